"""VaLoRA's parameters for ablations, and a request that starves for the folded adapter is taken up once."""

import numpy as np
import pytest

from policies import PolicyError, make_policy
from policies.valora import Valora
from policies.view import Limits
from sim.cluster import SimConfig, simulate
from sim.experiment import find_profile
from traces.assign import make_adapters
from traces.record import MODES
from traces.request import Trace

LIMITS = Limits(max_batch=8, max_batch_tokens=200)


def overload(seed: int = 0) -> Trace:
    """A burst in which most ask for one adapter and some starve behind it."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.integers(0, 3_000_000_000, 120))
    adapter = np.where(rng.random(120) < 0.8, 0, rng.integers(1, 4, 120)).astype(np.int32)
    return Trace.build(arrival, rng.integers(20, 400, 120), rng.integers(1, 60, 120), adapter=adapter,
                       adapters=make_adapters(4, (64,)))  # fmt: skip


def time_in(policy: Valora) -> dict[str, int]:
    result = simulate(overload(), policy, find_profile(None, "llava-1.5-7b"), SimConfig(LIMITS, check_invariants=True))
    assert not result.requests["status"].any(), "all complete"
    return {mode: result.time_ns["mode"][mode] for mode in MODES}


def test_each_mode_can_be_switched_off():
    full = time_in(Valora(theta_s=0.2))
    assert min(full[mode] for mode in ("unmerged", "merged", "mixture")) > 0
    assert time_in(Valora(theta_s=0.2, mixture=False))["mixture"] == 0
    never = time_in(Valora(theta_s=0.2, merge=False))
    assert never["merged"] == never["mixture"] == 0


def test_parameters_come_as_text():
    assert make_policy("valora", {"mixture": "false", "switch": "addmm"}) == Valora(mixture=False, switch="addmm")
    for text in ("0", "no", ""):
        with pytest.raises(PolicyError, match="neither true nor false"):
            make_policy("valora", {"merge": text})


@pytest.mark.parametrize(("name", "options", "patience_s"), [
    ("valora", {}, 0.5), ("valora", {"theta_s": "0.1"}, 0.1), ("valora", {"theta_s": "0.1", "merge": "false"}, 0.1),
    ("dlora", {"credit_s": "0.2"}, 0.2),
])  # fmt: skip
def test_a_full_batch_makes_room_for_who_waited_long(name, options, patience_s):
    """Long answers of one adapter fill the batch; who asks for another starts when its patience is over, and they go on."""
    arrival = np.array([0] * 8 + [1_000_000_000])
    trace = Trace.build(arrival, np.full(9, 50), np.array([1000] * 8 + [10]), adapters=make_adapters(2, (64,)),
                        adapter=np.array([0] * 8 + [1], np.int32))  # fmt: skip
    config = SimConfig(LIMITS, check_invariants=True)
    result = simulate(trace, make_policy(name, options), find_profile(None, "llava-1.5-7b"), config)
    waited_s = (result.requests["first_token_ns"][8] - arrival[8]) / 1e9
    assert patience_s - 0.02 < waited_s < patience_s + 0.1
    hot_s = result.requests["finish_ns"][:8] / 1e9
    assert hot_s.min() > waited_s + 2
    assert hot_s.max() - hot_s.min() < 0.2, "the one that paused comes back"
