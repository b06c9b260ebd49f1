"""From a base model, domains and floors to adapters, the map from domain to adapter, and the proof that the floors hold.

The folder that it writes:
    runs/          every training, by hash; a command that was cut off goes on from here
    features/      the images, encoded; may be deleted
    adapters/ID/   PEFT folders with their heads, as the engine loads them
    packing.json   domain -> adapter
    report.json    accuracies (base, own adapter, packed; decide and held-out), floors, cost
    report.txt, fused.png, summary.json   the same to read, to look at, and to keep

The held-out split is read once everything is decided.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import torch

from engine.fusion.domains import DomainError, load_domains
from engine.fusion.evaluate import evaluate, evaluate_base
from engine.fusion.metrics import Score
from engine.fusion.oracle import JOINT, SEQUENCE, SEQUENCE_EARLY, Runs, TrainingOracle
from engine.fusion.search import exhaustive, fuse_in_order, search
from engine.fusion.train import Recipe, load_run
from engine.fusion.trials import Attempt, Packing
from engine.fusion.whole_folder import put_in_place
from engine.fusion.workbench import digest_of, open_workbench
from engine.fusion.workers import Job, Workers, default_workers
from traces.whole_file import replace_text

COMPARISONS = {"heuristic": SEQUENCE, "heuristic-early": SEQUENCE_EARLY}
"""What may be run beside ours: the paper's heuristic, and the same with our rule of when to stop a training."""
HELD_OUT = "heldout"
DECODED = "decoded"
"""Also: the own adapters of domains with a head once more without, to see what the head costs or gains in accuracy."""


@dataclass(frozen=True)
class Options:
    """retries: attempts on fewer adapters after the first packing (None: until proven, or won over the heuristic's).

    compare: of COMPARISONS. yardstick: try everything on the first so many domains (0: none). workers: processes, None: as
    many as suit the machine. graphs: False trains without CUDA graphs.
    """

    recipe: Recipe = field(default_factory=Recipe)
    retries: int | None = None
    compare: tuple[str, ...] = ()
    yardstick: int = 0
    workers: int | None = 1
    graphs: bool = True


def fuse(model: str | Path, domains_yaml: str | Path, output: str | Path, options: Options, *, device: str,
         deadline: float | None = None, log: Callable[[str], None] = lambda line: None) -> dict:
    """Do all of it, or what is left of it; the report. FloorError, DomainError, ModelError, OutOfTime say what ended it."""
    started = time.monotonic()
    output = Path(output)
    again = partial(open_runs, model, domains_yaml, output, options.recipe, device, deadline, options.graphs)
    runs = again(log=log)
    again = partial(again, digest=runs.digest)  # hashing 14 GB once will do
    count = options.workers or default_workers(runs.bench)
    log(f"{len(runs.bench.domains)} domains, {count} worker{'s' if count > 1 else ''}")
    with Workers(runs, again, count) as workers:
        workers.each(_single_jobs(runs, options))
        runs.set_floors()
        for domain in runs.bench.domains:
            log(f"floor of {domain.name}: {runs.floors[domain.name]:.3f} {domain.metric}")
        workers.each(_jobs(runs, options))
        report = _report(runs, workers, options, output)
    log(f"done in {time.monotonic() - started:.0f} s of this call")
    places = {name: row["adapter"] for name, row in sorted(report["domains"].items())}
    replace_text(output / "packing.json", json.dumps(places, indent=1) + "\n")
    replace_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    return report


def open_runs(model: str | Path, domains_yaml: str | Path, output: Path, recipe: Recipe, device: str, deadline: float | None,
              graphs: bool = True, *, digest: str | None = None, log: Callable[[str], None]) -> Runs:
    """The base model, the domains, and what has been trained so far; the same in each process. digest: theirs, if known."""
    domains = load_domains(domains_yaml)
    digest = digest or digest_of(Path(model), domains)
    bench = open_workbench(model, domains, rank=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, device=device,
                           deadline=deadline, store=output / "features" / digest[:12], graphs=graphs, log=log)  # fmt: skip
    return Runs(bench, output / "runs", recipe, digest)


# -- jobs: each trains what is not there yet -------------------------------------------------------------------------------
def _single_jobs(runs: Runs, options: Options) -> list[Job]:
    """The domains' own adapters that relative floors need, and those that decode: the longest first."""
    long_first = sorted(runs.bench.domains, key=lambda domain: -runs.recipe.steps_of(domain))
    jobs: list[Job] = [(_train_own, (domain.name,)) for domain in long_first if domain.relative]
    if DECODED in options.compare:
        jobs += [(_train_decoded, (domain.name,)) for domain in long_first if domain.head]
    return jobs


def _jobs(runs: Runs, options: Options) -> list[Job]:
    """All searches and comparisons, which need nothing of each other: those with the longest chain of trainings first."""
    jobs: list[Job] = [(_in_order, (COMPARISONS[name],)) for name in options.compare if name in COMPARISONS]
    jobs.append((_search, (None, options.retries)))
    names = _yardstick_names(runs, options)
    for size in range(len(names), 1, -1):
        jobs += [(_attempt, (names, members)) for members in combinations(names, size)]
    return jobs


def _train_own(runs: Runs, name: str) -> None:
    runs.train_own(name)


def _train_decoded(runs: Runs, name: str) -> None:
    runs.train_decoded(name)


def _search(runs: Runs, names: tuple[str, ...] | None, retries: int | None) -> Packing:
    def watch(attempt: Attempt) -> None:
        runs.bench.log(f"attempt on {len(attempt.order)}: holds {len(attempt.held)}, {attempt.steps} steps")

    runs.set_floors()
    return search(TrainingOracle(runs, JOINT, names), retries, watch)


