"""Each figure draws what the files say: three files, units on the axes, the numbers in the CSV, the same bytes twice."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from analysis import claims
from analysis.__main__ import main
from analysis.draw import FIGURES, draw
from analysis.sweep_data import number, panels, read_rows
from traces.record import summarize
from traces.result_files import ResultError, write_results

ROOT = Path(__file__).resolve().parents[2]


def drawn(paths, out, name) -> tuple[str, list[dict]]:
    """(all text of the SVG, rows of the CSV) of one figure."""
    files = {path.suffix: path for path in draw(paths, out, [name])[name]}
    assert files[".png"].read_bytes().startswith(b"\x89PNG")
    words = " ".join(ElementTree.parse(files[".svg"]).getroot().itertext())
    return " ".join(words.split()), list(csv.DictReader(files[".csv"].open()))


# -- results ------------------------------------------------------------------------------------------------------------
def test_distributions(results, tmp_path):
    words, rows = drawn([results], tmp_path, "distributions")
    for unit in ("Time to first token (s)", "Time per output token (ms)", "End-to-end latency (s)", "Requests (%)"):
        assert unit in words
    at = {(row["panel"], row["policy"], row["x"]): float(row["value"]) for row in rows}
    assert at["tpot_cdf", "valora", "50"] == pytest.approx(np.median((90 + np.arange(60)) / 9))
    assert at["ttft_cdf", "slora", "100"] == pytest.approx(26 * 1.5 / 1e3)


def test_fairness_names_adapters_and_jains_index(results, tmp_path):
    words, rows = drawn([results], tmp_path, "fairness")
    assert "Jain 1.000" in words or "Jain 0.99" in words
    assert "cat" in words
    shares = [float(row["value"]) for row in rows if row["panel"] == "requests"]
    assert shares == pytest.approx([100 / 3] * 3)


def test_modes_over_time_account_for_all_of_it(results, tmp_path):
    words, rows = drawn([results], tmp_path, "modes")
    assert "Switches (1/s)" in words
    assert "slora: no switch" in words
    own = [row for row in rows if row["policy"] == "valora"]
    width = float(own[1]["second"]) - float(own[0]["second"])
    shares = {mode: sum(float(row[f"{mode}_percent"]) for row in own) * width * 2 / 100
              for mode in ("base", "unmerged", "merged", "mixture", "idle")}  # fmt: skip
    assert [shares[mode] for mode in ("unmerged", "merged", "mixture")] == pytest.approx([0.7, 0.65, 0.65], abs=1e-6)
    assert sum(shares.values()) == pytest.approx(2 * width * len(own))
    # Modes go unmerged, merged, mixture, unmerged ...: folded in and taken out 13 times on each GPU, the last stays in.
    assert sum(float(row["switches_per_s"]) for row in own) * width == pytest.approx(2 * 26)


def test_a_gantt_chart_shows_the_steps_of_its_window(results, tmp_path):
    words, rows = drawn([results], tmp_path, "gantt")
    assert "valora, GPU 1" in words
    assert {row["mode"] for row in rows if row["policy"] == "valora"} == {"unmerged", "merged", "mixture"}
    assert all(float(row["duration_s"]) == 0.025 for row in rows)


def test_figures_of_steps_need_steps(result, tmp_path):
    run = result("valora")
    run.steps = None
    place = write_results(tmp_path / "no-steps", [run], {"valora": summarize(run)}, ["cat", "dog", "owl"])
    assert "gantt" not in draw([place], tmp_path)
    with pytest.raises(ResultError, match="no steps were recorded"):
        draw([place], tmp_path, ["gantt"])


def test_agreement_tells_simulator_from_engine(result, tmp_path):
    places = []
    for name, slower in (("simulator", 1.1), ("engine", 1.0)):
        run = result("valora", slower, name)
        places.append(write_results(tmp_path / name, [run], {"valora": summarize(run)}, ["cat", "dog", "owl"]))
    words, rows = drawn(places, tmp_path, "agreement")
    assert "simulator against engine (%)" in words
    (e2el,) = [row for row in rows if row["metric"] == "mean_e2el_ms"]
    assert float(e2el["difference_percent"]) == pytest.approx(10, abs=0.01)
    assert "agreement" in draw(places, tmp_path)
    with pytest.raises(ResultError, match="two directories"):
        draw(places[:1], tmp_path, ["agreement"])


# -- sweeps -------------------------------------------------------------------------------------------------------------
def test_the_rate_figure_shows_the_paper_beside(sweep, tmp_path):
    path = sweep({"rate": [2.0, 4.0], "workload": ["retrieval", "video"]})
    words, rows = drawn([path], tmp_path, "rate")
    assert "Paper, A100: llava-1.5-7b, video" in words
    for text in ("Request rate (requests/s)", "(ms/token)", "Ours: retrieval", "not measured"):
        assert text in words
    at = {(row["panel"], row["series"], row["x"]): row for row in rows}
    ours = at["ours: retrieval", "slora", "4"]
    assert float(ours["mean"]) == pytest.approx(4.05)
    assert float(ours["ci95_half_width"]) == pytest.approx(12.7062047 * 0.05, rel=1e-6)
    assert float(at["paper: llava-1.5-7b, retrieval", "valora", "16"]["mean"]) == pytest.approx(31)


def test_the_papers_figure_is_whole():
    with (ROOT / "analysis/paper_fig14.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    places = {(row["model"], row["workload"], row["system"], row["rate_rps"]) for row in rows}
    assert len(places) == len(rows) == 3 * 2 * 4 * 5


@pytest.mark.parametrize(
    ("name", "axis", "values", "first"),
    [
        ("skewness", "adapter-assign", ["share:0.2", "share:0.8"], "share:0.2"),
        ("adapters", "adapters", [64, 4], "4"),
        ("ranks", "ranks", [[16, 64], [128], [16]], "16"),
    ],
)
def test_other_axes(sweep, tmp_path, name, axis, values, first):
    words, rows = drawn([sweep({axis: values})], tmp_path, name)
    assert "llava-1.5-7b, retrieval" in words
    assert len(rows) == 2 * len(values)
    assert rows[0]["x"] == first


def test_ablations_pair_the_seeds(sweep, tmp_path):
    path = sweep({"rate": [4.0]}, variants=("full", "no merge"))
    rows = [row for row in read_rows([path]) if row["settings"]["policy"] == "valora"]
    from analysis.sweeps import ablations

    files = ablations(rows, tmp_path)
    table = {row["series"]: row for row in csv.DictReader(files[-1].open())}
    ratios = [2.0, 2.1 / 1.1]
    assert float(table["no merge"]["mean"]) == pytest.approx(100 * (np.mean(ratios) - 1))
    assert float(table["full"]["mean"]) == 0


def test_settings_of_variants_open_no_panels(sweep):
    path = sweep({"rate": [4.0, 8.0]}, variants=("full", "punica tiles"))
    rows = read_rows([path])
    for row in rows:
        row["settings"]["operator"] = "punica" if row["variant"] == "punica tiles" else None
    assert len(panels(rows, "rate", "avg_token_latency_s")) == 1


def test_too_many_panels_are_refused(sweep):
    rows = read_rows([sweep({"rate": [1.0, 2.0], "adapters": list(range(1, 9))})])
    with pytest.raises(ResultError, match="8 panels, at most 6; pick one value of adapters with --where"):
        panels(rows, "rate", "avg_token_latency_s")
    with pytest.raises(ResultError, match="ranks does not vary"):
        panels(rows, "ranks", "avg_token_latency_s")


def test_numbers_in_settings():
    assert [number(text) for text in ("8", "share:0.8", "uniform", "16,64")] == [8.0, 0.8, None, None]


# -- capacity and operators ---------------------------------------------------------------------------------------------
def test_routers_say_why_they_fail(capacity, tmp_path):
    words, rows = drawn([capacity], tmp_path, "routers")
    assert "39.5 (3.95x)" in words
    assert "busiest GPU 1.30x mean" in words
    assert [row["why_it_fails"].split(";")[0] for row in rows] == ["p99_ttft<1s, saturated"] * 3
    capacity.write_text("{}")
    with pytest.raises(ResultError, match="is no answer of"):
        draw([capacity], tmp_path, ["routers"])


def test_gpus_for_a_load_are_drawn_too(capacity, tmp_path):
    document = json.loads(capacity.read_text())
    one, two = document["answers"][1], document["answers"][0]
    document |= {"load": 36.0, "answers": [one | {"high": two["high"]}]}
    load = tmp_path / "load.json"
    load.write_text(json.dumps(document))
    words, rows = drawn([load], tmp_path, "routers")
    assert "GPUs that hold the SLO at 36 requests/s" in words
    assert "what breaks with one GPU less" in words
    assert [(row["policy"], row["router"], row["gpus"]) for row in rows] == [("valora", "affinity", "4")]
    with pytest.raises(ResultError, match="drawn together"):
        draw([load, capacity], tmp_path, ["routers"])


def test_profiles_stand_above_one_another_and_the_paper_at_the_foot(sweep, tmp_path):
    path = sweep({"rate": [2.0, 4.0], "profile": ["h200-llava-1.5-7b", "elsewhere/a100-80gb-llava-1.5-7b.json"]})
    words, rows = drawn([path], tmp_path, "rate")
    for text in ("Ours: h200", "Ours: a100-80gb", "Paper, A100: llava-1.5-7b, retrieval"):
        assert text in words
    panels = dict.fromkeys(row["panel"] for row in rows)
    assert list(panels) == ["ours: h200", "ours: a100-80gb", "paper: llava-1.5-7b, retrieval"]


def test_claims_are_held_against_the_paper(sweep):
    """In the made-up sweep slora takes twice valora's time; in the paper as long at 2 requests/s, twice as long at 4."""
    rows = read_rows([sweep({"rate": [2.0, 4.0, 5.0]})])
    pairs = claims.beside(rows)
    assert list(pairs[0].ours["valora"]) == ["2", "4"], "the paper has no 5 requests/s"
    assert claims.table(pairs) == [("slora", "llava-1.5-7b, retrieval", "0 to 50 %", "49 to 49 %", "analytic-h200")]
    said = claims.sentences(pairs)
    assert "holds at 2 of 2 points. There it lies 0 to 50 % (median 25 %) below its rivals, here 49 to 49 %" in said[0]
    assert len(said) == 1, "one rival has no order"


