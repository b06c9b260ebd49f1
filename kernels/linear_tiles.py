"""The tiles of linear layers of few rows, and which of them was measured to be fastest on a device.

It knows shapes and table files, neither a kernel nor how it was timed (`kernels.skinny_bench`).
"""

from __future__ import annotations

from kernels.target import INTERPRETED, device_name  # isort: skip  (before triton)

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from kernels.batch import LoraError
from kernels.tiles import FOLDER as TILES_FOLDER

FOLDER = TILES_FOLDER / "linears"
BUCKETS = (16, 32, 64)
"""Rows of x are padded to the next of these."""


@dataclass(frozen=True)
class Tile:
    """split: parts of the sum over K. stages: of the pipelined loop. held, fetched: blocks of W asked for before the wait,
    up to 3 into registers and shared memory, or any number into L2. shared: 0, or programs a multiprocessor, which share all
    blocks evenly; `split`, `held` and `fetched` then mean nothing. residents: most programs on a multiprocessor at once, 0:
    whatever fits, -1 (`launch.EVEN`): as few as hold the grid."""

    split: int = 1
    stages: int = 4
    held: int = 0
    shared: int = 0
    fetched: int = 0
    residents: int = 0


Tiles = dict[tuple[int, int], dict[int, Tile | None]]
"""(rows of W, K) -> most rows of x -> the tile, None where torch's linear is as fast."""


@cache
def tiles(device: str, *, branched: bool = False) -> Tiles:
    """The measured tiles of a device; none where `python -m kernels.skinny_bench --table` has not run.

    branched: those of linears with LoRA branches behind them. LoraError that names the file and the entry for one that is
    not a table.
    """
    path = FOLDER / f"{device}.json"
    return load(path, branched=branched) if path.exists() else {}


def load(path: Path, *, branched: bool = False) -> Tiles:
    """The tiles of a table file; LoraError as `tiles`.

    An entry is of a bucket of rows: its `tile` serves the whole bucket; `branched` has one for each number of rows measured
    in a step (`engine.tile_bench`).
    """
    found, place = {}, "the file"
    try:
        for number, entry in enumerate(json.loads(path.read_text())["entries"]):
            place = f"entry {number}"
            bucket = entry["bucket"]
            if bucket not in BUCKETS:
                raise ValueError(f"bucket {bucket!r} is not among {BUCKETS}")
            fields = entry.get("branched", {}).items() if branched else [(bucket, entry["tile"])]
            here = {int(rows): tile and Tile(**tile) for rows, tile in fields}
            if any(not 0 < rows <= bucket or bucket_of(rows) != bucket for rows in here):
                raise ValueError(f"rows {[*here]} are not all of bucket {bucket}")
            found.setdefault((entry["columns"], entry["depth"]), {}).update(here)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LoraError(f"{path}: {place}: {error!r}; delete it and run `python -m kernels.skinny_bench --table`") from error
    return found


def bucket_of(rows: int) -> int:
    """What 1 to 64 rows are padded to; LoraError for any other number."""
    if not 0 < rows <= BUCKETS[-1]:
        raise LoraError(f"{rows} rows: the kernels of few rows take 1 to {BUCKETS[-1]}; use torch's linear")
    return next(bucket for bucket in BUCKETS if rows <= bucket)


def measured_tile(rows: int, columns: int, depth: int, dtype: torch.dtype, *, branched: bool = False) -> Tile | None:
    """The tile for so many rows and W [columns, depth], if any beat torch on this device.

    It is that of the next larger number of rows measured in the bucket. branched: with LoRA branches behind it; the same as
    without them where no other was measured.
    """
    if INTERPRETED or dtype is not torch.bfloat16 or not 0 < rows <= BUCKETS[-1]:
        return None
    bucket = bucket_of(rows)
    for apart in (True, False) if branched else (False,):
        known = tiles(device_name(), branched=apart).get((columns, depth), {})
        most = min((most for most in known if rows <= most <= bucket), default=None)
        if most is not None:
            return known[most]
    return None
