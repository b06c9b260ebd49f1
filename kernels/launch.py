"""One Triton kernel with everything but its run-time arguments resolved, and a cheap way to launch it.

It knows Triton's launcher (pinned: 3.6), not what any kernel computes.
"""

from __future__ import annotations

from kernels.target import INTERPRETED, processors  # isort: skip

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton

EVEN = -1
"""`room` for as many programs on a multiprocessor as the grid needs if it is spread evenly."""
UNASKED_BYTES = 48 << 10
"""Shared memory that any kernel may take; Triton raises the limit only of those that need more than this."""
KEPT_BYTES = 1 << 10
"""What the driver takes of a multiprocessor's shared memory for each program (CUDA C++ Programming Guide, 9.0)."""
_LOADED: dict[str, object] = {}


@cache
def _most_bytes() -> int:
    """Shared memory that one program may have, which is a multiprocessor's without what is kept."""
    driver = triton.runtime.driver.active
    return driver.utils.get_device_properties(driver.get_current_device())["max_shared_mem"]


def room(residents: int, programs: int) -> int:
    """`shared_bytes` of a launch of so many programs of which a multiprocessor shall hold at most `residents` at once.

    0: as many as fit. EVEN: as few as hold all programs; where more fit, the hardware may put three on one multiprocessor
    and one on another, and the one with three ends last.
    """
    if INTERPRETED or not residents:
        return 0
    if residents == EVEN:
        residents = -(-programs // processors())
    return max(0, (_most_bytes() + KEPT_BYTES) // residents // 128 * 128 - KEPT_BYTES)


@dataclass(frozen=True)
class Launch:
    """types: of the run-time arguments in order: a dtype for a tensor, for an integer a value with its usual alignment.

    shared_bytes: that a program is to have at least, so that fewer fit on a multiprocessor (`room`).
    """

    kernel: triton.JITFunction
    grid: tuple[int, int]
    constants: dict
    types: dict
    warps: int = 4
    shared_bytes: int = 0

    @cached_property
    def code(self) -> str:
        """What decides the machine code: all but the grid and `shared_bytes`."""
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
        scratch, metadata, hooks = (None, None), (self._metadata(compiled), None), (None, None)
        between = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, *scratch, *metadata, *hooks)
        constants = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
        stream_of, index, start = torch._C._cuda_getCurrentRawStream, device.index or 0, run.launch

        def launch_now(*arguments):
            start(*before, stream_of(index), *between, *arguments, *constants)

        return launch_now

    def thins(self) -> bool:
        """Whether `shared_bytes` lets fewer programs on a multiprocessor than would fit. OutOfResources where none does."""
        compiled = self.load()
        given, need = self._metadata(compiled)[-1], compiled.packed_metadata[-1]
        whole = _most_bytes() + KEPT_BYTES
        return whole // (given + KEPT_BYTES) < whole // (need + KEPT_BYTES)

    def _metadata(self, compiled) -> tuple[int, int, int]:
        """(warps, programs of a cluster, bytes of shared memory), as Triton's launcher takes them.

        A kernel that may not have more than UNASKED_BYTES gets no more.
        """
        warps, cluster, need = compiled.packed_metadata
        most = UNASKED_BYTES if need <= UNASKED_BYTES else self.shared_bytes
        return warps, cluster, max(need, min(self.shared_bytes, most))


def argument(tensor: torch.Tensor):
    """A tensor as a bound launch takes it: its address, cheapest for the host; the interpreter takes the tensor."""
    return tensor if INTERPRETED else tensor.data_ptr()


def layers(tensor: torch.Tensor) -> list:
    """One argument a layer of a tensor [layers, ...] that stays in place, and that its owner keeps alive."""
    if INTERPRETED:
        return list(tensor)
    return [tensor.data_ptr() + i * tensor.stride(0) * tensor.element_size() for i in range(len(tensor))]
