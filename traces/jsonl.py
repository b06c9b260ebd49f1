"""JSON-lines traces: Mooncake (FAST 2025), and our own format, which holds every field of the vocabulary.

Mooncake: {"timestamp": ms, "input_length", "output_length", "hash_ids": one id for each 512 tokens of the prompt}, and
optionally "adapter", "rank", "num_images". Ours: see `OURS`; an optional first line {"trace": "valora", "adapters":
[{"name", "rank", "digest"}]} holds the table of adapters. Each line is parsed on its own; whole columns are then
checked at once, and where that fails `parse_row`, the authority, goes through the rows. Knows nothing of files or of
the whole trace.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from traces.cells import MAX_NS, to_ns
from traces.request import TASKS, Adapter, TraceError
from traces.rows import AdapterTable, BadCell, Limits, Rejects, shown
from traces.suggest import near

BLOCK_TOKENS = 512
HEADER_KEY = "trace"
HEADER_VALUE = "valora"
MOONCAKE = {
    "timestamp": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length",
    "hash_ids": "hash_ids", "images": "num_images", "adapter": "adapter", "rank": "rank",
}  # fmt: skip
OURS = {
    "timestamp": "arrival_ns",  # nanoseconds; or "arrival", seconds
    "prompt_tokens": "prompt_tokens", "output_tokens": "output_tokens", "images": "images", "adapter": "adapter",
    "rank": "rank", "task": "task", "head": "head",
    "prefix": "prefix",  # [[content key, tokens], ...]
    "ttft_slo_ns": "ttft_slo_ns", "tpot_slo_ns": "tpot_slo_ns",  # or "ttft_slo", "tpot_slo", seconds
}  # fmt: skip
SECONDS = {"timestamp": "arrival", "ttft_slo_ns": "ttft_slo", "tpot_slo_ns": "tpot_slo"}
_COUNTS = ("prompt_tokens", "output_tokens", "images")
_EXTRAS = ("task", "head", "prefix", "ttft_slo_ns", "tpot_slo_ns")


def _no_constant(name: str):
    raise ValueError(f"{name} is not a number")


# Fractions stay decimal: a stamp never passes through a float. `scan_once` is the C scanner behind json.loads.
_scan = json.JSONDecoder(parse_float=Decimal, parse_constant=_no_constant).scan_once


def parse_object(text: str) -> dict:
    """One line as a JSON object. Raises BadCell."""
    try:
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError, ArithmeticError) as error:
        why = str(error) if isinstance(error, ValueError) else "nothing a JSON parser knows"
        raise BadCell("(row)", text, f"is not JSON: {why}") from None
    if end != len(text):
        raise BadCell("(row)", text, f"goes on after its JSON value, at character {end + 1}")
    if not isinstance(value, dict):
        raise BadCell("(row)", text, "is not a JSON object")
    return value


def find_format(source: str, first: dict, format: str, columns: dict[str, str]) -> tuple[str, dict[str, str]]:
    """(`mooncake` or `ours`, key of each role) from the first object of a file. Raises TraceError."""
    if format == "auto":
        if HEADER_KEY in first or "prompt_tokens" in first:
            format = "ours"
        elif "input_length" in first or "hash_ids" in first or columns:
            format = "mooncake"
        else:
            known = [*MOONCAKE.values(), *OURS.values(), *SECONDS.values()]
            hint = next((hint for key in first if (hint := near(key, known))), "")
            raise TraceError(
                f"{source}:1: the keys {shown(', '.join(map(str, first)))} are those of no known format{hint}; "
                "map yours with --columns timestamp=...,prompt_tokens=...,output_tokens=..."
            )
    keys = MOONCAKE if format == "mooncake" else OURS
    foreign = [role for role in columns if role not in keys]
    if foreign:
        raise TraceError(f"{source}: format {format} has no column {foreign[0]!r}{near(foreign[0], keys)}")
    return format, keys | columns


@dataclass
class ObjectParser:
    """Parses chunks of one file into columns. `vectorised` off sends every row the careful way (the tests compare)."""

    format: str
    keys: dict[str, str]
    limits: Limits
    rejects: Rejects
    adapters: AdapterTable
    vectorised: bool = True
    header: dict = field(default_factory=dict)
    has: set[str] = field(default_factory=set)  # optional columns seen in any row
    _segments: dict[int, tuple[int, int]] = field(default_factory=dict)  # equal blocks share one tuple

    def __post_init__(self):
        self._known = set(self.keys.values())

    def parse(self, chunk: bytes, first_line: int) -> dict[str, np.ndarray | list]:
        """Columns of the good rows of a chunk of whole lines; `prefix` is a list of segment tuples, or absent."""
        rows = _plain_objects(chunk) if self.vectorised and first_line > 1 else None
        lines: Sequence[int] = range(first_line, first_line + len(rows or ()))
        if rows is None:
            rows, lines = self._objects(chunk, first_line)
        columns = self._parse_together(rows) if self.vectorised and rows else None
        return self._parse_singly(rows, lines) if columns is None else columns

    def _objects(self, chunk: bytes, first_line: int) -> tuple[list[dict], list[int]]:
        """The objects of a chunk and their line numbers; bad lines are accounted for, the header is taken."""
        rows, lines = [], []
        for line, raw in enumerate(chunk.split(b"\n"), first_line):
            try:
                text = raw.decode("utf-8").strip()
                row = parse_object(text) if text else None
                if row is not None and line == 1 and HEADER_KEY in row:
                    self._take_header(row)
                    row = None
            except UnicodeDecodeError as error:
                text = raw.decode("utf-8", "replace")
                self.rejects.add(line, BadCell("(row)", text, f"is not UTF-8: {error.reason}"))
            except BadCell as error:
                self.rejects.add(line, error)
            else:
                if row is not None:
                    rows.append(row)
                    lines.append(line)
        return rows, lines

    def _parse_singly(self, rows: list[dict], lines: Sequence[int]) -> dict[str, np.ndarray | list]:
        parsed = []
        for row, line in zip(rows, lines, strict=True):
            try:
                parsed.append(self.parse_row(row))
            except BadCell as error:
                self.rejects.add(line, error)
        names = ["timestamp", *_COUNTS, "adapter", *sorted(self.has)]
        columns: dict[str, np.ndarray | list] = {}
        for name in names:
            values = [row[name] for row in parsed]
            columns[name] = values if name == "prefix" else np.array(values, np.int64)
        return columns

    def _parse_together(self, rows: list[dict]) -> dict[str, np.ndarray | list] | None:
        """The columns if every row is plain: known keys, integers in range, stamps in the format's own unit."""
        keys, ours = self.keys, self.format == "ours"
        seen = set().union(*rows)
        if ours and seen - self._known:
            return None
        has = {role for role in _EXTRAS if keys.get(role) in seen}
        has |= {"prefix"} if keys.get("hash_ids") in seen else set()
        unit_ns = 1 if ours else 1_000_000
        columns: dict[str, np.ndarray | list] = {}
        try:
            stamps = _integers(rows, keys["timestamp"])
            _demand((stamps >= 0) & (stamps <= MAX_NS // unit_ns))
            columns["timestamp"] = stamps * unit_ns
            for role in _COUNTS:
                if role == "images" and keys[role] not in seen:
                    columns[role] = np.zeros(len(rows), np.int64)
                    continue
                values = _integers(rows, keys[role], 0 if role == "images" else None)
                columns[role], ok = self.limits.take_column(role, values)
                _demand(ok)
            self._take_extras(rows, columns, has)
            pairs = self._column(rows, "adapter", seen), self._column(rows, "rank", seen)
            pairs = list(zip(*pairs, strict=True))
            index = {pair: self._adapter(*pair) for pair in dict.fromkeys(pairs)}
        except (BadCell, TypeError, OverflowError, KeyError):
            return None
        columns["adapter"] = np.array([index[pair] for pair in pairs], np.int64)
        self.has |= has
        return columns

    def _column(self, rows: list[dict], role: str, seen: set[str]) -> list:
        key = self.keys[role]
        return [row.get(key) for row in rows] if key in seen else [None] * len(rows)

    def _take_extras(self, rows: list[dict], columns: dict, has: set[str]) -> None:
        """Add the optional columns that these rows have; raises TypeError or KeyError where one is not plain."""
        keys = self.keys
        if "task" in has:
            number = {name: index for index, name in enumerate(TASKS)}
            columns["task"] = np.array([number[row.get(keys["task"], TASKS[0])] for row in rows], np.int64)
        if "head" in has:
            heads = [row.get(keys["head"], False) for row in rows]
            if set(map(type, heads)) != {bool}:
                raise TypeError
            columns["head"] = np.array(heads, np.int64)
            _demand((columns["output_tokens"] == 1) | (columns["head"] == 0))
        for role in has & {"ttft_slo_ns", "tpot_slo_ns"}:
            columns[role] = _integers(rows, keys[role], 0)
            _demand((columns[role] >= 0) & (columns[role] <= MAX_NS))
        if "prefix" in has:
            take = self._prefix if self.format == "ours" else self._blocks
            prompts = columns["prompt_tokens"].tolist()
            columns["prefix"] = [take(row, n) for row, n in zip(rows, prompts, strict=True)]

    def parse_row(self, row: dict) -> dict:
        """One row, cell by cell. Raises BadCell."""
        if self.format == "ours":
            for key in row.keys() - self._known - set(SECONDS.values()):
                known = [*self.keys.values(), *SECONDS.values()]
                raise BadCell(key, row[key], f"stands under an unknown key{near(key, known)}")
        elif "delay" in row and self.keys["timestamp"] not in row:
            raise BadCell("delay", row["delay"], "follows another turn; only rows with a timestamp can be replayed")
        values = {"timestamp": self._time(row, "timestamp", required=True)}
        for role in _COUNTS:
            key = self.keys[role]
            if role == "images" and key not in row:
                values[role] = 0
                continue
            values[role] = self.limits.take(role, key, _whole(row, key))
        if self.format == "mooncake":
            values["prefix"] = self._blocks(row, values["prompt_tokens"])
            if self.keys["hash_ids"] in row:
                self.has.add("prefix")
        else:
            values |= self._our_extras(row, values["prompt_tokens"])
        values["adapter"] = self._adapter(row.get(self.keys["adapter"]), row.get(self.keys["rank"]))
        return values

    def _our_extras(self, row: dict, prompt_tokens: int) -> dict:
        task, head = row.get(self.keys["task"], TASKS[0]), row.get(self.keys["head"], False)
        if task not in TASKS:
            raise BadCell("task", task, f"is none of {', '.join(TASKS)}{near(str(task), TASKS)}")
        if not isinstance(head, bool):
            raise BadCell("head", head, "is neither true nor false")
        values = {"task": TASKS.index(task), "head": int(head), "prefix": self._prefix(row, prompt_tokens)}
        if head and row[self.keys["output_tokens"]] != 1:
            raise BadCell("head", head, "needs output_tokens 1: a task head answers after the prefill")
        for role in ("ttft_slo_ns", "tpot_slo_ns"):
            values[role] = self._time(row, role, required=False)
        present = {role for role in ("task", "head", "prefix") if self.keys[role] in row}
        present |= {role for role in ("ttft_slo_ns", "tpot_slo_ns") if self.keys[role] in row or SECONDS[role] in row}
        self.has |= present
        return values

    def _time(self, row: dict, role: str, *, required: bool) -> int:
        key, unit_ns = self.keys[role], 1_000_000 if self.format == "mooncake" else 1
        if key not in row and self.format == "ours" and SECONDS[role] in row:
            key, unit_ns = SECONDS[role], 1_000_000_000
        if key not in row:
            if required:
                raise BadCell(key, row_keys(row), f"is missing{near(key, row)}")
            return 0
        value = row[key]
        if type(value) not in ((int,) if unit_ns == 1 else (int, Decimal)):
            raise BadCell(key, value, "is not a whole number of nanoseconds" if unit_ns == 1 else "is not a number")
        try:
            return to_ns(value, unit_ns)
        except ValueError as error:
            raise BadCell(key, value, str(error)) from None

    def _adapter(self, name: object, rank: object) -> int:
        if name is not None and not isinstance(name, str):
            raise BadCell("adapter", name, "is not an adapter id, a string")
        if rank is not None and type(rank) is not int:
            raise BadCell("rank", rank, "is not a whole number")
        return self.adapters.index(name, rank)

    def _blocks(self, row: dict, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        """hash_ids as segments of 512 tokens, the last one partial; ids past the end of the prompt are left out."""
        ids = row.get(self.keys["hash_ids"])
        if ids is None or ids == []:
            return ()
        _check_keys("hash_ids", ids)
        blocks, rest = divmod(prompt_tokens, BLOCK_TOKENS)
        known = self._segments
        segments = [known.get(key) or known.setdefault(key, (key, BLOCK_TOKENS)) for key in ids[:blocks]]
        if rest and len(ids) > blocks:
            segments.append((ids[blocks], rest))
        return tuple(segments)

    def _prefix(self, row: dict, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        segments = row.get(self.keys["prefix"])
        if segments is None or segments == []:
            return ()
        if not isinstance(segments, list) or any(type(pair) is not list or len(pair) != 2 for pair in segments):
            raise BadCell("prefix", segments, "is not a list of [content key, tokens]")
        keys, tokens = zip(*segments, strict=True)
        if set(map(type, tokens)) != {int} or min(tokens) < 1:
            raise BadCell("prefix", segments, "has a segment whose tokens are not a whole number of at least 1")
        _check_keys("prefix", keys)
        if sum(tokens) > prompt_tokens:
            raise BadCell("prefix", segments, f"is longer than the prompt of {prompt_tokens} tokens")
        return tuple(zip(keys, tokens, strict=True))

    def _take_header(self, row: dict) -> None:
        try:
            self._read_header(row)
        except BadCell as error:  # never skipped: without its table the file means nothing
            where = f"{self.rejects.source}:1: {error.column}"
            raise TraceError(f"{where}: {shown(error.value)} {error.why}") from None

    def _read_header(self, row: dict) -> None:
        if row[HEADER_KEY] != HEADER_VALUE:
            raise BadCell("header", row[HEADER_KEY], f"is no trace format of ours; expected {HEADER_VALUE!r}")
        known = (HEADER_KEY, "adapters", "notes", "origin", "settings")
        for key in row.keys() - set(known):
            raise BadCell("header", key, f"is an unknown key{near(key, known)}")
        notes = row.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise BadCell("header", notes, "is not a list of notes")
        table = row.get("adapters", [])
        fields = {"name", "rank", "digest"}
        if not isinstance(table, list):
            raise BadCell("adapters", table, "is not a list of adapters")
        for entry in table:
            if not isinstance(entry, dict) or not {"name", "rank"} <= entry.keys() <= fields:
                raise BadCell("adapters", entry, "is not {name, rank, digest (optional)}")
            if type(entry["rank"]) is not int or not 1 <= entry["rank"] <= 256:
                raise BadCell("adapters", entry["rank"], "is not a rank in 1..256")
            if not isinstance(entry.get("digest", ""), str):
                raise BadCell("adapters", entry["digest"], "is not a digest, a string")
            self.adapters.declare(Adapter(entry["name"], entry["rank"], entry.get("digest", "")))
        self.adapters.closed = "adapters" in row
        self.header = row


def _plain_objects(chunk: bytes) -> list[dict] | None:
    """The objects of a chunk whose every line is one and no more; None when any is not."""
    try:
        lines = chunk.decode("utf-8").replace("\r\n", "\n")[:-1].split("\n")
        pairs = [_scan(line, 0) for line in lines]
    except (ValueError, StopIteration, RecursionError, ArithmeticError):
        return None
    rows = [row for row, _ in pairs]
    plain = set(map(type, rows)) == {dict} and [end for _, end in pairs] == list(map(len, lines))
    return rows if plain else None


def row_keys(row: dict) -> str:
    """The keys of a row, for a message."""
    return ", ".join(map(str, row))


def _whole(row: dict, key: str) -> int:
    if key not in row:
        raise BadCell(key, row_keys(row), f"is missing{near(key, row)}")
    if type(row[key]) is not int:
        raise BadCell(key, row[key], "is not a whole number")
    return row[key]


def _check_keys(column: str, keys: object) -> None:
    if not isinstance(keys, list | tuple) or set(map(type, keys)) != {int}:
        raise BadCell(column, keys, "is not a list of whole numbers")
    if not -(2**63) <= min(keys) <= max(keys) < 2**63:
        raise BadCell(column, keys, "holds a content key outside 64 bits")


def _integers(rows: list[dict], key: str, default: int | None = None) -> np.ndarray:
    """One key of all rows as int64. Raises TypeError or OverflowError unless all are integers that fit."""
    values = [row.get(key, default) for row in rows]
    if set(map(type, values)) != {int}:
        raise TypeError
    return np.array(values, np.int64)


def _demand(ok: np.ndarray) -> None:
    """Leave the fast path unless every row is fine."""
    if not ok.all():
        raise TypeError
