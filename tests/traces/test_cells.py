"""Cells to integers: exact to the nanosecond, and the column functions say what the one-at-a-time functions say."""

import datetime

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from traces import cells

DAY_NS = 86_400_000_000_000


def column(function, texts):
    """What a column function says of texts that stand in a buffer, one after the other."""
    data = "|".join(texts).encode()
    lengths = np.array([len(text.encode()) for text in texts], np.int64)
    ends = np.cumsum(lengths + 1) - 1
    return function(np.frombuffer(data + b"|", np.uint8), ends - lengths, ends)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1970-01-01 00:00:00", 0),
        ("2023-11-16 18:17:03.9799600", 1_700_158_623_979_960_000),  # Azure 2023: 7 digits
        ("2024-05-12 00:00:00.001163+00:00", 1_715_472_000_001_163_000),  # Azure 2024
        ("2024-05-12 00:00:00+00:00", 1_715_472_000_000_000_000),  # Azure 2024, fraction absent
        ("2024-10-15T12:00:00.269Z", 1_728_993_600_269_000_000),  # Azure LMM 2025
        ("2024-02-29 23:59:59.999999999", 1_709_251_199_999_999_999),
        ("1970-01-01T02:00:00+02:00", 0),
        ("1970-01-01T00:00:00-0130", 5_400_000_000_000),
        ("1970-01-01 00:00:00.0000000005", 1),  # ten digits: rounded half up
    ],
)
def test_stamps_are_exact(text, nanoseconds):
    assert cells.parse_stamp(text) == nanoseconds
    values, ok = column(cells.stamp_column, [text])
    assert not ok[0] or values[0] == nanoseconds


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2023-02-29 00:00:00", "no day of the calendar"),
        ("2023-13-01 00:00:00", "no day of the calendar"),
        ("2023-01-01 24:00:00", "time of day"),
        ("2023-01-01 00:00:60", "time of day"),
        ("1969-12-31 23:59:59", "year"),
        ("2023-01-01 00:00:00.", "date-time"),
        ("2023-01-01", "date-time"),
        ("12345", "date-time"),
        ("2023-01-01 00:00:00+99:00", "zone"),
        ("", "date-time"),
    ],
)
def test_bad_stamps_say_why(text, why):
    with pytest.raises(ValueError, match=why):
        cells.parse_stamp(text)
    _, ok = column(cells.stamp_column, [text])
    assert not ok[0]


@given(st.lists(st.tuples(st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2199, 12, 31)),
                          st.sampled_from(["", "Z", "+00:00", "+02:00"]), st.sampled_from([" ", "T"]),
                          st.text("0123456789", max_size=12)), min_size=1, max_size=20))  # fmt: skip
def test_stamp_column_agrees(stamps):
    texts = [
        when.strftime(f"%Y-%m-%d{joint}%H:%M:%S") + ("." + digits if digits else "") + zone
        for when, zone, joint, digits in stamps
    ]
    values, ok = column(cells.stamp_column, texts)
    for text, value, fine in zip(texts, values.tolist(), ok.tolist(), strict=True):
        assert fine == (not text.endswith("+02:00"))
        assert not fine or value == cells.parse_stamp(text)


@given(st.lists(st.from_regex(r"\A[0-9]{0,11}(\.[0-9]{0,20})?\Z") | st.sampled_from(["1e-05", "-1", "nan", "1.2.3"]),
                min_size=1, max_size=20))  # fmt: skip
@example(["4611686018.427387904", "4611686018.427387905", "0.9999999995", "4611686019"])
def test_second_column_agrees(texts):
    values, ok = column(cells.second_column, texts)
    for text, value, fine in zip(texts, values.tolist(), ok.tolist(), strict=True):
        assert not fine or value == cells.parse_seconds(text)


@given(st.lists(st.from_regex(r"\A[0-9]{1,20}\Z") | st.text(max_size=5).filter(lambda t: "|" not in t), min_size=1))
def test_digit_column_agrees(texts):
    values, ok = column(cells.digit_column, texts)
    for text, value, fine in zip(texts, values.tolist(), ok.tolist(), strict=True):
        assert not fine or value == cells.parse_count(text)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("0", 0), ("5", 5_000_000_000), ("1e-05", 10_000), ("0.1", 100_000_000), (".5", 500_000_000), ("3.", 3 * 10**9)],
)
def test_seconds_never_pass_through_a_float(text, nanoseconds):
    assert cells.parse_seconds(text) == nanoseconds


@pytest.mark.parametrize(
    "text", ["nan", "inf", "1e309", "1e999999999", "1e-1844674407370955161605", "-1", "1,5", "0x10", "", "9" * 70, "٣"]
)
def test_bad_seconds(text):
    with pytest.raises(ValueError, match="is "):
        cells.parse_seconds(text)


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "1e3", "", "9223372036854775808", "٣", "1_0"])
def test_bad_counts(text):
    with pytest.raises(ValueError, match="whole number"):
        cells.parse_count(text)


def test_counts_written_by_a_data_frame():
    assert [cells.parse_count(text) for text in ("374", "374.0", " 374 ", "+374", "374.")] == [374] * 5