def test_without_rates_or_the_papers_model_no_claim_is_judged(sweep):
    assert claims.beside(read_rows([sweep({"adapters": [1, 16]})])) == []
    other = read_rows([sweep({"rate": [2.0, 4.0], "model": ["another"]}, name="other.jsonl")])
    assert claims.sentences(claims.beside(other)) == []


def test_operators_against_tokens(tmp_path):
    """Of many ranks, widths and skews the paper's set-up is drawn; of the numbers of adapters the fewest and about 16."""
    path = tmp_path / "operators.csv"
    lines = ["# device: a test", "operator,phase,d_in,d_out,slices,tokens,adapters,rank,skew,us"]
    for n, operator in enumerate(("atmm", "slora")):
        for adapters in (1, 4, 16, 64):
            for rank in (16, 64):
                for skew in ("uniform", "skew60"):
                    for tokens in (1, 64):
                        us = n + tokens + adapters + rank + 1000 * (skew != "uniform")
                        lines.append(f"{operator},decode,4096,4096,1,{tokens},{adapters},{rank},{skew},{us}")
    path.write_text("\n".join(lines) + "\n")
    words, rows = drawn([path], tmp_path, "operators")
    for text in ("One call (us)", "decode, 1 adapter", "decode, 16 adapters", "device: a test", "rank 64"):
        assert text in words
    at = {(row["panel"], row["operator"], row["tokens"]): float(row["us"]) for row in rows}
    assert at["decode, 16 adapters", "slora", "64"] == 1 + 64 + 16 + 64
    assert {row["system"] for row in rows if row["operator"] == "slora"} == {"S-LoRA"}
    assert len(at) == 2 * 2 * 2 + 32
    assert at["Paper, A100: 1 adapter", "valora", "8192"] == 125.3


