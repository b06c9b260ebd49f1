"""`python -m engine campaign FILE.yaml --traces DIR --output DIR`: every replay of a campaign under each of its policies.

One command that goes on where it stopped: a model is loaded once, an engine is built once for the cells that it can serve,
and each cell's record lies in DIR/REPLAY, as `replay --output` would write it, as soon as its run is over. A cell that fails
is reported and does not stop the others, unless the GPU's context went with it. Standard output has one row a cell. Exit
codes: 0 all are there, 1 cells failed, 75 the time of --stop-after was up (run it again), 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.build import Adapters, find_adapters
from engine.campaign_file import CampaignError, Cell, chosen, in_order, read_campaign
from engine.campaign_plan import expected_s, plan_of
from engine.campaign_records import Records
from engine.models import Model, ModelError
from engine.options import EXIT_TIME
from engine.progress import Progress
from engine.serve import Replay, Session, Signals, engine_config, find_profile, model_of, served_trace
from traces.record import RunResult, parse_goodput, summarize
from traces.result_files import ResultError

EXIT_FAILED, EXIT_SIGNAL = 1, 130
NEW_ENGINE_S, SAME_ENGINE_S = 15.0, 2.0
"""Allowed for until a cell's clock starts: on an H200 valora's graphs took 9 s, and 28 with kernels to compile."""
COLUMNS = ("completed", "cut off", "avg tok (ms)", "ttft (ms)", "tpot (ms)", "e2el (ms)", "tok/s")


def campaign(args: argparse.Namespace) -> int:
    """The command; its exit code. CampaignError for a file or folder that it cannot work with."""
    began = time.monotonic()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CampaignError("a campaign runs in one process: start it without torchrun")
    cells = in_order(chosen(read_campaign(args.file, args.traces), args.only))
    if args.dry_run:
        print(plan_of(cells, (NEW_ENGINE_S, SAME_ENGINE_S)))
        return 0
    with Records(args.output) as records, Signals() as signals:
        run = Run(records, signals, cells, args.progress, lambda: _left(args.stop_after, began))
        return run.all(overwrite=args.overwrite)


def _left(stop_after: float | None, began: float) -> float:
    return float("inf") if stop_after is None else stop_after - (time.monotonic() - began)


def device_of(args: argparse.Namespace) -> str:
    """The name of the device that a replay would run on."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else device


def row(cells: Sequence[object], width: int = 34) -> str:
    """A line of the table."""
    return f"{cells[0]!s:<{width}}" + "".join(f"{cell!s:>14}" for cell in cells[1:])


