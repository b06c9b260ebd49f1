"""One Triton kernel with everything but its run-time arguments resolved, and a cheap way to launch it.

It knows Triton's launcher (pinned: 3.6), not what any kernel computes.
"""

from __future__ import annotations

from kernels.target import INTERPRETED  # isort: skip

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import triton

_LOADED: dict[str, object] = {}


@dataclass(frozen=True)
class Launch:
    """types: of the run-time arguments in order: a dtype for a tensor, for an integer a value with its usual alignment."""

    kernel: triton.JITFunction
    grid: tuple[int, int]
    constants: dict
    types: dict
    warps: int = 4

    @cached_property
    def code(self) -> str:
        """What decides the machine code: all but the grid."""
        return f"{self.kernel.__name__} {sorted(self.constants.items())} {self.types} {self.warps}"

    def compile(self):
        """The compiled kernel for this device, from Triton's cache where it is there."""
        arguments = list(self.types.values())
        options = {"num_warps": self.warps} | ({"launch_pdl": True} if self.constants.get("PDL") else {})
        return self.kernel.warmup(*arguments, grid=self.grid, **self.constants, **options)

    def load(self):
        """The compiled kernel with its module on the device. OutOfResources where it does not fit, each time."""
        kernel = _LOADED.get(self.code)
        if kernel is None:
            kernel = self.compile()
            kernel._init_handles()
            _LOADED[self.code] = kernel
        return kernel

    def bind(self, device: torch.device) -> Callable:
        """A function of the run-time arguments (`argument` of each tensor, in the kernel's order) that launches it.

        It calls the compiled kernel's launcher directly: Triton's own way costs the host several times more.
        OutOfResources where it does not fit the device.
        """
        if INTERPRETED:
            return lambda *arguments: self.kernel[self.grid](*arguments, **self.constants)
        compiled = self.load()
        run = compiled.run
        before = (*self.grid, 1)
        scratch, metadata, hooks = (None, None), (compiled.packed_metadata, None), (None, None)
        between = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, *scratch, *metadata, *hooks)
        constants = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
        stream_of, index, start = torch._C._cuda_getCurrentRawStream, device.index or 0, run.launch

        def launch_now(*arguments):
            start(*before, stream_of(index), *between, *arguments, *constants)

        return launch_now


def argument(tensor: torch.Tensor):
    """A tensor as a bound launch takes it: its address, cheapest for the host; the interpreter takes the tensor."""
    return tensor if INTERPRETED else tensor.data_ptr()


def layers(tensor: torch.Tensor) -> list:
    """One argument a layer of a tensor [layers, ...] that stays in place, and that its owner keeps alive."""
    if INTERPRETED:
        return list(tensor)
    return [tensor.data_ptr() + i * tensor.stride(0) * tensor.element_size() for i in range(len(tensor))]
