"""Which figure is made of which inputs: directories of results, logs of sweeps, searches for capacity, operators' tables.

`FIGURES` is the list of all; each draws itself by one function of this package. It draws nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from analysis.compare import labels
from traces.record import RunResult
from traces.result_files import ResultError, read_results, read_summary
from traces.suggest import near


@dataclass(frozen=True)
class Inputs:
    """What there is to draw, by kind; of sweeps the rows that have the values in `where`, pairs of option and value."""

    directories: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()
    capacities: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    where: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, paths: Iterable[str | Path], where: Iterable[str] = ()) -> Inputs:
        """Paths sorted by what they end with. where: OPTION=VALUE. Raises ResultError."""
        kinds: dict[str, list[str]] = {"directories": [], "sweeps": [], "capacities": [], "operators": []}
        by_end = {".jsonl": "sweeps", ".json": "capacities", ".csv": "operators"}
        for path in dict.fromkeys(map(str, paths)):
            kind = "directories" if Path(path).is_dir() else by_end.get(Path(path).suffix, "")
            if not kind and Path(path).exists():
                raise ResultError(f"{path}: neither a directory of results nor a .jsonl, .json or .csv file of them")
            kinds[kind or "directories"].append(path)
        pairs = []
        for pair in where:
            name, equals, value = (part.strip() for part in pair.partition("="))
            if not equals:
                raise ResultError(f"--where {pair!r}: write OPTION=VALUE, as in --where adapters=16")
            if not kinds["sweeps"]:
                raise ResultError(f"--where {pair!r}: picks rows of sweeps, and there is no .jsonl among the inputs")
            pairs.append((name, value))
        return cls(**{kind: tuple(found) for kind, found in kinds.items()}, where=tuple(pairs))

    @cached_property
    def results(self) -> dict[str, RunResult]:
        """All results of the directories, by label."""
        names = labels(self.directories, short=True)
        return {names[place, result.policy]: result for place in self.directories for result in read_results(place)}

    @cached_property
    def adapters(self) -> list[str]:
        """Names of the adapters, where all directories agree on them."""
        lists = [read_summary(place)["adapters"] for place in self.directories]
        return lists[0] if lists and all(names == lists[0] for names in lists) else []

    @cached_property
    def rows(self) -> list[dict]:
        """The rows of the sweeps, those that `where` picks."""
        from analysis.sweep_data import pick, read_rows

        rows = read_rows(self.sweeps)
        for name, value in self.where:
            rows = pick(rows, name, value)
        return rows


@dataclass(frozen=True)
class Figure:
    """title: as a reader asks for it. needs: the kind of input. draw: (inputs, directory) -> paths."""

    title: str
    needs: str
    draw: Callable[[Inputs, Path], list[Path]]


def _directory(module: str, name: str) -> Callable[[Inputs, Path], list[Path]]:
    def draw(inputs: Inputs, out: Path) -> list[Path]:
        function = getattr(__import__(f"analysis.{module}", fromlist=[name]), name)
        extra = (inputs.adapters,) if name == "fairness" else ()
        return function(inputs.results, out, *extra)

    return draw


def _sweep(name: str) -> Callable[[Inputs, Path], list[Path]]:
    def draw(inputs: Inputs, out: Path) -> list[Path]:
        import analysis.sweeps

        return getattr(analysis.sweeps, name)(inputs.rows, out)

    return draw


def _operators(inputs: Inputs, out: Path) -> list[Path]:
    from analysis.operators import operators

    return operators(inputs.operators, out)


def _routers(inputs: Inputs, out: Path) -> list[Path]:
    from analysis.routers import routers

    return routers(inputs.capacities, out)


def _agreement(inputs: Inputs, out: Path) -> list[Path]:
    from analysis.agreement import agreement

    if len(inputs.directories) != 2:
        raise ResultError(f"agreement compares two directories of results, got {len(inputs.directories)}")
    pair = [{result.policy: result for result in read_results(place)} for place in inputs.directories]
    kinds = ["simulator" if "simulator" in next(iter(runs.values())).config else "engine" for runs in pair]
    names = tuple(kinds) if len(set(kinds)) == 2 else tuple(Path(place).name for place in inputs.directories)
    return agreement(*pair, out, names)


FIGURES: dict[str, Figure] = {
    "policies": Figure("Policies compared", "directories", _directory("figures", "policies")),
    "distributions": Figure("Distributions of latency", "directories", _directory("figures", "distributions")),
    "fairness": Figure("Fairness among adapters", "directories", _directory("figures", "fairness")),
    "modes": Figure("Modes and switches over time", "directories", _directory("timelines", "modes_over_time")),
    "gantt": Figure("Steps in the busiest two seconds", "directories", _directory("timelines", "gantt")),
    "agreement": Figure("Simulator against engine", "directories", _agreement),
    "rate": Figure("Average token latency against request rate", "sweeps", _sweep("rate")),
    "skewness": Figure("Average token latency against skewness", "sweeps", _sweep("skewness")),
    "adapters": Figure("Average token latency against the number of adapters", "sweeps", _sweep("adapters")),
    "ranks": Figure("Average token latency against the adapters' rank", "sweeps", _sweep("ranks")),
    "ablations": Figure("What each part is worth", "sweeps", _sweep("ablations")),
    "routers": Figure("What clusters sustain", "capacities", _routers),
    "operators": Figure("LoRA operators against tokens", "operators", _operators),
}


def possible(inputs: Inputs) -> list[str]:
    """Names of the figures that these inputs allow."""
    names = [name for name, figure in FIGURES.items() if getattr(inputs, figure.needs)]
    if inputs.sweeps:
        from analysis.sweep_data import varying

        other = {"skewness": "adapter-assign", "ablations": "variant"}  # figures that are not named like their setting
        changing = varying(inputs.rows)
        names = [name for name in names if FIGURES[name].needs != "sweeps" or other.get(name, name) in changing]
    if inputs.directories:
        timed = any(result.steps is not None and len(result.steps["mode"]) for result in inputs.results.values())
        names = [name for name in names if timed or name not in ("modes", "gantt")]
        kinds = {"simulator" in result.config for result in inputs.results.values()}
        if len(inputs.directories) != 2 or len(kinds) != 2:
            names = [name for name in names if name != "agreement"]
    return names


def check_names(text: str | None) -> list[str] | None:
    """Names with commas between. Raises ResultError, naming the near one."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FIGURES:
            raise ResultError(f"--only: unknown figure {name!r}{near(name, FIGURES)}; one of {', '.join(FIGURES)}")
    return names


def draw(
    paths: Sequence[str | Path], out: str | Path, only: Sequence[str] | None = None, where: Sequence[str] = (),
    skipped: Callable[[str], None] | None = None,
) -> dict[str, list[Path]]:
    """Draw the figures named, or all that the inputs allow, into `out`; paths by figure.

    where: OPTION=VALUE, picks rows of sweeps. skipped: told of every figure that cannot be drawn where none is named.
    Raises ResultError, also where nothing can be drawn.
    """
    inputs = Inputs.of(paths, where)
    for name in only or ():
        if not getattr(inputs, FIGURES[name].needs):
            raise ResultError(f"figure {name} is drawn from {FIGURES[name].needs}, and there are none among the inputs")
    names = possible(inputs) if only is None else only
    drawn, left = {}, {}
    for name in names:
        try:
            drawn[name] = FIGURES[name].draw(inputs, Path(out))
        except ResultError as error:
            if only is not None or skipped is None:
                raise
            left[name] = str(error)
    if not drawn:
        raise ResultError("; ".join(left.values()) or "nothing to draw: no setting but the policy varies in these inputs")
    for name, why in left.items():
        skipped(f"{name}: not drawn: {why}")
    return drawn
