"""Which adapter a request asks for: the assignments of the papers, and one fitted to real LoRA traffic.

No public trace with tokens and arrivals names adapters, so they are drawn. It knows nothing of policies, nor of what an
adapter's rank costs.

uniform            each adapter alike; S-LoRA (MLSys 2024) at alpha 1
round-robin        adapters in turn; vLLM's `--lora-assignment round-robin`
share:p            adapter 0 a share p of the requests, at random, the others alike; VaLoRA's skewness, interleaved
valora-prefix[:p]  the first floor(n p) requests in time adapter 0, the rest uniform over all; VaLoRA's artefact, p 0.5
power:alpha        adapter floor(N x) with P(x <= t) = t^alpha; S-LoRA's synthetic traces, alpha 0.1 .. 1
zipf:s[,q]         P(k) ~ (k + q)^-s, k = 1..N; s 0.90 fits GenTD26 (Lin et al., SoCC 2025), s 0.95 and q 1.1 service A
                   of Katz (ATC 2025)
session[:users]    users Zipf 0.81 over 4,247, their adapters Zipf 0.90, a user's next one the same with P 0.79; GenTD26
column, none       what the trace says; the base model
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from traces.request import NO_ADAPTER, Adapter, Trace, TraceError
from traces.suggest import near

SPECS = (
    "uniform", "round-robin", "share:p", "valora-prefix[:p]", "power:alpha", "zipf:s[,q]", "session[:users]", "column",
    "none",
)  # fmt: skip
DEFAULT_SPEC = "zipf:0.9"
MAX_ADAPTERS = 100_000
ASSIGN_STREAM = 2
USERS = 4_247
USER_ZIPF = 0.81
ADAPTER_ZIPF = 0.90
STICKY = 0.79


def assign_adapters(
    trace: Trace, spec: str = DEFAULT_SPEC, *, adapters: int = 16, ranks: Sequence[int] = (64,), seed: int = 0
) -> Trace:
    """The trace with an adapter for each request by `spec`, out of `adapters` named adapter-000, adapter-001 ...

    Adapter k has rank ranks[k % len(ranks)]. `column` keeps the trace's own adapters (their ranks too; `adapters` and
    `ranks` are not used), `none` and adapters=0 ask for the base model. Raises TraceError for a spec it cannot follow.
    """
    name, values = parse_spec(spec)
    if name == "column":
        if not trace.adapters:
            why = f"--adapter-assign column, but the trace names no adapter; try {DEFAULT_SPEC}"
            raise TraceError(f"{trace.source}: {why}")
        return trace.with_(settings={"adapter_assign": "column", "adapters": len(trace.adapters)})
    if name == "none" or adapters == 0:
        base = np.full(len(trace), NO_ADAPTER, np.int32)
        return trace.with_(adapter=base, adapters=(), settings={"adapter_assign": "none", "adapters": 0})
    pool = make_adapters(adapters, ranks)
    rng = np.random.default_rng([seed, ASSIGN_STREAM])
    picked = _RULES[name](rng, len(trace), adapters, *values)
    settings = {"adapter_assign": spec, "adapters": adapters, "ranks": list(ranks)}
    return trace.with_(adapter=picked.astype(np.int32), adapters=pool, settings=settings)


def make_adapters(count: int, ranks: Sequence[int]) -> tuple[Adapter, ...]:
    """`count` adapters whose ranks cycle over `ranks`."""
    if not 1 <= count <= MAX_ADAPTERS:
        raise TraceError(f"--adapters {count}: between 0 and {MAX_ADAPTERS}")
    if not ranks:
        raise TraceError("--ranks: at least one rank")
    width = max(3, len(str(count - 1)))
    return tuple(Adapter(f"adapter-{k:0{width}d}", ranks[k % len(ranks)]) for k in range(count))


def parse_spec(spec: str) -> tuple[str, tuple[float, ...]]:
    """(`zipf`, (0.9,)) of `zipf:0.9`. Raises TraceError for an unknown name or a value out of range."""
    name, _, rest = spec.partition(":")
    names = [known.split(":")[0].split("[")[0] for known in SPECS]
    if name not in names:
        raise TraceError(f"--adapter-assign {spec!r}: unknown{near(name, names)}; one of {', '.join(SPECS)}")
    try:
        values = tuple(float(text) for text in rest.split(",")) if rest else ()
    except ValueError:
        raise TraceError(f"--adapter-assign {spec!r}: {rest!r} is not a number; write {_form(name)}") from None
    fewest, most, low, high = {
        "share": (1, 1, 0.0, 1.0),
        "valora-prefix": (0, 1, 0.0, 1.0),
        "power": (1, 1, 1e-3, 1e3),
        "zipf": (1, 2, 0.0, 1e6),
        "session": (0, 1, 1.0, 1e6),
    }.get(name, (0, 0, 0.0, 0.0))
    if not fewest <= len(values) <= most:
        raise TraceError(f"--adapter-assign {spec!r}: takes {fewest} to {most} values; write {_form(name)}")
    for value in values:
        if not (math.isfinite(value) and low <= value <= high):
            raise TraceError(f"--adapter-assign {spec!r}: {value:g} is outside {low:g}..{high:g}")
    return name, values


def _form(name: str) -> str:
    return next(known for known in SPECS if known.startswith(name))


def _uniform(rng, n: int, adapters: int) -> np.ndarray:
    return rng.integers(adapters, size=n)


def _round_robin(_rng, n: int, adapters: int) -> np.ndarray:
    return np.arange(n) % adapters


def _share(rng, n: int, adapters: int, share: float) -> np.ndarray:
    if adapters == 1:
        return np.zeros(n, np.int64)
    hot = rng.random(n) < share
    return np.where(hot, 0, 1 + rng.integers(adapters - 1, size=n))


def _valora_prefix(rng, n: int, adapters: int, share: float = 0.5) -> np.ndarray:
    picked = rng.integers(adapters, size=n)
    picked[: math.floor(n * share)] = 0
    return picked


def _power(rng, n: int, adapters: int, alpha: float) -> np.ndarray:
    return np.minimum(rng.random(n) ** (1 / alpha) * adapters, adapters - 1).astype(np.int64)


def _zipf(rng, n: int, adapters: int, exponent: float, shift: float = 0.0) -> np.ndarray:
    return _draw(rng, n, _zipf_weights(adapters, exponent, shift))


def _session(rng, n: int, adapters: int, users: float = USERS) -> np.ndarray:
    """Each request comes from a Zipf user, who keeps the adapter of his last request or draws anew.

    The chance of drawing anew is set so that a user's next request has the same adapter with probability STICKY, a
    draw of the same one included. Users are drawn independently, so that their sessions interleave, and the fewer
    they are the more of a window's requests are for the same few adapters. GenTD26 had 4,247 users over weeks; how many
    are active at once in a busy service is not known.
    """
    user = _draw(rng, n, _zipf_weights(int(users), USER_ZIPF, 0.0))
    weights = _zipf_weights(adapters, ADAPTER_ZIPF, 0.0)
    fresh = _draw(rng, n, weights)
    same = float(np.sum((weights / weights.sum()) ** 2))
    anew = rng.random(n) < ((1 - STICKY) / (1 - same) if same < STICKY else 1.0)
    order = np.argsort(user, kind="stable")  # a user's requests side by side, in time
    first = np.diff(user[order], prepend=-1) != 0
    last_draw = np.maximum.accumulate(np.where(first | anew[order], np.arange(n), 0))
    picked = np.empty(n, np.int64)
    picked[order] = fresh[order][last_draw]
    return picked


def _zipf_weights(count: int, exponent: float, shift: float) -> np.ndarray:
    # Relative to the first, in logarithms: a large exponent must end in zeros, not in a division of zero by zero.
    return np.exp(-exponent * (np.log(np.arange(1, count + 1) + shift) - math.log(1 + shift)))


def _draw(rng, n: int, weights: np.ndarray) -> np.ndarray:
    cumulative = np.cumsum(weights)
    return np.minimum(np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right"), len(weights) - 1)


_RULES = {
    "uniform": _uniform,
    "round-robin": _round_robin,
    "share": _share,
    "valora-prefix": _valora_prefix,
    "power": _power,
    "zipf": _zipf,
    "session": _session,
}
