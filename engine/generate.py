"""`generate`: one prompt, its images and one adapter, answered; and `make-adapters`, which writes random adapters to try.

The prompt goes through the same ledger, policy and runner as a replay. It knows the prompt forms of the two families.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from engine.build import build, find_adapters
from engine.clock import WallClock
from engine.decoder import Decoder
from engine.heads import Detection, random_head
from engine.images import load_image
from engine.models import Model, ModelError, ModelShape, config_of, shape_of
from engine.options import TARGETS
from engine.peft_format import AdapterError, random_adapter, read_adapter, write_adapter
from engine.prompts import Prompt
from engine.replay import Driver, EngineConfig
from engine.serve import Signals, model_of
from policies import make_policy
from policies.plan import Work
from policies.view import Limits
from traces.assign import make_adapters as named_adapters
from traces.request import Adapter, Trace

FORMS = {
    "llava": ("USER: ", "{}\n", "{} ASSISTANT:"),
    "qwen2_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|vision_start|>{}<|vision_end|>", "{}<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip
"""Text before all, around each image and around the question, as the two families were trained."""


class StopAtEnd(WallClock):
    """Ends the run when the request's last token is an end mark of the model."""

    driver: Driver | None = None

    def finish_step(self, work: Work, number: int) -> int:
        end_ps = super().finish_step(work, number)
        sequence = self._runner.sequences[0]
        if sequence.generated and sequence.generated[-1] in self._runner.model.shape.eos:
            self.driver.stop = True
        return end_ps


def generate(args: argparse.Namespace) -> int:
    """The command: the answer on stdout, as text where there is a tokenizer, else as ids; a head's answer as JSON."""
    if (args.prompt is None) == (args.ids is None):
        raise ModelError("give a prompt, or --ids")
    if args.adapter and not args.adapter_dir:
        raise AdapterError(f"--adapter {args.adapter}: say with --adapter-dir where adapters lie")
    if args.head and not args.adapter:
        raise AdapterError("--head: say with --adapter whose head")
    model = model_of(args)
    images = [load_image(path, model.shape) for path in args.image]
    tokenizer = None
    if args.prompt is not None:
        tokenizer = _tokenizer(model)
        ids = formed(args.prompt, len(images), model.shape.family, model.shape.image_token_id, tokenizer)
    else:
        ids = _numbers(args.ids, model.shape)
    if args.head:
        ids += _queries(Path(args.adapter_dir) / args.adapter / "vision_head.json", ids, model.shape)
    prompt = with_images(ids, images, model.shape)
    tokens, head, stopped = answer(model, prompt, args)
    if head is not None:
        if isinstance(head, Detection):
            head = {"classes": head.classes.tolist(), "scores": head.scores.tolist(), "boxes": head.boxes.tolist()}
        print(json.dumps(head))
    elif tokenizer is not None:
        print(tokenizer.decode(tokens, skip_special_tokens=True))
    else:
        print(",".join(map(str, tokens)))
    return 130 if stopped else 0


