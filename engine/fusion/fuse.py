"""From a base model, domains and floors to adapters, the map from domain to adapter, and the proof that the floors hold.

The folder that it writes:
    runs/          every training, by hash; a command that was cut off goes on from here
    adapters/ID/   PEFT folders with their heads, as the engine loads them
    packing.json   domain -> adapter
    report.json    accuracies (base, own adapter, packed; decide and held-out), floors, cost; report.txt, fused.png

The held-out split is read once everything is decided.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from engine.fusion.checkpoint import put_in_place, replace_text
from engine.fusion.domains import DomainError, load_domains
from engine.fusion.evaluate import evaluate, evaluate_base
from engine.fusion.metrics import Score
from engine.fusion.oracle import JOINT, SEQUENCE, SEQUENCE_EARLY, Runs, TrainingOracle
from engine.fusion.search import Attempt, Packing, exhaustive, fuse_in_order, search
from engine.fusion.train import Recipe, load_run
from engine.fusion.workbench import digest_of, open_workbench

COMPARISONS = {"heuristic": SEQUENCE, "heuristic-early": SEQUENCE_EARLY}
"""What may be run beside ours: the paper's heuristic, and the same with our rule of when to stop a training."""
DECODED = "decoded"
"""Also: the own adapters of domains with a head once more without, to see what the head costs or gains in accuracy."""


@dataclass(frozen=True)
class Options:
    """retries: attempts on fewer adapters after the first packing (None: until proven, or won over the heuristic's).

    compare: of COMPARISONS. yardstick: try everything on the first so many domains (0: none).
    """

    recipe: Recipe = field(default_factory=Recipe)
    retries: int | None = None
    compare: tuple[str, ...] = ()
    yardstick: int = 0


def fuse(model: str | Path, domains_yaml: str | Path, output: str | Path, options: Options, *, device: str,
         deadline: float | None = None, log: Callable[[str], None] = lambda line: None) -> dict:
    """Do all of it, or what is left of it; the report. FloorError, DomainError, ModelError, OutOfTime say what ended it."""
    started = time.monotonic()
    output = Path(output)
    domains = load_domains(domains_yaml)
    recipe = options.recipe
    bench = open_workbench(model, domains, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, device=device,
                           deadline=deadline, log=log)  # fmt: skip
    runs = Runs(bench, output / "runs", recipe, digest_of(Path(model), domains))
    runs.set_floors()
    for domain in domains:
        log(f"floor of {domain.name}: {runs.floors[domain.name]:.3f} {domain.metric}")

    def watch(attempt: Attempt) -> None:
        log(f"attempt on {len(attempt.order)}: holds {len(attempt.held)}, {attempt.steps} steps")

    oracle = TrainingOracle(runs, JOINT)
    packing = search(oracle, options.retries, watch)
    log(f"packed {len(domains)} domains into {len(packing)} adapters")
    compared = {}
    for name in [name for name in options.compare if name in COMPARISONS]:
        other = TrainingOracle(runs, COMPARISONS[name])
        compared[name] = (other, fuse_in_order(other, watch))
    yardstick = _yardstick(runs, options, watch)
    places = _write_adapters(output, oracle, packing)
    report = {
        "model": Path(model).name, "device": _device(device), "versions": _versions(), "recipe": asdict(recipe),
        "domains": _accuracies(runs, oracle, packing, places), "decoded": _decoded(runs, options),
        "packing": _packing_told(packing),
        "compared": {name: _packing_told(found) | {"held_out": _held_out(runs, used, found)}
                     for name, (used, found) in compared.items()},
        "yardstick": yardstick, "cost": _cost(runs), "attempts": _attempts(runs),
    }  # fmt: skip
    log(f"done in {time.monotonic() - started:.0f} s of this call")
    replace_text(output / "packing.json", json.dumps({d: places[d] for d in sorted(places)}, indent=1) + "\n")
    replace_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def _yardstick(runs: Runs, options: Options, watch) -> dict | None:
    """Our search against the exhaustive optimum on the first few domains, trained for real."""
    if not options.yardstick:
        return None
    names = tuple(domain.name for domain in runs.bench.domains)[: options.yardstick]
    ours = search(TrainingOracle(runs, JOINT, names), None, watch)
    best = exhaustive(TrainingOracle(runs, JOINT, names))
    return {"domains": names, "search": len(ours), "optimum": len(best), "search_attempts": ours.attempts,
            "search_steps": ours.steps, "exhaustive_attempts": best.attempts, "exhaustive_steps": best.steps}  # fmt: skip


