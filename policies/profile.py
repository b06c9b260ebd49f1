"""A latency profile: the measured or analytic tables of one model on one GPU, read from a JSON file and checked.

A leaf of data that simulator and engine share; the files live in `sim/profiles/` with a provenance header. It knows how to
find values, not how to combine them (`cost`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path

Points = list[tuple[float, float]]

POSITIVE = ("kv_bytes_per_token", "adapter_bytes_per_rank", "load_gb_per_s", "device_bytes", "max_context")
"""Numbers that are divided by, or without which nothing runs."""

LEASE_PARTS = ("base", "load", "wake", "launch", "request", "prompts", "chunk")
"""What `lease_us` may hold, the host's time at the boundary of a lease. Before anything is on the GPU: in all, for each load
that it starts, and what it takes longer to begin from idleness; then, to prepare and launch the first step: in all, for each
decoding request, if there are prompts, and for each chunk of one."""
LORA_PHASES = ("decode", "prefill", "mixture_decode", "mixture_prefill", "mixture_few")
"""Tables that an operator may have, the first two always; without the others, steps in mixture mode are charged by those.
Over the rows that have a branch, but mixture_few: over all tokens of a step with prompts of which few rows have one, what it
takes at least."""


@dataclass(frozen=True)
class Boost:
    """How a GPU's clock settles under load (`policies.boost`). settle_us, rest_us: time constants under load and after it.
    rested, settled: by the rows of a step with prompts, its time over what the tables say, before and after. vision_rested,
    vision_settled: of the tower."""

    settle_us: float
    rest_us: float
    rested: Points
    settled: Points
    vision_rested: float = 1.0
    vision_settled: float = 1.0


class ProfileError(ValueError):
    """A profile that cannot be used. The message names the file, the key and what is wrong."""


@dataclass(frozen=True)
class Profile:
    """Tables in microseconds; `Points` are (x, us) with x ascending.

    kind: "measured", "analytic", or "extrapolated" (a measured table scaled to another GPU). linear: whole forward pass
    but attention, vision, LoRA and LM head, by tokens. decode_attention: batch -> points over the mean context.
    prefill_attention: context before the chunk -> points over its tokens. vision: by images encoded together. output: LM
    head, by rows. lora: operator -> {LORA_PHASES: {rank: {adapters: points over tokens}}, "pads": bool, "skew": float}, the
    branch of all layers. switch: way -> points over the rank. Sizes are bytes; image_tokens is per image. host_step_us,
    host_request_us: the host's part of a step, hidden behind the GPU: a step takes the longer of both. load_gb_per_s: of an
    adapter's copy.

    What only an engine has, neutral where a file lacks it. steps_ahead: 1 where a further step is under way when an event
    is noticed at a step's end. rank_align: in memory a rank is padded to a multiple of it. prefill_linear: `linear` of steps
    with chunks of prompts; mixed_attention: decode_attention in them; empty: as in steps without. lease_us: see LEASE_PARTS;
    decide_us: policy -> time of a decision. boost: see Boost. load_slowdown: by what share a step is slower while adapters
    are copied. scatter: table -> the 10th and 90th percentile of its repeats over their median; "model": of held-out steps,
    measured over predicted.
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
    steps_ahead: int = 0
    rank_align: int = 1
    prefill_linear: Points = field(default_factory=list)
    mixed_attention: dict[int, Points] = field(default_factory=dict)
    lease_us: dict[str, float] = field(default_factory=dict)
    decide_us: dict[str, float] = field(default_factory=dict)
    load_slowdown: float = 0.0
    boost: Boost | None = None
    scatter: dict[str, tuple[float, float]] = field(default_factory=dict)

    def named(self, table: str, name: str):
        """Entry `name` of `lora` or `switch`. Raises ProfileError listing what exists."""
        entries = getattr(self, table)
        if name not in entries:
            near = difflib.get_close_matches(name, entries, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            has = ", ".join(sorted(entries))
            raise ProfileError(f"profile {self.name} has no {table} table {name!r}; {hint}it has {has}")
        entry = entries[name]
        return {key: value for key, value in entry.items() if key in LORA_PHASES} if table == "lora" else entry

    def pads(self, operator: str) -> bool:
        """True if `operator` computes every adapter at the largest rank of the batch."""
        return operator != "none" and bool(self.lora[operator].get("pads", False))

    def skew(self, operator: str) -> float:
        """Share of what `Cost` adds for rows of one adapter that `operator` really takes (1 where nobody measured it)."""
        return 1.0 if operator == "none" else self.lora[operator].get("skew", 1.0)

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of an adapter's factors in 16 bit, its rank padded to rank_align."""
        return -(-rank // self.rank_align) * self.rank_align * self.adapter_bytes_per_rank

    def pool_bytes(self, *, golden: bool) -> int:
        """Bytes left for KV, prefixes and adapters; golden: keep a pristine copy of the weights that merging rewrites."""
        left = self.device_bytes - self.reserve_bytes - self.weights_bytes - (self.golden_bytes if golden else 0)
        if left <= 0:
            raise ProfileError(f"profile {self.name}: the weights leave no memory ({left} bytes)")
        return left


def shifted(profile: Profile, side: int) -> Profile:
    """The profile at one end of its own scatter: side 0 with every table at its 10th percentile, 1 at its 90th.

    The scatter of a table's repeats and that of held-out steps ("model") count as independent: their squares add up.
    """
    model = profile.scatter.get("model", (1.0, 1.0))[side] - 1

    def factor(table: str) -> float:
        repeats = profile.scatter.get(table, (1.0, 1.0))[side] - 1
        return max(0.05, 1 + (1 if side else -1) * math.hypot(repeats, model))

    def times(points: Points, table: str) -> Points:
        return [(x, y * factor(table)) for x, y in points]

    def each(table: dict[int, Points], name: str) -> dict[int, Points]:
        return {key: times(points, name) for key, points in table.items()}

    lora = {
        operator: {
            phase: {rank: each(curves, "lora") for rank, curves in ranks.items()} if phase in LORA_PHASES else ranks
            for phase, ranks in phases.items()
        }
        for operator, phases in profile.lora.items()
    }
    attention = each(profile.decode_attention, "decode_attention")
    return replace(
        profile, linear=times(profile.linear, "linear"), decode_attention=attention, lora=lora,
        prefill_linear=times(profile.prefill_linear, "prefill_linear"), vision=times(profile.vision, "vision"),
        prefill_attention=each(profile.prefill_attention, "prefill_attention"), output=times(profile.output, "linear"),
        mixed_attention=each(profile.mixed_attention, "decode_attention"), switch=each(profile.switch, "switch"),
        load_gb_per_s=profile.load_gb_per_s / factor("load"),
    )  # fmt: skip


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
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror}") from None
    return parse_profile(path, raw)


def parse_profile(path: Path, raw: bytes) -> Profile:
    """The profile whose file has these bytes. Raises ProfileError for anything that is not one."""
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise ProfileError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: expected a JSON object")
    known = {entry.name: entry for entry in fields(Profile) if entry.name not in ("sha256", "name")}
    for key in sorted(set(data) ^ set(known)):
        if key not in known:
            raise ProfileError(f"{path}: key {key!r} is unknown; known keys are {', '.join(sorted(known))}")
        if known[key].default is MISSING and known[key].default_factory is MISSING:
            raise ProfileError(f"{path}: key {key!r} is missing")
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
    _parse_engine(path, data)
    return Profile(name=path.stem, sha256=hashlib.sha256(raw).hexdigest(), **data)


def _check_plain(path: Path, data: dict) -> None:
    """Raise ProfileError unless the entries that are no tables have the type that `Profile` says, and a possible value."""
    for key, kind in Profile.__annotations__.items():
        if key not in data:
            continue
        value = data[key]
        if kind in ("int", "float"):
            right = isinstance(value, (int, float) if kind == "float" else int) and not isinstance(value, bool)
            if not right or not 0 <= value < 1e18:
                raise ProfileError(f"{path}: {key} {value!r} is not a finite, non-negative {kind}")
            if value == 0 and key in POSITIVE:
                raise ProfileError(f"{path}: {key} must be above 0")
        elif kind == "dict" and not isinstance(value, dict):
            raise ProfileError(f"{path}: {key} {value!r} is not an object")


def _parse_engine(path: Path, data: dict) -> None:
    """What only an engine's profile has, where the file holds it."""
    if data.get("prefill_linear"):
        data["prefill_linear"] = _points(f"{path}: prefill_linear", data["prefill_linear"])
    if data.get("mixed_attention"):
        where, table = f"{path}: mixed_attention", data["mixed_attention"]
        data["mixed_attention"] = {x: _points(f"{where}[{x}]", points) for x, points in _grid(where, table)}
    if data.get("rank_align", 1) < 1:
        raise ProfileError(f"{path}: rank_align {data['rank_align']} must be at least 1")
    if data.get("steps_ahead", 0) not in (0, 1):
        raise ProfileError(f"{path}: steps_ahead {data['steps_ahead']} is neither 0 nor 1")
    for key in ("lease_us", "decide_us"):
        for name, value in _table(f"{path}: {key}", data.get(key, {})).items():
            if key == "lease_us" and name not in LEASE_PARTS:
                raise ProfileError(f"{path}: lease_us[{name}] is unknown; it may hold {', '.join(LEASE_PARTS)}")
            _finite(f"{path}: {key}[{name}]", value)
    if data.get("boost") is not None:
        data["boost"] = _boost(f"{path}: boost", data["boost"])
    scatter = _table(f"{path}: scatter", data.get("scatter", {}))
    for name, pair in scatter.items():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ProfileError(f"{path}: scatter[{name}] {pair!r} is not a pair of percentiles")
        for value in pair:
            _finite(f"{path}: scatter[{name}]", value)
    data["scatter"] = {name: tuple(pair) for name, pair in scatter.items()}


def _boost(where: str, value) -> Boost:
    names = [field.name for field in fields(Boost)]
    if sorted(_table(where, value)) != sorted(names):
        raise ProfileError(f"{where}: has {', '.join(value) or 'nothing'}; it must have {', '.join(names)}")
    tables = {name: _points(f"{where}: {name}", value[name]) for name in ("rested", "settled")}
    for name in names:
        if name not in tables:
            _finite(f"{where}: {name}", value[name])
    factors = [factor for points in tables.values() for _, factor in points]
    taus, towers = (value["settle_us"], value["rest_us"]), (value["vision_rested"], value["vision_settled"])
    if not all(taus) or not all(0 < factor < 10 for factor in (*factors, *towers)):
        raise ProfileError(f"{where}: settle_us, rest_us and factors must be above 0, and factors below 10")
    return Boost(**{**value, **tables})


def _finite(where: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise ProfileError(f"{where}: {value!r} is not a finite, non-negative number")


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
    if "skew" in table:
        _finite(f"{where}.skew", table["skew"])
        parsed["skew"] = float(table["skew"])
    for phase in [phase for phase in LORA_PHASES if phase in table]:
        parsed[phase] = {
            rank: {
                adapters: _points(f"{where}.{phase}[{rank}][{adapters}]", points)
                for adapters, points in _grid(f"{where}.{phase}[{rank}]", by_adapters)
            }
            for rank, by_adapters in _grid(f"{where}.{phase}", table[phase])
        }
    return parsed
