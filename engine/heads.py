"""Vision task heads: a request that asks for one ends after its prefill with a class, or with boxes, and decodes nothing.

A head lies beside its adapter as vision_head.safetensors. classes.weight [classes, hidden] and classes.bias read the last
hidden state; with boxes.weight [4, hidden] and boxes.bias the head reads the last `queries` positions of the prompt, which
the request appends for that purpose, and answers a class and a box (centre x, y, width, height, each 0..1) for each.
Source: VaLoRA (EuroSys 2025), section 4.2.3 (task heads instead of the language model's); boxes as in DETR (2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.models import ModelShape

FILE = "vision_head.safetensors"
MAX_CLASSES, MAX_QUERIES = 100_000, 256
REAL, WHOLE = ("F32", "F16", "BF16"), ("I64", "I32")


class HeadError(ValueError):
    """A task head that is not taken. The message names the file and the key."""


@dataclass(frozen=True)
class Detection:
    """classes int64 [queries], boxes float32 [queries, 4]: centre x, y, width, height in 0..1; scores float32 [queries]:
    probability of the class."""

    classes: torch.Tensor
    boxes: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class TaskHead:
    """classes [n, hidden] with bias [n]; boxes [4, hidden] with bias [4], or None for a classifier (queries is then 1)."""

    classes: torch.Tensor
    classes_bias: torch.Tensor
    boxes: torch.Tensor | None = None
    boxes_bias: torch.Tensor | None = None
    queries: int = 1

    def to(self, place: torch.Tensor) -> TaskHead:
        """The same head with the type and on the device of `place`."""
        moved = (None if t is None else t.to(place) for t in (self.classes, self.classes_bias, self.boxes, self.boxes_bias))
        return TaskHead(*moved, self.queries)

    def answer(self, hidden: torch.Tensor) -> torch.Tensor | Detection:
        """From the last `queries` hidden states [queries, hidden]: the class, int64 [], or a Detection. On the device."""
        scores = torch.nn.functional.linear(hidden, self.classes, self.classes_bias).float().softmax(-1)
        best = scores.max(-1)
        if self.boxes is None:
            return best.indices[-1]
        boxes = torch.nn.functional.linear(hidden, self.boxes, self.boxes_bias).float().sigmoid()
        return Detection(best.indices, boxes, best.values)


def read_head(folder: Path, shape: ModelShape, dtype: torch.dtype = torch.float32) -> TaskHead | None:
    """The head in an adapter's folder; None where there is none. HeadError if it is not one for this model, or has values
    that `dtype`, in which it will run, does not hold."""
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise HeadError(f"{path}: is no file but a link or folder; copy the file there")
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", "cpu") as file:
            names = set(file.keys())
            if names not in ({"classes.weight", "classes.bias"},
                             {"classes.weight", "classes.bias", "boxes.weight", "boxes.bias", "queries"}):  # fmt: skip
                raise HeadError(f"{path}: holds {sorted(names)}; expected classes.*, and for boxes boxes.* and queries")
            sizes = {name: list(file.get_slice(name).get_shape()) for name in names}
            count = sizes["classes.weight"][0] if sizes["classes.weight"] else 0
            expected = {"classes.weight": [count, shape.hidden], "classes.bias": [count], "queries": [1]}
            expected |= {"boxes.weight": [4, shape.hidden], "boxes.bias": [4]}
            for name, size in sizes.items():
                if size != expected[name] or not 1 <= count <= MAX_CLASSES:
                    raise HeadError(f"{path}: {name} has shape {size}, expected {expected[name]}, 1..{MAX_CLASSES} classes")
                kind, kinds = file.get_slice(name).get_dtype(), WHOLE if name == "queries" else REAL
                if kind not in kinds:
                    raise HeadError(f"{path}: {name} is {kind}; expected one of {', '.join(kinds)}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise HeadError(f"{path}: cannot be read as safetensors ({error})") from None
    queries = int(tensors.pop("queries")[0]) if "queries" in tensors else 1
    if not 1 <= queries <= MAX_QUERIES:
        raise HeadError(f"{path}: queries {queries} is outside 1..{MAX_QUERIES}")
    if not all(bool(torch.isfinite(tensor.to(dtype)).all()) for tensor in tensors.values()):
        raise HeadError(f"{path}: holds values that are not finite in {str(dtype).removeprefix('torch.')}")
    return TaskHead(
        tensors["classes.weight"], tensors["classes.bias"], tensors.get("boxes.weight"), tensors.get("boxes.bias"), queries
    )


def random_head(shape: ModelShape, classes: int, rng: torch.Generator, queries: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a head with normal weights; queries > 0 makes it a detector."""
    scale = shape.hidden**-0.5
    tensors = {
        "classes.weight": torch.randn(classes, shape.hidden, generator=rng) * scale, "classes.bias": torch.zeros(classes),
    }  # fmt: skip
    if queries:
        tensors |= {"boxes.weight": torch.randn(4, shape.hidden, generator=rng) * scale, "boxes.bias": torch.zeros(4)}
        tensors["queries"] = torch.tensor([queries])
    return tensors