def test_of_a_systems_operators_the_fastest_is_drawn(tmp_path):
    path = tmp_path / "operators.csv"
    path.write_text("# device: a test\noperator,tokens,us\nsgl_triton,1,5\nsgl_csgmv,1,4\nsgl_triton,64,6\nsgl_csgmv,64,9\n"
                    "unheard_of,1,3\n")  # fmt: skip
    _, rows = drawn([path], tmp_path, "operators")
    ours = [(row["system"], row["operator"], row["tokens"], row["us"]) for row in rows if row["panel"] == "measured"]
    new = "unheard_of"
    assert ours == [("SGLang", "sgl_csgmv", "1", "4"), ("SGLang", "sgl_triton", "64", "6"), (new, new, "1", "3")]


def test_a_call_that_works_while_its_linear_does_is_drawn_as_it_occurs(tmp_path):
    path = tmp_path / "operators.csv"
    path.write_text("operator,tokens,us,behind_us\natmm,1,5,1.5\natmm,4096,35,0\nslora,1,6,\n")
    _, rows = drawn([path], tmp_path, "operators")
    assert [(row["operator"], row["us"]) for row in rows if row["panel"] == "measured"] == [
        ("atmm", "1.5"), ("atmm", "35"), ("slora", "6")]  # fmt: skip


def test_a_damaged_table_of_operators_names_its_line(tmp_path):
    path = tmp_path / "operators.csv"
    path.write_text("# made by hand\noperator,tokens,us\natmm,1,2.5\natmm,x,2.5\n")
    with pytest.raises(ResultError, match=r"operators\.csv:4: needs the columns"):
        draw([path], tmp_path, ["operators"])