def answer(model: Model, prompt: Prompt, args: argparse.Namespace) -> tuple[list[int], int | Detection | None, bool]:
    """(tokens without the end mark, what the head said, whether a signal cut it short)."""
    adapters: tuple[Adapter, ...] = ()
    targets = TARGETS[args.targets]
    if args.adapter:
        weights = read_adapter(args.adapter_dir, args.adapter, model.shape, targets)
        adapters = (Adapter(args.adapter, weights.rank, weights.digest),)
    most = 1 if args.head else max(1, args.max_tokens)
    total = len(prompt.ids) + most
    if total > model.shape.max_context:
        most_context = model.shape.max_context
        raise ModelError(f"{len(prompt.ids)} prompt tokens and {most} more pass the model's context of {most_context}")
    trace = Trace.build(
        [0], [len(prompt.ids)], [most], images=np.array([len(prompt.images)]), adapters=adapters,
        adapter=np.array([len(adapters) - 1], np.int32), head=np.array([args.head]), source="the command line",
    )  # fmt: skip
    config = EngineConfig(
        limits=Limits(1, 2048, total), pages=-(-total // 16) + 1, targets=targets, graphs=False, seed=args.seed
    )
    found = find_adapters(adapters, model, targets, args.adapter_dir, args.seed)
    if args.head and found.heads == [None]:
        reason = next(iter(found.reasons.values()), "there is no vision_head.safetensors beside it")
        raise AdapterError(f"adapter {args.adapter}: has no task head: {reason}")
    policy = make_policy("fcfs")
    engine = build(model, Decoder(model), adapters, found, policy, None, config)
    clock = StopAtEnd(engine.runner)
    driver = clock.driver = Driver(
        trace, policy, engine.ledger, None, engine.journal, clock, engine.runner, prompts={0: prompt}
    )  # fmt: skip
    kept = {}
    admit = engine.runner.admit

    def keep(request, given) -> None:
        admit(request, given)
        kept[0] = engine.runner.sequences[0]

    engine.runner.admit = keep
    with Signals() as signals:
        signals.driver = driver
        driver.run()
    if 0 in engine.runner.answers:
        said = engine.runner.answers[0]
        return _cut(said.tokens, model.shape), said.head, False
    if 0 not in kept or not kept[0].generated:
        raise ModelError(f"the prompt could not be served: {driver.reasons.get(0, 'it does not fit the memory')}")
    return _cut(kept[0].generated, model.shape), None, signals.asked


def with_images(ids: list[int], images: list[torch.Tensor], shape: ModelShape) -> Prompt:
    """A prompt in which each image token of `ids` becomes a whole image. ModelError where their number differs."""
    if ids.count(shape.image_token_id) != len(images):
        count = ids.count(shape.image_token_id)
        raise ModelError(f"{count} image tokens ({shape.image_token_id}) in the prompt for {len(images)} images")
    out: list[int] = []
    starts = []
    for token in ids:
        if token == shape.image_token_id:
            starts.append(len(out))
            out += [token] * shape.image_tokens
        else:
            out.append(token)
    if not out or out[-1] == shape.image_token_id:
        raise ModelError("the prompt must end with text")
    return Prompt(np.array(out, np.int32), tuple(starts), list(images))


def formed(text: str, images: int, family: str, image_token_id: int, tokenizer) -> list[int]:
    """Token ids of a question about `images` images, one image token each. ModelError if the tokenizer knows none.

    The whole is tokenised at once, as transformers does it: what a word becomes depends on what stands before it.
    """
    before, image, around = FORMS[family]
    mark = tokenizer.convert_ids_to_tokens(image_token_id) if images else ""
    said = before + images * image.format(mark) + around.format(text)
    ids, left = [], images
    for token in map(int, tokenizer(said)["input_ids"]):
        if token != image_token_id or left:
            ids.append(token)
        left -= token == image_token_id and left > 0  # further ones are the question's, and no images
    if left:
        raise ModelError(f"the tokenizer does not know the image token {image_token_id} ({mark!r}); put the model's there")
    return ids


def _queries(path: Path, ids: list[int], shape: ModelShape) -> list[int]:
    """What a box head reads behind a prompt: `query_ids` of its vision_head.json; nothing where `ids` end with them."""
    if not path.exists():
        return []
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        wanted = told["query_ids"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: has no list query_ids ({error!r}); `python -m engine fuse` writes it") from None
    if not isinstance(wanted, list) or not all(type(i) is int and 0 <= i < shape.vocab for i in wanted):
        raise AdapterError(f"{path}: query_ids {str(wanted)[:80]} are not token ids in 0..{shape.vocab - 1}")
    return wanted if ids[-len(wanted) :] != wanted else []


def _tokenizer(model: Model):
    if model.random:
        raise ModelError(f"{model.source} has random weights and no tokenizer; give --ids, or a checkpoint directory")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.source, local_files_only=True, trust_remote_code=False)


def _numbers(text: str, shape: ModelShape) -> list[int]:
    ids = []
    for part in text.split(","):
        if not (part.strip().isascii() and part.strip().isdigit()) or int(part) >= shape.vocab:
            raise ModelError(f"--ids: {part!r} is not a token id in 0..{shape.vocab - 1}")
        ids.append(int(part))
    return ids


def _cut(tokens: list[int], shape: ModelShape) -> list[int]:
    """The tokens before the first end mark."""
    for i, token in enumerate(tokens):
        if token in shape.eos:
            return tokens[:i]
    return tokens


def make_adapters(args: argparse.Namespace) -> int:
    """The command: folders below --out, their paths on stdout."""
    shape = shape_of(args.model, config_of(args.model))
    if args.head_queries and not args.head_classes:
        raise AdapterError("--head-queries: say with --head-classes how many classes the head has")
    adapters = named_adapters(args.adapters, args.ranks)
    taken = [adapter.name for adapter in adapters if (Path(args.out) / adapter.name).exists()]
    if taken:
        raise AdapterError(f"{args.out}/{taken[0]}: exists already; name another --out")
    for number, adapter in enumerate(adapters):
        rng = np.random.default_rng([args.seed, number])
        weights = random_adapter(shape, adapter.name, adapter.rank, TARGETS[args.targets], rng)
        head = None
        if args.head_classes:
            generator = torch.Generator().manual_seed(args.seed + number)
            head = random_head(shape, args.head_classes, generator, args.head_queries)
        print(write_adapter(args.out, weights, args.model, head))
        sys.stdout.flush()
    return 0
