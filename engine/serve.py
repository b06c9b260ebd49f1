"""`replay`: a trace through one or several policies on one model, from the options to tables and files.

The model is built once; each policy gets an engine of its own, is warmed up with the first requests, and then replays the
trace on the wall clock; its record is written before the next one begins. A signal ends the replay; what has finished is
written. It decides nothing.
"""

from __future__ import annotations

import argparse
import gc
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine import parallel
from engine.arrivals import ClosedLoop
from engine.build import Adapters, Engine, build, find_adapters
from engine.clock import MockedClock, WallClock
from engine.decoder import Decoder
from engine.graphs import BRANCHED, MIXED, PLAIN
from engine.models import MODELS, Model, ModelError, load_model
from engine.options import TARGETS
from engine.peft_baseline import against_peft, text_only
from engine.progress import Progress
from engine.replay import Driver, EngineConfig, record, resolved, stripped
from policies import Policy, make_policies, residency
from policies.profile import Profile, ProfileError, load_profile
from policies.view import Limits
from traces.options import check_end, load_trace, with_slo
from traces.publish import publish
from traces.record import RunResult, parse_goodput, summarize
from traces.request import Trace
from traces.result_files import check_target, write_results

PROFILES = Path(__file__).parent.parent / "sim" / "profiles"
MOST_CONTEXT = 4096


