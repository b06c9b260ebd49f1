"""Adapters added, taken out, pinned and loaded while requests run: nobody else notices, and every answer stays right."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.peft_format import AdapterError, random_adapter, write_adapter  # noqa: E402
from policies.residency import ResidencyError  # noqa: E402

COMPLETED, ABORTED, UNSERVABLE, FAILED = range(4)
PER_RANK = 2 * 4 * (3 * 64 + 192 + 128)


@pytest.fixture
def root(tmp_path, trace, model):
    for adapter in trace(1).adapters:
        weights = random_adapter(model("tiny-llava")[0].shape, adapter.name, adapter.rank, ("qkv", "o"),
                                 np.random.default_rng([3, adapter.rank]))  # fmt: skip
        write_adapter(tmp_path, weights, "tiny-llava")
    return tmp_path


@pytest.fixture
def running(world, root):
    """running(requests, when, act, ...) -> a world that calls act(residents) once `when(driver)` holds."""
    from engine.residents import Residents

    def make(requests, when, act, policy="slora", **options):
        w = world("tiny-llava", requests, policy, root=root, **options)
        residents = Residents(w.engine, w.driver, root)
        w.answers, w.residents = [], residents

        def watch():
            if not w.answers and when(w.driver):
                w.answers.append(act(residents))

        w.driver.watchers.append(watch)
        return w

    return make


def statuses(w):
    from engine.replay import record

    run = record(w.driver, w.trace, {"notes": []}, operator="x", page_bytes=1)
    run.check()
    return run.requests["status"].tolist()


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for request, rows in expected.items():
        torch.testing.assert_close(got[request], rows, rtol=0, atol=2e-5)


@pytest.mark.parametrize("policy", ["slora", "valora"])
def test_an_adapter_added_while_others_run_answers_as_if_it_had_been_there(world, trace, root, running, policy):
    requests = trace(12, images=0, output=8, span_ns=40_000_000, adapter=np.array([0, 1] * 3 + [2, 0, 2, 1, 2, 0], np.int32))
    expected = world("tiny-llava", requests, policy, root=root).logits()
    w = running(requests, lambda d: d.arrived >= 3, lambda r: r.add("lora-2"), policy, adapters=2, spare_adapters=1)
    assert len(w.ledger.pool.adapters) == 2
    assert_same(w.logits(), expected)
    assert w.answers[0].result() == 2
    assert w.residents.names == {"lora-0": 0, "lora-1": 1, "lora-2": 2}


def test_a_request_for_an_adapter_that_is_not_there_yet_fails_alone(trace, running):
    requests = trace(6, images=0, output=4, adapter=np.array([0, 2, 1, 2, 0, 1], np.int32))
    w = running(requests, lambda d: False, None, adapters=2)
    w.run()
    assert statuses(w) == [COMPLETED, FAILED, COMPLETED, FAILED, COMPLETED, COMPLETED]
    assert w.driver.reasons == {1: "its adapter does not exist", 3: "its adapter does not exist"}


@pytest.mark.parametrize("policy", ["slora", "valora", "merged-only"])
def test_taking_an_adapter_out_lets_its_running_requests_end(world, trace, root, running, policy):
    """Batches of two: when the first requests run, others wait for the same adapter, and more come later."""
    requests = trace(10, images=0, output=12, span_ns=60_000_000, adapter=np.array([1, 0, 1, 1, 0, 0, 0, 1, 0, 1], np.int32))
    requests = requests.with_(output_tokens=np.full(10, 12), arrival_ns=np.array([0] * 6 + [10**9] * 4))
    expected = world("tiny-llava", requests, policy, root=root, limits=(2, 64, 256)).logits()
    running_1 = []

    def when(driver):
        running_1[:] = [e.id for e in driver.ledger.decoding.values() if e.adapter == 1]
        return driver.arrived >= 6 and bool(running_1)

    w = running(requests, when, lambda r: r.remove("lora-1"), policy, limits=(2, 64, 256))
    got = w.logits()
    kept = [request for request in range(10) if requests.adapter[request] != 1]
    ended = statuses(w)
    assert all(ended[request] == COMPLETED for request in kept)
    done = [request for request in (0, 2, 3) if ended[request] == COMPLETED]
    waited = [request for request in (0, 2, 3) if ended[request] == FAILED]
    assert done
    assert waited
    assert_same({r: got[r] for r in (*kept, *done)}, {r: expected[r] for r in (*kept, *done)})
    assert all(w.driver.reasons[request] == "its adapter 'lora-1' was taken out" for request in waited)
    assert {w.driver.reasons[request] for request in (7, 9)} == {"its adapter was taken out"}
    assert 1 not in w.ledger.pool.resident
    assert w.runner.loader.adapters[1] is None
    assert w.runner.loader.adapters[0] is not None
    assert "lora-1" not in w.residents.names


def test_a_pinned_adapter_outlives_the_pressure(trace, running):
    requests = trace(30, images=0, output=3, span_ns=90_000_000, adapter=np.arange(30, dtype=np.int32) % 3)
    requests = requests.with_(adapter=np.where(np.arange(30) == 0, 0, 1 + np.arange(30) % 2).astype(np.int32))
    w = running(requests, lambda d: d.arrived >= 2, lambda r: r.pin("lora-0"), adapter_bytes=32 * PER_RANK)
    evict, gone = w.ledger.pool.evict, []
    w.ledger.pool.evict = lambda adapter: (gone.append(adapter), evict(adapter))
    w.run()
    assert statuses(w) == [COMPLETED] * 30
    assert w.answers[0].result() == 0
    assert {1, 2} <= set(gone)
    assert 0 not in gone
    assert 0 in w.ledger.pool.resident


def test_pins_of_the_start_are_there_before_the_first_request(world, trace, root):
    w = world("tiny-llava", trace(8, images=0, adapter=np.ones(8, np.int32)), root=root, pins=("lora-1",))
    assert list(w.ledger.pool.resident) == [1]
    w.run()
    assert w.ledger.journal.counters["adapter_loads"] == 0
    assert w.ledger.journal.counters["adapter_hits"] == 8


def test_an_adapter_that_cannot_be_read_is_not_pinned(trace, root, running):
    path = root / "lora-1" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    requests = trace(3, images=0, output=4, adapter=np.zeros(3, np.int32))
    w = running(requests, lambda d: d.arrived >= 1, lambda r: (r.pin("lora-1"), r.load("lora-1")))
    w.run()
    for answer in w.answers[0]:
        with pytest.raises(ResidencyError, match="'lora-1' could not be read"):
            answer.result(timeout=0)
    assert not w.ledger.pool.pinned


def test_everybody_who_asks_is_answered(trace, running, monkeypatch):
    """Whatever goes wrong, however late, and whoever no longer wants to know."""
    from engine import residents as module
    from engine.commands import RunOver

    def asks(r):
        r._driver.stop = True  # the run ends before these are done
        forgotten = r.load("lora-0")
        assert forgotten.cancel()
        return r.load("lora-1"), r.load("lora-2")

    w = running(trace(3, images=0, output=4), lambda d: d.arrived >= 1, asks)
    w.run()
    for answer in (*w.answers[0], w.residents.load("lora-0"), w.residents.unpin("lora-0")):
        with pytest.raises(RunOver, match=r"the run (is over|ended before this was done); start an engine anew"):
            answer.result(timeout=0)

    def broken(*given):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(module, "read_adapter", broken)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        w.residents.add("lora-1").result(timeout=0)


def test_a_command_that_fails_does_not_end_the_run(trace, running):
    def out_of_memory():
        raise torch.OutOfMemoryError("made up")

    def asks(r):
        r._driver.commands.ask(lambda: 0).cancel()
        return r._driver.commands.ask(out_of_memory)

    w = running(trace(3, images=0, output=4), lambda d: d.arrived >= 1, asks)
    w.run()
    assert statuses(w) == [COMPLETED] * 3
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        w.answers[0].result(timeout=0)


def test_an_adapter_that_left_while_folded_in_may_come_back(world, trace, root, running):
    """Merged-only keeps 0 in the weights when it gives its rows to 1; 1 is taken out, and 0 is asked for again."""
    requests = trace(3, images=0, output=3, adapter=np.array([0, 1, 0], np.int32))
    requests = requests.with_(arrival_ns=np.array([0, 500_000_000, 900_000_000]))
    expected = world("tiny-llava", requests, "merged-only", root=root).logits()
    folded = []

    def when(driver):
        folded.append(w.runner.lora.folded)
        return 1 in driver.ledger.pool.loading

    w = running(requests, when, lambda r: r.remove("lora-1"), "merged-only", adapter_bytes=16 * PER_RANK)
    got = w.logits()
    assert folded[-1] == 0
    assert statuses(w) == [COMPLETED, FAILED, COMPLETED]
    assert_same({r: got[r] for r in (0, 2)}, {r: expected[r] for r in (0, 2)})


def test_loading_ahead_makes_the_first_request_a_hit(trace, running):
    requests = trace(4, images=0, output=4, adapter=np.array([0, 0, 0, 2], np.int32))
    requests = requests.with_(arrival_ns=np.array([0, 1, 2, 10**9]))
    w = running(requests, lambda d: d.arrived >= 3, lambda r: r.load("lora-2"))
    w.run()
    assert w.answers[0].result() == 2
    assert w.ledger.journal.counters["adapter_hits"] == 1


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda r: r.add("lora-1"), ResidencyError, "'lora-1' is here already; take it out first"),
        (lambda r: r.add("big"), AdapterError, "rank 32 is above 16, the largest that this engine was made for"),
        (lambda r: r.add("small"), ResidencyError, "all 3 slots were used; start with more spare adapters"),
        (lambda r: r.add("../x"), AdapterError, "a name has letters"),
        (lambda r: r.add("missing"), AdapterError, "is not a folder"),
        (lambda r: r.remove("nobody"), ResidencyError, "'nobody' is not here; there are lora-0, lora-1, lora-2"),
        (lambda r: r.pin("nobody"), ResidencyError, "'nobody' is not here"),
    ],
)
def test_what_cannot_be_is_refused_and_the_run_goes_on(trace, root, model, running, act, error, words):
    for name, rank in (("big", 32), ("small", 4)):
        weights = random_adapter(model("tiny-llava")[0].shape, name, rank, ("qkv",), np.random.default_rng(0))
        write_adapter(root, weights, "tiny-llava")
    w = running(trace(4, images=0, output=4), lambda d: d.arrived >= 1, act)
    w.run()
    assert statuses(w) == [COMPLETED] * 4
    with pytest.raises(error, match=words):
        w.answers[0].result()
