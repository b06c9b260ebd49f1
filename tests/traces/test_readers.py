"""Reading tables: every format, its quirks, and what a person is told about a bad file."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from traces.readers import read_trace
from traces.request import NO_ADAPTER, TraceError

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319600,3180,8\r\n"
    "2023-11-16 18:17:04.0781490,110,27"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-12 00:00:00+00:00,100,1\n"
    "2024-05-12 00:00:00.001163+00:00,200,2\n"
    "2024-05-12 00:00:01+00:00,300,3\n"
)
AZURE_LMM = (
    "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
    "2024-10-15T12:00:00.269Z,0,100,1\n"
    "2024-10-15T12:00:00.270Z,529,20000,2\n"
    "2024-10-15T12:00:01.269Z,4,3000,3\n"
)
BURST_GPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,1,0.5,ChatGPT,472,18,490,Conversation log\n"
    "45.25,2,0.1,GPT-4,1087,230,1317,API log\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,10,1\n1e-05,20,2\n0.30000000000000004,30,3\n"
AZURE_DIR = Path(__file__).parents[3] / "shared" / "traces" / "azure"


def read(tmp_path, content, name="t.csv", **options):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_trace(path, **options)


def columns(trace):
    return [
        column.tolist() for column in (trace.arrival_ns, trace.prompt_tokens, trace.output_tokens, trace.images)
    ]


def test_azure_2023_with_crlf_and_no_final_newline(tmp_path):
    trace = read(tmp_path, AZURE_2023)
    assert columns(trace) == [[0, 52_000_000, 98_189_000], [4808, 3180, 110], [10, 8, 27], [0, 0, 0]]
    assert (trace.format, trace.notes, trace.adapter.tolist()) == ("azure", (), [NO_ADAPTER] * 3)
    assert trace.settings["first_stamp_ns"] == 1_700_158_623_979_960_000


def test_azure_2024_with_zone_and_absent_fractions(tmp_path):
    assert columns(read(tmp_path, AZURE_2024))[0] == [0, 1_163_000, 1_000_000_000]


@pytest.mark.parametrize(
    ("mode", "images", "word"),
    [("sqrt", [0, 23, 2], "square root"), ("raw", [0, 529, 4], "as it stands"), ("cap=3", [0, 3, 3], "capped at 3")],
)
def test_azure_lmm_counts_images_as_told_and_says_so(tmp_path, mode, images, word):
    trace = read(tmp_path, AZURE_LMM, images=mode)
    assert columns(trace) == [[0, 1_000_000, 1_000_000_000], [100, 20000, 3000], [1, 2, 3], images]
    assert word in trace.notes[0]


def test_a_count_that_is_no_square_is_not_rooted(tmp_path):
    content = AZURE_LMM.replace(",529,", ",530,")
    with pytest.raises(TraceError, match=r"t\.csv:3: column NumImages: 530 .*--images raw"):
        read(tmp_path, content)
    assert read(tmp_path, content, images="raw").images.tolist() == [0, 530, 4]


def test_burstgpt_counts_seconds(tmp_path):
    trace = read(tmp_path, BURST_GPT)
    assert (trace.format, columns(trace)[:3]) == ("burstgpt", [[0, 40_250_000_000], [472, 1087], [18, 230]])


def test_vidur_floats_become_whole_nanoseconds(tmp_path):
    trace = read(tmp_path, VIDUR)
    assert (trace.format, columns(trace)[:3]) == ("vidur", [[0, 10_000, 300_000_000], [10, 20, 30], [1, 2, 3]])


@pytest.mark.parametrize("content", [AZURE_2023, AZURE_2024, AZURE_LMM, BURST_GPT, VIDUR])
def test_disguises_change_nothing(tmp_path, content):
    plain = content.replace("\r\n", "\n").rstrip("\n") + "\n"
    expected = columns(read(tmp_path, plain))
    disguises = {
        "crlf": plain.replace("\n", "\r\n"),
        "no final newline": plain[:-1],
        "byte-order mark": "\ufeff" + plain,
        "semicolons": plain.replace(",", ";"),
        "tabs": plain.replace(",", "\t"),
        "blank lines": plain.replace("\n", "\n\n") + "\n \n",
        "header case": plain.partition("\n")[0].upper() + "\n" + plain.partition("\n")[2],
        "spaces": plain.replace(",", " , "),
        "quotes": "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in plain.splitlines()),
        "gzip": gzip.compress(plain.encode()),
        "two gzip members": gzip.compress(plain[:90].encode()) + gzip.compress(plain[90:].encode()),
    }
    for name, disguised in disguises.items():
        for vectorised in (True, False):
            trace = read(tmp_path, disguised, vectorised=vectorised)
            assert columns(trace) == expected, name


def test_columns_in_any_order_and_surplus_ones(tmp_path):
    content = "GeneratedTokens,x,TIMESTAMP,ContextTokens\n1,a,2023-11-16 18:00:00,10\n2,b,2023-11-16 18:00:01,20\n"
    assert columns(read(tmp_path, content))[:3] == [[0, 1_000_000_000], [10, 20], [1, 2]]


def test_columns_of_your_own(tmp_path):
    content = "when;in;out;who;r\n0.5;10;1;cat;8\n1.5;20;2;dog;64\n2.5;30;3;cat;8\n3.5;40;4;;\n"
    names = {"ts": "when", "prompt": "IN", "output_tokens": "out", "adapter": "who", "rank": "r"}
    trace = read(tmp_path, content, columns=names)
    assert columns(trace)[:3] == [[0, 10**9, 2 * 10**9, 3 * 10**9], [10, 20, 30, 40], [1, 2, 3, 4]]
    assert [(a.name, a.rank) for a in trace.adapters] == [("cat", 8), ("dog", 64)]
    assert (trace.adapter.tolist(), trace.format) == ([0, 1, 0, NO_ADAPTER], "csv")


def test_unsorted_rows_are_sorted_stably_and_noted(tmp_path):
    rows = ["2.0,1,1", "1.0,2,1", "1.0,3,1", "0.5,4,1", "2.0,5,1"]
    trace = read(tmp_path, VIDUR.partition("\n")[0] + "\n" + "\n".join(rows))
    assert columns(trace)[:2] == [[0, 500_000_000, 500_000_000, 1_500_000_000, 1_500_000_000], [4, 2, 3, 1, 5]]
    assert trace.notes == ("sorted by arrival: 2 of 5 rows came before the row above them",)
    many = [f"{i % 2}.0,{i + 1},1" for i in range(2000)]
    trace = read(tmp_path, VIDUR.partition("\n")[0] + "\n" + "\n".join(many))
    assert columns(trace)[1] == [*range(1, 2001, 2), *range(2, 2001, 2)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2023-11-16 18:17:05,0,5", r":3: column ContextTokens: 0 is outside 1\.\.10000000; .*--bad-rows skip"),
        ("2023-11-16 18:17:05,5,0", r":3: column GeneratedTokens: 0 is outside"),
        ("2023-11-16 18:17:05,-5,5", r":3: column ContextTokens: '-5' is not a whole number"),
        ("2023-11-16 18:17:05,nan,5", r":3: column ContextTokens: 'nan'"),
        ("2023-11-16 18:17:05,1e309,5", r":3: column ContextTokens: '1e309'"),
        ("2023-11-16 18:17:05,9223372036854775808,5", r":3: column ContextTokens: '9223372036854775808'"),
        ("2023-11-16 18:17:05,10000001,5", r":3: column ContextTokens: 10000001 is outside"),
        ("2023-11-16 18:17:05,5", r":3: column \(row\): .* has 2 cells where the header has 3"),
        ("2023-11-16 18:17:05,5,5,5", r":3: column \(row\): .* has 4 cells where the header has 3"),
        ("2023-11-31 18:17:05,5,5", r":3: column TIMESTAMP: '2023-11-31 18:17:05' is no day of the calendar"),
        ("1700158625,5,5", r":3: column TIMESTAMP: '1700158625' is not a date-time such as"),
        ('"2023-11-16 18:17:05,5,5', r":3: column \(row\): .* is not a row of text"),
        ("\x00\x01,5,5", r":3: column TIMESTAMP"),
    ],
)
@pytest.mark.parametrize("vectorised", [True, False])
def test_a_bad_row_stops_with_line_column_value_and_way_out_or_is_counted(tmp_path, row, message, vectorised):
    good = AZURE_2024.splitlines()
    content = "\n".join([good[0], "2023-11-16 18:17:04,1,1", row, "2023-11-16 18:17:06,2,2"])
    with pytest.raises(TraceError, match=r"t\.csv" + message):
        read(tmp_path, content, vectorised=vectorised)
    trace = read(tmp_path, content, bad_rows="skip", vectorised=vectorised)
    assert columns(trace)[:2] == [[0, 2_000_000_000], [1, 2]]
    assert len(trace.notes) == 1
    assert trace.notes[0].startswith("dropped 1 of 3 rows as bad; the first: ")


def test_the_line_is_right_far_into_a_file_of_many_chunks(tmp_path):
    lines = [AZURE_2024.splitlines()[0], *["2023-11-16 18:17:04,100,100"] * 200_000]
    lines[170_000] = "2023-11-16 18:17:04,100,0"
    with pytest.raises(TraceError, match=r":170001: column GeneratedTokens: 0"):
        read(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "the file is empty"),
        ("\n\n", {}, "the file is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", {}, "no requests"),
        ("TIMESTAMP,ContextToken,GeneratedTokens\n1,2,3\n", {}, "did you mean 'ContextToken'"),
        ("a,b,c\n1,2,3\n", {"columns": {"ts": "aa", "prompt": "b", "output": "c"}}, "'aa' .*did you mean 'a'"),
        ("a,b,c\n1,2,3\n", {"columns": {"timestmp": "a"}}, "did you mean 'timestamp'"),
        ("a,a,c,b\n1,2,3,4\n", {"columns": {"ts": "a", "prompt": "b", "output": "c"}}, "stands twice"),
        (AZURE_2023, {"format": "vidr"}, "did you mean 'vidur'"),
        (AZURE_2023, {"format": "vidur"}, "no known format has the columns"),
        (AZURE_2023, {"format": "mooncake"}, "is JSON lines, this is not"),
        (AZURE_2023, {"images": "sqr"}, "did you mean 'sqrt'"),
        (AZURE_2023, {"images": "cap=-1"}, "whole number"),
        (AZURE_2023, {"bad_rows": "ignore"}, "one of stop, skip"),
        ("PK\x03\x04zip", {}, "zip archive"),
        ("PAR1xx", {}, "Parquet"),
        (AZURE_2023.encode("utf-16"), {}, "UTF-16"),
        (b"\x1f\x8b\x08\x00garbage that is no gzip", {}, "broken gzip"),
        (gzip.compress(AZURE_2023.encode())[:-9], {}, "broken gzip"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe\xfd", {}, "header is not text"),
    ],
)
def test_what_is_wrong_with_the_file_is_said(tmp_path, content, options, message):
    with pytest.raises(TraceError, match=message):
        read(tmp_path, content, **options)


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "azure_conv.csv").write_text(AZURE_2023)
    with pytest.raises(TraceError, match=r"No such file or directory \(did you mean 'azure_conv.csv'\?\)"):
        read_trace(tmp_path / "azure_con.csv")
    with pytest.raises(TraceError, match="directory"):
        read_trace(tmp_path)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("end", [b"", b"\n2024-05-12 00:00:02+00:00,100,1\n"])
def test_an_endless_line_is_refused_early(tmp_path, pack, end):
    content = AZURE_2024.encode() + b"1" * 3_000_000 + end
    with pytest.raises(TraceError, match=r":5: a line of more than 1048576 bytes"):
        read(tmp_path, gzip.compress(content) if pack else content, bad_rows="skip")


def test_a_gzip_bomb_is_refused(tmp_path):
    rows = AZURE_2024.encode() + b"2024-05-12 00:00:02+00:00,100,1\n" * 3_000_000
    with pytest.raises(TraceError, match="of gzip, over 300:1"):
        read(tmp_path, gzip.compress(rows, 9))


@pytest.mark.parametrize(("name", "rows", "last_s"), [("code", 8_819, 3435.948056), ("conv", 19_366, 3501.721937)])
def test_the_real_azure_files(name, rows, last_s):
    path = AZURE_DIR / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.exists():
        pytest.skip("the Azure traces are not part of the project")
    fast, slow = read_trace(path), read_trace(path, vectorised=False)
    assert (len(fast), fast.arrival_ns[-1]) == (rows, round(last_s * 10**9))
    assert (np.diff(fast.arrival_ns) > 0).all()
    assert columns(fast) == columns(slow)
