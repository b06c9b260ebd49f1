"""Operator costs as a table for the simulator: what one call takes, by operator, phase, rank, adapters and tokens.

From the benchmark's rows: the square projection and the fused q, k, v of width 4096, equal shares; the simulator scales
them to a model. It measures nothing.
"""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from pathlib import Path

from kernels import results
from kernels.batch import LoraError
from kernels.verdict import STATIC

COLUMNS = ("operator", "phase", "d_in", "d_out", "slices", "tokens", "adapters", "rank", "skew", "us")
WIDTH = 4096


def write_profile(source: Path, out: Path) -> int:
    """Write the rows of `source` that a latency table is made of; how many. LoraError if there are none, or wrong ones.

    Left out: the static ablation, which nobody would serve with, and operators not measured at every square point (a
    benchmark cut short), of which a table would be full of holes; stderr names those.
    """
    rows = [
        row for row in results.read(source)
        if row.d_in == WIDTH and row.d_out == row.slices * WIDTH and row.skew == "uniform" and row.operator != STATIC
    ]  # fmt: skip
    if not rows:
        raise LoraError(f"{source} has no row of width {WIDTH} with equal shares; run `python -m kernels bench`")
    wrong = next((row for row in rows if not row.error < 1e-2), None)
    if wrong:
        raise LoraError(f"{source}: {wrong.operator} is wrong by {wrong.error} at {wrong.point}; no time of it counts")
    wanted = Counter(row.operator for row in rows if row.slices == 1)
    partial = {name for name in {row.operator for row in rows} if wanted[name] < max(wanted.values())}
    if partial:
        print(f"left out, not measured at every point: {', '.join(sorted(partial))}", file=sys.stderr)
    rows = [row for row in rows if row.operator not in partial]
    about = results.header(source)
    part = out.with_suffix(out.suffix + ".part")
    with part.open("w", newline="") as file:
        for key in ("what", "device", "date", "versions", "command"):
            file.write(f"# {key}: {about.get(key, 'unknown')}\n")
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in sorted(rows, key=lambda r: (r.operator, r.phase, r.slices, r.rank, r.adapters, r.tokens)):
            table.writerow([*(getattr(row, name) for name in COLUMNS[:-1]), f"{row.us:.2f}"])
        file.flush()
        os.fsync(file.fileno())
    part.replace(out)
    return len(rows)
