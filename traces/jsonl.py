"""JSON-lines traces: Mooncake (FAST 2025), and our own format, which holds every field of the vocabulary.

Mooncake: {"timestamp": ms, "input_length", "output_length", "hash_ids": one id for each 512 tokens of the prompt}, and
optionally "adapter", "rank", "num_images". Ours: see `OURS`; an optional first line {"trace": "valora", "adapters":
[{"name", "rank", "digest"}]} holds the table of adapters. Each line is parsed on its own; whole columns are then
checked at once, and where that fails `parse_row`, the authority, goes through the rows. Knows nothing of files or of
the whole trace.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from traces.cells import to_ns
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

    def parse(self, chunk: bytes, first_line: int) -> dict[str, np.ndarray | list]:
        """Columns of the good rows of a chunk of whole lines; `prefix` is a list of segment tuples, or absent."""
        rows, lines = [], []
        for offset, raw in enumerate(chunk.split(b"\n")):
            line = first_line + offset
            try:
                text = raw.decode("utf-8").strip()
                row = parse_object(text) if text else None
                if row is not None and line == 1 and HEADER_KEY in row:
                    self._read_header(row)
                    row = None
            except UnicodeDecodeError as error:
                text = raw.decode("utf-8", "replace")
                self.rejects.add(line, BadCell("(row)", text, f"is not UTF-8: {error.reason}"))
            except BadCell as error:
                if line == 1 and error.column in ("adapters", "header"):  # without its table the file means nothing
                    where = f"{self.rejects.source}:1: {error.column}"
                    raise TraceError(f"{where}: {shown(error.value)} {error.why}") from None
                self.rejects.add(line, error)
            else:
                if row is not None:
                    rows.append(row)
                    lines.append(line)
        columns = self._parse_together(rows) if self.vectorised and rows else None
        return self._parse_singly(rows, lines) if columns is None else columns

    def _parse_singly(self, rows: list[dict], lines: list[int]) -> dict[str, np.ndarray | list]:
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
        """The columns if every row is plain: integers in range, no more than the timing and count keys and prefixes."""
        keys = self.keys
        plain = {keys[role] for role in ("timestamp", *_COUNTS)} | ({keys["hash_ids"]} if "hash_ids" in keys else set())
        if self.format == "ours" and any(row.keys() - plain for row in rows):
            return None
        if any(keys["adapter"] in row or "delay" in row for row in rows):
            return None
        columns: dict[str, np.ndarray | list] = {}
        for role in ("timestamp", *_COUNTS):
            values = [row.get(keys[role], 0 if role == "images" else None) for row in rows]
            if set(map(type, values)) != {int}:
                return None
            try:
                column = np.array(values, np.int64)
            except OverflowError:
                return None
            if role == "timestamp":
                unit_ns = 1_000_000 if self.format == "mooncake" else 1
                ok = (column >= 0) & (column <= 2**62 // unit_ns)
                column = np.where(ok, column, 0) * unit_ns
            else:
                column, ok = self.limits.take_column(role, column)
            if not ok.all():
                return None
            columns[role] = column
        columns["adapter"] = np.full(len(rows), -1, np.int64)
        if any(keys.get("hash_ids") in row for row in rows) or "prefix" in self.has:
            try:
                prompts = columns["prompt_tokens"].tolist()
                columns["prefix"] = [self._blocks(row, n) for row, n in zip(rows, prompts, strict=True)]
            except BadCell:
                return None
            self.has.add("prefix")
        for role in self.has - {"prefix"}:
            columns[role] = np.zeros(len(rows), np.int64)
        return columns

    def parse_row(self, row: dict) -> dict:
        """One row, cell by cell. Raises BadCell."""
        if self.format == "ours":
            for key in row.keys() - set(self.keys.values()) - set(SECONDS.values()):
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
        values["adapter"] = self._adapter(row)
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

    def _adapter(self, row: dict) -> int:
        name, rank = row.get(self.keys["adapter"]), row.get(self.keys["rank"])
        if name is not None and not isinstance(name, str):
            raise BadCell("adapter", name, "is not an adapter id, a string")
        if rank is not None and type(rank) is not int:
            raise BadCell("rank", rank, "is not a whole number")
        return self.adapters.index(name, rank)

    def _blocks(self, row: dict, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        """hash_ids as segments of 512 tokens, the last one partial; ids past the end of the prompt are left out."""
        ids = row.get(self.keys.get("hash_ids"), ())
        if ids in ((), []):
            return ()
        _check_keys("hash_ids", ids)
        blocks, rest = divmod(prompt_tokens, BLOCK_TOKENS)
        known = self._segments
        segments = [known.get(key) or known.setdefault(key, (key, BLOCK_TOKENS)) for key in ids[:blocks]]
        if rest and len(ids) > blocks:
            segments.append((ids[blocks], rest))
        return tuple(segments)

    def _prefix(self, row: dict, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        segments = row.get(self.keys["prefix"], [])
        pairs = isinstance(segments, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in segments)
        if not pairs or any(type(tokens) is not int or tokens < 1 for _, tokens in segments):
            raise BadCell("prefix", segments, "is not a list of [content key, tokens >= 1]")
        _check_keys("prefix", [key for key, _ in segments])
        if sum(tokens for _, tokens in segments) > prompt_tokens:
            raise BadCell("prefix", segments, f"is longer than the prompt of {prompt_tokens} tokens")
        return tuple((key, tokens) for key, tokens in segments)

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
    if not isinstance(keys, list) or set(map(type, keys)) > {int} or set(map(type, keys)) - {int}:
        raise BadCell(column, keys, "is not a list of whole numbers")
    if keys and not -(2**63) <= min(keys) <= max(keys) < 2**63:
        raise BadCell(column, keys, "holds a content key outside 64 bits")