def facts(name: str, summary: dict) -> str:
    """The row of a cell."""
    known = [summary[key] for key in ("mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "output_throughput")]
    average = summary["avg_token_latency_s"]
    shown = ["-" if value is None else f"{value:,.1f}" for value in known]
    done = f"{summary['completed']}/{summary['requests']}"
    return row([name, done, summary["unfinished"], "-" if average is None else f"{1e3 * average:.4f}", *shown])


class TimeIsUpError(Exception):
    """The next cell would not fit in what is left of --stop-after."""


@dataclass
class Ready:
    """What a cell needs, in memory."""

    replay: Replay
    names: list[str]
    goodput: dict[str, float]


class Run:
    """The cells of one call. left_s: seconds that may still be used."""

    def __init__(self, records: Records, signals: Signals, cells: list[Cell], progress: str, left_s):
        self.records, self.signals, self.cells, self._progress, self._left_s = records, signals, cells, progress, left_s
        self._session: Session | None = None
        self._loaded: tuple = ()  # the model of the session
        self._broken: dict[tuple, str] = {}  # models that cannot be loaded
        self._adapters: tuple[tuple, Adapters] | None = None
        self._running = False  # the cell at hand has touched the model
        self.failed: list[str] = []

    def all(self, *, overwrite: bool) -> int:
        """Run every cell that has no record; the exit code."""
        missing = self._missing(overwrite=overwrite)
        print(row(["replay/policy", *COLUMNS]))
        for cell in self.cells:
            if cell not in missing:
                print(facts(cell.name, self.records.entries(cell)[cell.policy.name]["summary"]))
        code = self._run(missing)
        for line in self.failed:
            print(f"failed   {line}", file=sys.stderr)
        return code or (EXIT_FAILED if self.failed else 0)

    def _run(self, missing: list[Cell]) -> int:
        """The cells in turn; the exit code where something ends the call before all had their turn, else 0."""
        for number, cell in enumerate(missing):
            said = f"[{len(self.cells) - len(missing) + number + 1}/{len(self.cells)}] {cell.name}"
            try:
                lost = self._attempt(cell, said)
            except TimeIsUpError as error:
                print(f"{said}: {error}; {len(missing) - number} cells are left, the same command goes on", file=sys.stderr)
                return EXIT_TIME
            if self.signals.asked:
                print(f"interrupted in {cell.name}; cells that were over are in {self.records.path}", file=sys.stderr)
                return EXIT_SIGNAL
            if lost:
                print("the GPU's context is lost; the same command goes on in a new process", file=sys.stderr)
                return EXIT_FAILED
        return 0

    def _missing(self, *, overwrite: bool) -> list[Cell]:
        """Cells without a record. CampaignError for records of other options, unless they may be overwritten."""
        found = []
        for cell in self.cells:
            try:
                if not self.records.done(cell, device_of(cell.args)):
                    found.append(cell)
            except CampaignError:
                if not overwrite and self.records.entries(cell):
                    raise
                found.append(cell)  # its trace is missing, which it will say itself
        return found

    def _attempt(self, cell: Cell, said: str) -> bool:
        """One cell, to its record or to a line that says why not. True if the GPU cannot be used any more."""
        began, reason, self._running = time.monotonic(), None, False
        try:
            result = self._served(cell, said)
            if result is not None:
                took = time.monotonic() - began
                print(f"{said}: done in {took:.1f} s", file=sys.stderr)
        except TimeIsUpError:
            raise
        except ResultError:  # the disk or the folder; every other cell would meet it too
            raise
        except Exception as error:  # whatever it is, it is this cell's alone: an error of its file, its memory, its policy
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self.failed.append(f"{cell.name}: {reason}")
            print(f"{said}: failed: {reason}", file=sys.stderr)
            if self._running:
                self._session, self._adapters = None, None  # its weights may have an adapter folded in
                return _context_lost()
        return False

    def _served(self, cell: Cell, said: str) -> RunResult | None:
        session = self._with_model(cell)
        ready = self._ready(cell, session.model)
        same = session.serves(ready.replay, cell.policy)
        trace = ready.replay.trace
        want = expected_s(cell, trace, ready.replay.profile) + (SAME_ENGINE_S if same else NEW_ENGINE_S)
        if want > self._left_s():
            raise TimeIsUpError(f"takes up to {want:.0f} s, {max(0.0, self._left_s()):.0f} s are left")
        span = int(trace.arrival_ns[-1]) / 1e9
        print(f"{said}: {len(trace)} requests over {span:.1f} s, up to {want:.0f} s", file=sys.stderr)
        self._running = True
        with Progress(cell.name, len(trace), self._progress) as progress:
            result = session.measured(ready.replay, cell.policy, cell.args.warmup, progress, self.signals)
        if result is None or self.signals.asked:
            return None
        order = [other.policy.name for other in self.cells if other.replay == cell.replay]
        self.records.keep(cell, result, ready.names, ready.goodput, order, device_of(cell.args))
        print(facts(cell.name, summarize(result)), flush=True)
        return result

    def _with_model(self, cell: Cell) -> Session:
        """A session of the cell's model; another model goes first. ModelError where it cannot be loaded."""
        if cell.model in self._broken:
            raise ModelError(self._broken[cell.model])
        if self._session is None or self._loaded != cell.model:
            self._session, self._adapters = None, None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            began = time.monotonic()
            try:
                self._session = Session(model_of(cell.args))
            except (ValueError, OSError) as error:
                self._broken[cell.model] = str(error)
                raise
            self._loaded = cell.model
            print(f"{cell.args.model}: ready after {time.monotonic() - began:.1f} s", file=sys.stderr)
        return self._session

    def _ready(self, cell: Cell, model: Model) -> Ready:
        args = argparse.Namespace(**{**vars(cell.args), "output": str(self.records.path)})  # there steps are kept
        goodput = parse_goodput(args.goodput)
        config = engine_config(args, model)
        trace = served_trace(args, model, config, goodput)
        key = (trace.adapters, config.targets, args.adapter_dir, args.seed)
        if self._adapters is None or self._adapters[0] != key:
            self._adapters = None
            self._adapters = key, find_adapters(trace.adapters, model, config.targets, args.adapter_dir, args.seed)
        found = self._adapters[1]
        profile = find_profile(args.profile, model)
        return Ready(Replay(config, trace, profile, found), [adapter.name for adapter in trace.adapters], goodput)


def _context_lost() -> bool:
    """True after an error that no later call on the GPU survives."""
    gc.collect()
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False
