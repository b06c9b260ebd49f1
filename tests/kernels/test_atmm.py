"""The operator against float32: all forms, mixed ranks, fused slices, mixture, strided rows, NaN, nothing to do."""

import itertools

import numpy as np
import pytest
import torch

from kernels import atmm as operator
from kernels import skinny
from kernels.atmm import atmm, fitting, linear, resolve
from kernels.batch import LoraBatch, LoraError, LoraPool, Projection
from kernels.launch import Launch
from kernels.linear_tiles import Tile
from kernels.reference import reference, relative_error
from kernels.tiles import FORMS as FORMS_OF_ALL
from kernels.tiles import Shape, Tiling
from kernels.timing import in_turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16, torch.float32)
PROJECTIONS = {"o": Projection(96, (64,)), "qkv": Projection(96, (64, 32, 16))}
RANKS = (3, 16, 32, 20, 8)
FORMS = {
    "planes": Tiling(k_block=32, split=3, n_block=32),
    "more parts than columns": Tiling(k_block=64, split=9, n_block=32),
    "long tiles": Tiling(k_block=32, split=2, rows=32, expand_rows=16, n_block=16, span=2),
    "halves that meet": Tiling("under", k_block=32, split=3, n_block=32, rank_block=16),
    "one launch": Tiling("one", rows=16, k_block=32, n_block=16, span=2),
    "shared steps": Tiling("stream", k_block=32, split=3, n_block=16, residents=1, expand_residents=3),
    "shared long steps": Tiling("stream", rows=32, expand_rows=32, k_block=64, split=1, n_block=32, span=2),
    "default": None,
}


