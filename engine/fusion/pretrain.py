"""A small LLaVA made here: transformers' own classes, trained from scratch in minutes on plain drawings with text.

Vision tower, projector and decoder of LLaVA-1.5 at a hundredth of its size or less, and a tokenizer of the words
that the drawings use. It answers in words; where one thing is asked for, it also learns to know its corners at the position
that a box head reads. The result is a checkpoint directory like any other: `engine.models` and `engine.fusion` cannot
tell it from a downloaded one. Killed at any moment it goes on at its last checkpoint. It never sees a domain's images.
"""

from __future__ import annotations

import gc
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.fusion import checkpoint
from engine.fusion.drawings import COLOURS, SHAPES, SIZE, Drawing, plain_examples
from engine.fusion.graphed import CausalDecoder, Graphs
from engine.fusion.task_heads import GIOU_WEIGHT, L1_WEIGHT, corners_of, giou
from engine.fusion.whole_folder import put_in_place
from engine.fusion.wording import QUERIES, Packed, Wording
from engine.images import DEVIATION, MEAN

PATCH = 8
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
IMAGE = "<image>"
CHECKPOINT = "pretraining.safetensors"
UNKNOWN = -100
PLACE_SCALE = 0.5
"""Of the waves of places: about what patches of an untrained tower come to."""
POINTED_SHARE = 0.25
"""Of the steps: where a drawing has a box, it is regressed at the last query position, as a box head will read it."""


@dataclass(frozen=True)
class Size:
    """Widths and depths of the model, and how long it is trained. steps: optimizer steps. drawings: different examples."""

    vision: int
    vision_layers: int
    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int
    drawings: int
    learning_rate: float = 1e-3
    checkpoint_every: int = 200


SIZES = {
    "seconds": Size(48, 3, 64, 2, 4, 60, 16, 400, 2e-3, 20),
    "small": Size(96, 4, 128, 3, 4, 3000, 32, 20000, 1e-3, 100),
    "full": Size(256, 6, 384, 8, 6, 3000, 256, 100000, 6e-4, 500),
}


