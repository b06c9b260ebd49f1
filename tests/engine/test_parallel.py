"""Two engines of one replay, as torchrun starts them: one router, one record. And the router's view of far replicas."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import distributed  # noqa: E402

from engine import parallel  # noqa: E402
from engine.parallel import Shared, World  # noqa: E402
from policies.journal import Journal  # noqa: E402
from traces.result_files import read_results  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store():
    """A store as torchrun keeps one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


@pytest.fixture
def replicas(store, trace):
    """replicas(router, ...) -> the trace, two ledgers and what feeds them; nothing runs."""
    from policies.ledger import Ledger
    from policies.pool import Pool
    from policies.view import Limits

    def make(router, requests):
        ledgers = [Ledger(Pool(100, 16, requests.adapters, (1, 1, 1)), Limits(4, 32), Journal(), None) for _ in range(2)]
        return ledgers, [Shared(World(rank, 2, store), requests, router, ledgers[rank], "run") for rank in range(2)]

    return make


def taken(shared, ledger, now_ps=1 << 60):
    found = []
    while (request := shared.take(now_ps, len(ledger.entries))) is not None:
        ledger.enqueue(request)
        found.append(request.id)
    return found


@pytest.mark.parametrize("router", ["round-robin", "least-outstanding", "affinity", "consolidate"])
def test_whoever_looks_first_both_agree_and_no_request_is_lost(replicas, trace, router):
    requests = trace(40, images=0, span_ns=1000)
    ledgers, (one, two) = replicas(router, requests)
    mine, theirs = [], []
    for now_ns in (100, 400, 400, 1000):
        theirs += taken(two, ledgers[1], now_ns * 1000)
        two.report()
        mine += taken(one, ledgers[0], now_ns * 1000)
        one.report()
    assert sorted(mine + theirs) == list(range(40))
    assert one.done
    assert two.done
    assert router == "consolidate" or (mine and theirs)


def test_a_router_sees_what_was_routed_since_the_last_report(replicas, trace):
    """Nobody reports in between, and still the load is even: 20 each."""
    ledgers, (one, two) = replicas("least-outstanding", trace(40, images=0, span_ns=1000))
    assert len(taken(one, ledgers[0])) == len(taken(two, ledgers[1])) == 20


def test_affinity_reads_who_holds_the_adapter(replicas, trace):
    requests = trace(6, images=0, span_ns=1000, adapter=np.array([1, 2, 1, 2, 1, 2], np.int32))
    ledgers, (one, two) = replicas("affinity", requests)
    for rank, adapter in ((0, 2), (1, 1)):
        ledgers[rank].pool.start_load(adapter)
    one.report(), two.report()
    assert taken(one, ledgers[0]) == [1, 3, 5]
    assert taken(two, ledgers[1]) == [0, 2, 4]


def test_what_a_stopped_process_left_behind_is_known(replicas, trace):
    ledgers, (one, two) = replicas("round-robin", trace(10, images=0, span_ns=1000))
    assert taken(one, ledgers[0]) == [0, 2, 4, 6, 8]
    assert [request.id for request in two.left_behind(one.walked)] == [1, 3, 5, 7, 9]


def test_messages_of_any_length_come_to_process_0_and_leave_the_store_as_it_was(store, monkeypatch):
    monkeypatch.setattr(parallel, "PART_BYTES", 4)
    zero, one, two = (World(rank, 3, store) for rank in range(3))
    before = store.num_keys()
    assert (one.gathered(b"longer than four"), two.gathered(b"")) == (None, None)
    assert zero.gathered(b"mine") == [b"mine", b"longer than four", b""]
    assert store.num_keys() == before + 2, "how many parts each sent"


def test_the_largest_value_once_all_are_here(store):
    another = distributed.TCPStore("127.0.0.1", store.port, is_master=False)  # who waits has a connection to himself
    worlds = [World(0, 2, store), World(1, 2, another)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(World.largest, worlds, (3, 5))) == [5, 5]
        assert list(pool.map(World.largest, worlds, (False, False))) == [0, 0]


def test_a_journal_travels_as_bytes(world, trace):
    from policies.journal import result

    w = world("tiny-llava", trace(8), "valora")
    w.run()
    w.driver.journal.server = 1
    copy = Journal.unpacked(w.driver.journal.packed())
    options = {"policy": "x", "operator": "y", "counters": {"end_ns": 10**9}, "config": {}}
    ours, theirs = result([w.driver.journal], **options), result([copy], **options)
    assert copy.ended == 8
    for field in dataclasses.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name in ("requests", "steps"):
            assert all((mine[column] == other[column]).all() for column in mine)
        elif field.name == "itl":
            assert all((a == b).all() for a, b in zip(mine, other, strict=True))
        elif field.name == "details":
            assert mine.keys() == other.keys()
        else:
            assert mine == other, field.name


@pytest.fixture
def torchrun(profile, tmp_path):
    """torchrun(arguments) -> the started process of two engines on the tiny model."""
    values = dataclasses.asdict(profile)
    del values["name"], values["sha256"]
    (tmp_path / "profile.json").write_text(json.dumps(values))

    def start(*arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "engine"]
        command += ["replay", "--model", "tiny-llava", "--device", "cpu", "--profile", str(tmp_path / "profile.json"),
                    "--clip", "--max-context", "128", "--adapters", "3", "--ranks", "4,8", "--adapter-assign", "round-robin",
                    "--max-batch", "4", "--max-batch-tokens", "64", "--warmup", "1", *arguments]  # fmt: skip
        return subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    return start


def test_two_processes_replay_one_trace_into_one_record(torchrun, tmp_path):
    out = tmp_path / "results"
    process = torchrun("--policy", "slora,valora", "--max-requests", "12", "--time-scale", "0.001", "--output", str(out))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed.count("best of the row") == 1, "one process speaks"
    for run in read_results(out):
        run.check()
        assert run.counters["gpus"] == 2
        assert (run.requests["status"] == 0).all()
        assert len(run.requests["id"]) == 12
        assert set(run.requests["server"].tolist()) == set(run.steps["server"].tolist()) == {0, 1}
        assert (run.requests["generated_tokens"] == run.requests["output_tokens"]).all()


@pytest.mark.long
def test_a_signal_ends_all_processes_and_what_has_finished_is_written(torchrun, tmp_path):
    out = tmp_path / "results"
    process = torchrun("--policy", "slora", "--router", "round-robin", "--max-requests", "400", "--output", str(out))
    for line in process.stderr:
        if "warmed up" in line:
            break
    time.sleep(2.5)
    process.terminate()
    process.communicate(timeout=60)
    (run,) = read_results(out)
    run.check()
    assert (run.requests["status"] == 0).sum() > 0
    assert len(run.requests["id"]) < 400
    assert set(run.requests["server"].tolist()) == {0, 1}
    assert any(note.startswith("interrupted: ") for note in run.config["notes"])
