"""Programmatic dependent launch: how kernels of one chain overlap; and how programs of one kernel wait for each other.

A kernel launched with `launch_pdl` starts as soon as every program of its predecessor has called `trigger` or ended, and
sees its predecessor's results only after `wait`. Every program must call `wait` before it ends: only then does the end of
a kernel mean that all before it have ended too. In the interpreter both do nothing. It knows no kernel.
"""

from __future__ import annotations

from kernels.target import INTERPRETED, has_dependent_launch  # isort: skip  (before triton: it may choose the interpreter)

import triton
import triton.language as tl

if INTERPRETED:

    @triton.jit
    def wait():
        """Nothing: the interpreter runs one kernel after the other."""

    @triton.jit
    def trigger():
        """Nothing: the interpreter runs one kernel after the other."""

    @triton.jit
    def fetch(at):
        """Nothing: the interpreter has no cache."""

    @triton.jit
    def all_stored():
        """Nothing: the interpreter has one thread."""

    @triton.jit
    def until(count, target):
        """Nothing: the interpreter runs the programs in their order."""

else:

    @triton.jit
    def fetch(at):
        """Ask for the cache lines at these addresses, into L2: whoever loads them afterwards waits less."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def all_stored():
        """Wait for all threads of the program, as tl.debug_barrier; with that in its body a loop would not be pipelined."""
        tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def until(count, target):
        """Wait until a counter in memory has reached the target, and see what was written before.

        One thread reads (Triton makes it a load) and all go on together: by a load of every thread's own, some might still
        wait when the program has told that it is through, and whoever resets the counter then would leave them there.
        """
        while tl.atomic_add(count, 0, sem="acquire") < target:
            pass

    from triton.language.extra.cuda import gdc_launch_dependents as trigger  # noqa: F401
    from triton.language.extra.cuda import gdc_wait as wait  # noqa: F401


def chained() -> dict:
    """The arguments PDL and, where there is dependent launch, launch_pdl of a Triton call."""
    return {"PDL": True, "launch_pdl": True} if has_dependent_launch() else {"PDL": False}
