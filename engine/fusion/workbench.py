"""A frozen base model with room for one LoRA adapter, and every domain's examples as features and token ids.

The vision tower and the projector do not train, so each image is encoded once and its features are kept (on the device while
they fit, else on the host). Training, evaluation and the similarity of domains all read their batches here. Positions and
prompts are those that the engine serves (`engine.positions`, `engine.images`). It trains nothing and judges nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from engine.fusion import checkpoint
from engine.fusion.domains import SPLITS, Domain, DomainError
from engine.fusion.graphed import SMALL, CausalDecoder, Graphs
from engine.fusion.metrics import Box
from engine.fusion.wording import Packed, Wording, boxes_text
from engine.images import ImageError, load_image
from engine.models import Model, ModelError, load_checkpoint
from engine.positions import prompt_positions

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
"""The language model's attention projections alone: the bare names would also hit LLaVA's vision tower."""
DEVICE_FEATURE_BYTES = 24 << 30
STORED_BYTES = 1 << 29
"""Features of a split up to this size are stored, so that each process need not open and encode the images again."""
PAD = 8
ENCODE_BATCH = 64
NO_OBJECT = "no object"
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Weights, configuration and tokenizer: what a model is made of, and not its README."""


@dataclass(frozen=True)
class Sample:
    """One split of one domain, ready to run.

    features [n, frames, image tokens, hidden]; plain, queried: the tails' ids without and with the query positions; answers:
    ids of the texts trained on; labels: of the classes, "" for boxes; boxes: corners in 0..1; accepted: texts to judge by.
    """

    domain: Domain
    features: torch.Tensor
    plain: list[list[int]]
    queried: list[list[int]]
    answers: list[list[int]]
    labels: list[str]
    boxes: list[tuple[Box, ...]]
    accepted: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.plain)

    @cached_property
    def answered_length(self) -> int:
        """Ids that the longest tail with its answer has, in whole blocks of PAD: the shape of a graphed batch."""
        return -(-max(len(t) + len(a) for t, a in zip(self.plain, self.answers, strict=True)) // PAD) * PAD

    @cached_property
    def queried_length(self) -> int:
        """The same of the tails with query positions."""
        return -(-max(map(len, self.queried)) // PAD) * PAD


@dataclass
class Workbench:
    """model: frozen. peft: the same with one LoRA adapter in place. wording: its prompts. deadline: on time.monotonic.

    graphs: of training steps. store: a folder for features, of this model and these domains alone; None keeps none.
    """

    model: Model
    wording: Wording
    peft: torch.nn.Module
    domains: tuple[Domain, ...]
    log: Callable[[str], None]
    graphs: Graphs
    deadline: float | None = None
    store: Path | None = None
    _samples: dict[tuple[str, str], Sample] = field(default_factory=dict)
    _feature_bytes: int = 0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def graphed(self) -> bool:
        """True where training steps run as graphs, and batches are padded to shapes that do not change."""
        return self.device.type == "cuda" and self.model.shape.hidden < SMALL

    @property
    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's parameters by name, float32."""
        return {name: p for name, p in self.peft.named_parameters() if "lora_" in name}

    def domain(self, name: str) -> Domain:
        return next(domain for domain in self.domains if domain.name == name)

    def sample(self, name: str, split: str) -> Sample:
        """Encoded at first use. DomainError where an image cannot be read."""
        if (name, split) not in self._samples:
            self._samples[name, split] = self._encode(self.domain(name), split)
        return self._samples[name, split]

    def _encode(self, domain: Domain, split: str) -> Sample:
        examples = domain.examples[split]
        frames = len(examples[0].images)
        if any(len(example.images) != frames for d in domain.examples.values() for example in d):
            raise DomainError(f"{domain.name}: clips of different length; cut all of them to {frames} frames")
        features = self._features(f"{domain.name}-{split}", [path for example in examples for path in example.images])
        features = features.view(len(examples), frames, *features.shape[1:])
        wording, plain, queried, answers, boxes = self.wording, [], [], [], []
        for example in examples:
            scaled = self._scaled(example.images[0], example.boxes) if domain.boxed else ()
            text = boxes_text(scaled, named=domain.task == "detect") if domain.boxed else example.answers[0]
            plain.append(wording.tail(example.question))
            queried.append(wording.tail(example.question, queries=True))
            answers.append(wording.answer(text))
            boxes.append(scaled)
        labels = [example.answers[0] if example.answers else "" for example in examples]
        self.log(f"encoded {domain.name} {split}: {len(examples)} examples")
        return Sample(domain, features, plain, queried, answers, labels, boxes, [example.answers for example in examples])

    def _features(self, name: str, paths: Sequence[Path]) -> torch.Tensor:
        """[images, image tokens, hidden], encoded or, where another process has done that, read."""
        shape = self.model.shape
        size = len(paths) * shape.image_tokens * shape.hidden * self.model.dtype.itemsize
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
            raise DomainError(f"{paths[0].parent}: features of {len(paths)} images take {size >> 30} GiB; use fewer rows")
        fits = self._feature_bytes + size <= DEVICE_FEATURE_BYTES
        self._feature_bytes += size if fits else 0
        place = self.device if fits else torch.device("cpu")
        if self.store is None or size > STORED_BYTES:
            return self._encoded(paths, place)
        stored = self.store / f"{name}.safetensors"
        with checkpoint.locked(stored, self.deadline):
            found = checkpoint.load(stored)
            if found is not None:
                return found[0]["features"].to(place)
            encoded = self._encoded(paths, place)
            checkpoint.save(stored, {"features": encoded}, {})
        return encoded

    def _encoded(self, paths: Sequence[Path], place: torch.device) -> torch.Tensor:
        shape = self.model.shape
        kept = torch.empty(len(paths), shape.image_tokens, shape.hidden, dtype=self.model.dtype, device=place)
        for start in range(0, len(paths), ENCODE_BATCH):
            try:
                pixels = torch.stack([load_image(path, shape) for path in paths[start : start + ENCODE_BATCH]])
            except ImageError as error:
                raise DomainError(str(error)) from None
            kept[start : start + ENCODE_BATCH] = self.model.encode_images(pixels.to(self.device, self.model.dtype))
        return kept

    def _scaled(self, path: Path, boxes: tuple[Box, ...]) -> tuple[Box, ...]:
        """Boxes in 0..1 of what the model sees: LLaVA's square is cut from the middle, Qwen2-VL's is the whole, squeezed.

        A row's boxes are of the image as it is looked at, upright as EXIF says.
        """
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)  # decodes only what has to be turned
            width, height = image.size
        left, top, wide, high = 0.0, 0.0, float(width), float(height)
        if self.model.shape.family == "llava":
            wide = high = float(min(width, height))
            left, top = (width - wide) / 2, (height - high) / 2
        seen = []
        for box in boxes:
            x1, x2 = (min(1.0, max(0.0, (x - left) / wide)) for x in (box.x1, box.x2))
            y1, y2 = (min(1.0, max(0.0, (y - top) / high)) for y in (box.y1, box.y2))
            if x2 > x1 and y2 > y1:
                seen.append(Box(box.label, x1, y1, x2, y2))
        return tuple(seen)

    # -- running --
    def hidden(self, sample: Sample, index: Sequence[int], packed: Packed, cache=None) -> torch.Tensor:
        """Last hidden states [batch, length of ids, hidden] at the positions of `packed.ids`, after lead and images."""
        embedded = self.embedded(sample, index, packed)
        positions = self.positions(len(sample.features[0]), embedded.shape[1], len(index))
        out = self.model.hf.model.language_model(
            inputs_embeds=embedded, position_ids=positions, past_key_values=cache, use_cache=cache is not None
        )
        return out.last_hidden_state[:, embedded.shape[1] - packed.ids.shape[1] :]

    def training_hidden(self, sample: Sample, index: Sequence[int], packed: Packed) -> torch.Tensor:
        """The same for a step of training: of a small model on a GPU by a graph (`engine.fusion.graphed`)."""
        if not (self.graphed and self.peft.training):
            return self.hidden(sample, index, packed)
        embedded = self.embedded(sample, index, packed)
        key = (*embedded.shape[:2], len(sample.features[0]))

        def make() -> CausalDecoder:
            positions = self.positions(len(sample.features[0]), embedded.shape[1], len(index))
            return CausalDecoder(self.model.hf.model.language_model, positions)

        return self.graphs.run(key, make, embedded)[:, embedded.shape[1] - packed.ids.shape[1] :]

    def embedded(self, sample: Sample, index: Sequence[int], packed: Packed) -> torch.Tensor:
        """Embeddings [batch, length, hidden] of whole prompts: lead, images, `packed.ids`."""
        features = sample.features[torch.as_tensor(index, device=sample.features.device)].to(self.device)
        words = self.wording.words(features.shape[1], packed.ids.to(self.device))
        return self.wording.interleave(self.model.hf.model.language_model.embed_tokens(words), features)

    def positions(self, frames: int, tokens: int, batch: int) -> torch.Tensor:
        """[batch, tokens], or [3, batch, tokens] for Qwen2-VL."""
        shape = self.model.shape
        rows, _ = prompt_positions(shape, tokens, self.wording.image_starts(frames, shape.image_tokens))
        given = torch.from_numpy(np.ascontiguousarray(rows)).to(self.device, torch.int64)[:, None].expand(-1, batch, -1)
        return given if shape.mrope else given[0]

    def reset(self, seed: int) -> None:
        """A fresh adapter: A as PEFT initialises it (Kaiming uniform), B zero; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.lora.items():
                if ".lora_A." in name:
                    bound = parameter.shape[1] ** -0.5
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.copy_(drawn)
                else:
                    parameter.zero_()


def open_workbench(directory: str | Path, domains: tuple[Domain, ...], *, rank: int, alpha: float, dropout: float,
                   device: str, deadline: float | None = None, store: Path | None = None, graphs: bool = True,
                   log: Callable[[str], None] = lambda line: None) -> Workbench:
    """The checkpoint in `directory` (bf16 on a GPU, float32 on a CPU) with an empty LoRA adapter. ModelError if unfit."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = load_checkpoint(directory, dtype=dtype, device=device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0][:200]
        raise ModelError(f"{directory}: no tokenizer ({why}); put tokenizer.json there") from None
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, bias="none")
    with torch.random.fork_rng([]):
        peft = get_peft_model(model.hf, config)
    wording = Wording(model.shape.family, tokenizer, model.shape.image_token_id)
    return Workbench(model, wording, peft, domains, log, Graphs(log, graphs), deadline, store)