def build_tokenizer(texts: Sequence[str]):
    """A word-level tokenizer: the words in `texts`, the numbers 0..99, the query tokens, and last the image token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word for text in texts for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())}
    words |= {str(n) for n in range(100)} | set("[],;:") | {"user", "assistant"}
    listed = [*SPECIAL, *sorted(words), *(f"<q{i}>" for i in range(QUERIES)), IMAGE]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", listed.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=[IMAGE],
    )  # fmt: skip


def build_model(size: Size, vocabulary: int, seed: int):
    """An untrained LLaVA in float32; the image token is the last id of the vocabulary."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=size.vision, intermediate_size=4 * size.vision, num_hidden_layers=size.vision_layers,
        num_attention_heads=max(1, size.vision // 32), image_size=SIZE, patch_size=PATCH, projection_dim=size.vision,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=8 * size.hidden // 3 // 16 * 16, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=vocabulary, max_position_embeddings=512,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=tower, image_token_id=vocabulary - 1, vision_feature_layer=-2,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    tower = next(module for name, module in model.named_modules() if name.endswith("position_embedding"))
    with torch.no_grad():
        tower.weight[1:] += places_of_patches(SIZE // PATCH, size.vision)  # the first is the class token's
    return model


def places_of_patches(side: int, width: int) -> torch.Tensor:
    """[side * side, width]: waves of column and row, with which a tower knows from the start where a patch is.

    Otherwise it finds out after thousands of steps, and boxes after that.
    """
    count = width // 4
    places = (torch.arange(side) + 0.5) / side
    angles = places[:, None] * math.pi * torch.logspace(-1, math.log2(side), count, 2)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    both = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)  # column, row
    return PLACE_SCALE * torch.nn.functional.pad(both, (0, width - both.shape[1]))


def pretrain(folder: str | Path, size: Size, texts: Sequence[str], *, device: str, seed: int = 0, jobs: int = 1,
             graphs: bool = True, deadline: float | None = None, log: Callable[[str], None] = lambda line: None) -> Path:
    """Train and write the checkpoint directory `folder`, or go on where a killed run left off; `folder` if it is there.

    texts: what the domains say, so that the tokenizer has their words (the weights have not learnt them).
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    work = folder.with_name(f".{folder.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log(f"pretrain: draws {size.drawings} plain examples")
    drawings = plain_drawings(size.drawings, seed, jobs)
    log(f"pretrain: {len(drawings)} plain drawings in {time.monotonic() - started:.1f} s")
    tokenizer = build_tokenizer([*texts, *(f"{d.question} {d.answer}" for d in drawings)])
    model = build_model(size, len(tokenizer), seed).to(device)
    with sdpa_kernel(SDPBackend.MATH):  # the others add up in any order, unless torch may refuse what has no fixed one
        _train(model, Wording("llava", tokenizer, len(tokenizer) - 1), drawings, size, work / CHECKPOINT, seed,
               Graphs(log, graphs), deadline, log)
    unfinished = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.to("cpu", torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)  # as it will be loaded
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    put_in_place(unfinished, folder)
    shutil.rmtree(work, ignore_errors=True)
    del model
    if torch.device(device).type == "cuda":
        gc.collect()  # graphs and the modules that they replace refer to each other
        torch.cuda.empty_cache()
    return folder


def plain_drawings(count: int, seed: int, jobs: int = 1) -> list[Drawing]:
    """`count` plain drawings, the same whatever the number of processes that draw them."""
    if jobs == 1:
        return plain_examples(range(count), seed)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        chunks = [range(start, min(start + 1000, count)) for start in range(0, count, 1000)]
        return [drawing for part in pool.map(partial(plain_examples, seed=seed), chunks) for drawing in part]


class _Lessons:
    """What each step trains on: stills and clips answered in words, and stills with a box that is pointed at."""

    def __init__(self, drawings: list[Drawing], wording: Wording, device: torch.device):
        pixels, self.owners = _pixels(drawings)
        self.pixels = pixels.to(device)
        self.told = [(wording.tail(d.question), wording.answer(d.answer)) for d in drawings]
        self.asked = {i: (wording.tail(d.question, queries=True), []) for i, d in enumerate(drawings) if len(d.boxes) == 1}
        self.corners = {i: [v / SIZE for v in drawings[i].boxes[0][1]] for i in self.asked}
        moving = np.array([len(drawing.frames) > 1 for drawing in drawings])
        self.stills, self.clips, self.boxed = np.flatnonzero(~moving), np.flatnonzero(moving), np.array(sorted(self.asked))
        self.kinds, self.boxes = (found.to(device) for found in _patches(drawings))
        self.words, self.questions = (_longest(moving, pairs) for pairs in (dict(enumerate(self.told)), self.asked))

    def of_step(self, seed: int, step: int, batch: int) -> tuple[bool, list[int]]:
        """(whether to point, drawings of one number of frames)."""
        rng = np.random.default_rng([seed, 1, step])
        pointed = len(self.boxed) > 0 and rng.random() < POINTED_SHARE
        group = self.clips if rng.random() < len(self.clips) / len(self.owners) else self.stills
        group = self.boxed if pointed else group
        return pointed, group[rng.integers(len(group), size=batch)].tolist()


class Aside(torch.nn.Module):
    """What trains the model beside its words, and is not kept: the box of what was asked for, read at the last query
    position, and of each patch of an image which thing it is part of, and that thing's box."""

    def __init__(self, hidden: int):
        super().__init__()
        self.asked, self.box, self.kind = (torch.nn.Linear(hidden, n) for n in (4, 4, 1 + len(SHAPES) * len(COLOURS)))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def pointing(self, hidden: torch.Tensor, packed: Packed, corners: torch.Tensor) -> torch.Tensor:
        """The loss of a box head (`engine.fusion.task_heads`) at the last position. corners [batch, 4] in 0..1."""
        last = hidden[torch.arange(len(hidden), device=hidden.device), packed.last.to(hidden.device)]
        return _apart(corners_of(self.asked(last.float()).sigmoid()), corners.to(hidden.device)).mean()

    def patches(self, features: torch.Tensor, kinds: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Over the patches of known scenes. features [batch, patches, hidden]; kinds int64 [batch, patches], UNKNOWN where
        no scene is known, 0 where nothing is; boxes [batch, patches, 4]."""
        features, known, filled = features.float(), kinds != UNKNOWN, kinds > 0
        named = torch.nn.functional.cross_entropy(self.kind(features).flatten(0, 1), kinds.flatten(), reduction="none",
                                                  ignore_index=UNKNOWN)  # fmt: skip
        apart = _apart(corners_of(self.box(features).sigmoid()), boxes)
        return named.sum() / known.sum().clamp(min=1) + (apart * filled).sum() / filled.sum().clamp(min=1)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How far corners [..., 4] are apart, as a box head's training weighs it."""
    return L1_WEIGHT * (found - wanted).abs().sum(-1) / 4 + GIOU_WEIGHT * (1 - giou(found, wanted))


def _patches(drawings: list[Drawing]) -> tuple[torch.Tensor, torch.Tensor]:
    """(kinds int64 [n, patches], boxes [n, patches, 4]): the thing in whose box the middle of each patch lies."""
    side = SIZE // PATCH
    middles = (np.arange(side) + 0.5) * PATCH
    kinds = np.zeros((len(drawings), side, side), np.int64)
    boxes = np.zeros((len(drawings), side, side, 4), np.float32)
    colours = list(COLOURS)
    for number, drawing in enumerate(drawings):
        if not drawing.things:
            kinds[number] = UNKNOWN
        for thing in drawing.things:
            x1, y1, x2, y2 = thing.box
            inside = np.outer((middles > y1) & (middles < y2), (middles > x1) & (middles < x2))
            kinds[number][inside] = 1 + SHAPES.index(thing.shape) * len(colours) + colours.index(thing.colour)
            boxes[number][inside] = np.array(thing.box) / SIZE
    return torch.from_numpy(kinds).flatten(1), torch.from_numpy(boxes).flatten(1, 2)


def _longest(moving: np.ndarray, pairs: Mapping[int, tuple[list[int], list[int]]]) -> dict[bool, int]:
    """Ids of the longest tail with its answer, of stills (False) and of clips."""
    longest: dict[bool, int] = {}
    for i, (tail, answer) in pairs.items():
        longest[bool(moving[i])] = max(longest.get(bool(moving[i]), 0), len(tail) + len(answer))
    return longest


def _train(model, wording: Wording, drawings: list[Drawing], size: Size, path: Path, seed: int,
           graphs: Graphs, deadline: float | None, log) -> None:
    device = model.lm_head.weight.device
    lessons = _Lessons(drawings, wording, device)
    aside = Aside(model.lm_head.in_features).to(device)
    parameters = dict(model.named_parameters()) | {f"aside.{name}": p for name, p in aside.named_parameters()}
    optimizer = checkpoint.optimizer_of(parameters, size.learning_rate, 0.01)
    first, key = 0, [repr(size), len(wording.tokenizer), seed, POINTED_SHARE]
    found = checkpoint.load(path)
    if found is not None and found[1]["key"] != key:
        log("pretrain: the checkpoint is of another model or tokenizer; starts over")
        found = None
    if found is not None:
        checkpoint.restore(found[0], parameters, optimizer)
        first = found[1]["step"]
        log(f"pretrain: goes on at step {first}")
    model.train()
    recent: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for step in range(first, size.steps):
        pointed, chosen = lessons.of_step(seed, step, size.batch)
        warm, left = min(1.0, (step + 1) / 100), 1 - step / size.steps
        optimizer.param_groups[0]["lr"] = size.learning_rate * warm * (0.02 + 0.98 * left)
        batch = lessons.pixels[torch.tensor([lessons.owners[i] for i in chosen], device=device)]
        longest = (lessons.questions if pointed else lessons.words)[batch.shape[1] > 1]
        said = [lessons.asked[i] if pointed else lessons.told[i] for i in chosen]
        packed = wording.pack(said, longest if device.type == "cuda" else 0)  # one shape, one graph
        features, hidden = _seen(model, wording, graphs, batch, packed)
        if pointed:
            now = aside.pointing(hidden, packed, torch.tensor([lessons.corners[i] for i in chosen]))
        else:
            now = _loss(model, hidden, packed)
        recent[pointed].append(now.detach())
        if batch.shape[1] == 1:
            now = now + aside.patches(features, lessons.kinds[chosen], lessons.boxes[chosen])
        optimizer.zero_grad(set_to_none=True)
        now.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if (step + 1) % size.checkpoint_every == 0 and step + 1 < size.steps:
            words, boxes = (float(torch.stack(kept).mean()) if kept else float("nan") for kept in recent.values())
            log(f"pretrain: step {step + 1}/{size.steps}, loss {words:.3f}, of boxes {boxes:.3f}")
            recent = {False: [], True: []}
            tensors = checkpoint.training_tensors(parameters, optimizer)
            checkpoint.save(path, tensors, {"step": step + 1, "key": key})
            checkpoint.stop_if_late(deadline)
    model.eval()


def _pixels(drawings: list[Drawing]) -> tuple[torch.Tensor, list[list[int]]]:
    """uint8 [frames of all, 3, size, size], and which of them are each drawing's."""
    frames, owners = [], []
    for drawing in drawings:
        owners.append(list(range(len(frames), len(frames) + len(drawing.frames))))
        frames += [np.asarray(image) for image in drawing.frames]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), owners


class _Seeing(torch.nn.Module):
    """Vision tower, projector and decoder: features and, behind them, last hidden states, from pixels uint8 [batch, frames,
    3, size, size] and embedded words [batch, words, hidden] of one shape."""

    def __init__(self, model, wording: Wording, tokens: int):
        super().__init__()
        self.model, self._wording = model, wording
        device = model.lm_head.weight.device
        self.decoder = CausalDecoder(model.model.language_model, torch.arange(tokens, device=device)[None])
        self.mean, self.deviation = (torch.tensor(v, device=device)[:, None, None] for v in (MEAN, DEVIATION))

    def forward(self, pixels: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        config = self.model.config
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda, cache_enabled=False):
            features = self.model.model.get_image_features(
                (pixels.flatten(0, 1).float() / 255 - self.mean) / self.deviation,
                vision_feature_layer=config.vision_feature_layer,
                vision_feature_select_strategy=config.vision_feature_select_strategy,
            )  # fmt: skip
            features = torch.stack(list(features.pooler_output))
            features = features.view(*pixels.shape[:2], *features.shape[1:])
            hidden = self.decoder(self._wording.interleave(words, features))
            return torch.cat([features.flatten(1, 2).to(hidden.dtype), hidden], 1)


def _seen(model, wording: Wording, graphs: Graphs, pixels: torch.Tensor,
          packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Features [batch, patches of all frames, hidden], and last hidden states [batch, ids, hidden] at `packed.ids`. pixels
    uint8 [batch, frames, 3, size, size]."""
    frames = pixels.shape[1]
    words = model.get_input_embeddings()(wording.words(frames, packed.ids.to(pixels.device)))
    patches = frames * (SIZE // PATCH) ** 2
    tokens = words.shape[1] + patches
    found = graphs.run((len(pixels), frames, tokens), lambda: _Seeing(model, wording, tokens), pixels, words)
    return found[:, :patches], found[:, -packed.ids.shape[1] :]


def _loss(model, hidden: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Cross-entropy of the answers."""
    rows, columns, targets = (t.to(hidden.device) for t in (packed.rows, packed.columns, packed.targets))
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=hidden.is_cuda):
        logits = model.lm_head(hidden[rows, columns])
    return torch.nn.functional.cross_entropy(logits.float(), targets)
