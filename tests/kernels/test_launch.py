"""Launching without a GPU: a stand-in for the compiled kernel shows what is launched, and a small device what fits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels import atmm as operator
from kernels import launch as launching
from kernels.atmm import resolve
from kernels.batch import LoraBatch, LoraPool, Projection
from kernels.launch import Launch
from kernels.tiles import Shape, Tiling, steadier

DEVICE = SimpleNamespace(
    multi_processor_count=10, shared_memory_per_multiprocessor=100 << 10, max_threads_per_multi_processor=2048
)


SHAPE = Shape(4096, (4096,), 16, 8, 8)


@pytest.fixture
def launched(monkeypatch):
    """What reached the driver. A kernel needs 256 bytes of shared memory a column of x, and 64 registers a thread."""
    seen = []

    def compile_it(launch):
        run = SimpleNamespace(launch_cooperative_grid=False, launch_pdl=True, launch=lambda *a: seen.append(a))
        metadata = SimpleNamespace(shared=launch.constants.get("BK", 128) * 256)
        return SimpleNamespace(
            n_regs=64, metadata=metadata, function=7, packed_metadata=(4, 1, 0), run=run, _init_handles=lambda: None
        )

    monkeypatch.setattr(Launch, "compile", compile_it)
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "_LOADED", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: DEVICE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    return seen


def shrink_of(shape, tiling):
    return resolve(shape, tiling, torch.float16, mixture=False, strides=(shape.d_in, sum(shape.widths)))[0]


def test_a_bound_launch_passes_grid_stream_arguments_and_constants(launched):
    launch = shrink_of(SHAPE, Tiling(split=4))
    launch.bind(torch.device("cuda"))(1, 2, 3, 4, 5, 16, 32)
    how = (4, 8, 1, 99, 7, False, True, None, None, (4, 1, 0), None, None, None)
    assert launched == [(*how, 1, 2, 3, 4, 5, 16, 32, *launch.constants.values())]


def test_places_are_what_shared_memory_registers_and_threads_allow(launched):
    assert [shrink_of(SHAPE, Tiling(k_block=k)).places for k in (128, 16, 8)] == [30, 80, 80]  # 33 KB each; registers
    assert shrink_of(SHAPE, Tiling(k_block=8, warps=16)).places == 20


def test_programs_that_meet_must_fit_with_half_to_spare(launched):
    assert shrink_of(SHAPE, Tiling("barrier", split=32)).places == 30
    assert shrink_of(Shape(4096, (4096,), 16, 1, 1), Tiling("barrier", split=8)).bind(torch.device("cuda"))
    with pytest.raises(OutOfResources, match="resident programs"):
        shrink_of(SHAPE, Tiling("barrier", split=32)).bind(torch.device("cuda"))


@pytest.mark.parametrize(("rows", "steady"), [((320,) * 2, False), ((600, 40), True)], ids=["equal", "uneven"])
def test_uneven_rows_that_need_another_round_take_a_steadier_tiling(monkeypatch, launched, rows, steady):
    tuned = Tiling("two", 64, 128, 3, 4, 3, 64)
    monkeypatch.setattr(operator, "INTERPRETED", False)
    monkeypatch.setattr(operator, "lookup", lambda shape, meeting=True: tuned)
    pool = LoraPool({"o": Projection(64, (64,))}, layers=1, slots=2, rows=32, dtype=torch.float16)
    pool.reserve(0, 16)
    pool.reserve(1, 16)
    batch = LoraBatch(pool, 640)
    batch.update(np.repeat([0, 1], rows), route=False)
    shape = Shape(64, (64,), 16, 640, 2)

    def make(tiling):
        return resolve(shape, tiling, torch.float16, mixture=False, strides=(64, 64))

    chosen, runs = operator._choose(make, shape, batch)  # 30 places: ten equal tiles of three parts, uneven eleven
    assert (chosen, len(runs)) == (steadier(tuned) if steady else tuned, 2)
    assert batch.tiles(64) == (11 if steady else 10)