def replay(args: argparse.Namespace) -> int:
    """The command, and `baseline`. 0, or 130 after an interruption."""
    world = parallel.world()
    policies = make_policies(args.policy, args.policy_option)
    baseline = args.command == "baseline"
    if world is not None and (args.closed_loop or baseline):
        raise parallel.ParallelError("a closed loop and the baseline run in one process: start them without torchrun")
    first = world is None or world.rank == 0
    if args.output and first:
        check_target(args.output, args.overwrite)
    goodput = parse_goodput(args.goodput)
    began = time.perf_counter()
    model = model_of(args)
    config = engine_config(args, model)
    trace = served_trace(args, model, config, goodput)
    if baseline:
        text_only(trace)
    profile = find_profile(args.profile, model)
    found = find_adapters(trace.adapters, model, config.targets, args.adapter_dir, args.seed)
    for name, reason in found.reasons.items():
        print(f"adapter {name}: left out, its requests will fail: {reason}", file=sys.stderr)
    print(f"model, trace and adapters ready after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    results: list[RunResult] = []
    names = [adapter.name for adapter in trace.adapters]
    served = Replay(config, trace, profile, found)
    session = Session(model, world, args.router)
    with Signals() as signals:
        for policy in policies:
            with Progress(policy.name, len(trace), args.progress if first else "off") as progress:
                result = session.measured(served, policy, args.warmup, progress, signals)
            if result is not None:
                results.append(result)
                if args.output:  # a machine may be taken away before the last policy
                    summaries = {run.policy: summarize(run, goodput) for run in results}
                    write_results(args.output, results, summaries, names, overwrite=True)
            if signals.asked:
                break
    if baseline and results and not signals.asked:
        del session  # its memory is wanted
        against_peft(results, model, trace, args.closed_loop, args.baseline_steps)
    if results:
        again = args.output if baseline else None  # with what the baseline added
        publish(results, names, goodput, output=again, overwrite=True, with_adapters=args.per_adapter)
    if signals.asked and first:
        print(f"interrupted; {'what had finished is in' if results else 'there was not yet'} a result", file=sys.stderr)
    return 130 if signals.asked else 0


@dataclass(frozen=True)
class Replay:
    """What is served, whatever the policy."""

    config: EngineConfig
    trace: Trace
    profile: Profile
    found: Adapters


class Session:
    """A model and the engine built last, which goes on to serve the next replay where that needs one like it: its graphs
    need not be captured again."""

    def __init__(self, model: Model, world: parallel.World | None = None, router: str = "round-robin"):
        self._world, self._router = world, router
        self.model = model
        self._decoder = Decoder(model)
        self._engine: Engine | None = None
        self._found: Adapters | None = None  # the engine's, lest another's get its id
        self._built_for: tuple = ()

    def measured(self, replay: Replay, policy: Policy, warmup: int, progress: Progress,
                 signals: Signals) -> RunResult | None:
        """The record of one policy; None if a signal came before its clock started. ModelError where memory ran out."""
        try:
            return self._run(replay, policy, warmup, progress, signals)
        except torch.OutOfMemoryError:
            raise ModelError(f"policy {policy.name}: the memory does not hold the engine; lower --memory-share") from None
        finally:
            signals.driver = None  # it holds an engine

    def serves(self, replay: Replay, policy: Policy) -> bool:
        """True if no engine must be built for it."""
        return self._engine is not None and self._built_for == self._needs(replay, policy)

    @staticmethod
    def _needs(replay: Replay, policy: Policy) -> tuple:
        config = replace(replay.config, closed_loop=0, drain_s=None, pins=(), check_invariants=False)
        return policy, config, replay.trace.adapters, replay.profile.sha256, id(replay.found)

    def _run(self, replay: Replay, policy: Policy, warmup: int, progress: Progress, signals: Signals) -> RunResult | None:
        model, config = self.model, replay.config
        trace = stripped(replay.trace, policy)
        engine = self._engine if self.serves(replay, policy) else None
        self._engine = None  # nobody's until its run is over; and another one's memory is wanted
        if engine is None:
            engine = build(model, self._decoder, trace.adapters, replay.found, policy, replay.profile, config)
        seconds = warm_up(engine, policy, trace, config, warmup)
        print(f"{policy.name}: warmed up in {seconds:.1f} s, {_memory(engine)}", file=sys.stderr)
        if not getattr(policy, "strips_adapters", False):
            engine.hold(config.pins)
        world, arrivals, parts = self._world, None, None
        if config.closed_loop:
            arrivals = ClosedLoop(trace, config.closed_loop)
        elif world is not None:
            engine.journal.server = world.rank
            arrivals = parallel.Shared(world, trace, self._router, engine.ledger, policy.name)
        with frozen_heap():
            if signals.asked if world is None else world.largest(signals.asked):  # there all start together
                return None
            driver = Driver(
                trace, policy, engine.ledger, engine.cost, engine.journal, WallClock(engine.runner), engine.runner,
                check_invariants=config.check_invariants, progress=progress.update, arrivals=arrivals,
                drain_s=config.drain_s,
            )  # fmt: skip
            if world is not None:
                driver.watchers.append(arrivals.report)
            signals.driver, driver.stop = driver, signals.asked
            driver.run()
        if world is not None and (parts := parallel.together(world, driver, arrivals)) is None:
            return None
        settings = resolved(trace, policy, config, engine.cost, describe_model(model), describe_device(model.device))
        settings["notes"] += [f"adapter {name} was left out: {reason}" for name, reason in replay.found.reasons.items()]
        result = record(driver, trace, settings, operator=engine.operator, page_bytes=engine.page_bytes, parts=parts)
        engine.renew(config, policy)  # plain weights again, for whoever comes next
        self._engine, self._found, self._built_for = engine, replay.found, self._needs(replay, policy)
        return result


def _memory(engine: Engine) -> str:
    lora = engine.runner.lora.pool
    held = sum(factors.nbytes for half in (lora.a, lora.b) for factors in half.values())
    return f"{engine.ledger.pool.pages} KV pages, {held / 2**30:.2f} GiB for adapters"


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What exists by now, garbage too, is left out of garbage collection meanwhile: with torch and transformers loaded a
    full one stops the loop for longer than many steps take."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def warm_up(engine: Engine, policy: Policy, trace: Trace, config: EngineConfig, requests: int) -> float:
    """Capture the graphs and serve the first requests at once, under a mocked clock, so that all kernels are compiled; then
    forget it. Seconds that it took."""
    began = time.perf_counter()
    runner = engine.runner
    if runner.graphs is not None:
        kinds = [PLAIN]
        if trace.adapters and (trace.adapter >= 0).any():
            kinds += [BRANCHED, MIXED] if policy.merges else [BRANCHED]
        for graphs in (runner.packed_graphs, runner.graphs):
            graphs.capture(tuple(kinds))
        if (trace.images > 0).any():
            runner.vision.capture()
        runner.lora.warm(mixture=policy.merges, graphs=True)
    if requests and len(trace):
        first = trace.take(np.arange(min(requests, len(trace))))
        first = first.with_(arrival_ns=np.zeros(len(first), np.int64))
        clock = MockedClock(engine.cost, runner)
        Driver(first, policy, engine.ledger, engine.cost, engine.journal, clock, runner).run()
    engine.renew(config, policy)
    if runner.last_tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Signals:
    """A context in which SIGINT and SIGTERM end the run of `driver` at its next step and set `asked`; a second one kills."""

    def __init__(self):
        self.asked = False
        self.driver: Driver | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame) -> None:
        self.asked = True
        if self.driver is not None:
            self.driver.stop = True
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