@pytest.fixture
def wide(sweep):
    """A sweep over more than a page can show: eight panels over the rate."""
    return sweep({"rate": [2.0, 4.0], "adapters": [1, 2, 4, 8], "ranks": [[16], [16, 64]]}, name="wide.jsonl")


def test_where_picks_the_rows_of_a_wide_sweep(wide, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["figures", "--in", str(wide), "--out", str(tmp_path / "a"), "--only", "rate"])
    assert "pick one value of adapters, ranks with --where" in capsys.readouterr().err
    assert main(["figures", "--in", str(wide), "--out", str(tmp_path / "b"), "--where", "ranks=16,64"]) == 0
    assert {path.stem for path in (tmp_path / "b").iterdir()} == {"rate", "adapters"}
    with (tmp_path / "b/rate.csv").open() as file:
        ours = {row["panel"] for row in csv.DictReader(file) if row["panel"].startswith("ours")}
    assert ours == {f"ours: {n} adapter{'s' * (n > 1)}" for n in (1, 2, 4, 8)}


def test_what_cannot_be_drawn_is_said_and_the_others_are(wide, tmp_path, capsys):
    assert main(["figures", "--in", str(wide), "--out", str(tmp_path / "c")]) == 0
    assert {path.stem for path in (tmp_path / "c").iterdir()} == {"adapters"}, "four panels: rates and ranks"
    assert "rate: not drawn: rate: 8 panels, at most 6" in capsys.readouterr().err


@pytest.mark.parametrize(("pair", "message"), [
    ("adapters", "write OPTION=VALUE"), ("adapter=4", "no option 'adapter' in these sweeps (did you mean 'adapters'?)"),
    ("adapters=3", "no run with adapters '3' in these sweeps; there is 1, 2, 4, 8"),
])  # fmt: skip
def test_a_wrong_where_says_what_there_is(wide, tmp_path, pair, message, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(wide), "--output", str(tmp_path / "page.html"), "--where", pair])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


# -- the command --------------------------------------------------------------------------------------------------------
@pytest.mark.long
def test_every_figure_is_drawn_twice_alike(results, sweep, capacity, tmp_path):
    """Equal inputs, equal bytes: for all figures that these inputs allow, and nothing but they."""
    path = sweep({"rate": [2.0, 4.0]})
    first = draw([results, path, capacity], tmp_path / "a")
    assert set(first) == {"policies", "distributions", "fairness", "modes", "gantt", "rate", "routers"} < set(FIGURES)
    for name, files in draw([results, path, capacity], tmp_path / "b").items():
        for one, other in zip(first[name], files, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize(
    ("only", "message"),
    [("gannt", "did you mean 'gantt'"), ("rate", "figure rate is drawn from sweeps, and there are none")],
)
def test_a_figure_that_cannot_be_drawn_is_refused(results, tmp_path, only, message, capsys):
    with pytest.raises(SystemExit) as code:
        main(["figures", "--in", str(results), "--out", str(tmp_path / "f"), "--only", only])
    assert code.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_input_is_named(tmp_path, capsys):
    (tmp_path / "broken.json").write_text(json.dumps({"format": "other"}))
    for path in (tmp_path / "absent", tmp_path / "absent.jsonl", tmp_path / "broken.json"):
        with pytest.raises(SystemExit):
            main(["figures", "--in", str(path), "--out", str(tmp_path / "f")])
        assert str(path) in capsys.readouterr().err


def test_a_figure_for_a_page_has_no_svg(tmp_path):
    from analysis.style import png_alone, save, sheet

    with sheet(2, 2) as (figure, _):
        with png_alone():
            assert [path.name for path in save(figure, [], ("x",), tmp_path / "page")] == ["page.png", "page.csv"]
        written = [path.suffix for path in save(figure, [], ("x",), tmp_path / "alone")]
        assert written == [".png", ".svg", ".csv"]


def test_a_run_that_was_made_anew_takes_the_place_of_the_former(sweep):
    """As when the trace's file changed under a sweep that goes on: its seeds are two, not four."""
    first = read_rows([sweep({"rate": [2.0, 4.0]})])
    again = sweep({"rate": [2.0, 4.0]}, name="again.jsonl")
    changed = [json.loads(line) for line in again.read_text().splitlines()]
    for row in changed:
        row["key"] = f"new {row['key']}"
        row["summary"]["avg_token_latency_s"] *= 10
    again.write_text("".join(f"{json.dumps(row)}\n" for row in changed))
    rows = read_rows([again.with_name("sweep.jsonl"), again])
    assert len(rows) == len(first)
    (panel,) = panels(rows, "rate", "avg_token_latency_s")
    valora = next(series for series in panel.series if series.label == "valora")
    assert valora.seeds == [2, 2]
    assert valora.mean[0] == pytest.approx(1.05e-2)
