"""`python -m analysis report`: one HTML page of results, read top to bottom: the question, what was run, the verdict in one
sentence, a table, figures, caveats, provenance.

It says what the files say: metrics are not computed again. What it is made of can be directories of results, logs of sweeps,
searches for capacity and operators' tables, in any mixture.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from analysis import claims, page
from analysis.compare import summaries
from analysis.draw import FIGURES, Inputs, draw, possible
from analysis.routers import read as read_capacity
from analysis.style import KINDS, png_alone
from analysis.sweep_data import panels, text, varying
from traces.replication import mean_ci95
from traces.result_files import ResultError, read_summary
from traces.result_tables import REFERENCES, verdict
from traces.whole_file import replace_bytes

COLUMNS = (
    ("avg_token_latency_s", "Token latency (ms)", 1e3, ".3f", -1), ("mean_ttft_ms", "Mean TTFT (ms)", 1, ".1f", -1),
    ("p99_ttft_ms", "P99 TTFT (ms)", 1, ".1f", -1), ("mean_tpot_ms", "Mean TPOT (ms)", 1, ".2f", -1),
    ("p99_tpot_ms", "P99 TPOT (ms)", 1, ".2f", -1), ("p99_e2el_ms", "P99 E2EL (s)", 1e-3, ".2f", -1),
    ("request_throughput", "Requests/s", 1, ".2f", 1), ("switches", "Switches", 1, ".0f", 0),
    ("adapter_loads", "Adapter loads", 1, ".0f", 0), ("failed", "Failed", 1, ".0f", 0),
)  # fmt: skip
"""(key, title, factor, format, which end is better)."""
MOST_LINES = 400
MOST_CLAIMS = 24


def write_report(
    paths: Sequence[str | Path], output: str | Path, title: str | None = None, where: Sequence[str] = ()
) -> Path:
    """Write the page, in one piece; returns its path. where: OPTION=VALUE, picks rows of sweeps. Raises ResultError for what
    cannot be read or holds nothing."""
    output = Path(output)
    if output.suffix not in (".html", ".htm"):
        raise ResultError(f"--output {output}: name a .html file")
    inputs = Inputs.of(paths, where)
    found = summaries(inputs.directories, short=True) if inputs.directories else {}
    question = title or _question(inputs, found)
    sentences = _verdicts(inputs, found)
    body = [page.heading(question, 1), page.paragraph(sentences[0], "verdict")]
    body += [page.paragraph(sentence) for sentence in sentences[1:]]
    body += [page.heading("What was run"), page.facts(_set_up(inputs, found))]
    body += _tables(inputs, found)
    body += [page.heading("Figures"), *_figures(paths, inputs, where)]
    body += [page.heading("Caveats"), page.bullets(_caveats(inputs, found))]
    body += [page.heading("Where it comes from"), page.facts(_provenance(inputs, found)), *_configurations(inputs)]
    output.parent.mkdir(parents=True, exist_ok=True)
    return replace_bytes(output, page.page(question, body).encode())


def _runs(inputs: Inputs, found: dict[str, dict]) -> list[dict]:
    """`run` of every summary, of directories and sweeps."""
    return [s["run"] for s in found.values()] + [row["summary"]["run"] for row in (inputs.rows if inputs.sweeps else ())]


def _question(inputs: Inputs, found: dict[str, dict]) -> str:
    models = list(dict.fromkeys(run["model"] for run in _runs(inputs, found) if run["model"]))
    models += [read_capacity(path)["settings"]["model"] for path in inputs.capacities]
    if not models:
        return "Which LoRA operator is fastest?"
    return f"How should many LoRA adapters be served on {', '.join(dict.fromkeys(models))}, and what does it cost?"


def _verdicts(inputs: Inputs, found: dict[str, dict]) -> list[str]:
    """One sentence a kind of input, the most direct answer first."""
    sentences = [verdict(found)] if found else []
    if inputs.sweeps:
        sentences += [*_sweep_verdicts(inputs.rows), *claims.sentences(claims.beside(inputs.rows))]
    for path in inputs.capacities:
        sentences += _capacity_verdicts(read_capacity(path))
    return sentences or [f"{len(inputs.operators)} tables of operators; the figure compares them."]


def _sweep_verdicts(rows: list[dict]) -> list[str]:
    """How often each policy has the lowest average token latency over the points of the sweep, and how surely."""
    changing = varying(rows)
    if "policy" not in changing:
        return []
    points: dict[tuple, dict[str, list[float]]] = {}
    axes = [name for name in changing if name not in ("policy", "policy-option", "operator")]
    for row in rows:
        place = tuple(row["variant"] if name == "variant" else text(row["settings"][name]) for name in axes)
        value, policy = row["summary"]["avg_token_latency_s"], row["settings"]["policy"]
        if value is not None and policy not in REFERENCES:
            points.setdefault(place, {}).setdefault(policy, []).append(value)
    wins: dict[str, int] = {}
    sure = 0
    for lines in points.values():
        ranked = sorted((mean_ci95(values), policy) for policy, values in lines.items())
        if len(ranked) < 2:
            continue
        (best, half), winner = ranked[0]
        (second, other), _ = ranked[1]
        wins[winner] = wins.get(winner, 0) + 1
        sure += half is not None and other is not None and best + half < second - other
    if not wins:
        return []
    total = sum(wins.values())
    winner = max(wins, key=wins.get)
    others = ", ".join(f"{policy} at {count}" for policy, count in wins.items() if policy != winner)
    tail = f" ({others})" if others else ""
    return [
        f"{winner} has the lowest average token latency at {wins[winner]} of {total} points of the sweep{tail}; at {sure} "
        "of the points the 95\u00a0% intervals of the best two are apart."
    ]


def _capacity_verdicts(document: dict) -> list[str]:
    done = [answer for answer in document["answers"] if answer["low"]]
    if not done:
        return [f"No policy holds {document['slo']} at any load tried."]
    if document["load"] is not None:
        best = min(done, key=lambda answer: answer["low"]["gpus"])
        need = f"{best['low']['gpus']} GPUs with {best['policy']}"
        return [f"{document['load']:g} requests/s under {document['slo']} take {need}."]
    best = max(done, key=lambda answer: answer["low"]["rate"])
    first = next(answer for answer in done if answer["policy"] == best["policy"])
    router = f" with router {best['router']}" if best["gpus"] > 1 else ""
    ratio = f", {best['low']['rate'] / first['low']['rate']:.2f} times {first['gpus']} GPU" if best is not first else ""
    where = f"{best['policy']} on {best['gpus']} GPU{'s' * (best['gpus'] > 1)}{router}"
    return [f"Under {document['slo']}, {where} sustains {best['low']['rate']:.4g} requests/s{ratio}."]


def _set_up(inputs: Inputs, found: dict[str, dict]) -> dict[str, str]:
    runs = _runs(inputs, found)
    pairs = {
        "Trace": _listed(Path(run["trace"]).name if run["trace"] else None for run in runs),
        "Model": _listed(run["model"] for run in runs),
        "Latency profile": _listed(
            f"{run['profile']} ({KINDS.get(run['profile_kind'], 'of unknown kind')})" for run in runs if run["profile"]
        ),
        "Policies": _listed(found),
        "Requests": _listed(f"{summary['requests']:,}" for summary in found.values()),
        "GPUs": _listed(str(summary["gpus"]) for summary in found.values()),
        "LoRA operators": _listed(f"{label}: {summary['operator']}" for label, summary in found.items()),
        "Adapters": str(len(inputs.adapters)) if inputs.adapters else "",
    }
    if inputs.sweeps:
        seeds = {row["settings"]["seed"] for row in inputs.rows}
        changing = {
            name: _listed(Path(value).name if name in ("trace", "profile") else value for value in values)
            for name, values in varying(inputs.rows).items()
        }
        pairs |= {f"Swept: {name}": values for name, values in changing.items()}
        pairs |= {"Runs": f"{len(inputs.rows):,}", "Seeds": f"{len(seeds)}"}
    for path in inputs.capacities:
        document = read_capacity(path)
        pairs["SLO"] = f"{document['slo']}, in {document['confidence']:.0%} of {document['seeds']} seeds"
    return {name: value for name, value in pairs.items() if value}


def _listed(values) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _tables(inputs: Inputs, found: dict[str, dict]) -> list[str]:
    parts = []
    if found:
        parts += [page.heading("The policies side by side"), _policy_table(found)]
    if inputs.sweeps and (pairs := claims.beside(inputs.rows)):
        rows = claims.table(pairs)
        parts += [page.heading("Beside the paper's figure 14"), page.table(claims.HEADER, rows[:MOST_CLAIMS])]
        if len(rows) > MOST_CLAIMS:
            parts.append(page.paragraph(f"and {len(rows) - MOST_CLAIMS} rows more."))
    for path in inputs.capacities:
        document = read_capacity(path)
        header, rows = _capacity_rows(document)
        parts += [page.heading(f"What holds {document['slo']}"), page.table(header, rows)]
    return parts


def _capacity_rows(document: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a search: the rates that hold, or for a load the GPUs that do."""
    rows = []
    for a in document["answers"]:
        why = ", ".join(a["high"]["broken"]) if a["high"] else a["remark"]
        if document["load"] is not None:
            needs, fails = ("-" if probe is None else str(probe["gpus"]) for probe in (a["low"], a["high"]))
            rows.append((a["policy"], a["router"], needs, fails, why))
        else:
            router = a["router"] if a["gpus"] > 1 else "-"
            rows.append((a["policy"], str(a["gpus"]), router, _load(a["low"]), _load(a["high"]), why))
    if document["load"] is not None:
        return ("Policy", "Router", f"GPUs for {document['load']:g} requests/s", "Fails with", "Because of"), rows
    return ("Policy", "GPUs", "Router", "Holds (requests/s)", "Fails at (requests/s)", "Because of"), rows


