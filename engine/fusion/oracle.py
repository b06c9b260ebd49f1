"""The oracle that really trains: what `engine.fusion.search` asks, answered by runs on disk.

Two ways to train a set of domains. *jointly*: one run over all of them from their own adapters, merged (or those of the
groups they were in), each step the domain that is furthest below its floor, stopped once all floors hold. *in sequence*, the
paper's: go on with the adapter of the domains before, on the next domain only, for as many steps as its own adapter took
(or, with `early`, until all floors hold).

A floor counts as held if it is met on the decide split with a margin for chance, so that it also holds on the held-out
split, which is never looked at here. Every run is named by a hash of all that it depends on: what a killed search had
trained is found again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist

import torch

from engine.fusion import checkpoint
from engine.fusion.metrics import HIGHEST, Score
from engine.fusion.train import Recipe, Result, Task, batch_loss, repeatable, train
from engine.fusion.trials import Attempt
from engine.fusion.workbench import Workbench
from traces.whole_file import replace_text

JOINT, SEQUENCE, SEQUENCE_EARLY = "joint", "sequence", "sequence-early"
ERROR_CHANCE = 0.05
"""Chance that any one of the floors of a packing, all just held, fails on the held-out split."""
SIGNAL_BATCH = 64
ALL_BUT_PERFECT = 0.98


@dataclass
class Runs:
    """The runs of one workbench, below `folder`. digest: of model and data.

    own: results of the domains' own adapters. floors: in the metrics' units. done: the runs that were asked for, by folder.
    """

    bench: Workbench
    folder: Path
    recipe: Recipe
    digest: str
    own: dict[str, Result] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    done: dict[str, Result] = field(default_factory=dict)

    def path(self, kind: str, task: Task) -> Path:
        told = [self.digest, asdict(self.recipe), kind, task.domains, task.trained, task.cap]
        told += [task.floors and sorted(task.floors.items()), [folder.name for folder in task.start] or None]
        name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
        return self.folder / f"{kind}-{len(task.domains)}-{name}"

    def own_task(self, name: str) -> Task:
        """Train until the accuracy is all but perfect, or no longer rises, or the recipe's steps are done."""
        domain = self.bench.domain(name)
        return Task((name,), (name,), self.recipe.steps_of(domain), {name: ALL_BUT_PERFECT * HIGHEST[domain.metric]})

    def train_decoded(self, name: str) -> Path:
        """The domain's own adapter without a head, which decodes its answer, trained by the same rule; its folder."""
        task = replace(self.own_task(name), decode=True)
        self.run("decoded", task)
        return self.path("decoded", task)

    def own_path(self, name: str) -> Path:
        return self.path("own", self.own_task(name))

    def train_own(self, name: str) -> Result:
        """The domain's own adapter."""
        if name not in self.own:
            self.own[name] = self.run("own", self.own_task(name))
        return self.own[name]

    def set_floors(self) -> None:
        """Floors in the metrics' units. Relative ones need the domains' own adapters, which are trained for that."""
        for domain in self.bench.domains:
            scale = self.train_own(domain.name).scores[domain.name].value if domain.relative else 1.0
            self.floors[domain.name] = domain.floor * scale

    def run(self, kind: str, task: Task) -> Result:
        path = self.path(kind, task)
        with checkpoint.locked(path, self.bench.deadline):
            self.done[path.name] = train(self.bench, path, task, self.recipe, self.safe)
        return self.done[path.name]

    def safe(self, score: Score, name: str) -> float:
        """The accuracy that the held-out split will show at least, up to ERROR_CHANCE over all domains (Bonferroni)."""
        z = NormalDist().inv_cdf(1 - ERROR_CHANCE / len(self.bench.domains))
        held_out = len(self.bench.domain(name).examples["heldout"])
        return max(0.0, score.value - z * score.stderr * math.sqrt(1 + score.n / held_out))

    def held(self, scores: Mapping[str, Score]) -> frozenset[str]:
        """Domains whose floor holds. The own adapter of a domain with a relative floor defines it, and holds it."""
        return frozenset(name for name, score in scores.items() if self.safe(score, name) >= self.floors[name])


