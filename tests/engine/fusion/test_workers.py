"""Jobs on worker processes: results in the jobs' order, errors as they were, and a word about workers that died."""

from __future__ import annotations

import types
from functools import partial

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from engine.fusion.checkpoint import OutOfTime, locked  # noqa: E402
from engine.fusion.workers import Workers  # noqa: E402
from traces.whole_file import replace_text  # noqa: E402

SAID = partial(eval, "log('a job') or number")
"""A job as a worker can be given it: an expression over what `open_again` made, here a dict with log and number."""
DIES = partial(eval, "__import__('os')._exit(3) if __import__('multiprocessing').parent_process() else number")
NUMBER = partial(eval, "number")
THREADS = partial(eval, "__import__('torch').get_num_threads()")


def here(log, **names):
    found = types.SimpleNamespace(bench=types.SimpleNamespace(log=log))
    return found, partial(dict, **names)


def test_workers_give_results_in_order_and_pass_on_what_is_said_and_what_fails():
    said = []
    runs, again = here(said.append, number=7)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Workers(runs, again, 2) as workers:
            jobs = [(partial(eval, f"{n} * number"), ()) for n in range(9)]
            assert workers.each([*jobs, (SAID, ()), (THREADS, ())]) == [*range(0, 63, 7), 7, 1]
            with pytest.raises(ZeroDivisionError):
                workers.each([(SAID, ()), (partial(eval, "1 / (number - 7)"), ()), (SAID, ())])
            assert workers.each([(SAID, ())]) == [7]
    finally:
        torch.set_num_threads(before)
    assert set(said) == {"a job"}
    assert len(said) >= 2


class Names(dict):
    """What an expression is given in this process."""


def test_where_a_worker_dies_the_jobs_go_on_in_this_process_and_the_way_out_is_said():
    said = []
    runs = Names(number=1)
    runs.bench = types.SimpleNamespace(log=said.append)
    with Workers(runs, partial(dict, number=2), 2) as workers:
        assert workers.each([(NUMBER, ())]) == [2]
        assert workers.each([(DIES, ()), (NUMBER, ())]) == [1, 1]
        assert workers.each([(NUMBER, ())]) == [1]
    assert len(said) == 1
    assert "fewer --workers" in said[0]


def test_one_worker_is_this_process():
    runs, _ = here(print)
    with Workers(runs, dict, 1) as workers:
        assert workers.each([(isinstance, (types.SimpleNamespace,)), (getattr, ("bench",))]) == [True, runs.bench]


def test_a_lock_is_waited_for_until_the_deadline(tmp_path):
    path = tmp_path / "runs" / "one"
    with locked(path):
        with pytest.raises(OutOfTime), locked(path, deadline=0.0):
            pytest.fail("two hold one lock")
        with locked(tmp_path / "runs" / "another", deadline=0.0):
            pass
    with locked(path, deadline=0.0):
        replace_text(path, "made")
    assert path.read_text() == "made"


def test_workers_take_over_the_digest_and_hash_nothing_again(monkeypatch, tmp_path):
    from engine.fusion import fuse

    seen = types.SimpleNamespace(hashed=0, opened=[])

    def hashed(*_):
        seen.hashed += 1
        return "d" * 64

    def ends(runs, again, count):
        seen.opened = [runs.digest, again(log=None).digest]
        raise OutOfTime

    monkeypatch.setattr(fuse, "load_domains", lambda path: ())
    monkeypatch.setattr(fuse, "digest_of", hashed)
    monkeypatch.setattr(fuse, "open_workbench", lambda *_, **__: types.SimpleNamespace(domains=()))
    monkeypatch.setattr(fuse, "Workers", ends)
    with pytest.raises(OutOfTime):
        fuse.fuse("base", "domains.yaml", tmp_path, fuse.Options(), device="cpu")
    assert seen.hashed == 1
    assert seen.opened == ["d" * 64] * 2
