"""Launching without a GPU: a stand-in for the compiled kernel shows what is launched."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.errors import OutOfResources

from kernels import atmm as operator
from kernels import launch as launching
from kernels import precompile
from kernels.atmm import resolve
from kernels.batch import LoraBatch, LoraError, LoraPool, Projection
from kernels.launch import Launch
from kernels.tiles import Shape, Tiling, default

SHAPE = Shape(4096, (4096,), 16, 8, 8)


@pytest.fixture
def launched(monkeypatch):
    """What reached the driver."""
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
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 99, raising=False)
    return seen


def shrink_of(shape, tiling):
    return resolve(shape, tiling, torch.float16, mixture=False, strides=(shape.d_in, sum(shape.widths)))[0]


def test_a_bound_launch_passes_grid_stream_arguments_and_constants(launched):
    launch = shrink_of(SHAPE, Tiling(split=4))
    launch.bind(torch.device("cuda"))(1, 2, 3, 4, 5, 16, 32, 4)
    how = (4, 8, 1, 99, 7, False, True, None, None, (4, 1, 0), None, None, None)
    assert launched == [(*how, 1, 2, 3, 4, 5, 16, 32, 4, *launch.constants.values())]


@pytest.mark.parametrize(
    ("need", "asked", "given"),
    [
        (60_000, 0, 60_000), (60_000, 50_000, 60_000), (60_000, 115_712, 115_712), (49_153, 232_448, 232_448),
        (49_152, 232_448, 49_152), (1_000, 30_000, 30_000), (0, 0, 0),
    ],
    ids=["nothing asked", "less than it needs", "more", "all", "a kernel that may not have more", "as much as any may have",
         "none"],
)  # fmt: skip
def test_shared_memory_is_what_was_asked_for_and_never_less_than_needed(monkeypatch, launched, need, asked, given):
    launch = replace(shrink_of(SHAPE, Tiling(split=4)), shared_bytes=asked)
    compile_it = Launch.compile

    def compiled(launch):
        return SimpleNamespace(**vars(compile_it(launch)) | {"packed_metadata": (4, 1, need)})

    monkeypatch.setattr(Launch, "compile", compiled)
    launch.bind(torch.device("cuda"))(1)
    assert [call[9] for call in launched] == [(4, 1, given)]
    monkeypatch.setattr(launching, "_most_bytes", lambda: 227 << 10)
    assert launch.thins() == ((228 << 10) // (given + 1024) < (228 << 10) // (need + 1024))


def test_triton_packs_what_a_launch_takes_apart():
    packed = CUDABackend.pack_metadata(None, SimpleNamespace(num_warps=4, num_ctas=1, shared=60_000))
    assert packed == (4, 1, 60_000)
    assert replace(shrink_of(SHAPE, Tiling()), shared_bytes=70_000)._metadata(SimpleNamespace(packed_metadata=packed)) == (
        4, 1, 70_000)  # fmt: skip


def test_room_is_an_equal_share_of_a_multiprocessor(monkeypatch):
    monkeypatch.setattr(launching, "INTERPRETED", True)
    assert launching.room(2, 288) == 0, "the interpreter has no shared memory"
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(launching, "processors", lambda: 132)
    monkeypatch.setattr(launching, "_most_bytes", lambda: 227 << 10)
    assert launching.room(0, 288) == 0
    for residents in range(1, 17):
        taken = launching.room(residents, 288) + launching.KEPT_BYTES
        assert (228 << 10) // taken == residents
        assert taken % 128 == 0, "shared memory is given in units of 128 bytes"
    for programs, residents in ((1, 1), (132, 1), (133, 2), (264, 2), (265, 3), (288, 3)):
        assert launching.room(launching.EVEN, programs) == launching.room(residents, programs)
    assert launching.room(300, 288) == 0, "no share is left"


def test_unequal_shares_take_a_tiling_of_their_own(monkeypatch, launched):
    seen = []
    monkeypatch.setattr(operator, "lookup", lambda shape: seen.append(shape) or Tiling())
    pool = LoraPool({"o": Projection(64, (64,))}, layers=1, slots=2, rows=32, dtype=torch.float16)
    pool.reserve(0, 16)
    pool.reserve(1, 16)
    batch = LoraBatch(pool, 640)
    y = torch.zeros(640, 64, dtype=torch.float16)
    for rows in ((320, 320), (600, 40), (200, 40)):
        batch.update(np.repeat([0, 1], rows), route=False)
        operator.atmm(y, y, pool, batch, (0, "o"))
    batch.fix(600, 2, 16)
    operator.atmm(y, y, pool, batch, (0, "o"))
    assert [shape.uneven for shape in seen] == [False, True, False, True]


def test_a_tiling_that_does_not_fit_gives_way_to_the_default(monkeypatch, launched):
    monkeypatch.setattr(operator, "lookup", lambda shape: Tiling(k_block=512))
    bind = Launch.bind

    def refuses(launch, device):
        if launch.constants.get("BK") == 512:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return bind(launch, device)

    monkeypatch.setattr(Launch, "bind", refuses)
    batch = SimpleNamespace(merged=-1, pool=SimpleNamespace(device=torch.device("cuda")))

    def make(tiling):
        return resolve(SHAPE, tiling, torch.float16, mixture=False, strides=(4096, 4096))

    assert operator._choose(make, SHAPE, batch)[0] == default(SHAPE)


def test_what_is_compiled_ahead_is_what_a_call_launches(monkeypatch, launched):
    pool = LoraPool({"qkv": Projection(64, (64, 32, 32))}, layers=1, slots=3, rows=64, dtype=torch.float16)
    batch = LoraBatch(pool, 640)
    batch.fix(640, 4, 16, 2)
    batch.update(np.full(640, -1, np.int32), route=False)
    ahead = [launch.code for launch in operator.launches(pool, batch, "qkv")]
    bound = []
    monkeypatch.setattr(Launch, "bind", lambda launch, device: bound.append(launch.code) or (lambda *arguments: None))
    x, y = (torch.zeros(640, width, dtype=torch.float16) for width in (64, 128))
    operator.atmm(y, x, pool, batch, (0, "qkv"))
    assert bound == ahead


def test_many_kernels_are_compiled_on_all_cores_and_few_here(monkeypatch):
    here, everywhere = [], []
    monkeypatch.setattr(precompile, "compile_one", lambda kernel, *resolved: here.append(kernel) or "")
    monkeypatch.setattr(precompile, "in_parallel", lambda work, jobs: everywhere.extend(jobs) or [""] * len(jobs))
    launches = [shrink_of(SHAPE, Tiling(split=4, k_block=block)) for block in (64, 128, 64)]
    precompile.make_ready(launches)
    assert here == ["shrink", "shrink"], "each once"
    monkeypatch.setattr(precompile, "PATIENCE_S", 0.0)
    precompile.make_ready(launches)
    assert (len(here), len(everywhere)) == (2, 2)
    assert precompile._workers.cache_info().currsize == 0, "their memory on the GPU is free again"


def test_a_compiling_process_that_ends_says_what_to_do(monkeypatch):
    monkeypatch.setattr(precompile.os, "sched_getaffinity", lambda process: {3})
    with pytest.raises(LoraError, match="leave that much free"):
        precompile.in_parallel(os._exit, [(1,)])
    assert precompile.in_parallel(abs, [(-1,)]) == [1], "others take their place"
    assert precompile._workers()._max_workers == 1, "as many as the cores that this process may use"
    precompile._workers().shutdown()
    precompile._workers.cache_clear()
