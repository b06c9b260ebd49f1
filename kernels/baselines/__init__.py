"""Rival operators, each at its best, behind one calling convention: op(y, x, pool, batch, key), see kernels.batch.

`OPERATORS` names them; `operator(name)` imports one on demand. Each module documents the technique, its paper and what
is simplified, and says in CAPTURE how it goes into a CUDA graph:
* "free": a replay serves any batch of the captured size, if `inputs.refresh(batch)` was captured before it;
* "frozen": a replay serves the very segments, or the very adapters in the pool, that were captured, since the host looked
  at them. The engine, whose graphs outlive both, launches such an operator kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from kernels.batch import LoraError

OPERATORS = {
    "punica": "kernels.baselines.punica",
    "slora": "kernels.baselines.slora",
    "dlora": "kernels.baselines.dlora",
    "vllm": "kernels.baselines.vllm",
    "grouped": "kernels.baselines.grouped",
    "loop": "kernels.baselines.loop",
    "peft": "kernels.baselines.peft",
}


def operator(name: str) -> Callable[..., None]:
    """The rival called `name`. Raises LoraError that lists the names for an unknown one."""
    if name not in OPERATORS:
        raise LoraError(f"no rival operator {name!r}; there are {', '.join(OPERATORS)}")
    return import_module(OPERATORS[name]).op