def _write_adapters(output: Path, oracle: TrainingOracle, packing: Packing) -> dict[str, str]:
    """Copy the packing's adapters to adapters/fused-N, whole or not at all; domain -> adapter."""
    unfinished, target = output / ".adapters.partial", output / "adapters"
    shutil.rmtree(unfinished, ignore_errors=True)
    places = {}
    for number, group in enumerate(packing.groups):
        shutil.copytree(oracle.path(group.attempt.order) / "adapter", unfinished / f"fused-{number}")
        places |= dict.fromkeys(group.serves, f"fused-{number}")
    put_in_place(unfinished, target)
    return places


def _accuracies(runs: Runs, oracle: TrainingOracle, packing: Packing, places: Mapping[str, str]) -> dict:
    """Of each domain: base, own and packed accuracy on the held-out split, the floor, and whether it holds there."""
    bench, table = runs.bench, {}
    held_out = _held_out(runs, oracle, packing)
    for domain in bench.domains:
        name = domain.name
        base = evaluate_base(bench, name, "heldout")
        own = _evaluate_run(runs, runs.own_path(name), (name,), (name,))[name]
        packed, floor = Score(*held_out[name]), runs.floors[name]
        table[name] = {
            "task": domain.task, "metric": domain.metric, "head": domain.head, "adapter": places[name], "floor": floor,
            "own_decide": runs.own[name].scores[name].value, "base": base.value, "own": own.value, "packed": packed.value,
            "packed_stderr": packed.stderr, "n": packed.n, "holds": packed.value >= floor,
        }  # fmt: skip
    return table


def _decoded(runs: Runs, options: Options) -> dict[str, dict[str, float]]:
    """Domain -> accuracy of a decoding adapter on the held-out split, and the tokens it decodes where a head needs none."""
    told = {}
    for domain in runs.bench.domains:
        if domain.head and DECODED in options.compare:
            load_run(runs.bench, runs.train_decoded(domain.name), (domain.name,), runs.recipe.seed)
            answers = runs.bench.sample(domain.name, "heldout").answers
            accuracy = evaluate(runs.bench, domain.name, "heldout", None).value
            told[domain.name] = {"accuracy": accuracy, "answer_tokens": sum(map(len, answers)) / len(answers)}
    return told


def _held_out(runs: Runs, oracle: TrainingOracle, packing: Packing) -> dict[str, list[float]]:
    scores = {}
    for group in packing.groups:
        order = group.attempt.order
        scores |= _evaluate_run(runs, oracle.path(order), order, sorted(group.serves))
    return {name: list(score) for name, score in scores.items()}


def _evaluate_run(runs: Runs, folder: Path, trained: tuple[str, ...], names) -> dict[str, Score]:
    head = load_run(runs.bench, folder, trained, runs.recipe.seed)
    return {name: evaluate(runs.bench, name, "heldout", head) for name in names}


def _packing_told(packing: Packing) -> dict:
    return {
        "adapters": len(packing), "proven": packing.proven, "attempts": packing.attempts, "steps": packing.steps,
        "steps_to": {str(size): steps for size, steps in packing.steps_to.items()},
        "groups": [sorted(group.serves) for group in packing.groups],
    }  # fmt: skip


def _cost(runs: Runs) -> dict[str, dict[str, float]]:
    """Runs, steps and minutes on the device by kind of run."""
    cost: dict[str, dict[str, float]] = {}
    for name, result in sorted(runs.done.items()):
        kind = cost.setdefault(_kind(name), {"runs": 0, "steps": 0, "minutes": 0.0})
        kind["runs"] += 1
        kind["steps"] += result.steps
        kind["minutes"] = round(kind["minutes"] + result.seconds / 60, 3)
    return cost


def _attempts(runs: Runs) -> list[dict]:
    """Every run: what it trained on and what it reached, on the decide split."""
    return [
        {"kind": _kind(name), "steps": result.steps, "accuracies": {d: score.value for d, score in result.scores.items()}}
        for name, result in sorted(runs.done.items())
    ]


def _kind(run: str) -> str:
    return run.rsplit("-", 2)[0]


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else platform.machine() + " CPU"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers", "peft")}


def check_output(output: Path) -> None:
    """DomainError where `output` is a file, or a folder that holds something else than results of this command."""
    known = {"runs", "adapters", "packing.json", "report.json", "report.txt", "fused.png", "base", "data"}
    if output.is_file():
        raise DomainError(f"{output}: is a file; name a folder")
    strange = sorted(p.name for p in output.iterdir() if p.name not in known and not p.name.startswith(".")) \
        if output.exists() else []  # fmt: skip
    if strange:
        raise DomainError(f"{output}: holds {strange[0]!r}, which is not from this command; name an empty or new folder")