def _load(probe: dict | None) -> str:
    return "-" if probe is None else f"{probe['rate']:.4g}"


def _policy_table(found: dict[str, dict]) -> str:
    contenders = [label for label, summary in found.items() if summary["policy"] not in REFERENCES] or list(found)
    rows = []
    for key, title, factor, form, better in COLUMNS:
        rivals = [found[name][key] for name in contenders if found[name][key] is not None]
        best = (max if better > 0 else min)(rivals) if better and len(set(rivals)) > 1 else None
        cells = [title]
        for label, summary in found.items():
            value = summary[key]
            star = "*" if best is not None and value == best and label in contenders else ""
            cells.append("-" if value is None else format(value * factor, form) + star)
        rows.append(cells)
    return page.table(("", *found), rows)


def _figures(paths: Sequence[str | Path], inputs: Inputs, where: Sequence[str]) -> list[str]:
    names, parts = possible(inputs), []
    for name, axis in (("rate", "rate"), ("skewness", "adapter-assign"), ("adapters", "adapters"), ("ranks", "ranks")):
        if name in names:
            try:
                panels(inputs.rows, axis, "avg_token_latency_s")
            except ResultError as error:  # more panels than a page can show
                names.remove(name)
                parts.append(page.paragraph(f"{FIGURES[name].title}: not drawn, {error}."))
    if not names:
        return parts or [page.paragraph("Nothing to draw.")]
    with tempfile.TemporaryDirectory() as folder, png_alone():
        for name, files in draw(paths, folder, names, where).items():
            by_end = {path.suffix: path for path in files}
            lines = by_end[".csv"].read_text(encoding="utf-8").splitlines()
            caption = f"{FIGURES[name].title}."
            parts.append(page.image(by_end[".png"], caption, caption))
            more = [f"... and {len(lines) - MOST_LINES} lines more"] if len(lines) > MOST_LINES else []
            parts.append(page.folded("The numbers", "\n".join(lines[:MOST_LINES] + more)))
    return parts