class TrainingOracle:
    """`engine.fusion.search.Oracle` over real trainings. kind: JOINT, SEQUENCE or SEQUENCE_EARLY."""

    def __init__(self, runs: Runs, kind: str, domains: tuple[str, ...] | None = None):
        self.runs, self.kind = runs, kind
        self.domains = domains or tuple(domain.name for domain in runs.bench.domains)
        self.ordered = kind != JOINT
        self.alone = frozenset(name for name in self.domains if runs.bench.domain(name).relative)
        self._signal: dict[str, dict[str, float]] | None = None
        self._signal_steps = 0
        self._folders: dict[tuple[str, ...], Path] = {}

    def path(self, order: tuple[str, ...]) -> Path:
        """The folder of the run that `attempt` of this order makes, or made."""
        if order in self._folders:
            return self._folders[order]
        return self.runs.own_path(order[0]) if len(order) == 1 else self.runs.path(self.kind, self._task(order, ()))

    def _task(self, order: tuple[str, ...], parts: tuple[tuple[str, ...], ...]) -> Task:
        bench, recipe = self.runs.bench, self.runs.recipe
        floors = {name: self.runs.floors[name] for name in order}
        if self.kind == JOINT:
            start = tuple(map(self.path, sorted(parts, key=lambda part: min(map(self.domains.index, part)))))
            if not parts:
                start = tuple(self.runs.own_path(name) for name in order if bench.domain(name).relative)
            return Task(order, order, recipe.cap([bench.domain(name) for name in order]), floors, start)
        known = floors if self.kind == SEQUENCE_EARLY else None
        domain = bench.domain(order[-1])
        steps = self.runs.train_own(domain.name).steps if domain.relative else recipe.steps_of(domain)
        return Task(order, order[-1:], steps, known, (self.path(order[:-1]),))

    def attempt(self, order: tuple[str, ...], parts: tuple[tuple[str, ...], ...] = ()) -> Attempt:
        """Train and evaluate on the decide split. The own adapter of a domain costs no step where its floor needed it.

        parts: what to start from; else from the own adapters of all.
        """
        spent, self._signal_steps = self._signal_steps, 0
        milestones = ()
        if len(order) == 1:
            result = self.runs.train_own(order[0])
            relative = self.runs.bench.domain(order[0]).relative
            held = frozenset(order) if relative else self.runs.held(result.scores)
            spent += 0 if relative else result.steps
        else:
            if self.ordered and not self.path(order[:-1]).exists():
                spent += self.attempt(order[:-1]).steps
            task = self._task(order, parts)
            self._folders[order] = self.runs.path(self.kind, task)
            result = self.runs.run(self.kind, task)
            held = self.runs.held(result.scores)
            if self.kind == JOINT:
                milestones = tuple((spent + step, frozenset(names)) for step, names in result.milestones)
            spent += result.steps
        accuracies = {name: score.value for name, score in result.scores.items()}
        return Attempt(order, accuracies, held, spent, milestones)

    def similarity(self, a: str, b: str) -> float:
        """Cosine of the gradients that one batch of each domain gives a fresh adapter (its B factors), answers decoded.

        The batches are counted as steps of the next attempt.
        """
        if self._signal is None:
            self._signal = self._similarities()
            self._signal_steps = len(self.domains)
        return self._signal[a][b]

    def _similarities(self) -> dict[str, dict[str, float]]:
        """Computed, or read where this has been done."""
        told = json.dumps([self.runs.digest, asdict(self.runs.recipe), self.domains])
        path = self.runs.folder / f"similarity-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"
        with checkpoint.locked(path, self.runs.bench.deadline):
            if not path.exists():
                found = {name: self._gradient(name) for name in self.domains}
                table = {a: {b: float(found[a] @ found[b]) for b in self.domains} for a in self.domains}
                replace_text(path, json.dumps(table) + "\n")
            return json.loads(path.read_text(encoding="utf-8"))

    def _gradient(self, name: str) -> torch.Tensor:
        bench = self.runs.bench
        bench.reset(self.runs.recipe.seed)
        bench.peft.eval()
        factors = [parameter for key, parameter in bench.lora.items() if ".lora_B." in key]
        size = min(SIGNAL_BATCH, len(bench.sample(name, "train")))
        with repeatable(bench):
            gradients = torch.autograd.grad(batch_loss(bench, None, name, range(size)), factors)
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        return (flat / flat.norm().clamp(min=1e-12)).cpu()
