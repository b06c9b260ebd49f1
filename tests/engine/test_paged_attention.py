"""The kernels of a decoder layer against plain torch: paged decode attention and the fused small steps."""

from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import pointwise  # noqa: E402
from kernels.attention import paged_decode, splits_for  # noqa: E402

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def caches(lengths, kv_heads, width, dtype, device, seed=0):
    """(keys, values, tables, lengths): pages in a shuffled order, one table a request."""
    generator = torch.Generator().manual_seed(seed)
    most = max(-(-length // 16) for length in lengths)
    pages = sum(-(-length // 16) for length in lengths) + 1
    order = torch.randperm(pages - 1, generator=generator)
    tables = torch.full((len(lengths), most), pages - 1, dtype=torch.int32)
    done = 0
    for i, length in enumerate(lengths):
        count = -(-length // 16)
        tables[i, :count] = order[done : done + count]
        done += count
    k, v = (torch.randn(pages, kv_heads, 16, width, generator=generator).to(device, dtype) for _ in range(2))
    return k, v, tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def by_hand(q, k, v, tables, lengths, heads):
    """Softmax attention of each request in float32."""
    rows = []
    for i, length in enumerate(lengths.tolist()):
        pages = tables[i, : -(-length // 16)].long()
        keys, values = (
            c[pages].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(heads // k.shape[1], 1) for c in (k, v)
        )
        query = q[i].view(heads, -1).float()
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, keys) * query.shape[1] ** -0.5, dim=1)
        rows.append(torch.einsum("ht,thd->hd", weights, values).flatten())
    return torch.stack(rows)


def attention_error(lengths, heads, kv_heads, width, dtype, device, splits):
    k, v, tables, sizes = caches(lengths, kv_heads, width, dtype, device)
    packed = torch.randn(len(lengths), (heads + 2 * kv_heads) * width, generator=torch.Generator().manual_seed(1))
    q = packed.to(device, dtype)[:, : heads * width]  # strided, as in a fused projection
    out = torch.full((len(lengths), heads * width), float("nan"), dtype=dtype, device=device)
    paged_decode(q, k, v, tables, sizes, out, width**-0.5, splits)
    return float((out.float() - by_hand(q, k, v, tables, sizes, heads)).abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)], ids=["multi-head", "grouped"])
@pytest.mark.parametrize("splits", [1, 4])
def test_paged_decode_in_the_interpreter(heads, kv_heads, splits):
    assert attention_error([1, 16, 65, 130], heads, kv_heads, 16, torch.float32, "cpu", splits) < 1e-5


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (28, 4)], ids=["llava", "qwen2-vl"])
@pytest.mark.parametrize("splits", [None, 1, 16])
def test_paged_decode_on_the_gpu(heads, kv_heads, splits):
    lengths = [1, 16, 17, 1000, 64, 65, 4095, 333]
    assert attention_error(lengths, heads, kv_heads, 128, torch.bfloat16, "cuda", splits) < 2e-2


def test_splits_fill_the_gpu_and_no_more():
    assert [splits_for(batch, 32) for batch in (1, 8, 32, 64)] == [16, 2, 1, 1]
    assert splits_for(1, 4) == 32


@pytest.mark.parametrize("q_shape", [(2, 48), (2, 40)])
def test_paged_decode_refuses_what_does_not_fit(q_shape):
    k = torch.zeros(2, 2, 16, 16)
    table = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="does not fit a cache"):
        paged_decode(torch.zeros(q_shape), k, k, table, table[:, 0] + 1, torch.zeros(q_shape), 0.25)


def small_steps(device, dtype):
    """Inputs of the three fused steps."""
    generator = torch.Generator().manual_seed(3)
    x, residual, weight = (torch.randn(size, generator=generator).to(device, dtype) for size in ((5, 48), (5, 48), (48,)))
    qkv = torch.randn(5, (4 + 2 * 2) * 16, generator=generator).to(device, dtype)
    cos, sin = (torch.randn(5, 8, generator=generator).to(device) for _ in range(2))
    k, v = (torch.zeros(3, 2, 16, 16, dtype=dtype, device=device) for _ in range(2))
    slots = torch.tensor([0, 17, 47, 33, 5], dtype=torch.int32, device=device)
    gate_up = torch.randn(5, 2 * 24, generator=generator).to(device, dtype)
    return x, residual, weight, qkv, cos, sin, k, v, slots, gate_up


def run_small_steps(device, dtype):
    x, residual, weight, qkv, cos, sin, k, v, slots, gate_up = small_steps(device, dtype)
    first = pointwise.add_rms_norm(x, residual, weight, 1e-5)
    second = pointwise.add_rms_norm(None, residual, weight, 1e-5)
    pointwise.rope_store(qkv, cos, sin, k, v, slots, 4)
    return [first, residual, second, qkv, k, v, pointwise.silu_mul(gate_up)]


def test_fused_small_steps_equal_plain_torch_in_the_interpreter(monkeypatch):
    expected = run_small_steps("cpu", torch.float32)
    monkeypatch.setattr(pointwise, "_fused", lambda tensor: True)
    for got, plain in zip(run_small_steps("cpu", torch.float32), expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)


@cuda
@pytest.mark.gpu
def test_fused_small_steps_equal_plain_torch_on_the_gpu():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for got, plain in zip(run_small_steps("cuda", dtype), run_small_steps("cpu", dtype), strict=True):
            torch.testing.assert_close(got.cpu(), plain, rtol=tolerance, atol=tolerance)


def flash_by_hand(q, k, v, cu_q, cu_k, most_q, most_k, dropout, causal, debug, *, scale):
    """What torch's flash kernel computes for packed sequences: causal, aligned at the end of the keys."""
    assert (dropout, causal, debug) == (0.0, True, False)
    assert max(cu_q.diff()) == most_q
    assert max(cu_k.diff()) == most_k
    assert cu_q.dtype == cu_k.dtype == torch.int32
    out = torch.empty_like(q)
    groups = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        keys, values = (part[c:d].repeat_interleave(groups, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a)).logical_not()
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return out, None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_engine_runs_on_its_gpu_path(world, trace, model, monkeypatch, name):
    """All Triton kernels of a layer in the interpreter, and torch's flash kernel by hand: the logits stay the same."""
    from engine import attention

    requests = trace(3, 2, image_tokens=model(name)[0].shape.image_tokens, images=1, output=3, span_ns=10)
    assert requests.images.any()

    def logits():
        rows = []
        w = world(name, requests, limits=(3, 24, 256))
        w.runner.observer = lambda sequences, found: rows.append(found.clone())
        w.run()
        return torch.cat(rows)

    expected = logits()
    monkeypatch.setattr(pointwise, "_fused", lambda tensor: True)
    monkeypatch.setattr(attention, "_fused", lambda tensor: True)
    monkeypatch.setattr(attention, "flash", flash_by_hand)
    torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-5)