def world(dtype, tokens=37, ranks=RANKS, seed=0, projections=PROJECTIONS):
    """A pool of random adapters and a random packed step over them, base rows included."""
    random = torch.Generator().manual_seed(seed)
    rows = sum(-(-rank // 16) * 16 for rank in ranks)
    pool = LoraPool(projections, layers=2, slots=len(ranks), rows=rows, dtype=dtype, device=DEVICE)
    for slot, rank in enumerate(ranks):
        factors = {
            (layer, name): [
                (torch.randn(rank, p.d_in, generator=random) * 0.2, torch.randn(rank, w, generator=random) * 0.2)
                for w in p.widths
            ]
            for name, p in projections.items()
            for layer in range(2)
        }
        pool.put(slot, factors, scale=0.5 + slot)
    return pool, LoraBatch(pool, 48), np.random.default_rng(seed).integers(-1, len(ranks), tokens), random


def tensors(pool, key, tokens, random):
    p = pool.projections[key[1]]
    x, y = torch.randn(tokens, p.d_in, generator=random), torch.randn(tokens, p.d_out, generator=random)
    return x.to(DEVICE, pool.dtype), y.to(DEVICE, pool.dtype)


@pytest.mark.parametrize("form", FORMS_OF_ALL)
@pytest.mark.parametrize("mixture", [False, True])
def test_a_launch_has_every_argument_of_its_kernel(form, mixture):
    shape = Shape(96, (64, 32), 16, 8, 3)
    tiling = fitting(Tiling(form, split=4), 96, mixture=mixture)
    for launch in resolve(shape, tiling, torch.float16, mixture=mixture, strides=(96, 96)):
        names = [*launch.types, *launch.constants]
        assert names == launch.kernel.arg_names
        assert [*launch.constants] == [n for n in names if "constexpr" in str(launch.kernel.fn.__annotations__.get(n))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_float32(form, dtype):
    pool, batch, index, random = world(dtype)
    all_of_them = [*itertools.product((-1, 2), ((1, "o"), (0, "qkv")))]
    whole = DEVICE == "cuda" or (form, dtype) == ("default", torch.float16)
    one = all_of_them[3 if dtype is DTYPES[0] else 0]  # the interpreter takes seconds for each
    for merged, key in all_of_them if whole else [one]:
        batch.update(index, merged)
        x, y = tensors(pool, key, len(index), random)
        truth = reference(y, x, pool, batch, key)
        atmm(y, x, pool, batch, key, tiling=FORMS[form])
        assert relative_error(y, truth) < 1e-2, (merged, key)


@pytest.mark.parametrize("merged", [-1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_steps_of_many_rows_keep_v_in_the_factors_type(monkeypatch, form, merged):
    monkeypatch.setattr(operator, "MANY_ROWS", 16)
    pool, batch, index, random = world(DTYPES[0])
    batch.update(index, merged)
    x, y = tensors(pool, (1, "o"), len(index), random)
    expected = reference(y, x, pool, batch, (1, "o"))
    atmm(y, x, pool, batch, (1, "o"), tiling=FORMS[form])
    assert relative_error(y, expected) < 1e-2
    types = [operator.planes_type(Shape(96, (64,), 32, tokens, 5), pool.dtype) for tokens in (15, 16)]
    assert types == [torch.float32, pool.dtype]


def test_a_later_call_is_checked_as_the_first():
    """Of a shape that a plan is kept for: fewer rows, other widths, another pool or an odd address are no such call."""
    pool, batch, index, random = world(DTYPES[0])
    batch.update(index)
    x, y = tensors(pool, (1, "o"), len(index), random)
    atmm(y, x, pool, batch, (1, "o"))
    before, odd = y.clone(), torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x)
    for given, words in (
        ((y[:2], x, pool), r"y has shape \(2, "),
        ((y, x[:, :-8], pool), "x has shape"),
        ((y, x, world(DTYPES[0])[0]), "another pool"),
        ((y, odd, pool), "start on 16 bytes"),
    ):
        with pytest.raises(LoraError, match=words):
            atmm(*given, batch, (1, "o"))
    assert torch.equal(y, before)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed):
    choose = np.random.default_rng(seed)
    widths = tuple(int(8 * w) for w in choose.integers(2, 12, choose.integers(1, 4)))
    projections = {"p": Projection(int(8 * choose.integers(2, 20)), widths)}
    ranks = tuple(choose.integers(1, 70, 3).tolist())
    pool, batch, index, random = world(DTYPES[0], int(choose.integers(1, 48)), ranks, seed, projections)
    batch.update(index)
    x, y = tensors(pool, (1, "p"), len(index), random)
    truth = reference(y, x, pool, batch, (1, "p"))
    atmm(y, x, pool, batch, (1, "p"))
    assert relative_error(y, truth) < 1e-2, (projections, ranks)


def test_rank_256():
    pool, batch, _, random = world(DTYPES[1], 3, (256, 16))
    batch.update(np.array([0, 1, 0]))
    x, y = tensors(pool, (0, "o"), 3, random)
    truth = reference(y, x, pool, batch, (0, "o"))
    atmm(y, x, pool, batch, (0, "o"))
    assert relative_error(y, truth) < 1e-2


def test_rows_without_a_branch_keep_every_bit():
    pool, batch, index, random = world(DTYPES[0])
    batch.update(index)
    x, y = tensors(pool, (0, "o"), len(index), random)
    before = y.clone()
    atmm(y, x, pool, batch, (0, "o"))
    base = torch.from_numpy(index < 0)
    assert base.any()
    assert torch.equal(y.cpu()[base], before.cpu()[base])


def test_nan_stays_in_its_row():
    pool, batch, _, random = world(DTYPES[1])
    for form in FORMS.values():
        batch.update(np.array([0, 3, 0, 1, 3]))
        x, y = tensors(pool, (0, "o"), 5, random)
        x[1] = float("nan")
        atmm(y, x, pool, batch, (0, "o"), tiling=form)
        assert y.isnan().any(1).tolist() == [False, True, False, False, False]


def test_one_adapter_that_is_not_a_number_touches_no_other_row():
    pool, batch, _, random = world(DTYPES[1])
    batch.update(np.array([0, 1, 2]))
    pool.views(1, (0, "o"))[0][0].fill_(float("nan"))
    x, w, b, _ = with_linear(pool, (0, "o"), 3, random)
    for form in FORMS.values():
        assert linear(x, w, b, pool, batch, (0, "o"), tiling=form).isnan().all(1).tolist() == [False, True, False]


def test_stale_scratch_does_not_leak():
    """Columns behind a rank, and rows behind a tile, hold whatever the last step left."""
    pool, batch, index, random = world(DTYPES[1])
    batch.update(index)
    batch.workspace(1 << 16).fill_(float("nan"))
    x, y = tensors(pool, (0, "o"), len(index), random)
    truth = reference(y, x, pool, batch, (0, "o"))
    atmm(y, x, pool, batch, (0, "o"), tiling=FORMS["planes"])
    assert relative_error(y, truth) < 1e-2


def test_strided_rows_of_a_wider_tensor():
    pool, batch, index, random = world(DTYPES[1])
    batch.update(index)
    x, y = tensors(pool, (0, "o"), len(index), random)
    wide = torch.zeros(len(index), 256, dtype=pool.dtype, device=DEVICE)
    x_view, y_view = wide[:, :96], wide[:, 128:192]
    x_view.copy_(x)
    y_view.copy_(y)
    truth = reference(y, x, pool, batch, (0, "o"))
    atmm(y_view, x_view, pool, batch, (0, "o"))
    assert relative_error(y_view, truth) < 1e-2
    assert not wide[:, 96:128].any()
    assert not wide[:, 192:].any()


@pytest.mark.parametrize("index", [[], [-1, -1, -1]], ids=["no rows", "only base rows"])
def test_nothing_to_add(index):
    pool, batch, _, random = world(DTYPES[0])
    batch.update(np.array(index, int))
    x, y = tensors(pool, (0, "o"), len(index), random)
    before = y.clone()
    atmm(y, x, pool, batch, (0, "o"))
    assert torch.equal(y, before)


def test_contents_change_under_a_fixed_shape():
    """What a CUDA graph relies on: same plan, new rows, new adapters, fewer tokens."""
    pool, batch, _, random = world(DTYPES[1])
    batch.fix(40, 5, 32)
    for step, tokens in enumerate((40, 7, 23)):
        index = np.random.default_rng(step).integers(-1, 5, tokens)
        pool.release(4)
        pool.put(4, {(0, "o"): [(torch.randn(8, 96, generator=random), torch.randn(8, 64, generator=random))]}, scale=2)
        batch.update(index)
        x, y = tensors(pool, (0, "o"), 40, random)
        truth = reference(y[:tokens], x[:tokens], pool, batch, (0, "o"))
        rest = y[tokens:].clone()
        atmm(y, x, pool, batch, (0, "o"), tiling=FORMS["planes"])
        assert relative_error(y[:tokens], truth) < 1e-2
        assert torch.equal(y[tokens:], rest)


@pytest.mark.parametrize("form", FORMS)
def test_a_tiling_for_the_expected_adapters_is_right_for_any(form):
    pool, batch, _, random = world(DTYPES[1])
    batch.fix(48, 5, 32, expected=1)
    assert (batch.adapters, batch.expected) == (5, 1)
    several = (np.zeros(48, int), np.arange(48) % 5, np.full(3, -1), np.array([4]))
    for index in several if form == "default" else several[1::2]:
        batch.update(index)
        x, y = tensors(pool, (0, "qkv"), 48, random)
        truth = torch.cat([reference(y[: len(index)], x[: len(index)], pool, batch, (0, "qkv")), y[len(index) :]])
        atmm(y, x, pool, batch, (0, "qkv"), tiling=FORMS[form])
        assert relative_error(y, truth) < 1e-2, index
    with pytest.raises(LoraError, match="expected 6 adapters is outside"):
        batch.fix(48, 5, 32, expected=6)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_graph_replays_with_new_contents(form):
    pool, batch, _, random = world(torch.bfloat16)
    batch.fix(40, 5, 32, expected=2)
    batch.update(np.zeros(40, int), route=False)
    x, y = tensors(pool, (0, "o"), 40, random)

    def step():
        batch.route()
        for layer in (0, 1, 0):
            atmm(y, x, pool, batch, (layer, "o"), tiling=FORMS[form])

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        index = np.random.default_rng(seed).integers(-1, 5, 40 - seed)
        batch.update(index, route=False)
        truth = y.normal_()[: len(index)].clone()
        for layer in (0, 1, 0):
            truth = reference(truth, x[: len(index)], pool, batch, (layer, "o"))
        graph.replay()
        assert relative_error(y[: len(index)], truth) < 1e-2


def with_linear(pool, key, tokens, random):
    """(x, W, bias, float32 truth of the linear alone) of a projection."""
    p = pool.projections[key[1]]
    x, _ = tensors(pool, key, tokens, random)
    w, b = torch.randn(p.d_out, p.d_in, generator=random) * 0.1, torch.randn(p.d_out, generator=random)
    w, b = w.to(DEVICE, pool.dtype), b.to(DEVICE, pool.dtype)
    return x, w, b, torch.nn.functional.linear(x.float(), w.float(), b.float())


@pytest.fixture
def launched(monkeypatch):
    """(kernel, constants) of what was launched, in order; linears of few rows are tiled."""
    seen, bind = [], Launch.bind

    def recording(launch, device):
        run = bind(launch, device)
        return lambda *arguments: (seen.append((launch.kernel.__name__, launch.constants)), run(*arguments))

    monkeypatch.setattr(Launch, "bind", recording)
    monkeypatch.setattr(skinny, "_PLANS", {})
    monkeypatch.setattr(skinny, "fits", lambda x, weight: True)
    monkeypatch.setattr(skinny, "measured_tile", lambda rows, *shape, branched=False: Tile(2, 3) if rows <= 64 else None)
    return seen


@pytest.mark.parametrize("merged", [-1, 2])
@pytest.mark.parametrize(
    ("tiling", "kernels"),
    [(FORMS["planes"], ["shrink", "expand"]), (FORMS["halves that meet"], ["under"]), (None, ["shrink", "expand"])],
    ids=["two launches", "one", "the table's"],
)
def test_a_linear_and_its_branches_equal_float32(monkeypatch, launched, tiling, kernels, merged):
    monkeypatch.setattr(operator, "lookup", lambda shape: FORMS["planes"])
    pool, batch, index, random = world(DTYPES[-1], 9)
    batch.update(index, merged)
    key = (1, "qkv" if merged < 0 else "o")
    x, w, b, truth = with_linear(pool, key, len(index), random)
    launched.clear()
    once = linear(x, w, b, pool, batch, key, tiling=tiling)
    assert relative_error(once, reference(truth, x, pool, batch, key)) < 1e-2
    assert [name for name, _ in launched if name.startswith(("few", "sh", "ex", "un"))] == ["few_rows", *kernels]
    late, ready = (next(c[name] for _, c in launched if name in c) for name in ("LATE", "READY"))
    assert late == ready == 1, "the branch starts when x is complete, and trusts in it"
    if tiling is None:
        ahead = [(launch.kernel.__name__, launch.constants) for launch in operator.launches(pool, batch, key[1], bias=True)]
        assert ahead == launched, "what is compiled ahead is what is launched"
    assert torch.equal(linear(x, w, b, pool, batch, key, tiling=tiling), once), "no launch leaves anything behind"


def test_the_branch_of_a_linear_that_is_not_late_waits_for_it(launched):
    pool, _, _, random = world(DTYPES[-1])
    batch = LoraBatch(pool, 80)
    batch.update(np.arange(80) % 5)
    x, w, b, truth = with_linear(pool, (0, "o"), 80, random)
    launched.clear()
    y = linear(x, w, b, pool, batch, (0, "o"), tiling=FORMS["planes"])
    assert relative_error(y, reference(truth, x, pool, batch, (0, "o"))) < 1e-2
    assert [(name, constants.get("READY")) for name, constants in launched if name != "route"][-2][1] is False


def test_a_linear_that_does_not_fit_its_batch_is_refused():
    pool, batch, _, random = world(DTYPES[1])
    batch.update(np.array([0, 1, 2]))
    x, w, _, _ = with_linear(pool, (0, "o"), 3, random)
    for bad_x, bad_w, key, says in (
        (x[:2], w, (0, "o"), "x has shape"),
        (x, torch.cat([w, w]), (0, "o"), "y has shape"),
        (x, w, (2, "o"), "no projection"),
    ):
        with pytest.raises(LoraError, match=says):
            linear(bad_x, bad_w, None, pool, batch, key)


def test_an_operator_in_turn_is_the_linear_and_then_the_operator():
    pool, batch, index, random = world(DTYPES[1], 9)
    batch.update(index)
    x, w, b, truth = with_linear(pool, (0, "o"), 9, random)
    y = in_turn(atmm, skinny.linear)(x, w, b, pool, batch, (0, "o"))
    assert relative_error(y, reference(truth, x, pool, batch, (0, "o"))) < 1e-2


def test_a_linear_without_branches_is_the_linear(launched):
    pool, batch, _, random = world(DTYPES[-1])
    batch.update(np.full(5, -1))
    x, w, b, _ = with_linear(pool, (0, "o"), 5, random)
    launched.clear()
    assert torch.equal(linear(x, w, b, pool, batch, (0, "o")), skinny.run(x, w, b, Tile(2, 3)))
    assert [constants["LATE"] for _, constants in launched] == [False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["planes", "halves that meet"])
def test_a_chain_of_linears_that_run_over_their_branches_is_repeatable(launched, form):
    """Every linear of a graph reads what the branch before it wrote: no branch reads x too early, nor v of another layer."""
    tiling = {"planes": Tiling(k_block=128, split=4, n_block=64), "halves that meet": Tiling("under", k_block=128, split=4)}
    layers, wide, rows, place = 6, 1024, 24, {"dtype": torch.bfloat16, "device": "cuda"}
    random = torch.Generator().manual_seed(0)
    pool = LoraPool({"p": Projection(wide, (wide,))}, layers=layers, slots=8, rows=8 * 64, **place)
    for slot in range(8):
        pairs = [(torch.randn(64, wide, generator=random) * wide**-0.5, torch.randn(64, wide, generator=random) * 0.1)]
        pool.put(slot, {(layer, "p"): pairs for layer in range(layers)})
    batch = LoraBatch(pool, rows)
    batch.fix(rows, 8, 64)
    batch.update(np.arange(rows) % 8, route=False)
    weights = [(torch.randn(wide, wide, generator=random) * wide**-0.5).to(**place) for _ in range(layers)]
    x = torch.randn(rows, wide, generator=random).to(**place)

    def chain(step):
        h = x
        for layer in range(layers):
            h = step(h, weights[layer], (layer, "p"))
        return h

    def run():
        batch.route()
        return chain(lambda h, w, key: linear(h, w, None, pool, batch, key, tiling=tiling[form]))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(20):
        index = np.random.default_rng(seed).integers(-1, 8, rows)
        batch.update(index, route=False)
        x.normal_()
        truth = chain(lambda h, w, key: reference(h.float() @ w.float().t(), h, pool, batch, key).to(torch.bfloat16))
        graph.replay()
        first = out.clone()
        assert relative_error(first, truth.float()) < 2e-2
        for _ in range(5):
            graph.replay()
            assert torch.equal(out, first)


def test_bad_tensors_are_refused():
    pool, batch, index, random = world(torch.float16)
    batch.update(index)
    x, y = tensors(pool, (0, "o"), len(index), random)
    for bad_y, bad_x, key, says in (
        (y, x[:, :64], (0, "o"), "x has shape"),
        (y[:5], x, (0, "o"), "y has shape"),
        (y, x.float(), (0, "o"), "float32"),
        (y, x, (2, "o"), "no projection"),
        (y, x, (0, "up"), "no projection"),
        (y.T.contiguous().T, x, (0, "o"), "strides"),
    ):
        with pytest.raises(LoraError, match=says):
            atmm(bad_y, bad_x, pool, batch, key)
