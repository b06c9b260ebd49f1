"""Cells to integers: counts, date-times and seconds, one at a time with reasons, or a whole column at once.

The column functions return (values, ok): where ok is False the cell was not understood and the caller asks the
one-at-a-time function, which is the authority. Times are integer nanoseconds and never pass through a float.
"""

from __future__ import annotations

import datetime
import re
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

MAX_NS = 2**62
_STAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[ T](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|z|([+-])(\d\d):?(\d\d))?", re.ASCII
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+(?:[eE][+-]?\d+)?", re.ASCII)
_COUNT = re.compile(r"\+?(\d{1,18})(?:\.0*)?", re.ASCII)
_FRACTION_DIGITS = 18
_EPOCH_DAY = datetime.date(1970, 1, 1).toordinal()


def parse_count(text: str) -> int:
    """A non-negative whole number, such as `374` or `374.0`. Raises ValueError with the reason."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not a whole number of at most 18 digits")
    return int(match[1])


def parse_stamp(text: str) -> int:
    """Nanoseconds since 1970 UTC of an ISO date-time; no zone means UTC. Raises ValueError with the reason."""
    match = _STAMP.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not a date-time such as 2023-11-16 18:17:03.9799600 or 2024-10-15T12:00:00.269Z")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if not 1970 <= year <= 2199:
        raise ValueError("has a year outside 1970..2199")
    if hour > 23 or minute > 59 or second > 59:
        raise ValueError("has a time of day outside 00:00:00..23:59:59")
    try:
        days = datetime.date(year, month, day).toordinal() - _EPOCH_DAY
    except ValueError:
        raise ValueError("is no day of the calendar") from None
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second
    if match[8]:
        if int(match[9]) > 23 or int(match[10]) > 59:
            raise ValueError("has a zone offset outside 00:00..23:59")
        offset = (int(match[9]) * 60 + int(match[10])) * 60
        seconds += offset if match[8] == "-" else -offset
    return seconds * 1_000_000_000 + _fraction_ns(match[7] or "")


def is_stamp(text: str) -> bool:
    """Whether the cell looks like a date-time rather than a number."""
    return _STAMP.fullmatch(text.strip()) is not None


def is_number(text: str) -> bool:
    """Whether the cell is a decimal number."""
    return _NUMBER.fullmatch(text.strip()) is not None


def parse_seconds(text: str) -> int:
    """Nanoseconds of a non-negative decimal number of seconds. Raises ValueError with the reason."""
    text = text.strip()
    if not is_number(text) or len(text) > 64:
        raise ValueError("is not a number of seconds")
    try:
        return to_ns(Decimal(text), 1_000_000_000)
    except ArithmeticError:  # an exponent that not even a decimal holds
        raise ValueError("is outside the range of times") from None


def to_ns(value: int | Decimal, unit_ns: int) -> int:
    """Nanoseconds of `value` units of `unit_ns`, rounded half up. Raises ValueError outside 0..2**62 ns."""
    if isinstance(value, Decimal):
        if not value.is_finite() or value.adjusted() > 19:  # before the product: 1e999999 must not become an integer
            raise ValueError("is outside the range of times")
        value = int((value * unit_ns).to_integral_value(ROUND_HALF_UP)) if value.adjusted() > -30 else 0
        unit_ns = 1
    nanoseconds = value * unit_ns
    if not 0 <= nanoseconds <= MAX_NS:
        raise ValueError("is outside the range of times, 0 to 4.6e9 s")
    return nanoseconds


def _fraction_ns(digits: str) -> int:
    padded = digits.ljust(10, "0")
    return int(padded[:9]) + (padded[9] >= "5")


def digit_column(buf: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers in buf[start:end] (uint8 text; int64 positions), at most 18 digits each."""
    length = end - start
    ok = (length > 0) & (length <= 18)
    value = np.zeros(len(start), np.int64)
    for place in range(min(18, int(length.max(initial=0)))):
        at = end - 1 - place
        live = at >= start
        digit = buf[np.maximum(at, 0)] - np.uint8(48)  # anything but a digit wraps above 9
        ok &= (digit <= 9) | ~live
        value += np.where(live, digit, 0).astype(np.int64) * 10**place
    return value, ok


