"""Reading JSON lines: Mooncake's hash_ids become prefix segments, ours holds every field, both are strict."""

import json

import pytest

from traces.readers import read_trace
from traces.request import NO_ADAPTER, TASKS, TraceError

MOONCAKE = [
    {"timestamp": 27, "input_length": 1124, "output_length": 5, "hash_ids": [7, 8, 9]},
    {"timestamp": 3027, "input_length": 1024, "output_length": 6, "hash_ids": [7, 8]},
    {"timestamp": 3027.5, "input_length": 600, "output_length": 7, "hash_ids": [7, 10, 11, 12], "num_images": 2},
    {"timestamp": 4000, "input_length": 5000, "output_length": 8, "adapter": "cat", "rank": 8},
]
OURS = [
    {"trace": "valora", "adapters": [{"name": "cat", "rank": 8}, {"name": "dog", "rank": 128, "digest": "d"}]},
    {"arrival_ns": 5, "prompt_tokens": 10, "output_tokens": 1, "adapter": "dog", "task": "detect", "head": True},
    {"arrival": 0.000000006, "prompt_tokens": 20, "output_tokens": 2, "images": 3, "prefix": [[1, 5], [-2, 15]]},
    {"arrival": 1, "prompt_tokens": 30, "output_tokens": 3, "ttft_slo": 0.2, "tpot_slo_ns": 50_000_000},
]


def read(tmp_path, rows, name="t.jsonl", **options):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_trace(path, **options)


@pytest.mark.parametrize("vectorised", [True, False])
def test_mooncake(tmp_path, vectorised):
    trace = read(tmp_path, MOONCAKE, vectorised=vectorised)
    assert trace.format == "mooncake"
    assert trace.arrival_ns.tolist() == [0, 3_000_000_000, 3_000_500_000, 3_973_000_000]
    assert trace.prompt_tokens.tolist() == [1124, 1024, 600, 5000]
    assert trace.prefix == (
        ((7, 512), (8, 512), (9, 100)),  # the last block is partial
        ((7, 512), (8, 512)),
        ((7, 512), (10, 88)),  # never past the prompt
        (),
    )
    assert trace.images.tolist() == [0, 0, 2, 0]
    assert [(a.name, a.rank) for a in trace.adapters] == [("cat", 8)]
    assert trace.adapter.tolist() == [NO_ADAPTER, NO_ADAPTER, NO_ADAPTER, 0]


@pytest.mark.parametrize("vectorised", [True, False])
def test_ours(tmp_path, vectorised):
    trace = read(tmp_path, OURS, vectorised=vectorised)
    assert trace.format == "ours"
    assert trace.arrival_ns.tolist() == [5, 6, 1_000_000_000]  # counts from its own start: not rebased
    assert [(a.name, a.rank) for a in trace.adapters] == [("cat", 8), ("dog", 128)]
    assert trace.adapter.tolist() == [1, NO_ADAPTER, NO_ADAPTER]
    assert [TASKS[task] for task in trace.task.tolist()] == ["detect", "text", "text"]
    assert trace.head.tolist() == [True, False, False]
    assert trace.prefix == ((), ((1, 5), (-2, 15)), ())
    assert (trace.ttft_slo_ns.tolist(), trace.tpot_slo_ns.tolist()) == ([0, 0, 200_000_000], [0, 0, 50_000_000])


def test_ours_without_a_header_learns_adapters_as_they_come(tmp_path):
    row = {"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": 1}
    trace = read(tmp_path, [row | {"adapter": "b", "rank": 16}, row, row | {"adapter": "a"}, row | {"adapter": "b"}])
    assert [(a.name, a.rank) for a in trace.adapters] == [("b", 16), ("a", 64)]
    assert trace.adapter.tolist() == [0, NO_ADAPTER, 1, 0]
    assert trace.notes == ("adapters without a rank in the file have rank 64",)


def test_keys_of_your_own(tmp_path):
    rows = [{"t": 5, "in": 10, "out": 1}, {"t": 7, "in": 20, "out": 2}]
    trace = read(tmp_path, rows, columns={"ts": "t", "prompt": "in", "output": "out"})
    assert trace.arrival_ns.tolist() == [0, 2_000_000]
    assert trace.prompt_tokens.tolist() == [10, 20]


def test_many_chunks_read_as_one(tmp_path):
    rows = [{"timestamp": i, "input_length": 600, "output_length": 1, "hash_ids": [i, i + 1]} for i in range(60_000)]
    rows[50_000] |= {"num_images": 1, "note": "unknown keys are Mooncake's own affair"}
    fast, slow = read(tmp_path, rows), read(tmp_path, rows, vectorised=False)
    assert len(fast) == 60_000
    assert fast.prefix == slow.prefix
    assert fast.images.tolist() == slow.images.tolist()
    rows[55_000]["output_length"] = 0
    with pytest.raises(TraceError, match=r":55001: column output_length: 0 is outside"):
        read(tmp_path, rows)


