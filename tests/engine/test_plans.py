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


def engine_without_model(trace, policy, profile, pages, prefix_cache=True, adapter_pages=None, adapter_room=None, pins=(),
                         closed_loop=0):  # fmt: skip
    from engine.arrivals import ClosedLoop
    from engine.clock import MockedClock
    from engine.replay import Driver, stripped
    from policies import residency
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
    residency.hold(ledger, pins)
    arrivals = ClosedLoop(trace, closed_loop) if closed_loop else None
    return Driver(
        trace, policy, ledger, cost, journal, MockedClock(cost), check_invariants=True, arrivals=arrivals
    )  # fmt: skip


def simulated(trace, policy, profile, **options):
    from policies.view import Limits
    from sim.cluster import SimConfig, simulate

    return simulate(trace, policy, profile, SimConfig(limits=Limits(*LIMITS), check_invariants=True, **options))


ENGINE = {"steps_ahead": 1, "lease_us": {"base": 100.0, "load": 31.0, "wake": 60.0, "launch": 30.0, "request": 7.0,
          "prompts": 40.0, "chunk": 20.0}, "decide_us": {"valora": 41.0}, "load_slowdown": 0.02}  # fmt: skip


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


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("case", ["adapters apart", "pinned", "closed loop", "all of it"])
def test_plans_are_identical_however_adapters_lie_and_requests_come(trace, profile, name, case):
    """Adapters in a memory of their own that holds two of three, one that stays, requests that arrive when others end."""
    from engine.replay import record
    from policies import make_policy

    apart, pinned, closed = (case in (this, "all of it") for this in ("adapters apart", "pinned", "closed loop"))
    requests = trace(60, 4, output=30, span_ns=60_000_000)
    options = {"pins": ("lora-1",) if pinned else (), "closed_loop": 5 if closed else 0}
    tight = dataclasses.replace(profile, device_bytes=30 * 16 * 1024, **ENGINE)
    theirs, sim_plans = recording(make_policy(name))
    expected = simulated(requests, theirs, tight, adapter_bytes=32 * 1024 if apart else None, **options)
    ours, engine_plans = recording(make_policy(name))
    strips = name == "base"
    options["pins"] = (1,) if pinned and not strips else ()
    room = expected.counters.get("adapter_room_pages")
    driver = engine_without_model(requests, ours, tight, expected.counters["pool_pages"], adapter_room=room, **options)
    driver.run()
    assert engine_plans == sim_plans
    assert room == (2 if apart else None)
    got = record(driver, requests, {"notes": []}, operator="x", page_bytes=16 * 1024)
    assert all((got.requests[column] == values).all() for column, values in expected.requests.items())
    for look_up in ("adapter_hits", "adapter_misses"):  # at the arrival there, at the next step's end here
        del got.counters[look_up], expected.counters[look_up]
    assert got.counters == expected.counters


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
