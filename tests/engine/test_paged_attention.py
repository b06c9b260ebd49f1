"""The kernels of a decoder layer against plain torch: paged decode attention and the fused small steps."""


import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from kernels import attention as decoding  # noqa: E402
from kernels import pointwise  # noqa: E402
from kernels.attention import paged_decode, shares_for  # noqa: E402
from kernels.extend import blocks_of, extend, most_blocks  # noqa: E402

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def caches(lengths, kv_heads, width, dtype, device, seed=0):
    """(keys, values, tables, lengths): pages in a shuffled order, one table a request; what no key lies in is NaN."""
    generator = torch.Generator().manual_seed(seed)
    most = max(-(-length // 16) for length in lengths) or 1
    pages = sum(-(-length // 16) for length in lengths) + 1
    order = torch.randperm(pages - 1, generator=generator)
    tables = torch.full((len(lengths), most), pages - 1, dtype=torch.int32)
    done = 0
    for i, length in enumerate(lengths):
        count = -(-length // 16)
        tables[i, :count] = order[done : done + count]
        done += count
    k, v = (torch.randn(pages, kv_heads, 16, width, generator=generator).to(device, dtype) for _ in range(2))
    for i, length in enumerate(lengths):
        if length % 16:
            for cache in (k, v):
                cache[tables[i, length // 16], :, length % 16 :] = float("nan")
    return k, v, tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device)


def by_hand(q, k, v, tables, lengths, heads):
    """Softmax attention of each request in float32."""
    rows = []
    for i, length in enumerate(lengths.tolist()):
        if not length:
            rows.append(torch.full(q.shape[1:], float("nan"), device=q.device))
            continue
        pages = tables[i, : -(-length // 16)].long()
        keys, values = (
            c[pages].transpose(1, 2).flatten(0, 1)[:length].float().repeat_interleave(heads // k.shape[1], 1) for c in (k, v)
        )
        query = q[i].view(heads, -1).float()
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, keys) * query.shape[1] ** -0.5, dim=1)
        rows.append(torch.einsum("ht,thd->hd", weights, values).flatten())
    return torch.stack(rows)


def attention_error(lengths, heads, kv_heads, width, dtype, device):
    k, v, tables, sizes = caches(lengths, kv_heads, width, dtype, device)
    packed = torch.randn(len(lengths), (heads + 2 * kv_heads) * width, generator=torch.Generator().manual_seed(1))
    q = packed.to(device, dtype)[:, : heads * width]  # strided, as in a fused projection
    out = torch.full((len(lengths), heads * width), float("nan"), dtype=dtype, device=device)
    paged_decode(q, k, v, tables, sizes, out, width**-0.5)
    expected = by_hand(q, k, v, tables, sizes, heads)
    assert torch.equal(out.isnan(), expected.isnan()), "rows of length 0 are left as they are, and no others"
    return float((out.float() - expected).abs().nan_to_num().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)], ids=["multi-head", "grouped"])
def test_paged_decode_in_the_interpreter(heads, kv_heads):
    assert attention_error([1, 16, 65, 130], heads, kv_heads, 16, torch.float32, "cpu") < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
@pytest.mark.parametrize("programs", [1, 3, 7, 40])
@pytest.mark.parametrize("lengths", [[0, 300, 0, 17, 64, 0], [700], [0, 0]], ids=["uneven", "one", "none"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)], ids=["multi-head", "grouped"])
def test_any_share_of_the_keys_gives_the_same(monkeypatch, programs, lengths, heads, kv_heads):
    """Pairs in one program, over two, over many; and pieces of more programs than are put together in one go."""
    monkeypatch.setattr(decoding, "shares_for", lambda *batch: decoding.Shares(programs, 2, 1))
    assert attention_error(lengths, heads, kv_heads, 16, torch.float32, "cpu") < 1e-5


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (28, 4)], ids=["llava", "qwen2-vl"])
@pytest.mark.parametrize("requests", [2, 8, 70])
def test_paged_decode_on_the_gpu(heads, kv_heads, requests):
    lengths = ([1, 1000, 16, 17, 0, 64, 4095, 333] * 9)[:requests]
    assert attention_error(lengths, heads, kv_heads, 128, torch.bfloat16, "cuda") < 2e-2


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (28, 4)], ids=["llava", "qwen2-vl"])
def test_a_captured_decode_follows_the_lengths(heads, kv_heads):
    """One graph, whose kernels overlap, over other lengths at each replay."""
    k, v, tables, sizes = caches([2048] * 16, kv_heads, 128, torch.bfloat16, "cuda")
    q = torch.randn(16, heads * 128, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    out = torch.empty_like(q)
    for _ in range(2):
        paged_decode(q, k, v, tables, sizes, out, 128**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):  # the last finds what the one before left
            paged_decode(q, k, v, tables, sizes, out, 128**-0.5)
    for lengths in ([2048] * 16, [1] * 16, [0] * 15 + [2000], [5, 0, 900, 2048] * 4):
        sizes.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(
            out.float(), by_hand(q, k, v, tables, sizes, heads), rtol=2e-2, atol=2e-2, equal_nan=True
        )


def test_shares_follow_the_batch_and_the_heads():
    of = [shares_for(*batch) for batch in ((1, 32, 32), (8, 32, 32), (9, 32, 32), (64, 28, 4))]
    assert of == [decoding.FEW, decoding.FEW, decoding.MANY, decoding.GROUPED]


def extend_error(chunks, heads, kv_heads, width, dtype, device, spare=3):
    """Largest error of `extend` over the rows of `chunks`; the first two rows are somebody else's."""
    k, v, tables, _ = caches([tokens + context for tokens, context in chunks], kv_heads, width, dtype, device)
    total = 2 + sum(tokens for tokens, _ in chunks)
    packed = torch.randn(total, (heads + 2 * kv_heads) * width, generator=torch.Generator().manual_seed(1))
    q = packed.to(device, dtype)[:, : heads * width]
    out = torch.full((total, heads * width), 7.0, dtype=dtype, device=device)
    blocks = torch.from_numpy(blocks_of(chunks, 2, 0))
    blocks = torch.cat([blocks, torch.zeros(spare, 4, dtype=torch.int32)]).to(device)
    extend(q, k, v, tables, blocks, out, width**-0.5)
    assert bool((out[:2] == 7.0).all()), "rows of nobody are left alone"
    row, worst = 2, 0.0
    for i, (tokens, context) in enumerate(chunks):
        for t in range(0, tokens, max(1, tokens // 7)):
            length = torch.tensor([context + t + 1])
            right = by_hand(q[row + t : row + t + 1], k, v, tables[i : i + 1], length, heads)
            worst = max(worst, float((out[row + t].float() - right[0]).abs().max()))
        row += tokens
    return worst


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)], ids=["multi-head", "grouped"])
def test_extend_in_the_interpreter(heads, kv_heads):
    chunks = [(1, 0), (17, 0), (130, 5), (3, 200), (40, 64)]
    assert extend_error(chunks, heads, kv_heads, 16, torch.float32, "cpu") < 1e-5


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (28, 4)], ids=["llava", "qwen2-vl"])
def test_extend_on_the_gpu(heads, kv_heads):
    chunks = [(1, 0), (17, 0), (130, 5), (512, 3000), (1024, 0), (100, 63), (100, 64), (129, 1)]
    assert extend_error(chunks, heads, kv_heads, 128, torch.bfloat16, "cuda") < 2e-2


def test_blocks_cover_every_row_once_and_the_longest_come_first():
    chunks = [(300, 0), (5, 1000), (128, 128)]
    blocks = blocks_of(chunks, 10, 4)
    assert len(blocks) <= most_blocks(433, 3)
    rows = sorted(row for first, count, _, _ in blocks.tolist() for row in range(first, first + count))
    assert rows == list(range(10, 443))
    keys = [count + before for _, count, before, _ in blocks.tolist()]
    assert keys == sorted(keys, reverse=True)
    assert blocks.tolist()[0] == [310, 5, 1000, 5]
    assert [10 + 256, 44, 256, 4] in blocks.tolist()
    assert blocks_of([], 0, 0).shape == (0, 4)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_the_engine_runs_on_its_gpu_path(world, trace, model, monkeypatch, name):
    """All Triton kernels of a layer in the interpreter: the logits stay the same."""
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
    torch.testing.assert_close(logits(), expected, rtol=0, atol=1e-5)