ROW = '{"timestamp": 1, "input_length": 5, "output_length": 5'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"is not JSON"),
        ("[1]", r"not a JSON object"),
        ("[" * 100_000, r"is not JSON"),
        (ROW + "} {}", r"goes on after its JSON value"),
        (ROW + ', "adapter": "../../etc/passwd"}', r"column adapter: .* not an adapter id"),
        (ROW + ', "adapter": 5}', r"column adapter: 5"),
        (ROW + ', "adapter": "a", "rank": 0}', r"column rank: 0 is outside"),
        (ROW + ', "adapter": "a", "rank": 8.5}', r"column rank: .* not a whole number"),
        (ROW + ', "hash_ids": 5}', r"column hash_ids: 5 is not a list of whole numbers"),
        (ROW + ', "hash_ids": [true]}', r"column hash_ids"),
        (ROW + ', "hash_ids": [9223372036854775808]}', r"outside 64 bits"),
        (ROW + ', "num_images": -1}', r"column num_images: -1 is outside"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 5}', r"NaN is not a number"),
        ('{"timestamp": 1e999999999, "input_length": 5, "output_length": 5}', r"column timestamp"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 5}', r"column timestamp: -1 is outside the range"),
        ('{"timestamp": true, "input_length": 5, "output_length": 5}', r"column timestamp: True is not a number"),
        ('{"timestamp": "1", "input_length": 5, "output_length": 5}', r"column timestamp: '1' is not a number"),
        ('{"timestamp": 1, "input_length": 5.0, "output_length": 5}', r"column input_length: .* not a whole number"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 5}', r"column input_length: 0 is outside"),
        ('{"timestamp": 1, "input_length": 9223372036854775808, "output_length": 5}', r"column input_length: 92"),
        ('{"timestamp": 1, "input_lenght": 5, "output_length": 5}', r"input_length: .* \(did you mean 'input_lenght'"),
        ('{"delay": 1, "input_length": 5, "output_length": 5}', r"column delay: 1 follows another turn"),
    ],
)
@pytest.mark.parametrize("vectorised", [True, False])
def test_bad_mooncake_rows(tmp_path, row, message, vectorised):
    rows = [MOONCAKE[0], row, MOONCAKE[1]]
    with pytest.raises(TraceError, match=r"t\.jsonl:2: column .*" + message.removeprefix("column ")):
        read(tmp_path, rows, vectorised=vectorised)
    trace = read(tmp_path, rows, bad_rows="skip", vectorised=vectorised)
    assert trace.arrival_ns.tolist() == [0, 3_000_000_000]
    assert "dropped 1 of 3 rows" in trace.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": "dgo"}, r"column adapter: 'dgo' is not in the header's table \(did you mean 'dog'"),
        ({"rank": 8, "adapter": "dog"}, r"column rank: 8 differs from rank 128"),
        ({"task": "detekt"}, r"column task: 'detekt' is none of .*did you mean 'detect'"),
        ({"task": []}, r"column task"),
        ({"head": 1}, r"column head: 1 is neither"),
        ({"head": True, "output_tokens": 2}, r"column head: True needs output_tokens 1"),
        ({"prefix": [[1, 11]]}, r"column prefix: .* longer than the prompt of 10"),
        ({"prefix": [[1, 0]]}, r"column prefix"),
        ({"prefix": [1]}, r"column prefix"),
        ({"prefix": [["a", 1]]}, r"column prefix"),
        ({"ttft_slo_ns": -1}, r"column ttft_slo_ns: -1"),
        ({"ttft_slo_ns": 0.5}, r"column ttft_slo_ns: .* whole number of nanoseconds"),
        ({"promt_tokens": 5}, r"column promt_tokens: .*unknown key \(did you mean 'prompt_tokens'"),
    ],
)
@pytest.mark.parametrize("vectorised", [True, False])
def test_bad_rows_of_ours(tmp_path, change, message, vectorised):
    row = {"arrival_ns": 1, "prompt_tokens": 10, "output_tokens": 1}
    rows = [OURS[0], row | change, row]
    with pytest.raises(TraceError, match=r"t\.jsonl:2: " + message):
        read(tmp_path, rows, vectorised=vectorised)
    trace = read(tmp_path, rows, bad_rows="skip", vectorised=vectorised)
    assert len(trace) == 1


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"trace": "other"}, "no trace format of ours"),
        ({"trace": "valora", "adaptors": []}, "unknown key .*did you mean 'adapters'"),
        ({"trace": "valora", "adapters": [{"name": "a"}]}, "is not {name, rank"),
        ({"trace": "valora", "adapters": [{"name": "a", "rank": 0}]}, "not a rank"),
        ({"trace": "valora", "adapters": [{"name": "a/b", "rank": 8}]}, "not an adapter id"),
        ({"trace": "valora", "adapters": [{"name": "a", "rank": 8}] * 2}, "declared twice"),
        ({"trace": "valora", "notes": "x"}, "not a list of notes"),
        ({"hello": 1}, "no known format"),
        ({"input_lenght": 1, "output_lenght": 1}, "did you mean 'input_length'"),
    ],
)
def test_bad_headers_always_stop(tmp_path, header, message):
    with pytest.raises(TraceError, match=message):
        read(tmp_path, [header, OURS[-1]], bad_rows="skip")
