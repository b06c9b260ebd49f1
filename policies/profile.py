"""A latency profile: the measured or analytic tables of one model on one GPU, read from a JSON file and checked.

A leaf of data that simulator and engine share; the files live in `sim/profiles/` with a provenance header. It knows how to
find values, not how to combine them (`cost`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

Points = list[tuple[float, float]]

POSITIVE = ("kv_bytes_per_token", "adapter_bytes_per_rank", "load_gb_per_s", "device_bytes", "max_context")
"""Numbers that are divided by, or without which nothing runs."""


class ProfileError(ValueError):
    """A profile that cannot be used. The message names the file, the key and what is wrong."""


@dataclass(frozen=True)
class Profile:
    """Tables in microseconds; `Points` are (x, us) with x ascending.

    kind: "measured", "analytic", or "extrapolated" (a measured table scaled to another GPU). linear: whole forward pass
    but attention, vision, LoRA and LM head, by tokens. decode_attention: batch -> points over the mean context.
    prefill_attention: context before the chunk -> points over its tokens. vision: by images encoded together. output: LM
    head, by rows. lora: operator -> {"decode" | "prefill": {rank: {adapters: points over tokens}}, "pads": bool}, the
    branch of all layers. switch: way -> points over the rank. Sizes are bytes; image_tokens is per image.
    """

    name: str
    kind: str
    sha256: str
    provenance: dict
    model: str
    max_context: int
    image_tokens: int
    video_images: int
    kv_bytes_per_token: int
    adapter_bytes_per_rank: int
    weights_bytes: int
    golden_bytes: int
    device_bytes: int
    reserve_bytes: int
    linear: Points
    decode_attention: dict[int, Points]
    prefill_attention: dict[int, Points]
    vision: Points
    output: Points
    lora: dict[str, dict]
    switch: dict[str, Points]
    load_gb_per_s: float
    load_latency_us: float
    host_step_us: float
    host_request_us: float

    def named(self, table: str, name: str):
        """Entry `name` of `lora` or `switch`. Raises ProfileError listing what exists."""
        entries = getattr(self, table)
        if name not in entries:
            near = difflib.get_close_matches(name, entries, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            has = ", ".join(sorted(entries))
            raise ProfileError(f"profile {self.name} has no {table} table {name!r}; {hint}it has {has}")
        entry = entries[name]
        return {key: value for key, value in entry.items() if key != "pads"} if table == "lora" else entry

    def pads(self, operator: str) -> bool:
        """True if `operator` computes every adapter at the largest rank of the batch."""
        return operator != "none" and bool(self.lora[operator].get("pads", False))

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of an adapter's factors in 16 bit."""
        return rank * self.adapter_bytes_per_rank

    def pool_bytes(self, *, golden: bool) -> int:
        """Bytes left for KV, prefixes and adapters; golden: keep a pristine copy of the weights that merging rewrites."""
        left = self.device_bytes - self.reserve_bytes - self.weights_bytes - (self.golden_bytes if golden else 0)
        if left <= 0:
            raise ProfileError(f"profile {self.name}: the weights leave no memory ({left} bytes)")
        return left


def _points(where: str, value) -> Points:
    try:
        points = [(float(x), float(y)) for x, y in value]
    except (TypeError, ValueError, OverflowError):
        raise ProfileError(f"{where}: expected a list of [x, microseconds] pairs") from None
    if not points:
        raise ProfileError(f"{where}: no points")
    for (x, y), (after, _) in zip(points, [*points[1:], (math.inf, 0.0)], strict=True):
        if not (math.isfinite(x) and math.isfinite(y)) or y < 0 or x < 0:
            raise ProfileError(f"{where}: point [{x}, {y}] is not finite and non-negative")
        if after <= x:
            raise ProfileError(f"{where}: x {after} follows {x}; points must ascend")
    return points


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile. Raises ProfileError for anything that is not one."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        data = json.loads(raw)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ProfileError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: expected a JSON object")
    fields = set(Profile.__dataclass_fields__) - {"sha256", "name"}
    for key in sorted(set(data) ^ fields):
        what = "missing" if key in fields else f"unknown; known keys are {', '.join(sorted(fields))}"
        raise ProfileError(f"{path}: key {key!r} is {what}")
    if data["kind"] not in ("measured", "analytic", "extrapolated"):
        raise ProfileError(f"{path}: kind {data['kind']!r} is none of measured, analytic, extrapolated")
    _check_plain(path, data)
    for key in ("linear", "vision", "output"):
        data[key] = _points(f"{path}: {key}", data[key])
    for key in ("decode_attention", "prefill_attention"):
        data[key] = {x: _points(f"{path}: {key}[{x}]", points) for x, points in _grid(f"{path}: {key}", data[key])}
    data["switch"] = {
        way: _points(f"{path}: switch[{way}]", points) for way, points in _table(f"{path}: switch", data["switch"]).items()
    }
    operators = _table(f"{path}: lora", data["lora"])
    data["lora"] = {operator: _operator(f"{path}: lora[{operator}]", table) for operator, table in operators.items()}
    return Profile(name=path.stem, sha256=hashlib.sha256(raw).hexdigest(), **data)


def _check_plain(path: Path, data: dict) -> None:
    """Raise ProfileError unless the entries that are no tables have the type that `Profile` says, and a possible value."""
    for key, kind in Profile.__annotations__.items():
        value = data.get(key)
        if kind in ("int", "float"):
            right = isinstance(value, (int, float) if kind == "float" else int) and not isinstance(value, bool)
            if not right or not 0 <= value < 1e18:
                raise ProfileError(f"{path}: {key} {value!r} is not a finite, non-negative {kind}")
            if value == 0 and key in POSITIVE:
                raise ProfileError(f"{path}: {key} must be above 0")
        elif kind == "dict" and not isinstance(value, dict):
            raise ProfileError(f"{path}: {key} {value!r} is not an object")


def _table(where: str, value) -> dict:
    if not isinstance(value, dict):
        raise ProfileError(f"{where}: expected an object, found {value!r}"[:300])
    return value


def _grid(where: str, value) -> list[tuple[int, object]]:
    """The items of a table whose keys are whole numbers; at least one."""
    items = _table(where, value).items()
    for key, _ in items:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ProfileError(f"{where}: key {key!r} is not a whole number")
    if not items:
        raise ProfileError(f"{where}: is empty")
    return [(int(key), entry) for key, entry in items]


def _operator(where: str, value) -> dict:
    table = _table(where, value)
    if not {"decode", "prefill"} <= set(table):
        raise ProfileError(f"{where}: needs the tables decode and prefill, has {', '.join(sorted(table))}")
    parsed: dict = {"pads": bool(table.get("pads", False))}
    for phase in ("decode", "prefill"):
        parsed[phase] = {
            rank: {
                adapters: _points(f"{where}.{phase}[{rank}][{adapters}]", points)
                for adapters, points in _grid(f"{where}.{phase}[{rank}]", by_adapters)
            }
            for rank, by_adapters in _grid(f"{where}.{phase}", table[phase])
        }
    return parsed