def _caveats(inputs: Inputs, found: dict[str, dict]) -> list[str]:
    runs = _runs(inputs, found)
    said = []
    kinds = {run["profile_kind"] for run in runs} | {read_capacity(path)["profile"]["kind"] for path in inputs.capacities}
    if kinds - {"measured", None}:
        said.append("Latencies come from a profile that no running engine measured: read ratios, not milliseconds.")
    for label, summary in found.items():
        if summary["failed"]:
            done, asked = summary["completed"], summary["requests"]
            said.append(f"{label} completed {done:,} of {asked:,} requests; its latencies count only those.")
        if summary["policy"] in REFERENCES:
            said.append(f"{label} {REFERENCES[summary['policy']]}: a bound, not a competitor.")
    if len({(run["trace"], run["trace_sha256"]) for run in runs}) > 1:
        said.append("The runs replay different traces; figures of different traces do not compare.")
    if inputs.sweeps and len({row["code"] for row in inputs.rows}) > 1:
        said.append("The sweep's rows were made by different versions of the program.")
    alike: dict[str, list[str]] = {}
    for note in dict.fromkeys(note for run in runs for note in run["notes"]):
        alike.setdefault(re.sub(r"[\d.,]+", "0", note), []).append(note)
    said += [notes[0] + (f" (and {len(notes) - 1} notes alike)" if len(notes) > 1 else "") for notes in alike.values()]
    return said or ["None that the files tell of."]


def _provenance(inputs: Inputs, found: dict[str, dict]) -> dict[str, str]:
    runs = _runs(inputs, found)
    pairs = {
        "Made from": _listed(Path(path).name for path in
                             (*inputs.directories, *inputs.sweeps, *inputs.capacities, *inputs.operators)),
        "Trace sha256": _listed(run["trace_sha256"] for run in runs if run["trace_sha256"]),
        "Profile sha256": _listed(run["profile_sha256"] for run in runs if run["profile_sha256"]),
        "Program sha256": _listed(row["code"] for row in (inputs.rows if inputs.sweeps else ())),
        "Seeds": _listed(sorted({run["seed"] for run in runs if run["seed"] is not None})),
    }  # fmt: skip
    return {name: value for name, value in pairs.items() if value}


def _configurations(inputs: Inputs) -> list[str]:
    parts = []
    for directory in inputs.directories:
        for policy, entry in read_summary(directory)["policies"].items():
            parts.append(page.folded(f"Configuration of {policy}", json.dumps(entry["config"], indent=1)))
    return parts
