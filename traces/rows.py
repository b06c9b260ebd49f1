"""What every row format shares: the accounting of bad rows, the table of adapters, and the limits of a cell.

It knows no file format: `delimited` and `jsonl` find the cells.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from traces.request import MAX_IMAGES, MAX_TOKENS, NO_ADAPTER, Adapter, TraceError
from traces.suggest import near

DEFAULT_RANK = 64
MAX_ROWS = 100_000_000
BAD_ROWS = ("stop", "skip")
IMAGES = ("raw", "sqrt", "cap=N")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", re.ASCII)


class BadCell(ValueError):
    """A cell that cannot be taken: its column, the value, and why ('is ...', 'has ...')."""

    def __init__(self, column: str, value: object, why: str):
        super().__init__(column, value, why)
        self.column, self.value, self.why = column, value, why


def shown(value: object) -> str:
    """The value as a message may show it: quoted, on one line, at most 60 characters."""
    text = repr(value[:200]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class Rejects:
    """Bad rows of one file: `stop` raises at the first, `skip` counts them and remembers the first."""

    source: str
    mode: str = "stop"
    dropped: int = 0
    first: str = ""

    def add(self, line: int, error: BadCell) -> None:
        """Account for one bad row; raises TraceError in stop mode."""
        where = f"{self.source}:{line}: column {error.column}: {shown(error.value)} {error.why}"
        if self.mode == "stop":
            raise TraceError(f"{where}; correct the row, or drop such rows with --bad-rows skip")
        self.dropped += 1
        self.first = self.first or where

    def note(self, kept: int) -> str:
        """The sentence for the report; empty when nothing was dropped."""
        if not self.dropped:
            return ""
        return f"dropped {self.dropped} of {self.dropped + kept} rows as bad; the first: {self.first}"


@dataclass
class AdapterTable:
    """Adapters by name in order of first appearance. A closed table (from a header) takes no new names."""

    adapters: list[Adapter] = field(default_factory=list)
    closed: bool = False
    guessed: bool = False
    _index: dict[str, int] = field(default_factory=dict)

    def declare(self, adapter: Adapter) -> int:
        """Add an adapter; raises BadCell when the name is taken or is no id."""
        check_name(adapter.name)
        if adapter.name in self._index:
            raise BadCell("adapters", adapter.name, "is declared twice")
        self._index[adapter.name] = len(self.adapters)
        self.adapters.append(adapter)
        return self._index[adapter.name]

    def index(self, name: str | None, rank: int | None = None) -> int:
        """Index of the adapter a row names; None and '' mean the base model. Raises BadCell."""
        if name is None or name == "":
            return NO_ADAPTER
        known = self._index.get(name)
        if known is not None:
            if rank is not None and rank != self.adapters[known].rank:
                raise BadCell("rank", rank, f"differs from rank {self.adapters[known].rank} of {name!r} before")
            return known
        if self.closed:
            raise BadCell("adapter", name, f"is not in the header's table{near(name, self._index)}")
        check_name(name)
        if rank is not None and not 1 <= rank <= 256:
            raise BadCell("rank", rank, "is outside 1..256")
        self.guessed |= rank is None
        return self.declare(Adapter(name, DEFAULT_RANK if rank is None else rank))


def check_name(name: object) -> None:
    """Raise BadCell unless `name` is an id: letters, digits, `._-`, never a path."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadCell("adapter", name, "is not an adapter id (letters, digits, `._-`, not a path)")


@dataclass(frozen=True)
class Limits:
    """Bounds of the integer cells, and how an image count is read (`raw`, `sqrt`, or a cap)."""

    square: bool = False
    cap: int = MAX_IMAGES

    BOUNDS: ClassVar = {"prompt_tokens": (1, MAX_TOKENS), "output_tokens": (1, MAX_TOKENS), "images": (0, MAX_IMAGES)}

    def take(self, role: str, column: str, value: int) -> int:
        """The value of one cell, checked and converted. Raises BadCell."""
        low, high = self.BOUNDS[role]
        if not low <= value <= high:
            raise BadCell(column, value, f"is outside {low}..{high}")
        if role != "images":
            return value
        if self.square:
            root = math.isqrt(value)
            if root * root != value:
                why = "is no perfect square, so it is no count of the Azure LMM trace; read it with --images raw"
                raise BadCell(column, value, why)
            value = root
        return min(value, self.cap)

    def take_column(self, role: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`take` over a column: (converted values, where `take` would accept)."""
        low, high = self.BOUNDS[role]
        ok = (values >= low) & (values <= high)
        if role != "images":
            return values, ok
        if self.square:
            root = np.sqrt(np.where(ok, values, 0)).round().astype(np.int64)
            ok &= root * root == values
            values = root
        return np.minimum(values, self.cap), ok


def image_limits(images: str, counts_are_squares: bool) -> tuple[Limits, str]:
    """Limits for `--images raw|sqrt|cap=N`, and the sentence that says how NumImages was read.

    The Azure LMM column takes perfect squares only (1, 4, 9 ... 529), inferred to be the true count squared by a
    self-join; `sqrt` undoes that. In formats whose counts are honest, `sqrt` and `raw` are the same.
    """
    if images.startswith("cap="):
        cap = images.removeprefix("cap=")
        if not cap.isascii() or not cap.isdigit() or len(cap) > 9:
            raise TraceError(f"--images {images}: N is a whole number of images, as in cap=16")
        return Limits(cap=int(cap)), f"images capped at {int(cap)} a request (--images {images})"
    if images not in ("raw", "sqrt"):
        raise TraceError(f"--images {images!r}: unknown mode{near(images, IMAGES)}; one of {', '.join(IMAGES)}")
    if not counts_are_squares:
        return Limits(), ""
    if images == "sqrt":
        return Limits(square=True), "NumImages read as its square root, the likely true count (--images sqrt)"
    return Limits(), "NumImages taken as it stands (--images raw)"
