"""Adapter assignment: each rule delivers the shares it promises, from the seed alone."""

import math

import numpy as np
import pytest

from traces import assign
from traces.assign import assign_adapters, make_adapters, parse_spec
from traces.request import NO_ADAPTER, Adapter, Trace, TraceError

N = 40_000
STOCHASTIC = ("uniform", "share:0.8", "valora-prefix", "power:0.3", "zipf:0.9", "zipf:0.95,1.1", "session")


def world(n=N):
    return Trace.build(np.arange(n), np.ones(n, int), np.ones(n, int))


def shares(spec, adapters, **options):
    trace = assign_adapters(world(), spec, adapters=adapters, **options)
    trace.check()
    return np.bincount(trace.adapter, minlength=adapters) / N


def assert_shares(spec, expected):
    expected = np.asarray(expected)
    spread = np.sqrt(expected * (1 - expected) / N)
    assert (np.abs(shares(spec, len(expected)) - expected) < 4.5 * spread + 1e-12).all(), spec


def test_uniform_and_round_robin():
    assert_shares("uniform", [1 / 8] * 8)
    trace = assign_adapters(world(7), "round-robin", adapters=3)
    assert trace.adapter.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_share_gives_the_hot_adapter_its_share():
    assert_shares("share:0.8", [0.8, *[0.2 / 3] * 3])
    assert_shares("share:0", [0, 0.5, 0.5])
    assert shares("share:0.3", 1).tolist() == [1]


def test_valora_prefix_is_a_prefix_in_time():
    picked = assign_adapters(world(1001), "valora-prefix:0.6", adapters=16).adapter
    assert (picked[:600] == 0).all()
    assert set(picked[600:].tolist()) == set(range(16))
    assert_shares("valora-prefix", [0.5 + 0.5 / 4, *[0.5 / 4] * 3])


def test_power_and_zipf_follow_their_laws():
    assert_shares("power:0.3", np.diff((np.arange(17) / 16) ** 0.3))
    rank = np.arange(1, 17)
    assert_shares("zipf:0.9", rank**-0.9 / (rank**-0.9).sum())
    assert_shares("zipf:0.95,1.1", (rank + 1.1) ** -0.95 / ((rank + 1.1) ** -0.95).sum())
    assert_shares("zipf:0", [1 / 4] * 4)
    assert shares("zipf:1000000", 4).tolist() == [1, 0, 0, 0]


def test_s_loras_skew_with_200_adapters():
    top1 = [shares(f"power:{alpha}", 200)[0] for alpha in (0.1, 0.3, 0.6)]
    assert top1 == pytest.approx([0.59, 0.20, 0.042], abs=0.008)  # as S-LoRA's generator gives


def test_sessions_stick():
    rng = np.random.default_rng(1)
    user = assign._draw(rng, N, assign._zipf_weights(assign.USERS, assign.USER_ZIPF, 0.0))
    picked = assign._session(np.random.default_rng(1), N, 64)  # draws the same users first
    order = np.argsort(user, kind="stable")
    same_user = np.diff(user[order]) == 0
    same_adapter = np.diff(picked[order]) == 0
    assert same_adapter[same_user].mean() == pytest.approx(assign.STICKY, abs=0.01)
    share = np.bincount(picked, minlength=64) / N
    assert same_adapter[~same_user].mean() < 2 * (share**2).sum()  # strangers share an adapter by chance alone


def test_few_users_keep_few_adapters_busy():
    def busy(spec):
        picked = assign_adapters(world(), spec, adapters=256).adapter
        return np.mean([len(set(window.tolist())) for window in picked.reshape(-1, 500)])

    assert busy("session:8") < 0.5 * busy("session")
    assert busy("session") < 0.95 * busy("zipf:0.9")


@pytest.mark.parametrize("spec", STOCHASTIC)
def test_the_seed_decides(spec):
    first, again, other = (assign_adapters(world(500), spec, seed=seed).adapter.tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_ranks_cycle_and_names_count():
    pool = make_adapters(5, (8, 64))
    assert [(a.name, a.rank) for a in pool[:3]] == [("adapter-000", 8), ("adapter-001", 64), ("adapter-002", 8)]
    assert make_adapters(1001, (8,))[-1].name == "adapter-1000"
    assert len({a.digest for a in make_adapters(1001, (8,))}) == 1001


def test_column_none_and_zero():
    named = world(3).with_(adapters=(Adapter("a", 8),), adapter=np.array([0, -1, 0], np.int32))
    kept = assign_adapters(named, "column", ranks=(128,))
    assert (kept.adapters, kept.adapter.tolist()) == (named.adapters, [0, -1, 0])
    for trace in (assign_adapters(named, "none"), assign_adapters(named, "uniform", adapters=0)):
        assert (trace.adapters, trace.adapter.tolist()) == ((), [NO_ADAPTER] * 3)
    with pytest.raises(TraceError, match="names no adapter"):
        assign_adapters(world(3), "column")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zipff:1", "did you mean 'zipf'"),
        ("share", r"write share:p"),
        ("share:x", r"'x' is not a number; write share:p"),
        ("share:1.5", r"1\.5 is outside 0\.\.1"),
        ("zipf:nan", "nan is outside"),
        ("zipf:1,2,3", "takes 1 to 2 values"),
        ("power:0", "outside"),
        ("uniform:3", "takes 0 to 0 values"),
        ("", "unknown"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(TraceError, match=message):
        parse_spec(spec)


@pytest.mark.parametrize(("adapters", "ranks"), [(-1, (8,)), (10**9, (8,)), (4, ()), (4, (0,)), (4, (257,))])
def test_bad_pools(adapters, ranks):
    with pytest.raises(TraceError):
        assign_adapters(world(3), "uniform", adapters=adapters, ranks=ranks)


def test_settings_say_what_was_done():
    trace = assign_adapters(world(3), "zipf:0.9", adapters=4, ranks=(8, 16))
    assert trace.settings == {"adapter_assign": "zipf:0.9", "adapters": 4, "ranks": [8, 16]}
    assert math.isclose(parse_spec("zipf:0.9")[1][0], 0.9)
