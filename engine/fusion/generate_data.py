"""The generated domains as files: images, rows and the YAML that `python -m engine fuse` reads. Nothing is downloaded.

Twelve domains over six tasks (`engine.fusion.domain_drawings`); the digits are scikit-learn's real ones, each used once.
A domain is written whole or not at all and not written again, so that a run that was cut off goes on where it was. The same
seed gives the same bytes. It knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from engine.fusion import domain_drawings as drawn
from engine.fusion.domains import SPLITS, DomainError
from engine.fusion.drawings import Drawing
from engine.fusion.whole_folder import put_in_place
from traces.whole_file import replace_text

SIZES = {"seconds": (96, 48, 48), "small": (800, 400, 1200), "full": (1500, 1000, 2000)}
"""Examples of the splits train, decide and heldout. The last is read once, and its chance is part of every margin: to pass a
floor of .85 of an own accuracy of .5 takes .95 of it with 1,000 and 2,000, and all of it with 400 and 1,200."""
YAML = "domains.yaml"


@dataclass(frozen=True)
class Made:
    """A generated domain: its task, its drawings, its training examples against a class's, and the share of its own
    adapter's accuracy that it must keep."""

    task: str
    draw: Callable[[np.random.Generator], Drawing]
    more: int = 1
    relative: float = 0.85


GENERATED: dict[str, Made] = {
    "textures": Made("classify", drawn.texture), "digits": Made("classify", drawn.digit),
    "typefaces": Made("classify", drawn.typeface), "tissue": Made("classify", drawn.tissue),
    "vehicles": Made("detect", drawn.aerial, 2), "nodules": Made("detect", drawn.radiograph),
    "charts": Made("vqa", drawn.chart, 2), "stock": Made("vqa", drawn.tally, 2), "labels": Made("caption", drawn.shelf, 2),
    "pointing": Made("refer", drawn.refer, 3), "cells": Made("video", drawn.drift), "gestures": Made("video", drawn.gesture),
}  # fmt: skip


def write_domains(folder: str | Path, size: str, seed: int = 0, names: Sequence[str] = tuple(GENERATED), jobs: int = 1,
                  log: Callable[[str], None] = lambda line: None) -> Path:
    """Write the domains that are not there yet, `jobs` at a time; the path of the YAML. DomainError for an unknown name."""
    if "digits" in names and importlib.util.find_spec("sklearn") is None:
        raise DomainError("the domain 'digits' is scikit-learn's: pip install scikit-learn, or leave it out")
    folder = Path(folder)
    unknown = [name for name in names if name not in GENERATED]
    if unknown or size not in SIZES:
        raise DomainError(f"{(unknown or [size])[0]!r}: domains are {', '.join(GENERATED)}; sizes {', '.join(SIZES)}")
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict(zip(SPLITS, SIZES[size], strict=True))
    absent = [name for name in names if not (folder / name).exists()]
    if jobs == 1:
        for name in absent:
            _write_domain(folder, name, counts, seed)
            log(f"data: {name} written")
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
            written = pool.map(partial(_write_domain, folder, counts=counts, seed=seed), absent)
            for name, _ in zip(absent, written, strict=True):
                log(f"data: {name} written")
    lines = ["domains:"]
    for name in names:
        made = GENERATED[name]
        lines += [f"  - name: {name}", f"    task: {made.task}", f"    data: {name}/rows.jsonl",
                  f"    floor: {{relative: {made.relative}}}"]  # fmt: skip
    replace_text(folder / YAML, "\n".join(lines) + "\n")
    return folder / YAML


def _write_domain(folder: Path, name: str, counts: Mapping[str, int], seed: int) -> None:
    unfinished = folder / f".{name}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    rows = [_write_example(unfinished, name, *drawn_) for drawn_ in _drawings(name, counts, seed)]
    replace_text(unfinished / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put_in_place(unfinished, folder / name)


def _drawings(name: str, counts: Mapping[str, int], seed: int):
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    numbers = None
    if name == "digits":
        available = len(drawn.real_digits()[1])
        numbers = iter(rng.permutation(available).tolist())
        share = min(1.0, available / sum(counts.values()))
        counts = {split: int(count * share) for split, count in counts.items()}
    counts = counts | {"train": counts["train"] * GENERATED[name].more}
    for split, count in counts.items():
        for number in range(count):
            yield split, number, drawn.digit(rng, next(numbers)) if numbers is not None else GENERATED[name].draw(rng)


def _write_example(folder: Path, name: str, split: str, number: int, drawing: Drawing) -> dict:
    paths = []
    for frame, image in enumerate(drawing.frames):
        paths.append(f"{split}-{number:05d}{f'-{frame}' if len(drawing.frames) > 1 else ''}.png")
        image.save(folder / paths[-1], compress_level=1)
    row = {"image": paths[0]} if len(paths) == 1 else {"frames": paths}
    row |= {"question": drawing.question, "split": split}
    if GENERATED[name].task in ("detect", "refer"):
        row["boxes"] = [{"label": label, "box": [round(v, 2) for v in box]} for label, box in drawing.boxes]
    else:
        row["answer"] = drawing.answer
    return row
