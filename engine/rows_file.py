"""A file of measurements that grows row by row and survives being killed: JSON lines, each on disk before the next begins.

The first line holds what all rows share. It knows nothing of what is measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class RowsError(ValueError):
    """A file of rows that cannot be read or written. The message names the line and the way out."""


class RowsFile:
    """The file at `path`: `facts`, empty before the first `begin`, and `rows` by their key. Raises RowsError."""

    def __init__(self, path: Path, *, anew: bool = False):
        self.path = path
        self.facts: dict = {}
        self.rows: dict[str, dict] = {}
        if anew:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]  # a line without its end was being written when the process died
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if number == 1:
                    self.facts = dict(row["facts"])
                else:
                    self.rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                raise RowsError(
                    f"{self.path}:{number}: is no row of measurements; remove the line and it is measured again, or name "
                    "another --out"
                ) from None
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))

    def begin(self, facts: Mapping) -> None:
        """Write the first line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.facts = json.loads(json.dumps(facts))
        self._append({"facts": self.facts})

    def keep(self, row: Mapping) -> None:
        """Add a row; its `key` names it."""
        self._append(row)
        self.rows[row["key"]] = json.loads(json.dumps(row))

    def _append(self, value: Mapping) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
