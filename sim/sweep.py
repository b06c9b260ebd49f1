"""`python -m sim sweep GRID.yaml`: every run of a grid, on all cores or on a Ray cluster, kept as each of them ends.

Results go to an append-only log, one synced line a run, keyed by what the run depends on: killed at any moment
and started again, the sweep goes on and ends with the same table. The table, mean and 95 % confidence interval over the
seeds, goes to stdout and as CSV beside the log; progress and errors to stderr. Exit codes: 0, 1 (some runs failed; the
others are kept), 2 (bad input), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from policies.invariants import InvariantError
from policies.plan import PlanError
from sim.experiment import code_sha256, key_of, option_names, settings, summary, trace_file
from sim.grid import Cell, read_grid
from sim.parallel import Outcome, in_processes, on_ray
from sim.sweep_table import METRICS, Table, check_metrics
from traces.options import SuggestingParser, count
from traces.result_log import ResultLog
from traces.suggest import near

SAY_EVERY_S = 10.0


def build_parser() -> SuggestingParser:
    """The command line of a sweep."""
    parser = SuggestingParser("python -m sim sweep", description="Run a grid of simulations; what has run is not run again.")
    add = parser.add_argument
    add("grid", metavar="GRID.yaml", help="options of `python -m sim` without their dashes; lists are crossed")
    add("--trace", metavar="FILE", help="replay this trace, whatever the grid says")
    add(
        "--set", action="append", default=[], metavar="OPTION=VALUE",
        help="one value for an option, whatever the grid says, e.g. profile=h200 or model=llava-1.5-7b; may be repeated",
    )  # fmt: skip
    add("--output", metavar="FILE.jsonl",
        help="log of results, gone on with where it is there (default: GRID.jsonl; results/GRID.jsonl of a grid that ships)")
    add("--jobs", type=count, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    add("--ray", metavar="ADDRESS",
        help="run on a Ray cluster instead: `auto`, or the address that `ray start --head` printed; a profile given as a "
        "file must lie on every node")  # fmt: skip
    add("--metrics", default=",".join(METRICS), metavar="NAME,...", help="columns of the table (default %(default)s)")
    add("--progress", choices=("auto", "off"), default="auto", help="progress on stderr")
    add("--dry-run", action="store_true", help="only say how many runs there are and how many are left")
    return parser


def run_cell(args: argparse.Namespace, file=None) -> Outcome:
    """The summary of one run, or what went wrong with it; in whatever process.

    A run leaves cycles behind, and memory must not grow with the number of runs; but what was there before, which may be
    much, need not be searched after each.
    """
    gc.freeze()
    try:
        return Outcome(summary(args, file), "")
    except (ValueError, OSError, InvariantError, PlanError) as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
    finally:
        gc.collect()
        gc.unfreeze()


def sweep(cells: Iterable[Cell], log: ResultLog, work: Callable[[Iterable], Iterator], tell: Callable[[int], None]) -> list:
    """Run the cells that the log lacks and append each as it ends; (variant, axes, error) of those that failed.

    work: from (cell, arguments) pairs to (cell, outcome) pairs, in any order, a few at a time. tell: gets the number of
    runs that ended.
    """
    failed = []
    todo = ((cell, cell.args) for cell in cells if key_of(cell.args, cell.variant) not in log)
    for ended, (cell, outcome) in enumerate(work(todo), 1):
        if outcome.summary is None:
            failed.append((cell.variant, cell.axes, outcome.error))
        else:
            log.append({
                "key": key_of(cell.args, cell.variant), "variant": cell.variant, "settings": settings(cell.args),
                "code": code_sha256(), "summary": outcome.summary,
            })  # fmt: skip
        tell(ended)
    return failed


class Progress:
    """How many of `total` runs have ended, on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, mode: str):
        self._total, self._quiet, self._bar = total, mode == "off", None
        self._said_s = self._began_s = time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc="sweep", total=total, unit="run", file=sys.stderr)

    def __call__(self, ended: int) -> None:
        if self._bar is not None:
            self._bar.update(ended - self._bar.n)
        elif not self._quiet and (ended == self._total or time.monotonic() - self._said_s > SAY_EVERY_S):
            self._said_s = time.monotonic()
            print(f"{ended} of {self._total} runs, {self._said_s - self._began_s:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()


def default_log(grid: Path) -> Path:
    """Beside the grid; under `results` where the grid is the program's own."""
    own = grid.resolve().parent == Path(__file__).resolve().parent / "grids"
    return Path("results", grid.name).with_suffix(".jsonl") if own else grid.with_suffix(".jsonl")


def instead(args: argparse.Namespace) -> dict[str, str]:
    """Option -> the one value that --trace and --set give it. Raises ValueError."""
    found = {"trace": args.trace} if args.trace else {}
    for pair in args.set:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("_", "-")
        if not equals:
            raise ValueError(f"--set {pair!r}: write OPTION=VALUE, as in --set profile=h200")
        if name not in option_names():
            raise ValueError(f"--set {pair!r}: unknown option {name!r}{near(name, option_names())}")
        found[name] = value.strip()
    return found


def run(args: argparse.Namespace) -> int:
    """The whole of it; the exit code. Raises ValueError or OSError for bad input."""
    grid = read_grid(args.grid, instead(args))
    metrics = check_metrics(args.metrics)
    path = Path(args.output) if args.output else default_log(Path(args.grid))
    if path.resolve() == Path(args.grid).resolve() or path.suffix == ".csv":
        raise ValueError(f"--output {path}: name a .jsonl file; the table goes beside it as .csv")
    beside = path.with_suffix(".csv")
    if beside.exists() and not path.exists():  # a trace, say: no sweep wrote it
        raise ValueError(f"{beside}: is there already, and the table would replace it; name another --output")
    left = 0
    with ResultLog(path) as log:
        for cell in grid.cells():  # proves every run before the first begins
            left += key_of(cell.args, cell.variant) not in log
        if log.torn_bytes:
            print(f"{path}: cut off the last {log.torn_bytes} bytes, a run that was not written whole", file=sys.stderr)
        print(f"{len(grid)} runs, {len(grid) - left} of them done before, {left} to do", file=sys.stderr, flush=True)
        if args.dry_run:
            return 0
        failed = []
        if left:
            progress = Progress(left, args.progress)
            try:
                if args.ray is not None:
                    work = on_ray(run_cell, args.ray, trace_file)
                else:
                    work = in_processes(run_cell, min(args.jobs or 1, left))
                failed = sweep(grid.cells(), log, work, progress)
            finally:
                progress.close()
        table = Table(grid, log, metrics)
        sys.stdout.write(table.text())
        table.write_csv(beside)
    for variant, axes, error in failed:
        print(f"failed: {' '.join([variant, *(f'{k}={v}' for k, v in axes.items())]).strip()}: {error}", file=sys.stderr)
    print(f"results {path}, table {beside}", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except BrokenPipeError:
        sys.stdout = None
        return 0
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; what had ended is kept, the same command goes on", file=sys.stderr)
        return 130


