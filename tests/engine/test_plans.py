"""The central promise: engine and simulator take byte-identical plans for the same trace, policy and cost table."""

import dataclasses

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("simpy")

POLICIES = ("valora", "dlora", "slora", "punica", "fcfs", "merged-only", "base", "oracle")
LIMITS = (4, 48, 256)


def recording(policy):
    """The policy, and the list that each of its plans is written to with its time."""
    plans = []

    class Recorder(type(policy)):
        def decide(self, view):
            plan = super().decide(view)
            plans.append(repr((view.now_ns, tuple(plan))))
            return plan

    recorder = Recorder(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)})
    return recorder, plans


def engine_without_model(trace, policy, profile, pages, prefix_cache=True, adapter_pages=None, adapter_room=None):
    from engine.clock import MockedClock
    from engine.replay import Driver, stripped
    from policies.cost import Cost
    from policies.journal import Journal
    from policies.ledger import Ledger
    from policies.pool import Pool
    from policies.view import Limits

    trace = stripped(trace, policy)
    cost = Cost(profile, policy.operator, policy.switch, trace.adapters, policy.name)
    page_bytes = 16 * profile.kv_bytes_per_token
    if adapter_pages is None:
        adapter_pages = tuple(-(-profile.adapter_bytes(adapter.rank) // page_bytes) for adapter in trace.adapters)
    pool = Pool(pages, 16, trace.adapters, adapter_pages, prefix_cache=prefix_cache, adapter_room=adapter_room)
    journal = Journal()
    ledger = Ledger(pool, Limits(*LIMITS), journal, cost, oracle=policy.oracle)
    return Driver(trace, policy, ledger, cost, journal, MockedClock(cost), check_invariants=True)


def simulated(trace, policy, profile, prefix_cache=True):
    from policies.view import Limits
    from sim.cluster import SimConfig, simulate

    return simulate(trace, policy, profile, SimConfig(limits=Limits(*LIMITS), prefix_cache=prefix_cache))


ENGINE = {"steps_ahead": 1, "lease_us": {"base": 130.0, "request": 7.0, "chunk": 20.0, "image": 9.0, "load": 31.0,
          "wake": 60.0}, "decide_us": {"valora": 41.0}, "load_slowdown": 0.02}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("engine", [{}, ENGINE], ids=["bare", "with its host"])
def test_plans_and_records_are_byte_identical(trace, profile, name, seed, engine):
    profile = dataclasses.replace(profile, **engine)
    from engine.replay import record
    from policies import make_policy

    requests = trace(60, seed, output=30, span_ns=120_000_000)
    theirs, sim_plans = recording(make_policy(name))
    expected = simulated(requests, theirs, profile)
    ours, engine_plans = recording(make_policy(name))
    driver = engine_without_model(requests, ours, profile, expected.counters["pool_pages"])
    driver.run()
    assert "\n".join(engine_plans) == "\n".join(sim_plans)
    assert len(engine_plans) > 60
    got = record(driver, requests, {"notes": []}, operator="x", page_bytes=16 * 1024)
    for column, values in expected.requests.items():
        assert (got.requests[column] == values).all(), column
    assert (got.itl[0] == expected.itl[0]).all()
    assert (got.itl[1] == expected.itl[1]).all()
    assert {k: v for k, v in got.counters.items() if k != "page_bytes"} == {
        k: v for k, v in expected.counters.items() if k != "page_bytes"
    }


@pytest.mark.parametrize("name", ["valora", "slora"])
def test_plans_are_identical_under_pressure_of_memory(trace, profile, name):
    from policies import make_policy

    requests = trace(40, 3, output=60, span_ns=20_000_000)
    tight = dataclasses.replace(profile, device_bytes=20 * 16 * 1024)
    theirs, sim_plans = recording(make_policy(name))
    expected = simulated(requests, theirs, tight)
    ours, engine_plans = recording(make_policy(name))
    driver = engine_without_model(requests, ours, tight, expected.counters["pool_pages"])
    driver.run()
    assert expected.counters["preemptions"] > 0
    assert engine_plans == sim_plans


@pytest.mark.parametrize("name", ["valora", "slora"])
def test_computing_the_steps_changes_no_plan(world, trace, model, name):
    """With a real model behind it the engine decides as it does without."""
    tokens = model("tiny-llava")[0].shape.image_tokens
    requests = trace(12, 5, image_tokens=tokens, output=6)
    w = world("tiny-llava", requests, name, limits=LIMITS)
    w.driver.policy, with_model = recording(w.policy)
    w.run()
    ours, without = recording(w.policy)
    driver = engine_without_model(
        requests, ours, w.engine.cost.profile, 200, adapter_room=w.ledger.pool.adapter_room,
        adapter_pages=w.ledger.pool.adapter_pages,
    )  # fmt: skip
    driver.run()
    assert with_model == without
