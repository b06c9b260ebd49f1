"""Where the simulator reduces to one server, first come first served, it agrees with queueing theory.

Batches of one and requests that are answered by a task head: a request is one prefill step, whose time is linear in its
tokens here. Poisson arrivals make it M/D/1 (all prompts alike) or M/M/1 (prompts drawn so that service is exponential).
Waits are correlated, so that the mean of one run of 50,000 requests wanders by 2 to 5 % around the formula at a load of 0.8.
Hence two steps: every single wait of the simulator equals Lindley's recursion on the same arrivals, to the nanosecond; and
the mean of that recursion over 150 such samples, the simulated one among them, is within 2 % of the formula.
"""

from __future__ import annotations

import numpy as np
import pytest

from policies.unmerged import Base
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from traces.request import Trace

REQUESTS = 50_000
SAMPLES = 150
NS_PER_TOKEN = 1000
MEAN_TOKENS = 10_000
MEAN_NS = MEAN_TOKENS * NS_PER_TOKEN


def sample(kind: str, load: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(arrivals in ns, prompt tokens) of one sample of Poisson arrivals."""
    rng = np.random.default_rng(seed)
    arrival_ns = np.cumsum(rng.exponential(MEAN_NS / load, REQUESTS)).astype(np.int64)
    if kind == "M/D/1":
        return arrival_ns, np.full(REQUESTS, MEAN_TOKENS)
    return arrival_ns, np.ceil(rng.exponential(MEAN_TOKENS, REQUESTS)).astype(np.int64)


def lindley_waits_ns(arrival_ns: np.ndarray, service_ns: np.ndarray) -> np.ndarray:
    """W_0 = 0, W_(n+1) = max(0, W_n + S_n - (A_(n+1) - A_n)), as a walk less its running minimum."""
    walk = np.concatenate([[0], np.cumsum(service_ns[:-1] - np.diff(arrival_ns))])
    return walk - np.minimum.accumulate(walk)


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("kind", ["M/D/1", "M/M/1"])
def test_single_server_limit(tiny_profile, kind, load):
    arrival_ns, tokens = sample(kind, load, 0)
    zero = [(1.0, 0.0)]
    profile = tiny_profile(
        2_000_000, linear=[(1.0, NS_PER_TOKEN / 1e3), (1e6, 1e3 * NS_PER_TOKEN)], prefill_attention={0: zero},
        output=zero, host_step_us=0.0, host_request_us=0.0,
    )  # fmt: skip
    trace = Trace.build(arrival_ns, tokens, np.ones(REQUESTS), head=np.ones(REQUESTS, bool))
    config = SimConfig(Limits(1, 4_000_000, 4_000_000), page_tokens=4, keep_steps=False)
    rows = simulate(trace, Base(), profile, config).requests
    waits_ns = rows["scheduled_ns"] - rows["arrival_ns"]
    assert (rows["finish_ns"] - rows["scheduled_ns"] == tokens * NS_PER_TOKEN).all()
    assert (waits_ns == lindley_waits_ns(arrival_ns, tokens * NS_PER_TOKEN)).all()

    others = [sample(kind, load, seed) for seed in range(1, SAMPLES)]
    means_ns = [waits_ns.mean(), *(lindley_waits_ns(at, prompt * NS_PER_TOKEN).mean() for at, prompt in others)]
    formula_ns = load / (1 - load) * MEAN_NS / (2 if kind == "M/D/1" else 1)
    assert np.mean(means_ns) == pytest.approx(formula_ns, rel=0.02)
