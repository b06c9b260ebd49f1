"""Where the kernels run: on the GPU, or in Triton's interpreter where there is none.

Import this before `triton`: the interpreter is chosen when a kernel is defined. It knows no kernel.
"""

from __future__ import annotations

import os
from functools import cache

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def device_name() -> str:
    """Name of the tile table for this machine, e.g. nvidia-h200; `interpreter` where there is no GPU."""
    if INTERPRETED:
        return "interpreter"
    return torch.cuda.get_device_name().lower().replace(" ", "-")


@cache
def has_dependent_launch() -> bool:
    """Programmatic dependent launch (a kernel's prologue overlaps its predecessor) exists from Hopper on."""
    return not INTERPRETED and torch.cuda.get_device_capability() >= (9, 0)


@cache
def processors() -> int:
    """Multiprocessors of the GPU; a few in the interpreter."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
