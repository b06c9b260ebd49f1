"""Accuracy of the adapter on the workbench, or of the base model, on one split of one domain.

Bounded answers come from the head after one forward pass, as the engine serves them; the others, and all of the base
model's, are decoded greedily. Prompts of one length run together, so that nothing is padded. It changes no weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from engine.fusion.domains import Domain
from engine.fusion.metrics import Box, Score, score
from engine.fusion.task_heads import Head
from engine.fusion.wording import QUERIES, boxes_from
from engine.fusion.workbench import Sample, Workbench

BATCH_TOKENS = 32_768
"""Prompt tokens that run at once."""
MAX_NEW_TOKENS = 64
ROOM = 4
"""Tokens that an answer may be longer than the longest trained one."""


def evaluate(bench: Workbench, name: str, split: str, head: Head | None) -> Score:
    """The domain's metric on a split. head: of the adapter on the bench; None decodes every answer."""
    sample = bench.sample(name, split)
    wanted = sample.boxes if sample.domain.boxed else sample.accepted
    return score(sample.domain.metric, predict(bench, sample, head), wanted)


def evaluate_base(bench: Workbench, name: str, split: str) -> Score:
    """The same for the base model without any adapter, which decodes its answer whatever the task."""
    with bench.peft.disable_adapter():
        return evaluate(bench, name, split, None)


@torch.no_grad()
def predict(bench: Workbench, sample: Sample, head: Head | None) -> list[str] | list[list[Box]]:
    """The answer to each example: a text, or boxes in 0..1."""
    bench.peft.eval()
    domain = sample.domain
    use_head = head is not None and domain.head
    tails = sample.queried if use_head and domain.boxed else sample.plain
    answers: list = [None] * len(sample)
    images = sample.features.shape[1] * sample.features.shape[2]
    for index in _equal_lengths(tails, images):
        batch = [tails[i] for i in index]
        if not use_head:
            found = [answer_of(domain, bench.wording.text(ids)) for ids in _decode(bench, sample, index, batch)]
        else:
            hidden = bench.hidden(sample, index, bench.wording.pack([(tail, []) for tail in batch]))
            found = head.found(hidden[:, -QUERIES:], domain) if domain.boxed else head.labels(hidden[:, -1], domain)
        for i, answer in zip(index, found, strict=True):
            answers[i] = answer
    return answers


def answer_of(domain: Domain, text: str) -> str | list[Box]:
    """A decoded answer in the form that the domain's metric takes."""
    if not domain.boxed:
        return text
    boxes = boxes_from(text)
    return [box._replace(label="object") for box in boxes] if domain.task == "refer" else boxes


def _equal_lengths(tails: Sequence[list[int]], images: int) -> list[list[int]]:
    """Indices in batches of one prompt length; images: tokens of an example's images."""
    groups = defaultdict(list)
    for i, tail in enumerate(tails):
        groups[len(tail)].append(i)
    batches = []
    for length, group in sorted(groups.items()):
        size = max(1, BATCH_TOKENS // (length + images))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def _decode(bench: Workbench, sample: Sample, index: list[int], tails: list[list[int]]) -> list[list[int]]:
    """Greedy ids of each answer, its end included if it came within the longest trained answer and a little more."""
    from transformers import DynamicCache

    steps = min(MAX_NEW_TOKENS, max(len(ids) for ids in sample.answers) + ROOM)
    cache = DynamicCache(config=bench.model.hf.config.get_text_config())
    hidden = bench.hidden(sample, index, bench.wording.pack([(tail, []) for tail in tails]), cache)[:, -1:]
    language, lm_head = bench.model.hf.model.language_model, bench.model.hf.lm_head
    frames = sample.features.shape[1]
    length = cache.get_seq_length()
    positions = bench.positions(frames, length + steps, len(index))
    done = torch.zeros(len(index), dtype=torch.bool, device=bench.device)
    tokens = []
    for step in range(steps):
        token = lm_head(hidden[:, -1]).argmax(-1)
        tokens.append(token)
        done |= token == bench.wording.eos
        if step + 1 == steps or (step % 4 == 3 and bool(done.all())):  # asking costs a wait for the device
            break
        now = positions[..., length + step : length + step + 1]
        out = language(input_ids=token[:, None], position_ids=now, past_key_values=cache, use_cache=True)
        hidden = out.last_hidden_state
    return torch.stack(tokens, 1).tolist()
