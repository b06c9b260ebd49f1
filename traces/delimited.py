"""Delimited traces: Azure LLM 2023 and 2024, Azure LMM 2025, BurstGPT, Vidur, or mapped columns of any other CSV.

Whole chunks are parsed with array operations on the bytes; every row that those do not understand goes through
`parse_row`, which is the authority: it accepts the cell or says why not. Formats: Azure/AzurePublicDataset (Patel et
al., ISCA 2024; Qiu et al., SoCC 2025), HPMLL/BurstGPT, microsoft/vidur. Knows nothing of JSON or of the whole trace.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field

import numpy as np

from traces import cells
from traces.request import TraceError
from traces.rows import AdapterTable, BadCell, Limits, Rejects, shown
from traces.suggest import near

FORMATS = {
    "azure": {
        "timestamp": "timestamp", "prompt_tokens": "contexttokens", "output_tokens": "generatedtokens",
        "images": "numimages", "adapter": "adapter", "rank": "rank",
    },
    "burstgpt": {
        "timestamp": "timestamp", "prompt_tokens": "request tokens", "output_tokens": "response tokens",
        "adapter": "adapter", "rank": "rank",
    },
    "vidur": {
        "timestamp": "arrived_at", "prompt_tokens": "num_prefill_tokens", "output_tokens": "num_decode_tokens",
        "adapter": "adapter", "rank": "rank",
    },
    "csv": {"images": "numimages", "adapter": "adapter", "rank": "rank"},
}  # fmt: skip
"""Header names (case-folded) of each format by role. `csv` is any header whose three required columns the user maps."""

REQUIRED = ("timestamp", "prompt_tokens", "output_tokens")
ROLES = (*REQUIRED, "images", "adapter", "rank")


@dataclass(frozen=True)
class Layout:
    """Where the cells are: delimiter, number of columns, role -> position, role -> name as the header writes it."""

    format: str
    delimiter: str
    width: int
    position: dict[str, int]
    title: dict[str, str]


def find_layout(source: str, line: bytes, format: str, columns: dict[str, str]) -> Layout:
    """Layout of the header `line`. `format` is one of FORMATS, or `auto`. Raises TraceError."""
    try:
        text = line.decode("utf-8").strip()
        delimiter = max(",;\t", key=text.count)
        names = [name.strip() for name in next(csv.reader([text], delimiter=delimiter, strict=True), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{source}:1: the header is not text: {error}") from None
    folded = [name.casefold() for name in names]
    mapped = {}
    for role, name in columns.items():
        if name.casefold() not in folded:
            raise TraceError(f"{source}:1: no column {name!r} for {role}{near(name, names)}; it has {_listed(names)}")
        mapped[role] = name.casefold()
    tried = {}
    candidates = ["csv"] if mapped.keys() >= set(REQUIRED) else FORMATS
    for candidate in candidates if format == "auto" else [format]:
        roles = FORMATS[candidate] | mapped
        found = {role: name for role, name in roles.items() if name in folded}
        missing = [role for role in REQUIRED if role not in found]
        if not missing:
            break
        tried[candidate] = [roles.get(role, role) for role in missing]
    else:
        raise TraceError(_unknown(source, names, tried))
    twice = [name for name in found.values() if folded.count(name) > 1]
    if twice:
        raise TraceError(f"{source}:1: column {twice[0]!r} stands twice in the header; rename one")
    position = {role: folded.index(name) for role, name in found.items()}
    title = {role: names[place] for role, place in position.items()}
    return Layout(candidate, delimiter, len(names), position, title)


def _unknown(source: str, names: list[str], tried: dict[str, list[str]]) -> str:
    closest = min(tried, key=lambda name: len(tried[name]))
    absent = tried[closest][0]
    return (
        f"{source}:1: no known format has the columns {_listed(names)}: {closest} also needs {absent!r}"
        f"{near(absent, names)}; map yours with --columns timestamp=...,prompt_tokens=...,output_tokens=..."
    )


def _listed(names: list[str]) -> str:
    return shown(", ".join(names))


@dataclass
class RowParser:
    """Parses chunks of one file into columns. `vectorised` off sends every row the careful way (the tests compare)."""

    layout: Layout
    limits: Limits
    rejects: Rejects
    adapters: AdapterTable
    vectorised: bool = True
    dates: bool | None = None  # whether stamps are date-times or seconds; the first row decides
    counts: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        self.counts = tuple(role for role in Limits.BOUNDS if role in self.layout.position)

    def parse(self, chunk: bytes, first_line: int) -> dict[str, np.ndarray]:
        """Columns `timestamp` (ns), the counts and `adapter` of the good rows of a chunk of whole lines."""
        buf = np.frombuffer(chunk, np.uint8)
        ends = np.flatnonzero(buf == ord("\n"))
        starts = np.concatenate(([0], ends[:-1] + 1))
        stops = ends - ((buf[np.maximum(ends - 1, 0)] == ord("\r")) & (ends > starts))
        n = len(ends)
        columns = {role: np.zeros(n, np.int64) for role in ("timestamp", *self.counts)}
        columns["adapter"] = np.full(n, -1, np.int32)
        kept = np.zeros(n, bool)
        if self.dates is None:
            self._decide_dates(chunk)
        if self.vectorised and self.dates is not None and "adapter" not in self.layout.position:
            self._parse_regular(buf, starts, stops, columns, kept)
        for row in np.flatnonzero(~kept).tolist():
            line = chunk[starts[row] : stops[row]]
            if not line.strip():
                continue
            try:
                values = self.parse_row(line)
            except BadCell as error:
                self.rejects.add(first_line + row, error)
                continue
            for role, value in values.items():
                columns[role][row] = value
            kept[row] = True
        return columns if kept.all() else {role: column[kept] for role, column in columns.items()}

    def parse_row(self, line: bytes) -> dict[str, int]:
        """One row, cell by cell. Raises BadCell."""
        layout = self.layout
        text = line.decode("utf-8", "replace")  # what stands in a column that nobody reads does not matter
        try:
            row = next(csv.reader([text], delimiter=layout.delimiter, strict=True)) if '"' in text else None
        except csv.Error as error:
            raise BadCell("(row)", text, f"is not a row of text: {error}") from None
        row = text.split(layout.delimiter) if row is None else row
        if len(row) != layout.width:
            raise BadCell("(row)", text, f"has {len(row)} cells where the header has {layout.width}")
        cell = {role: row[place] for role, place in layout.position.items()}
        values = {"timestamp": self._stamp(cell["timestamp"])}
        for role in self.counts:
            title = layout.title[role]
            values[role] = self.limits.take(role, title, _asked(cells.parse_count, title, cell[role]))
        if "adapter" in cell:
            rank = cell.get("rank", "").strip()
            number = _asked(cells.parse_count, layout.title["rank"], rank) if rank else None
            values["adapter"] = self.adapters.index(cell["adapter"].strip(), number)
        return values

    def _stamp(self, text: str) -> int:
        parse = cells.parse_seconds if self.dates is False else cells.parse_stamp
        return _asked(parse, self.layout.title["timestamp"], text)

    def _decide_dates(self, chunk: bytes) -> None:
        """Let the first understandable stamp of the file decide whether stamps are date-times or seconds."""
        for line in chunk.split(b"\n"):
            row = line.decode("utf-8", "replace").strip().replace('"', "").split(self.layout.delimiter)
            stamp = row[self.layout.position["timestamp"]] if len(row) == self.layout.width else ""
            if cells.is_stamp(stamp) or cells.is_number(stamp):
                self.dates = cells.is_stamp(stamp)
                return

    def _parse_regular(self, buf, starts, stops, columns, kept) -> None:
        """Fill the columns and `kept` for the rows that have the header's number of plain cells."""
        delimiters = np.flatnonzero(buf == ord(self.layout.delimiter))
        first = np.searchsorted(delimiters, starts)
        regular = np.searchsorted(delimiters, stops) - first == self.layout.width - 1
        quotes = np.flatnonzero(buf == ord('"'))
        regular[np.searchsorted(stops, quotes)] = False
        rows = np.flatnonzero(regular)
        if not len(rows):
            return
        start, stop, first = starts[rows], stops[rows], first[rows]
        ok = np.ones(len(rows), bool)
        parsed = {}
        for role in ("timestamp", *self.counts):
            place = self.layout.position[role]
            left = start if place == 0 else delimiters[first + place - 1] + 1
            right = stop if place == self.layout.width - 1 else delimiters[first + place]
            if role == "timestamp":
                values, fine = (cells.stamp_column if self.dates else cells.second_column)(buf, left, right)
            else:
                values, fine = cells.digit_column(buf, left, right)
                values, inside = self.limits.take_column(role, values)
                fine = fine & inside
            ok &= fine
            parsed[role] = values
        good = rows[ok]
        for role, values in parsed.items():
            columns[role][good] = values[ok]
        kept[good] = True


def _asked(parse, column: str, text: str) -> int:
    try:
        return parse(text)
    except ValueError as error:
        raise BadCell(column, text, str(error)) from None
