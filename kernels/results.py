"""Rows of the operator benchmark, their file, and the peers' file beside it; the simulator's tables come from both.

It measures nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from kernels.batch import LoraError
from kernels.measured import whole_file

FOLDER = Path(__file__).parent / "results"
PEERS = FOLDER / "peers_h200.csv"
"""One H200's figures of other systems' own operators, measured the same way; see its header."""


@dataclass(frozen=True)
class Row:
    """One operator at one point. us: a call back to back, floor_us: what its bytes or flops need; error: relative, against
    float32; behind_us: what a call adds behind the linear of its projection, 0 where that was not measured.

    d_out counts the columns of all slices together.
    """

    operator: str
    phase: str
    d_in: int
    d_out: int
    slices: int
    tokens: int
    adapters: int
    rank: int
    skew: str
    us: float
    floor_us: float
    error: float
    behind_us: float = 0.0

    @property
    def cost_us(self) -> float:
        """As calls occur where that was measured, back to back elsewhere."""
        return self.behind_us or self.us

    @property
    def point(self) -> tuple:
        """What the operators are compared at."""
        return (self.phase, self.d_in, self.d_out, self.slices, self.tokens, self.adapters, self.rank, self.skew)


def write(path: Path, rows: Iterable[Row], header: dict[str, str]) -> None:
    """A CSV with `# key: value` lines of provenance before it, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        out = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        out.writeheader()
        for row in rows:
            times = {"us": f"{row.us:.3f}", "floor_us": f"{row.floor_us:.3f}", "behind_us": f"{row.behind_us:.3f}"}
            out.writerow(asdict(row) | times | {"error": f"{row.error:.1e}"})


def read(path: Path) -> list[Row]:
    """The rows of a file. LoraError naming file, line, column and value for one that is not a row."""
    if not path.exists():
        raise LoraError(f"{path} does not exist; `python -m kernels bench --out {path}` writes it on a GPU")
    with path.open(newline="") as file:
        lines = [(number, line) for number, line in enumerate(file, 1) if not line.startswith("#")]
    names = [f.name for f in fields(Row)]
    kinds = {"int": int, "float": float, "str": str}
    reader = csv.reader(line for _, line in lines)
    if next(reader, None) != names:
        raise LoraError(f"{path}: the columns are not {','.join(names)}")
    rows = []
    for (number, _), values in zip(lines[1:], reader, strict=True):
        if len(values) != len(names):
            raise LoraError(f"{path}: line {number}: {len(values)} values, expected {len(names)}")
        row = {}
        for column, value in zip(fields(Row), values, strict=True):
            try:
                row[column.name] = kinds[column.type](value)
            except ValueError:
                raise LoraError(f"{path}: line {number}: {column.name} {value!r} is no {column.type}") from None
        rows.append(Row(**row))
    return rows


def header(path: Path) -> dict[str, str]:
    """The provenance lines of a file."""
    with path.open() as file:
        pairs = [line[1:].partition(":") for line in file if line.startswith("#")]
    return {key.strip(): value.strip() for key, _, value in pairs}
