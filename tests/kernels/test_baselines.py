"""Every rival, in each of its forms, against the float32 reference: mixed ranks, fused widths, any order of rows."""

import random
from importlib import import_module

import numpy as np
import pytest
import torch

from kernels import baselines
from kernels.baselines import dlora, grouped, inputs, punica, slora, vllm
from kernels.batch import LoraBatch, LoraError, LoraPool, Projection
from kernels.reference import reference, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
OPS = {name: baselines.operator(name) for name in baselines.OPERATORS}
FREE = [name for name, module in baselines.OPERATORS.items() if import_module(module).CAPTURE == "free"]
CHOICES = ((punica, "bgmv", "sgmv"), (slora, "mbgmv", "mbgmm"), (dlora, "gathered", "einsum"))
FORMS = {name: OPS[name] for name in ("vllm", "grouped", "loop", "peft")} | {
    form: getattr(module, form) for module, *forms in CHOICES for form in forms
}
PROJECTIONS = {"o": Projection(64, (48,)), "qkv": Projection(32, (48, 16, 24))}  # 24: no block of columns is full
TOLERANCE = 1e-2
LAYERS = 2


def make_pool(ranks, dtype, seed=0, slots=None, rows=128):
    """Adapter j of rank ranks[j] in slot j; scales 0.5, 0.75, ... so that a forgotten scale shows."""
    rng = np.random.default_rng(seed)
    pool = LoraPool(PROJECTIONS, layers=LAYERS, slots=slots or len(ranks), rows=rows, dtype=dtype, device=DEVICE)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(DEVICE, dtype)

    for slot, rank in enumerate(ranks):
        factors = {
            (layer, name): [(draw(rank, p.d_in) / p.d_in**0.5, draw(rank, width)) for width in p.widths]
            for layer in range(LAYERS) for name, p in PROJECTIONS.items()
        }
        pool.put(slot, factors, scale=0.5 + 0.25 * slot)
    return pool


def make_batch(pool, index, max_tokens=32):
    batch = LoraBatch(pool, max_tokens)
    batch.update(np.array(index, np.int32))
    return batch


def draw_xy(pool, tokens, key, seed=1):
    rng = np.random.default_rng(seed)
    p = pool.projections[key[1]]
    shapes = ((tokens, p.d_in), (tokens, p.d_out))
    return (torch.from_numpy(rng.standard_normal(shape)).to(DEVICE, pool.dtype) for shape in shapes)


def run(op, pool, index, key, seed=1):
    """(got, truth) of one call on fresh random inputs."""
    batch = make_batch(pool, index)
    x, y = draw_xy(pool, len(index), key, seed)
    truth = reference(y, x, pool, batch, key)
    op(y, x, pool, batch, key)
    return y, truth


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_mixed_ranks_fused_widths_and_unsorted_rows_equal_the_reference(form, dtype):
    pool = make_pool((8, 16, 33), dtype)
    index = [2, 0, -1, 1, 0, 2]
    for key in ((0, "o"), (1, "qkv")):
        got, truth = run(FORMS[form], pool, index, key)
        assert relative_error(got, truth) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_random_batches_equal_the_reference(form):
    rng = random.Random(form)
    for seed in range(2):
        ranks = [rng.choice((1, 4, 16, 20, 32)) for _ in range(rng.randint(1, 4))]
        pool = make_pool(ranks, torch.float32, seed)
        index = [rng.randrange(-1, len(ranks)) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.5:
            index.sort()
        got, truth = run(FORMS[form], pool, index, (seed % LAYERS, rng.choice(("o", "qkv"))), seed)
        assert relative_error(got, truth) < 1e-5, (ranks, index)


@pytest.mark.parametrize("form", FORMS)
def test_one_rank_for_all_sorted_rows_and_a_single_token(form):
    pool = make_pool((16, 16, 16), torch.float16)
    for index in ([0, 0, 1, 2], [1]):
        got, truth = run(FORMS[form], pool, index, (0, "o"))
        assert relative_error(got, truth) < TOLERANCE


@pytest.mark.parametrize("name", baselines.OPERATORS)
def test_nothing_happens_without_rows_or_without_adapters(name):
    pool = make_pool((16,), torch.float16)
    for index in ([], [-1], [-1, -1, -1]):
        batch = make_batch(pool, index)
        x, y = draw_xy(pool, len(index), (0, "qkv"))
        before = y.clone()
        OPS[name](y, x, pool, batch, (0, "qkv"))
        assert torch.equal(y, before)


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_row_stays_alone(form):
    pool = make_pool((16, 8), torch.float16)
    index, key = [0, 1, 0, -1, 1, 0], (0, "o")
    batch = make_batch(pool, index)
    x, y = draw_xy(pool, len(index), key)
    x[2, 5] = float("nan")
    x[3, 0] = float("nan")  # a row with no adapter: its x is not even looked at
    truth = reference(y, x, pool, batch, key)
    FORMS[form](y, x, pool, batch, key)
    assert y.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]
    sound = [0, 1, 3, 4, 5]
    assert relative_error(y[sound], truth[sound]) < TOLERANCE