def model_of(args: argparse.Namespace) -> Model:
    """The model that --model, --device, --dtype and --seed describe."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ModelError(f"--device {device}: there are cpu, cuda and cuda:N; leave it out for what is there")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"--device {device}: torch finds no GPU; leave it out to run on the CPU")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    if device.startswith("cuda") and dtype == torch.float32:
        raise ModelError("--dtype float32: the GPU's attention kernels take bfloat16 and float16")
    if device == "cpu" and dtype != torch.float32:
        raise ModelError(f"--dtype {args.dtype}: on a CPU the kernels are interpreted, which is right in float32 only")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # Triton launches on the current one
    return load_model(args.model, dtype=dtype, device=device, seed=args.seed)


def engine_config(args: argparse.Namespace, model: Model) -> EngineConfig:
    """The engine's configuration. ValueError with the offending value."""
    if args.page_tokens < 1 or 64 % args.page_tokens:
        raise ValueError(f"--page-tokens {args.page_tokens} must divide 64")
    if args.memory_share > 1:
        raise ValueError(f"--memory-share {args.memory_share} is above 1")
    most = model.shape.max_context
    context = args.max_context or min(most, MOST_CONTEXT)
    if context > most:
        raise ValueError(f"--max-context {context} is above the model's {most}")
    check_end(args.drain, args.closed_loop)
    return EngineConfig(
        limits=Limits(args.max_batch, args.max_batch_tokens, context), operator=args.operator,
        page_tokens=args.page_tokens, memory_share=args.memory_share, prefix_cache=not args.no_prefix_cache,
        targets=TARGETS[args.targets], graphs=not args.no_graphs, seed=args.seed, keep_steps=args.output is not None,
        check_invariants=args.check_invariants, pins=args.pin, closed_loop=args.closed_loop,
        drain_s=args.drain,
        adapter_bytes=None if args.adapter_memory is None else int(args.adapter_memory * 2**30),
    )  # fmt: skip


def served_trace(args: argparse.Namespace, model: Model, config: EngineConfig, goodput: Mapping[str, float]) -> Trace:
    """The trace that the options describe, for this model. Its adapters know the pins: a wrong name is answered at once."""
    trace = with_slo(load_trace(args, replace(model.shape, max_context=config.limits.max_context)), goodput)
    residency.numbers_of(config.pins, trace.adapters)
    return trace


def find_profile(path: str | None, model: Model, *, measured: bool = True) -> Profile:
    """`profile_for` the name of a model that is loaded."""
    return profile_for(path, model.source if model.source in MODELS else model.shape.name, measured=measured)


def profile_for(path: str | None, name: str, *, measured: bool = True) -> Profile:
    """The profile of a file; else the model's measured one, if it may be that, else its analytic one. ProfileError where
    there is none."""
    if path is not None:
        return load_profile(path)
    for candidate in (f"h200-{name}.json", f"analytic-h200-{name}.json")[not measured :]:
        if (PROFILES / candidate).exists():
            return load_profile(PROFILES / candidate)
    raise ProfileError(f"no latency profile for the model {name!r}; policies predict with one: name it with --profile FILE")


def describe_model(model: Model) -> dict:
    """Facts for the record."""
    return {
        "name": model.shape.name, "weights": "random" if model.random else "checkpoint", "dtype": str(model.dtype),
        "parameters": sum(parameter.numel() for parameter in model.hf.parameters()),
    }  # fmt: skip


def describe_device(device: torch.device) -> dict:
    """Facts for the record. gpu: the beginning of the card's UUID, since two of one name differ by some percent."""
    import transformers
    import triton

    known = {"name": "cpu", "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {"name": properties.name, "gpu": str(properties.uuid)[:8]}
    return known | {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
