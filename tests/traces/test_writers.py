"""Writing: what is written reads back the same, whole or not at all, and what a format cannot hold is said."""

import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.readers import read_trace
from traces.request import TASKS, Adapter, Trace, TraceError
from traces.writers import write_trace

NAMES = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9._-]{0,8}\Z")
COLUMNS = (*Trace.COLUMNS, *Trace.OPTIONAL)


@st.composite
def traces(draw, *, mooncake=False):
    """Any trace; for Mooncake one that starts at 0, with block prefixes and without what Mooncake lacks."""
    n = draw(st.integers(1, 8))
    gaps = draw(st.lists(st.integers(0, 10**15), min_size=n, max_size=n))
    gaps[0] = 0 if mooncake else gaps[0]
    table = [Adapter(name, draw(st.integers(1, 256))) for name in draw(st.lists(NAMES, max_size=3, unique=True))]
    prompts = draw(st.lists(st.integers(1, 3000), min_size=n, max_size=n))
    heads = [False] * n if mooncake else draw(st.lists(st.booleans(), min_size=n, max_size=n))
    outputs = [1 if head else draw(st.integers(1, 10_000_000)) for head in heads]
    columns = {
        "images": np.array(draw(st.lists(st.integers(0, 10_000), min_size=n, max_size=n))),
        "adapter": np.array([draw(st.integers(-1, len(table) - 1)) for _ in range(n)], np.int32),
        "head": np.array(heads),
    }
    if mooncake:  # adapters in order of first appearance, none idle: Mooncake has no table
        order = [a for a in dict.fromkeys(columns["adapter"].tolist()) if a >= 0]
        columns["adapter"] = np.array([order.index(a) if a >= 0 else -1 for a in columns["adapter"]], np.int32)
        table = [table[a] for a in order]
    else:
        columns["task"] = np.array([draw(st.integers(0, len(TASKS) - 1)) for _ in range(n)], np.int8)
        for name in Trace.OPTIONAL:
            if draw(st.booleans()):
                columns[name] = np.array(draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n)))
    if draw(st.booleans()):
        columns["prefix"] = tuple(draw(prefixes(prompt, mooncake)) for prompt in prompts)
    return Trace.build(np.cumsum(gaps), prompts, outputs, adapters=tuple(table), notes=("ünïcode",), **columns)


@st.composite
def prefixes(draw, prompt, mooncake):
    keys = draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4))
    segments, room = [], prompt
    for key in keys:
        tokens = min(512, room) if mooncake else draw(st.integers(1, 600))
        if not 0 < tokens <= room:
            break
        segments.append((key, tokens))
        room -= tokens
    return tuple(segments)


def assert_same(read, trace):
    for name in COLUMNS:
        theirs, ours = getattr(read, name), getattr(trace, name)
        assert (theirs is None) == (ours is None), name
        assert ours is None or (theirs.tolist() == ours.tolist() and theirs.dtype == ours.dtype), name
    assert read.prefix == trace.prefix
    assert read.adapters == trace.adapters


ANY_PATH = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_PATH
@given(trace=traces(), pack=st.booleans())
def test_ours_round_trips_exactly(tmp_path, trace, pack):
    path = tmp_path / ("t.jsonl.gz" if pack else "t.jsonl")
    assert write_trace(trace, path, "ours") == ()
    read = read_trace(path)
    assert_same(read, trace)
    assert_same(read_trace(path, vectorised=False), trace)
    assert read.notes == trace.notes
    again = tmp_path / ("u.jsonl.gz" if pack else "u.jsonl")
    write_trace(trace, again, "ours")
    assert path.read_bytes() == again.read_bytes()


@ANY_PATH
@given(trace=traces(mooncake=True))
def test_mooncake_round_trips_exactly(tmp_path, trace):
    path = tmp_path / "t.jsonl"
    assert write_trace(trace, path, "mooncake") == ()
    assert_same(read_trace(path), trace)
    assert_same(read_trace(path, vectorised=False), trace)