def digest_of(directory: Path, domains: Sequence[Domain]) -> str:
    """A hash of all that results depend on: every byte of the model's files and of the images, and every domain's rows.

    Whole files, no samples of them: a model that differs in a few rows of its embeddings alone is another one. 14 GB take
    some 10 s, once a call (and are then in memory for the loading), where the trainings take minutes to hours. What was
    stored under the earlier hash of sizes and names is never found again. ModelError, DomainError: a file cannot be read.
    """
    told = hashlib.sha256()
    files = [path for path in sorted(directory.glob("*")) if path.suffix in MODEL_FILES and path.is_file()]
    for path, content in _contents(files, ModelError).items():
        told.update(repr((path.name, content)).encode())
    every = (example for domain in domains for split in SPLITS for example in domain.examples[split])
    images = _contents({path: None for example in every for path in example.images}, DomainError)
    for domain in domains:
        told.update(repr((domain.name, domain.task, domain.metric, domain.head)).encode())
        for split in SPLITS:
            for example in domain.examples[split]:
                seen = [images[path] for path in example.images]
                told.update(repr((split, seen, example.question, example.answers, example.boxes)).encode())
    return told.hexdigest()


def _contents(paths: Iterable[Path], error: type[Exception]) -> dict[Path, str]:
    """SHA-256 of each file, in the order given, some at once. `error` names one that cannot be read."""
    paths = list(paths)
    with ThreadPoolExecutor() as pool:  # hashing and reading leave the interpreter free
        return dict(zip(paths, pool.map(partial(_content, error=error), paths), strict=True))


def _content(path: Path, error: type[Exception]) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as why:
        raise error(f"{path}: cannot be read ({why.strerror})") from None
