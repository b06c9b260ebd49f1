"""How far a latency model is from each step that an engine took, by kind of step, and which kinds the error comes from.

The engine's own batches are held against what the model's tables say of them, so that no difference in scheduling is in
these numbers. A first step is counted from when the GPU was free before it, so that it holds the boundary of its lease;
leases that waited for something that no record tells are left out. It reads tables of results and knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from traces.record import RunResult
from traces.result_files import ResultError

KINDS = ("decode, further steps", "decode, first of a lease", "with prompts", "with images", "with a switch")


class StepError(NamedTuple):
    """Of one kind of steps: how many, their time in all (ms) as measured and as modelled, and the errors of single steps in
    percent: median and 95th percentile of their size, and the mean with its sign."""

    kind: str
    steps: int
    measured_ms: float
    modelled_ms: float
    median: float
    p95: float
    mean: float


def step_errors(engine: RunResult, simulated: RunResult) -> list[StepError]:
    """By KINDS, and "all". ResultError where either record lacks what it takes."""
    steps, leases, model = _aligned(engine, simulated)
    end = steps["start_ns"] + leases["first_ns"]
    lead = end - model["free_ns"]
    lead_model = model["boundary_ns"] + model["model_first_ns"]
    further = steps["steps"] - 1
    rest = steps["duration_ns"] - leases["first_ns"]
    known = model["known"] > 0
    prompts = steps["prefills"] > 0
    images, switch = steps["images"] > 0, leases["switch_rank"] > 0
    first = {
        KINDS[1]: known & ~prompts & ~switch, KINDS[2]: known & prompts & ~images & ~switch,
        KINDS[3]: known & images & ~switch, KINDS[4]: known & switch,
    }  # fmt: skip
    many = further > 0
    parts = [(KINDS[0], rest[many] / further[many], model["model_rest_ns"][many] / further[many], further[many])]
    parts += [(kind, lead[rows], lead_model[rows], np.ones(int(rows.sum()), int)) for kind, rows in first.items()]
    together = tuple(np.concatenate([part[i] for part in parts]) for i in (1, 2, 3))
    return [_error(*part) for part in (*parts, ("all", *together)) if len(part[1])]


def _error(kind: str, measured: np.ndarray, modelled: np.ndarray, times: np.ndarray) -> StepError:
    off = np.repeat(100 * (modelled / np.maximum(measured, 1) - 1), times)
    median, p95 = np.percentile(np.abs(off), (50, 95))
    return StepError(
        kind, int(times.sum()), float((measured * times).sum() / 1e6), float((modelled * times).sum() / 1e6), float(median),
        float(p95), float(off.mean()),
    )  # fmt: skip


def _aligned(engine: RunResult, simulated: RunResult) -> tuple[Mapping, Mapping, Mapping]:
    leases, model = engine.details.get("leases"), simulated.details.get("predicted")
    if engine.steps is None or leases is None:
        raise ResultError(f"the engine's record of {engine.policy} tells nothing of its steps; replay again with --output")
    if model is None:
        raise ResultError(f"the simulated record of {engine.policy} has no predictions; make it by python -m sim replicate")
    if not np.array_equal(model["start_ns"], engine.steps["start_ns"]):
        raise ResultError(f"the predictions for {engine.policy} are of another replay; run python -m sim replicate again")
    return engine.steps, leases, model


def load_of(engine: RunResult) -> float:
    """Share of the time, from the first arrival to the end, in which the engine computed."""
    if engine.steps is None or not len(engine.steps["start_ns"]):
        return 0.0
    begin = int(engine.requests["arrival_ns"].min())
    span = int((engine.steps["start_ns"] + engine.steps["duration_ns"]).max()) - begin
    return float(engine.steps["duration_ns"].sum()) / max(1, span)
