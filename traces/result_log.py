"""An append-only log of finished runs: one JSON object a line, each written in one piece and synced to disk.

A process killed at any moment leaves whole lines and at most one torn line at the end, which the next writer cuts off.
Rows are found by their `key`, and read back one at a time, so that memory does not grow with them. Version 1 of the
format: {"key": hash of what was run, "variant": label, "settings": {option: value}, "code": hash of the program,
"summary": what `record.summarize` gave}. It knows nothing of what the settings mean.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from traces.result_files import ResultError

OPENING = b'{"key":'
PARTS = {"key": str, "variant": str, "settings": dict, "code": str, "summary": dict}


class ResultLog:
    """The log at `path`, opened for appending by one process at a time; a context manager.

    Raises ResultError, naming the line, for a file that is not such a log or that another process is writing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.torn_bytes = 0  # cut off the end when it was opened
        self._places: dict[str, int] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ResultError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            self._lock()
            self._index()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> ResultLog:
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultError(f"{self.path}: another process is writing it; wait for it, or name another file") from None

    def _index(self) -> None:
        place = 0
        for row, length in _rows(self.path):
            self._places[row["key"]] = place
            place += length
        self.torn_bytes = os.fstat(self._file).st_size - place
        if self.torn_bytes:
            torn = os.pread(self._file, len(OPENING), place)
            if torn != OPENING[: len(torn)]:
                raise ResultError(f"{self.path}: its last line is no row of a sweep; name another file")
            os.ftruncate(self._file, place)
            os.fsync(self._file)

    def append(self, row: Mapping) -> None:
        """Write one row; it is on disk when this returns. A key that is there already is replaced for readers."""
        line = json.dumps({"key": row["key"]} | dict(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        place = os.fstat(self._file).st_size
        written = 0
        while written < len(line):  # a disk may take only a part
            written += os.write(self._file, line[written:])
        os.fsync(self._file)
        self._places[row["key"]] = place

    def read(self, key: str) -> dict:
        """The row of `key`. KeyError if there is none."""
        with self.path.open("rb") as file:
            file.seek(self._places[key])
            return json.loads(file.readline())


def read_log(path: str | Path) -> list[dict]:
    """All rows of a log, in the order they were first written; of rows with one key the last. Raises ResultError."""
    rows = {row["key"]: row for row, _ in _rows(Path(path))}
    if not rows:
        raise ResultError(f"{path}: holds no finished run; let the sweep finish at least one")
    return list(rows.values())


def _rows(path: Path) -> Iterator[tuple[dict, int]]:
    """(row, bytes of its line) of each whole line; a last line without its end is left out."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                yield _row(f"{path}:{number}", line), len(line)
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None


def _row(where: str, line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ResultError(f"{where}: is not JSON; remove the line, and the sweep runs it again") from None
    for name, kind in PARTS.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ResultError(f"{where}: lacks a valid {name!r}, so it is no row of a sweep; name another file")
    return row
