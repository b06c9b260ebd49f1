"""Which tiling an operator call uses: a table tuned per device, and a sound default where there is none.

The key is (projection, rank, tokens, adapters, equal shares or not): adapters and rows per adapter decide where the time
goes, and no other shipped table sees both. Lookup is a nearest neighbour in log2 space, remembered: one dictionary access
a call. It knows no kernel.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from math import log2
from pathlib import Path

from kernels.batch import LONG, TILE_ROWS, LoraError
from kernels.measured import whole_file
from kernels.target import device_name

FORMS = ("two", "under", "one", "stream")
FOLDER = Path(__file__).parent / "tiles"


@dataclass(frozen=True)
class Tiling:
    """One way to run the branch.

    form "two": shrink (rows x rank_block tiles of v at most, k_block columns of x a step, the sum over d_in split into
    `split` planes), then expand (expand_rows x n_block tiles, `span` of them a program). form "under": both in one launch,
    by programs of either kind that meet; expand_rows is rows, expand_warps warps, span 1. form "one": both in one
    program a row tile of `rows`, whose output columns `span` programs share; split, rank_block, expand_rows and
    expand_warps are not used. form "stream": like "two", but a fixed number of programs, `residents` and
    `expand_residents` a processor, share whatever row tiles there are; `split` and `span` bound from below how little
    one does; expand_rows is rows.
    """

    form: str = "two"
    rows: int = 16
    k_block: int = 256
    split: int = 16
    warps: int = 4
    stages: int = 3
    expand_rows: int = 16
    n_block: int = 128
    span: int = 1
    expand_warps: int = 4
    expand_stages: int = 3
    rank_block: int = 256
    residents: int = 2
    expand_residents: int = 2

    def __post_init__(self):
        if self.form not in FORMS:
            raise LoraError(f"form {self.form!r} must be among {FORMS}")
        if self.form == "stream" and self.rows != self.expand_rows:
            raise LoraError(f"rows {self.rows}, expand_rows {self.expand_rows} must be equal in the stream form")
        if self.form == "under" and (self.rows, self.warps, 1) != (self.expand_rows, self.expand_warps, self.span):
            raise LoraError(f"{self}: rows, warps and a span of 1 are common to both halves in the form \"under\"")
        if self.rows not in TILE_ROWS or self.expand_rows not in TILE_ROWS:
            raise LoraError(f"rows {self.rows}, expand_rows {self.expand_rows} must be among {TILE_ROWS}")


@dataclass(frozen=True)
class Shape:
    """What decides the tiling: one projection's sizes, the padded rank, the step's tokens and active adapters, whether
    these have unequal shares (only of LONG steps), and whether the branch may run beside its linear (`branch.shrink`)."""

    d_in: int
    widths: tuple[int, ...]
    rank: int
    tokens: int
    adapters: int
    uneven: bool = False
    ready: bool = False

    def rounded(self) -> Shape:
        """The same with tokens rounded to a quarter of a power of two, so that lookups repeat from step to step."""
        if self.tokens <= 16:
            return self
        return replace(self, tokens=round(2 ** (round(4 * log2(self.tokens)) / 4)))

    def distance(self, other: Shape) -> float:
        """Log2 distance; widths and slices weigh more than tokens, rank most (tiles are cut for it)."""
        mine, theirs = sum(self.widths), sum(other.widths)
        return (
            4 * abs(log2(self.rank / other.rank))
            + abs(log2(self.tokens / other.tokens))
            + abs(log2(self.tokens * other.adapters / (other.tokens * self.adapters))) / 2
            + 2 * abs(log2(self.d_in / other.d_in))
            + abs(log2(mine / theirs))
            + 2 * abs(len(self.widths) - len(other.widths))
            + abs(self.uneven - other.uneven)
            + 16 * (not self.alike(other))
        )

    def alike(self, other: Shape) -> bool:
        """Tuned for the same circumstances, see kernels.tune."""
        return (self.tokens < LONG, self.ready) == (other.tokens < LONG, other.ready)


def default(shape: Shape) -> Tiling:
    """Right and sound on any device: small tiles and a wide split for few rows, long tiles for many."""
    rows_per_adapter = shape.tokens / max(shape.adapters, 1)
    k_block = max(32, min(256, 16384 // shape.rank))
    if rows_per_adapter <= 32 or shape.tokens <= 256:
        rows = 16 if rows_per_adapter <= 16 else 32
        split = max(1, min(16, -(-shape.d_in // k_block)))
        return Tiling(rows=rows, expand_rows=rows, k_block=k_block, split=split, n_block=128)
    rows = 64 if shape.rank <= 128 else 32
    split = 1 if shape.tokens >= 4096 else 4
    return Tiling(rows=rows, expand_rows=rows, k_block=min(64, k_block), split=split, n_block=128, stages=4)


def load(path: Path) -> dict[Shape, Tiling]:
    """The entries of a table file. LoraError naming the file and entry if it is not one."""
    try:
        entries = json.loads(path.read_text())["entries"]
        known = {f.name for f in fields(Tiling)}
        table = {}
        for i, entry in enumerate(entries):
            unknown = set(entry["tiling"]) - known
            if unknown:
                raise LoraError(f"{path}: entry {i}: unknown tiling field {sorted(unknown)}; delete it and tune again")
            table[entry_shape(entry)] = Tiling(**entry["tiling"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, LoraError):
            raise
        raise LoraError(f"{path}: {error!r}; delete it and run `python -m kernels tune`") from error
    return table


@cache
def table(device: str) -> dict[Shape, Tiling]:
    """The tuned table of a device; empty, with a word on stderr, where none was tuned."""
    path = FOLDER / f"{device}.json"
    if path.exists():
        return load(path)
    if device != "interpreter":
        print(f"no tiles are tuned for {device}; run `python -m kernels tune`", file=sys.stderr)
    return {}


@cache
def lookup(shape: Shape) -> Tiling:
    """The tiling of the nearest tuned shape on this device, or the default; the first of equals.

    A tile cut for a smaller rank may not fit.
    """
    entries = {known: tiling for known, tiling in table(device_name()).items() if known.rank >= shape.rank}
    near = min(entries, key=shape.distance, default=None)
    return entries[near] if near else default(shape)


def neighbours(shape: Shape, each: int) -> list[Tiling]:
    """Distinct tilings worth a try for a shape: of every form those of its `each` nearest shapes, alike, of that form."""
    entries = table(device_name()).items()
    entries = [(known, tiling) for known, tiling in entries if known.rank >= shape.rank and shape.alike(known)]
    found: dict[Tiling, None] = {}
    for form in FORMS:
        alike = [(known, tiling) for known, tiling in entries if tiling.form == form]
        found |= dict.fromkeys(tiling for _, tiling in sorted(alike, key=lambda one: shape.distance(one[0]))[:each])
    return [*found]


def entry_shape(entry: dict) -> Shape:
    """The shape of a row of a table file. KeyError where a size is missing."""
    sizes = {name: entry[name] for name in ("d_in", "rank", "tokens", "adapters")}
    flags = {name: entry.get(name, False) for name in ("uneven", "ready")}
    return Shape(widths=tuple(entry["widths"]), **sizes, **flags)


def as_entry(shape: Shape, tiling: Tiling, us: float) -> dict:
    """One row of a table file; us: measured microseconds a call."""
    return asdict(shape) | {"us": round(us, 3), "tiling": asdict(tiling)}


def earlier_runs(old: dict, origin: dict) -> dict:
    """What a table that keeps entries of an old one says beside its own run's origin: `earlier`, the runs that those are
    of, and whether some were chosen `in_step`."""
    runs = [*old.get("earlier", []), {key: old[key] for key in origin if key in old}]
    told = {"earlier": [run for run in runs if run and run != origin], "in_step": old.get("in_step")}
    return {key: value for key, value in told.items() if value}


def write_table(path: Path, header: dict, entries: list[dict]) -> None:
    """A table file: what is said of it, then an entry a line."""
    rows = ",\n".join(json.dumps(entry) for entry in entries)
    with whole_file(path) as file:
        file.write(json.dumps(header, indent=1)[:-2] + f',\n "entries": [\n{rows}\n ]\n}}\n')