@pytest.mark.parametrize("name", [n for n in baselines.OPERATORS if n not in ("loop", "peft")])
def test_a_fixed_batch_serves_fewer_rows_than_its_shape(name):
    """As in a captured graph: the tensors keep the size they were fixed for, and the rows behind are left alone."""
    pool = make_pool((16, 8, 8), torch.float16)
    key, batch = (0, "o"), LoraBatch(pool, 16)
    batch.fix(tokens=12, adapters=3, rank=16)
    for index in ([0] * 12, [1, -1, 2, 2], [2, 2, 1, 0, 0, 0, 0]):
        batch.update(np.array(index, np.int32))
        inputs.refresh(batch)
        x, y = draw_xy(pool, 12, key)
        before = y.clone()
        truth = reference(y[: len(index)], x[: len(index)], pool, batch, key)
        OPS[name](y, x, pool, batch, key)
        assert relative_error(y[: len(index)], truth) < TOLERANCE
        assert torch.equal(y[len(index) :], before[len(index) :])


def test_segments_list_used_slots_in_order_and_end_where_they_end():
    pool = make_pool((8, 8, 8, 8), torch.float16, slots=5)
    batch = make_batch(pool, [3, -1, 1, 3, 3, -1])
    table = inputs.segments(batch)
    assert {name: values.tolist() for name, values in table._asdict().items()} == {
        "slot": [1, 3, -1, -1, -1], "start": [0, 1, 0, 0, 0], "stop": [1, 4, 0, 0, 0], "ends": [0, 1, 1, 4, 4],
    }
    assert inputs.segments(batch).slot is table.slot
    batch.update(np.array([0, 0, 2], np.int32))
    assert inputs.segments(batch).ends.tolist() == [2, 2, 3, 3, 3]


def test_column_blocks_cover_each_slice_once():
    widths, block = (48, 16, 24), 32
    assert inputs.column_blocks(Projection(32, widths), block) == 2 + 1 + 1
    assert inputs.width_constants(Projection(32, (48,))) == {"W0": 48, "W1": 0, "W2": 0}


def test_vllm_takes_its_default_tiles_without_empty_splits():
    assert vllm.shrink_tile(1, 4096) == vllm.ShrinkTile(32, 16, 256, 16)
    assert vllm.shrink_tile(127, 32768) == vllm.ShrinkTile(32, 16, 256, 64)
    assert vllm.shrink_tile(128, 4096) == vllm.ShrinkTile(32, 16, 32, 8)


def test_grouped_reads_an_even_pool_where_it_lies_and_copies_an_uneven_one():
    even = make_pool((16, 16), torch.float16)
    a, _, _ = even.factors((0, "o"))
    assert grouped.even_spacing(even) == (0, 16)
    assert grouped.stacked(a[0], even).data_ptr() == a[0].data_ptr()
    uneven = make_pool((8, 33), torch.float16)
    a, _, _ = uneven.factors((0, "o"))
    assert grouped.even_spacing(uneven) is None
    copied = grouped.stacked(a[0], uneven)
    assert copied.shape == (2, 48, 64)
    assert not copied[0, 16:].any()
    assert torch.equal(copied[1], a[0][16:64])
    with pytest.raises(LoraError, match="none of the 4 slots holds an adapter"):
        grouped.stacked(a[0], make_pool((), torch.float16, slots=4))