def stamp_column(buf: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Date-times in buf[start:end], with `Z`, `+00:00` or no zone; other zones are left to `parse_stamp`."""
    length = end - start
    ok = length >= 19
    last = len(buf) - 1

    def char(offset):
        return buf[np.minimum(start + offset, last)]

    def number(*offsets):
        nonlocal ok
        total = np.zeros(len(start), np.int64)
        for offset in offsets:
            digit = char(offset) - np.uint8(48)
            ok = ok & (digit <= 9)
            total = total * 10 + digit
        return total

    for offset, mark in ((4, "-"), (7, "-"), (13, ":"), (16, ":")):
        ok = ok & (char(offset) == ord(mark))
    ok = ok & ((char(10) == ord(" ")) | (char(10) == ord("T")))
    year, month, day = number(0, 1, 2, 3), number(5, 6), number(8, 9)
    hour, minute, second = number(11, 12), number(14, 15), number(17, 18)
    ok = ok & (year >= 1970) & (year <= 2199) & (month >= 1) & (month <= 12)
    ok = ok & (hour <= 23) & (minute <= 59) & (second <= 59)
    months = np.where(ok, (year - 1970) * 12 + month - 1, 0).astype("datetime64[M]")
    first_day = months.astype("datetime64[D]").astype(np.int64)
    next_month = (months + np.timedelta64(1, "M")).astype("datetime64[D]").astype(np.int64)
    ok = ok & (day >= 1) & (day <= next_month - first_day)
    seconds = (((first_day + day - 1) * 24 + hour) * 60 + minute) * 60 + second

    final = buf[np.maximum(end - 1, 0)]
    zone = np.where(final == ord("Z"), 1, 0)
    utc = (length >= 25) & (buf[np.maximum(end - 6, 0)] == ord("+"))
    for back, mark in ((5, "0"), (4, "0"), (3, ":"), (2, "0"), (1, "0")):
        utc &= buf[np.maximum(end - back, 0)] == ord(mark)
    zone[utc] = 6
    digits_end = end - zone
    has_fraction = digits_end > start + 19
    ok = ok & np.where(has_fraction, char(19) == ord("."), digits_end == start + 19)
    nanoseconds, fine = _fraction_column(buf, np.where(has_fraction, start + 20, digits_end), digits_end)
    ok = ok & fine & (~has_fraction | (digits_end > start + 20))
    return np.where(ok, seconds, 0) * 1_000_000_000 + nanoseconds, ok


def second_column(buf: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plain decimal numbers of seconds in buf[start:end]; exponents and signs are left to `parse_seconds`."""
    length = end - start
    dot = end.copy()
    for offset in reversed(range(min(32, int(length.max(initial=0))))):
        at = np.minimum(start + offset, len(buf) - 1)
        dot = np.where((at < end) & (buf[at] == ord(".")), at, dot)
    whole, ok = digit_column(buf, start, dot)
    nanoseconds, fine = _fraction_column(buf, np.minimum(dot + 1, end), end)
    ok &= fine & (whole < MAX_NS // 1_000_000_000)
    return np.where(ok, whole, 0) * 1_000_000_000 + nanoseconds, ok


def _fraction_column(buf: np.ndarray, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nanoseconds of the fraction digits in buf[start:end] (none: 0), rounded half up."""
    length = end - start
    ok = (length >= 0) & (length <= _FRACTION_DIGITS)
    value = np.zeros(len(start), np.int64)
    for place in range(min(_FRACTION_DIGITS, int(length.max(initial=0)))):
        live = place < length
        digit = buf[np.minimum(start + place, len(buf) - 1)] - np.uint8(48)
        ok &= (digit <= 9) | ~live
        digit = np.where(live, digit, 0).astype(np.int64)
        value += digit * 10 ** (8 - place) if place <= 8 else (digit >= 5) * (place == 9)
    return value, ok
