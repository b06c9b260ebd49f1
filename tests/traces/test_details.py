"""What an engine adds to its steps: written by the journal, kept in files of their own, read back, replaced with them."""

from __future__ import annotations

import pytest

from policies.journal import Journal, result
from policies.plan import UNMERGED, Work
from traces.details import DETAIL_COLUMNS
from traces.record import summarize
from traces.result_files import ResultError, read_results, write_results

PS = 1000


def journal_of(*leases) -> Journal:
    """A journal with one row for each (start_ps, work, loads, loading); every lease takes 40 us, its first step 30."""
    journal = Journal()
    for start_ps, work, loads, loading in leases:
        places = (40_000 * PS, 0, 0, 0, 0, 0)
        journal.step((0, start_ps, 40_000 * PS, 2, work.mode, -1, work.decodes, len(work.prefills), work.prefill_tokens, 0,
                      work.adapters, work.context_tokens, *places))  # fmt: skip
        journal.detail(work, start_ps, 30_000 * PS, loads, loading)
    return journal


DECODE = Work(UNMERGED, 3, 30, (), 0, 0, 3, 2, 16, 24, 8, 3)
PREFILL = Work(UNMERGED, 1, 11, ((5, 0), (2, 32)), 7, 0, 8, 1, 16, 16, 0, 2, 8)


def run_of(journal):
    return result([journal], policy="valora", operator="atmm", counters={"gpus": 1, "end_ns": 10**6}, config={"notes": []})


def test_details_come_back(tmp_path):
    run = run_of(journal_of((70_000_999, DECODE, 1, True), (0, PREFILL, 0, False)))
    write_results(tmp_path / "run", [run], {"valora": summarize(run)}, [])
    (back,) = read_results(tmp_path / "run")
    leases = list(zip(*(back.details["leases"][name].tolist() for name in DETAIL_COLUMNS["leases"]), strict=True))
    assert leases == [(0, 0, 30_000, 8, 1, 16, 16, 0, 2, 0, 0, 8), (0, 70_000, 30_000, 3, 2, 16, 24, 8, 3, 1, 1, 0)]
    assert back.details["chunks"]["tokens"].tolist() == [5, 2]
    assert back.details["chunks"]["context"].tolist() == [0, 32]
    assert (back.details["leases"]["start_ns"] == back.steps["start_ns"]).all()


def test_results_with_details_may_be_overwritten_by_results_without(tmp_path):
    rich, plain = run_of(journal_of((0, DECODE, 0, False))), run_of(Journal())
    for run in (rich, plain):
        write_results(tmp_path / "run", [run], {"valora": summarize(run)}, [], overwrite=True)
    assert read_results(tmp_path / "run")[0].details == {}
    assert not (tmp_path / "run" / "valora" / "chunks.parquet").exists()


def test_damaged_details_name_the_file(tmp_path):
    run = run_of(journal_of((0, PREFILL, 0, False)))
    write_results(tmp_path / "run", [run], {"valora": summarize(run)}, [])
    (tmp_path / "run" / "valora" / "leases.parquet").write_bytes(b"no")
    with pytest.raises(ResultError, match=r"leases\.parquet"):
        read_results(tmp_path / "run")
    del run.details["chunks"]["context"]
    with pytest.raises(ValueError, match="chunks lack the column 'context'"):
        run.check()


def test_a_journal_that_keeps_no_steps_keeps_no_details():
    journal = Journal(keep_steps=False)
    journal.detail(DECODE, 0, 1, 0, False)
    assert run_of(journal).details == {}
