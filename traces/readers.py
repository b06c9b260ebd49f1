"""Read a trace file of any known format into a `Trace`; every reader of a file goes through `read_trace`.

It finds the format and the columns, rebases the stamps, sorts, and says in notes what it did. It knows nothing of
adapters a trace does not name (`assign`), of windows (`window`) or of workloads (`workload`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from traces import delimited, jsonl
from traces.request import NO_ADAPTER, Trace, TraceError
from traces.rows import BAD_ROWS, DEFAULT_RANK, MAX_ROWS, AdapterTable, BadCell, Rejects, image_limits
from traces.source import Source
from traces.suggest import near

FORMATS = ("auto", *delimited.FORMATS, "mooncake", "ours")
ROLE_NAMES = {"ts": "timestamp", "prompt": "prompt_tokens", "output": "output_tokens"}
"""Short names that `columns` also takes for roles."""


def read_trace(
    path: str | Path,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    images: str = "sqrt",
    bad_rows: str = "stop",
    vectorised: bool = True,
) -> Trace:
    """The trace in `path` (plain or gzip), with arrivals in ns from its first row, in arrival order.

    format: one of FORMATS. columns: role -> column, for headers of your own; the roles are timestamp, prompt_tokens,
    output_tokens, images, adapter, rank (and in JSON lines the other keys of `jsonl`). images: raw | sqrt | cap=N, how
    a count of images is read. bad_rows: `stop` raises at the first bad row, `skip` drops and counts them. vectorised:
    off, every row is parsed one cell at a time, with the same result (for tests).

    Our own format counts from its own start and is not rebased. Stamps without a zone are UTC; numbers are seconds
    (Mooncake: milliseconds). Raises TraceError for every input that is not a trace.
    """
    if format not in FORMATS:
        raise TraceError(f"unknown trace format {format!r}{near(format, FORMATS)}; one of {', '.join(FORMATS)}")
    if bad_rows not in BAD_ROWS:
        raise TraceError(f"bad_rows {bad_rows!r}: one of {', '.join(BAD_ROWS)}")
    image_limits(images, False)
    roles = _roles(columns or {})
    rejects, table = Rejects(str(path), bad_rows), AdapterTable()
    shared = {"images": images, "rejects": rejects, "table": table}
    with Source(path) as source:
        chunks = source.chunks()
        first_line, first = next(chunks, (1, b""))
        if not first.strip():
            raise TraceError(f"{source.name}: the file is empty; a trace needs a header and at least one row")
        if first.lstrip()[:1] == b"{":
            parser, image_note = _json_parser(source.name, first, format, roles, **shared)
        else:
            header, _, first = first.partition(b"\n")
            first_line += 1
            parser, image_note = _csv_parser(source.name, header, format, roles, **shared)
        parser.vectorised = vectorised
        parts = list(_parts(parser, _chain(first_line, first, chunks)))
        sha256 = source.sha256
    if not parts:
        raise TraceError(f"{source.name}: no requests in it. {rejects.note(0)}".rstrip(". "))
    found = parser.format if isinstance(parser, jsonl.ObjectParser) else parser.layout.format
    notes = [rejects.note(sum(len(part["timestamp"]) for part in parts)), image_note]
    if table.guessed:
        notes.append(f"adapters without a rank in the file have rank {DEFAULT_RANK}")
    settings = {"trace": str(path), "trace_format": found, "images": images, "bad_rows": bad_rows}
    if roles:
        settings["columns"] = roles
    header = getattr(parser, "header", {})
    notes = [*header.get("notes", ()), *notes]
    if found == "ours" and "origin" in header:
        settings["origin"] = header["origin"]
    about = {"source": str(path), "sha256": sha256, "format": found, "adapters": tuple(table.adapters)}
    return _assemble(parts, about, [note for note in notes if note], settings)


def _roles(columns: dict[str, str]) -> dict[str, str]:
    known = {*delimited.ROLES, *jsonl.MOONCAKE, *jsonl.OURS}
    roles = {}
    for given, column in columns.items():
        role = ROLE_NAMES.get(given, given)
        if role not in known:
            names = ", ".join(sorted(known))
            raise TraceError(f"--columns: no column called {given!r}{near(given, known)}; one of {names}")
        roles[role] = column
    return roles


def _json_parser(name, first, format, roles, *, images, rejects, table) -> tuple[jsonl.ObjectParser, str]:
    if format in delimited.FORMATS:
        raise TraceError(f"{name}:1: format {format} is a table, this is JSON lines; leave the format to auto")
    if format == "auto":
        line = first.lstrip().partition(b"\n")[0]
        try:
            example = jsonl.parse_object(line.decode("utf-8").strip())
        except (BadCell, UnicodeDecodeError) as error:
            why = error.why if isinstance(error, BadCell) else error.reason
            raise TraceError(f"{name}:1: looks like JSON lines, but its first line {why}") from None
    else:
        example = {}
    format, keys = jsonl.find_format(name, example, format, roles)
    limits, note = image_limits(images, False)
    return jsonl.ObjectParser(format, keys, limits, rejects, table), note


def _csv_parser(name, header, format, roles, *, images, rejects, table) -> tuple[delimited.RowParser, str]:
    if format in ("mooncake", "ours"):
        raise TraceError(f"{name}:1: format {format} is JSON lines, this is not; leave the format to auto")
    foreign = [role for role in roles if role not in delimited.ROLES]
    if foreign:
        raise TraceError(f"--columns: a table has no column {foreign[0]!r}; one of {', '.join(delimited.ROLES)}")
    layout = delimited.find_layout(name, header, format, roles)
    squares = layout.title.get("images", "").casefold() == "numimages"
    limits, note = image_limits(images, squares)
    return delimited.RowParser(layout, limits, rejects, table), note if "images" in layout.position else ""


def _chain(line: int, first: bytes, rest: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield line, first
    yield from rest


def _parts(parser, chunks: Iterator[tuple[int, bytes]]) -> Iterator[dict]:
    """The columns of each chunk that has any good row."""
    n = 0
    for line, chunk in chunks:
        part = parser.parse(chunk, line) if chunk else None
        if part is not None and len(part["timestamp"]):
            yield part
            n += len(part["timestamp"])
        if n > MAX_ROWS:
            raise TraceError(f"{parser.rejects.source}: more than {MAX_ROWS} rows; split the trace")


def _assemble(parts: list[dict], about: dict, notes: list[str], settings: dict) -> Trace:
    """One trace from the columns of all chunks: sorted stably, rebased, checked."""
    n = sum(len(part["timestamp"]) for part in parts)

    def column(name, dtype, default=0):
        pieces = [part.get(name, None) for part in parts]
        pieces = [np.full(len(part["timestamp"]), default, dtype) if piece is None else piece
                  for piece, part in zip(pieces, parts, strict=True)]  # fmt: skip
        return np.concatenate(pieces).astype(dtype, copy=False)

    present = {name for part in parts for name in part}
    arrival = column("timestamp", np.int64)
    columns = {
        "prompt_tokens": column("prompt_tokens", np.int64),
        "output_tokens": column("output_tokens", np.int64),
        "images": column("images", np.int64),
        "adapter": column("adapter", np.int32, NO_ADAPTER),
        "task": column("task", np.int8),
        "head": column("head", bool),
    }
    columns |= {name: column(name, np.int64) for name in ("ttft_slo_ns", "tpot_slo_ns") if name in present}
    prefix = None
    if "prefix" in present:
        prefix = [p for part in parts for p in part.get("prefix") or [()] * len(part["timestamp"])]
    late = int(np.count_nonzero(np.diff(arrival) < 0))
    if late:
        order = np.argsort(arrival, kind="stable")
        arrival = arrival[order]
        columns = {name: values[order] for name, values in columns.items()}
        prefix = [prefix[i] for i in order.tolist()] if prefix is not None else None
        notes.append(f"sorted by arrival: {late} of {n} rows came before the row above them")
    if about["format"] != "ours":
        settings["first_stamp_ns"] = int(arrival[0])
        arrival = arrival - arrival[0]
    return Trace.build(
        arrival, columns.pop("prompt_tokens"), columns.pop("output_tokens"), **columns, **about,
        prefix=None if prefix is None else tuple(prefix), notes=tuple(notes), settings=settings,
    )  # fmt: skip