def _in_order(runs: Runs, kind: str) -> Packing:
    runs.set_floors()
    return fuse_in_order(TrainingOracle(runs, kind))


def _attempt(runs: Runs, names: tuple[str, ...], members: tuple[str, ...]) -> Attempt:
    runs.set_floors()
    return TrainingOracle(runs, JOINT, names).attempt(members)


def _score_base(runs: Runs, name: str) -> Score:
    return evaluate_base(runs.bench, name, HELD_OUT)


def _score_decoded(runs: Runs, name: str) -> Score:
    load_run(runs.bench, runs.train_decoded(name), (name,), runs.recipe.seed)
    return evaluate(runs.bench, name, HELD_OUT, None)


def _score_run(runs: Runs, folder: Path, trained: tuple[str, ...], names: tuple[str, ...]) -> dict[str, Score]:
    """Of a run's adapter, on the domains `names` of those it was trained on."""
    head = load_run(runs.bench, folder, trained, runs.recipe.seed)
    return {name: evaluate(runs.bench, name, HELD_OUT, head) for name in names}


# -- what came of it: the same searches again, with all their trainings done ------------------------------------------------
def _report(runs: Runs, workers: Workers, options: Options, output: Path) -> dict:
    oracle = TrainingOracle(runs, JOINT)
    packing = search(oracle, options.retries)
    runs.bench.log(f"packed {len(runs.bench.domains)} domains into {len(packing)} adapters")
    compared = {}
    for name in [name for name in options.compare if name in COMPARISONS]:
        other = TrainingOracle(runs, COMPARISONS[name])
        found = fuse_in_order(other)
        compared[name] = _packing_told(found) | {"held_out": _held_out(workers, other, found)}
    places = _write_adapters(output, oracle, packing)
    return {
        "model": Path(runs.bench.model.source).name, "device": _device(runs.bench.device), "versions": _versions(),
        "recipe": asdict(options.recipe), "domains": _accuracies(runs, workers, oracle, packing, places),
        "decoded": _decoded(runs, workers, options), "packing": _packing_told(packing), "compared": compared,
        "yardstick": _yardstick(runs, options), "cost": _cost(runs), "attempts": _attempts(runs),
    }  # fmt: skip


def _yardstick_names(runs: Runs, options: Options) -> tuple[str, ...]:
    return tuple(domain.name for domain in runs.bench.domains)[: options.yardstick]


def _yardstick(runs: Runs, options: Options) -> dict | None:
    """Our search against the exhaustive optimum on the first few domains, trained for real."""
    names = _yardstick_names(runs, options)
    if not names:
        return None
    ours = search(TrainingOracle(runs, JOINT, names))
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


def _accuracies(runs: Runs, workers: Workers, oracle: TrainingOracle, packing: Packing, places: Mapping[str, str]) -> dict:
    """Of each domain: base, own and packed accuracy on the held-out split, the floor, and whether it holds there.

    own is None where the floor is absolute and no adapter was trained for the domain alone.
    """
    domains, table = runs.bench.domains, {}
    held_out = _held_out(workers, oracle, packing)
    bases = workers.each([(_score_base, (domain.name,)) for domain in domains])
    alone = [domain.name for domain in domains if domain.name in runs.own]
    scored = workers.each([(_score_run, (runs.own_path(name), (name,), (name,))) for name in alone])
    own = {name: score for scores in scored for name, score in scores.items()}
    for domain, base in zip(domains, bases, strict=True):
        name = domain.name
        packed, floor = Score(*held_out[name]), runs.floors[name]
        table[name] = {
            "task": domain.task, "metric": domain.metric, "head": domain.head, "adapter": places[name], "floor": floor,
            "own_decide": runs.own[name].scores[name].value if name in own else None, "base": base.value,
            "own": own[name].value if name in own else None, "packed": packed.value, "packed_stderr": packed.stderr,
            "n": packed.n, "holds": packed.value >= floor,
        }  # fmt: skip
    return table


def _decoded(runs: Runs, workers: Workers, options: Options) -> dict[str, dict[str, float]]:
    """Domain -> accuracy of a decoding adapter on the held-out split, and the tokens it decodes where a head needs none."""
    names = [domain.name for domain in runs.bench.domains if domain.head and DECODED in options.compare]
    told = {}
    for name, score in zip(names, workers.each([(_score_decoded, (name,)) for name in names]), strict=True):
        runs.train_decoded(name)  # it is there; this counts it
        answers = runs.bench.sample(name, HELD_OUT).answers
        told[name] = {"accuracy": score.value, "answer_tokens": sum(map(len, answers)) / len(answers)}
    return told


def _held_out(workers: Workers, oracle: TrainingOracle, packing: Packing) -> dict[str, list[float]]:
    orders = [(group.attempt.order, tuple(sorted(group.serves))) for group in packing.groups]
    scored = workers.each([(_score_run, (oracle.path(order), order, names)) for order, names in orders])
    return {name: list(score) for scores in scored for name, score in scores.items()}


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


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers", "peft")}


def check_output(output: Path) -> None:
    """DomainError where `output` is a file, or a folder that holds something else than results of this command."""
    known = {"base", "data", "runs", "features", "adapters", "packing.json", "report.json", "report.txt", "summary.json",
             "fused.png", "demo.json"}  # fmt: skip
    if output.is_file():
        raise DomainError(f"{output}: is a file; name a folder")
    strange = sorted(p.name for p in output.iterdir() if p.name not in known and not p.name.startswith(".")) \
        if output.exists() else []  # fmt: skip
    if strange:
        raise DomainError(f"{output}: holds {strange[0]!r}, which is not from this command; name an empty or new folder")