@pytest.mark.parametrize("tokens", [1, 97])
@pytest.mark.parametrize("name", FREE)
def test_what_a_graph_captures_asks_the_host_nothing_about_the_adapters(name, tokens, monkeypatch):
    """The engine captures before any adapter is there, and replays after others came: either form, on an empty pool."""
    monkeypatch.setattr(dlora, "GATHER_LAUNCH_ROWS", 0)
    pool, key = make_pool((), torch.float16, slots=4), (0, "o")
    batch = LoraBatch(pool, 97)
    batch.fix(tokens, adapters=4, rank=32)
    batch.update(np.full(tokens, -1, np.int32))
    pool.ranks = pool.true_ranks = pool.offsets = pool.scales = None
    x, y = draw_xy(pool, tokens, key)
    before = y.clone()
    inputs.refresh(batch)
    OPS[name](y, x, pool, batch, key)
    assert torch.equal(y, before)


def test_the_operators_that_a_graph_cannot_hold_are_known():
    assert set(OPS) - set(FREE) == {"grouped", "loop", "peft"}


CHOSEN = {  # module -> tokens of one adapter, form
    punica: {2: "bgmv", 16: "bgmv", 17: "sgmv"},
    slora: {2: "mbgmv", 96: "mbgmv", 97: "mbgmm"},
    dlora: {2: "gathered", 3: "einsum"},  # 3 x tokens x rank 16 against the pool's 128 rows
}


@pytest.mark.parametrize("module", CHOSEN, ids=("punica", "slora", "dlora"))
def test_the_number_of_rows_chooses_the_form(monkeypatch, module):
    taken = {}
    monkeypatch.setattr(dlora, "GATHER_LAUNCH_ROWS", 0)
    for form in ("bgmv", "sgmv", "mbgmv", "mbgmm", "gathered", "einsum"):
        if hasattr(module, form):
            monkeypatch.setattr(module, form, lambda y, *_, form=form: taken.update({len(y): form}))
    pool = make_pool((16,), torch.float16)
    for tokens in CHOSEN[module]:
        x, y = draw_xy(pool, tokens, (0, "o"))
        module.op(y, x, pool, make_batch(pool, [0] * tokens, max_tokens=97), (0, "o"))
    assert taken == CHOSEN[module]


def test_bad_calls_are_named():
    pool = make_pool((16, 16), torch.float16)
    batch = make_batch(pool, [0, 1])
    x, y = draw_xy(pool, 2, (0, "o"))
    op = OPS["vllm"]
    with pytest.raises(LoraError, match="no rival operator 'cutlass'; there are punica, slora"):
        baselines.operator("cutlass")
    with pytest.raises(LoraError, match=r"x of \(0, 'o'\) is \(1, 64\)"):
        op(y, x[:1], pool, batch, (0, "o"))
    with pytest.raises(LoraError, match=r"y of \(0, 'o'\) is \(2, 48\) torch.float32"):
        op(y.float(), x, pool, batch, (0, "o"))
    batch.update(np.array([0, 1], np.int32), merged=1)
    with pytest.raises(LoraError, match="slot 1 is merged"):
        op(y, x, pool, batch, (0, "o"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FREE)
def test_a_captured_graph_replays_with_another_batch(name):
    pool = make_pool((16, 16, 16), torch.bfloat16)
    key, batch = (0, "qkv"), LoraBatch(pool, 16)
    batch.fix(tokens=12, adapters=3, rank=16)
    x, y = draw_xy(pool, 12, key)
    start = y.clone()
    batch.update(np.array([0] * 12, np.int32))
    OPS[name](y, x, pool, batch, key)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch.route()
        inputs.refresh(batch)
        OPS[name](y, x, pool, batch, key)
    for index in ([1] * 12, [2, 0, -1, 1, 1, 0, 2, 2], [0, 0, 0, 0, 1, 2]):
        batch.update(np.array(index, np.int32), route=False)
        y.copy_(start)
        truth = reference(y[: len(index)], x[: len(index)], pool, batch, key)
        graph.replay()
        assert relative_error(y[: len(index)], truth) < TOLERANCE
        assert torch.equal(y[len(index) :], start[len(index) :])