@ANY_PATH
@given(trace=traces())
def test_mooncake_keeps_what_blocks_can_share(tmp_path, trace):
    write_trace(trace, tmp_path / "t.jsonl", "mooncake")
    read = read_trace(tmp_path / "t.jsonl")
    assert read.prompt_tokens.tolist() == trace.prompt_tokens.tolist()
    if trace.prefix is None:
        assert read.prefix is None
        return

    def whole_blocks_in_common(a, b):
        common = 0
        for (key_a, tokens_a), (key_b, tokens_b) in zip(a, b, strict=False):
            if (key_a, tokens_a) != (key_b, tokens_b):
                break
            common += tokens_a
        return common // 512

    for i in range(len(trace)):
        for j in range(i):
            ours = whole_blocks_in_common(trace.prefix[i], trace.prefix[j])
            assert whole_blocks_in_common(read.prefix[i], read.prefix[j]) == ours


def test_a_block_is_its_content_and_all_before_it(tmp_path):
    prefix = (((1, 100), (2, 924)), ((1, 100), (2, 924)), ((3, 100), (2, 924)), ((1, 100), (4, 412), (5, 512)))
    trace = Trace.build([0, 1, 2, 3], [1024] * 4, [1] * 4, prefix=prefix)
    write_trace(trace, tmp_path / "m.jsonl", "mooncake")
    ids = [json.loads(line)["hash_ids"] for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    # The second half of segment 2 stands in the second blocks of rows 0, 1 and 2, but row 2 began otherwise.
    assert ids == [[0, 1], [0, 1], [2, 3], [4, 5]]


def test_mooncake_says_what_it_cannot_hold(tmp_path):
    trace = Trace.build(
        [0, 1_500_000], [1000, 1000], [1, 1], head=np.array([True, False]), task=np.array([4, 0], np.int8),
        adapters=(Adapter("a", 8, "digest"), Adapter("idle")), adapter=np.array([0, -1], np.int32),
        prefix=(((1, 600),), ((1, 600),)), ttft_slo_ns=np.array([5, 0]),
    )  # fmt: skip
    lost = write_trace(trace, tmp_path / "m.jsonl", "mooncake")
    assert lost == (
        "Mooncake rows hold no tasks",
        "Mooncake rows hold no task heads (those requests decode one token)",
        "Mooncake rows hold no SLOs",
        "Mooncake rows hold no adapter digests",
        "Mooncake rows hold no adapters that no request asks for",
        "prefixes are cut anew into blocks of 512 tokens; part of a block is not shared",
    )
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows == [
        {"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [0, 1], "adapter": "a", "rank": 8},
        {"timestamp": 1.5, "input_length": 1000, "output_length": 1, "hash_ids": [0, 2]},
    ]


def test_azure_csv_looks_like_azures_and_reads_back(tmp_path):
    start_ns = 1_700_158_623_979_960_000
    trace = Trace.build([0, 52_000_000], [4808, 3180], [10, 8], settings={"first_stamp_ns": start_ns})
    assert write_trace(trace, tmp_path / "t.csv", "azure") == ()
    assert (tmp_path / "t.csv").read_text() == (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
    )
    assert_same(read_trace(tmp_path / "t.csv"), trace)
    with_images = trace.with_(images=np.array([0, 23]))
    write_trace(with_images, tmp_path / "i.csv", "azure")
    assert (tmp_path / "i.csv").read_text().splitlines()[2] == "2023-11-16T18:17:04.031Z,529,3180,8"
    assert read_trace(tmp_path / "i.csv").images.tolist() == [0, 23]
    with pytest.raises(TraceError, match="at most 100 images"):
        write_trace(trace.with_(images=np.array([0, 101])), tmp_path / "i.csv", "azure")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    trace = Trace.build([0], [1], [1])
    path = tmp_path / "t.jsonl"
    path.write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(TraceError, match="cannot be written: No space left"):
            write_trace(trace, path)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["t.jsonl"])
    write_trace(trace, path)
    assert os.listdir(tmp_path) == ["t.jsonl"]
    assert len(read_trace(path)) == 1
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(trace, tmp_path / "nowhere" / "t.jsonl")
    with pytest.raises(TraceError, match="did you mean 'mooncake'"):
        write_trace(trace, path, "moncake")


def test_gzip_holds_neither_name_nor_time(tmp_path):
    write_trace(Trace.build([0], [1], [1]), tmp_path / "t.jsonl.gz")
    packed = (tmp_path / "t.jsonl.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # no flags, time 0
    assert gzip.decompress(packed).endswith(b'{"arrival_ns": 0, "prompt_tokens": 1, "output_tokens": 1}\n')
