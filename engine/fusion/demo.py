"""The proof that needs no download: generated data, a base model pre-trained here, and its domains packed into adapters.

One command does it, `python -m engine fuse demo --output DIR`; cut off at any moment, the same command goes on. What follows
the pre-training is exactly what a downloaded checkpoint gets. It knows sizes and orders of steps, nothing of the search.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.fusion import generate_data, pretrain
from engine.fusion.domains import DomainError, load_domains
from engine.fusion.fuse import Options, fuse
from engine.fusion.train import Recipe
from traces.whole_file import replace_text


@dataclass(frozen=True)
class Scale:
    """What each size trains: the recipe of a domain, the domains, and how many of them are tried exhaustively."""

    recipe: Recipe
    domains: tuple[str, ...]
    yardstick: int


SCALES = {
    "seconds": Scale(Recipe(rank=8, alpha=16.0, learning_rate=4e-3, batch=16, steps=40, check_every=10),
                     ("textures", "nodules", "stock"), 3),
    "small": Scale(Recipe(rank=16, alpha=32.0, learning_rate=3e-3, batch=24, steps=160, check_every=80),
                   tuple(generate_data.GENERATED), 0),
    "full": Scale(Recipe(rank=16, alpha=32.0, learning_rate=2e-3, batch=48, steps=300, check_every=50),
                  tuple(generate_data.GENERATED), 4),
}  # fmt: skip


def demo(output: str | Path, size: str, *, compare: tuple[str, ...], retries: int | None, workers: int | None, device: str,
         jobs: int, seed: int = 0, graphs: bool = True, deadline: float | None = None,
         log: Callable[[str], None] = lambda line: None) -> dict:
    """Data, base model, adapters; the report of `engine.fusion.fuse.fuse`. DomainError for a folder of another demo."""
    output, scale = Path(output), SCALES[size]
    _remember(output / "demo.json", {"size": size, "seed": seed})
    yaml = generate_data.write_domains(output / "data", size, seed, scale.domains, jobs, log)
    texts = []
    for domain in load_domains(yaml):
        for split in domain.examples.values():
            texts += [text for example in split for text in (example.question, *example.answers)]
        texts += domain.labels
    model = pretrain.pretrain(output / "base", pretrain.SIZES[size], texts, device=device, seed=seed, jobs=jobs,
                              graphs=graphs, deadline=deadline, log=log)  # fmt: skip
    options = Options(scale.recipe, retries, compare, scale.yardstick, workers, graphs)
    return fuse(model, yaml, output, options, device=device, deadline=deadline, log=log)


def _remember(path: Path, made_with: dict) -> None:
    """Write down what a folder is made with. DomainError if it is another's: what lies there would be taken as done."""
    text = json.dumps(made_with) + "\n"
    if path.exists() and (before := path.read_text(encoding="utf-8")) != text:
        raise DomainError(f"{path.parent}: was made with {before.strip()}, not {text.strip()}; name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
