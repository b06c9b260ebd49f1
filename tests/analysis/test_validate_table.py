"""The table over many replays, and what VaLoRA gains over each rival, from results made by hand."""

import csv
import io

import pytest

from analysis.validate import METRICS, Pair
from analysis.validate_paper import comparison
from analysis.validate_table import STEPS, Row, as_csv, markdown, orders, table, text, worst
from traces.record import STATUS


@pytest.fixture
def pair(result):
    """pair(replay, policy, slower, simulated) of an engine's run that takes `slower` times as long as a simulated one."""

    def make(replay, policy, slower=1.0, simulated=1.0, cut=0, workload="retrieval"):
        engine, other = result(policy, slower, "engine"), result(policy, simulated)
        engine.config["trace"] = {"source": "tiny.csv", "settings": {"workload": workload}}
        if cut:
            engine.requests["status"][-cut:] = STATUS.index("unfinished")
        return Pair(f"runs/{replay}", engine, other, replay)

    return make


def row(pair, **errors):
    known = dict.fromkeys((*METRICS, *STEPS), 0.5) | errors
    return Row(pair, 0.5, 3.25, 60, 0, known)


def test_the_table_ends_with_the_worst_its_goal_and_how_many_are_within(pair):
    rows = [row(pair("light", "valora"), mean_ttft_ms=-3.4, step_p95=6.5), row(pair("light", "slora"), mean_ttft_ms=2.9),
            row(pair("near", "valora"), mean_ttft_ms=None)]  # fmt: skip
    head, first, _, third, worst_row, goal, within = table(rows)
    ttft, p95 = head.index("ttft mean"), head.index("step p95")
    assert first[:7] == ["light", "llava-1.5-7b", "valora", "0.50", "3.2", "60", "0"]
    assert [line[ttft] for line in (first, third, worst_row, goal, within)] == ["-3.4!", "-", "-3.4!", "3", "1/2"]
    assert [line[p95] for line in (first, third, worst_row, goal, within)] == ["6.5!", "0.5", "6.5!", "6", "2/3"]
    assert worst(rows, "p99_ttft_ms") == 0.5
    said = markdown(rows)
    assert "| light | llava-1.5-7b | valora | 0.50 | 3.2 | 60 | 0 | **-3.4** |" in said
    assert "!" not in said
    assert "ttft mean" in text(rows)


def test_the_csv_has_both_values(pair):
    found = list(csv.DictReader(io.StringIO(as_csv([row(pair("a", "slora", 1.5, 1.2), mean_ttft_ms=-20.0)]))))
    assert len(found) == len(METRICS) + len(STEPS)
    first = found[0]
    assert (first["replay"], first["policy"], first["metric"]) == ("a", "slora", "mean_ttft_ms")
    assert float(first["simulator"]) / float(first["engine"]) == pytest.approx(0.8, rel=0.02)
    assert (first["error_percent"], first["goal_percent"]) == ("-20.0000", "3")


def test_the_order_of_policies_is_judged_replay_by_replay(pair):
    found = [pair("a", "valora"), pair("a", "slora", 1.5, 1.4), pair("b", "valora", 1.0, 1.5), pair("b", "slora", 1.5)]
    assert list(orders(found)) == [
        ("a", "valora < slora", "valora < slora", "right"),
        ("b", "valora < slora", "slora < valora", "slora and valora the other way round"),
    ]


def test_reductions_stand_beside_the_papers_and_say_where_they_are_bounds(pair):
    found = [pair("a", "valora"), pair("a", "dlora", 2.0), pair("a", "slora", 1.25, cut=5),
             pair("b", "valora", workload="trace"), pair("b", "dlora", 2.0, workload="trace")]  # fmt: skip
    head, *lines = comparison(found)
    rows = {(line[0], line[2]): dict(zip(head, line, strict=True)) for line in lines}
    gain, paper = head[-2:]
    assert rows["a", "valora"][gain] == rows["a", "valora"][paper] == ""
    assert (rows["a", "dlora"][gain], rows["a", "dlora"][paper]) == ("-50", "-72")
    assert rows["a", "slora"][gain].startswith("<= -1")
    assert rows["a", "slora"]["avg tok (ms)"].startswith(">= ")
    assert rows["a", "slora"]["cut off"] == "5"
    assert (rows["b", "dlora"][gain], rows["b", "dlora"][paper]) == ("-50", "")
