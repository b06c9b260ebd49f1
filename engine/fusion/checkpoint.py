"""Checkpoints of a training: one safetensors file with the weights, AdamW's moments, and a JSON of the rest; and locks.

Written beside and then put in place, so that a process killed at any moment leaves the last one or the one before.
Everything random in a training is drawn from (seed, step), so that no generator's state needs keeping.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

STATE = "state"
ASK_AGAIN_S = 0.1


class OutOfTime(Exception):
    """The time that was given is used up. All that was done is on the disk; the same command goes on from there."""


def stop_if_late(deadline: float | None) -> None:
    """Raise OutOfTime where `deadline` (of time.monotonic) has passed. Called right after a checkpoint."""
    if deadline is not None and time.monotonic() > deadline:
        raise OutOfTime


@contextmanager
def locked(path: Path, deadline: float | None = None) -> Iterator[None]:
    """Only one process at a time makes `path`; the lock of a killed one is free. OutOfTime where it is not by `deadline`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stop_if_late(deadline)
                time.sleep(ASK_AGAIN_S)
        yield


def save(path: Path, tensors: Mapping[str, torch.Tensor], state: Mapping) -> None:
    """Write `tensors` and the JSON-able `state` to `path`, whole or not at all."""
    from safetensors.torch import save_file

    unfinished = path.with_name(f".{path.name}.partial")
    save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, unfinished, {STATE: json.dumps(state)})
    handle = os.open(unfinished, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    os.replace(unfinished, path)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """(tensors on the CPU, state), or None where there is no checkpoint yet."""
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt", "cpu") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()[STATE])  # noqa: SIM118


def training_tensors(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """The parameters by name, and AdamW's moments of each."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight:{name}"] = parameter.data
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value
    return tensors


def restore(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter],
            optimizer: torch.optim.AdamW) -> None:
    """Put back what `training_tensors` gave."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight:{name}"])
            moments = {key: tensors.get(f"{key}:{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if moments["step"] is not None:
                step = moments.pop("step")
                moved = {key: value.to(parameter.device, copy=True) for key, value in moments.items()}
                on = parameter.device if optimizer.defaults.get("fused") or optimizer.defaults.get("capturable") else "cpu"
                optimizer.state[parameter] = {"step": step.to(on), **moved}


def optimizer_of(parameters: Mapping[str, torch.nn.Parameter], learning_rate: float,
                 weight_decay: float) -> torch.optim.AdamW:
    """AdamW, fused on a GPU."""
    values = list(parameters.values())
    return torch.optim.AdamW(values, learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98),
                             fused=values[0].is_cuda or None)  # fmt: skip
