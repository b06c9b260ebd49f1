"""Whatever the bytes: a Trace or a TraceError, and the vectorised way agrees with the careful one on which."""

import gzip
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traces.readers import read_trace
from traces.request import Trace, TraceError

SEEDS = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n2023-11-16 18:17:04,3180,8",
    b"TIMESTAMP;NumImages;ContextTokens;GeneratedTokens\n2024-10-15T12:00:00.269Z;4;9;1\n2024-10-15T12:00:00Z;0;5;2\n",
    b"Timestamp,Model,Request tokens,Response tokens,Log Type\n5,GPT-4,472,18,API log\n45.25,GPT-4,1087,230,API log\n",
    b'arrived_at,num_prefill_tokens,num_decode_tokens,adapter,rank\n0.1,10,1,a,8\n1e-05,20,2,"b",16\n0.3,5,5,,\n',
    b'{"timestamp": 0, "input_length": 1124, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
    b'{"timestamp": 27.5, "input_length": 5, "output_length": 5, "adapter": "a", "rank": 8, "num_images": 1}\n',
    b'{"trace": "valora", "adapters": [{"name": "a", "rank": 8}], "notes": ["n"]}\n'
    b'{"arrival_ns": 0, "prompt_tokens": 9, "output_tokens": 1, "adapter": "a", "head": true, "task": "detect"}\n'
    b'{"arrival": 0.5, "prompt_tokens": 9, "output_tokens": 1, "prefix": [[1, 5]], "ttft_slo": 0.1}\n',
)
SPLICES = (
    b"NaN", b"nan", b"Infinity", b"1e309", b"-1e309", b"9223372036854775808", b"18446744073709551616", b"10000001",
    b"-1", b"0", b"00", b"1.5", b"5.0", b"1e3", b"+5", b" ", b"\t", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n",
    b"\r\n", b"\n\n", b";", b",", b'"', b"'", b"{", b"}", b"[", b"]", b":", b"null", b"true", b"{}", b"\xd9\xa3",
    b"Z", b"+00:00", b"+25:00", b".", b"-", b"2023-02-30 00:00:00", b"9999-12-31 23:59:59", b"0000-00-00 00:00:00",
    b"9" * 400, b"1" * 5000,
)  # fmt: skip


def outcome(path, **options):
    try:
        trace = read_trace(path, **options)
    except TraceError as error:
        return str(error)
    trace.check()
    columns = {name: getattr(trace, name) for name in (*Trace.COLUMNS, *Trace.OPTIONAL)}
    columns = {name: None if column is None else column.tolist() for name, column in columns.items()}
    return columns, trace.prefix, trace.adapters, trace.notes, trace.settings


def assert_both_ways_agree(path):
    for bad_rows in ("stop", "skip"):
        fast = outcome(path, bad_rows=bad_rows)
        assert fast == outcome(path, bad_rows=bad_rows, vectorised=False)


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0:
                data[at:at] = rng.choice(SPLICES)
            case 1:
                data[at : at + rng.randint(1, 12)] = rng.choice(SPLICES)
            case 2:
                del data[at : at + rng.randint(1, 20)]
            case 3:
                line = bytes(data).split(b"\n")
                rng.shuffle(line)
                data = bytearray(b"\n".join(line))
            case 4:
                data[at:at] = bytes(rng.randrange(256) for _ in range(3))
    return bytes(data)


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_mutated_files(tmp_path, number):
    rng = random.Random(number)
    path = tmp_path / "fuzz"
    for _ in range(250):
        path.write_bytes(mutated(rng, SEEDS[number]))
        assert_both_ways_agree(path)


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_mutated_gzip(tmp_path, number):
    rng = random.Random(number)
    path = tmp_path / "fuzz.gz"
    for _ in range(60):
        path.write_bytes(mutated(rng, gzip.compress(SEEDS[number], mtime=0)))
        assert_both_ways_agree(path)


@pytest.mark.parametrize("splice", SPLICES)
def test_a_splice_in_any_cell(tmp_path, splice):
    path = tmp_path / "fuzz"
    for seed in SEEDS:
        cells = seed.replace(b"\n", b",\n,").replace(b";", b",;,").split(b",")
        for at in range(0, len(cells), 2):
            path.write_bytes(b",".join([*cells[:at], splice, *cells[at + 1 :]]).replace(b",\n,", b"\n"))
            assert_both_ways_agree(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
def test_binary_garbage(tmp_path, data):
    path = tmp_path / "fuzz"
    path.write_bytes(data)
    assert_both_ways_agree(path)
    path.write_bytes(SEEDS[0] + b"\r\n" + data)
    assert_both_ways_agree(path)
    path.write_bytes(SEEDS[4] + data)
    assert_both_ways_agree(path)
