"""The command lines: shared options in their documented order, near names for misspelt ones, exit codes, same bytes."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from traces.__main__ import main
from traces.options import SAMPLE, SuggestingParser, add_trace_arguments, load_trace
from traces.readers import read_trace
from traces.request import TraceError

MODEL = SimpleNamespace(image_tokens=576, video_images=3, max_context=4096)


def load(*argv):
    parser = SuggestingParser(prog="sim")
    add_trace_arguments(parser)
    return load_trace(parser.parse_args(argv), MODEL)


def fails(capsys, call, *argv):
    """The one line on stderr of a call that must exit with code 2."""
    with pytest.raises(SystemExit) as exit_:
        call(*argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_no_options_replay_the_sample_with_zipf_adapters():
    trace = load()
    assert 900 <= len(trace) <= 1100
    assert trace.source == "traces/sample.csv"
    assert len(trace.adapters) == 16
    assert {a.rank for a in trace.adapters} == {64}
    assert trace.settings["adapter_assign"] == "zipf:0.9"
    assert "synthetic sample" in trace.notes[0]


def test_the_sample_is_what_the_command_makes(tmp_path):
    assert main(["synth", "conv", "--requests", "1000", "--seed", "1", "--output", str(tmp_path / "s.csv")]) == 0
    assert (tmp_path / "s.csv").read_bytes() == SAMPLE.read_bytes()


def test_steps_apply_in_the_documented_order():
    trace = load(
        "--start", "10", "--duration", "100", "--sample", "0.5", "--max-requests", "100", "--rate", "4",
        "--workload", "video", "--adapters", "4", "--ranks", "8,64", "--adapter-assign", "round-robin",
        "--clip", "--seed", "7",
    )  # fmt: skip
    assert len(trace) == 100
    assert trace.adapter.tolist() == [0, 1, 2, 3] * 25
    assert [a.rank for a in trace.adapters] == [8, 64, 8, 64]
    words = ["sample that ships", "window from 10 s", "sampled 0.5", "first 100 of", "rescaled", "video analytics"]
    assert [word in note for word, note in zip(words, trace.notes, strict=True)] == [True] * 6
    expected = {
        "trace": "traces/sample.csv", "trace_format": "azure", "images": "sqrt", "bad_rows": "stop", "start_s": 10.0,
        "duration_s": 100.0, "arrivals": "trace", "sample": 0.5, "max_requests": 100, "rate": 4.0, "time_scale": None,
        "workload": "video", "image_tokens": 576, "video_images": 3, "repeat_images": 0.0, "head": True, "adapters": 4,
        "ranks": [8, 64], "adapter_assign": "round-robin", "clip": True, "max_context": 4096, "seed": 7,
        "requests": 100,
    }  # fmt: skip
    assert trace.settings == expected


def test_one_seed_governs_every_draw():
    def draws(seed):
        trace = load("--sample", "0.5", "--workload", "retrieval", "--repeat-images", "0.5", "--seed", seed)
        return trace.arrival_ns.tolist(), trace.prompt_tokens.tolist()[:400], trace.prefix, trace.adapter.tolist()

    assert draws("1") == draws("1")
    assert all(a != b for a, b in zip(draws("1"), draws("2"), strict=True))


def test_the_traces_own_adapters_come_first(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 5, "adapter": "cat", "rank": 8}\n')
    assert [a.name for a in load("--trace", str(path)).adapters] == ["cat"]
    assert len(load("--trace", str(path), "--adapters", "3").adapters) == 3
    assert load("--trace", str(path), "--adapters", "0").adapters == ()
    with pytest.raises(TraceError, match="drop --adapters and --ranks"):
        load("--trace", str(path), "--adapter-assign", "column", "--ranks", "8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tracee", "x"], "unknown argument '--tracee' (did you mean '--trace'?)"),
        (["--request-rate", "4"], "unknown argument '--request-rate' (here it is --rate)"),
        (["--num-prompts=9"], "unknown argument '--num-prompts=9' (here it is --max-requests)"),
        (["--workload", "retreival"], "(did you mean 'retrieval'?)"),
        (["--trace-format", "asure"], "(did you mean 'azure'?)"),
        (["--arrivals", "valora-sampl:4"], "(did you mean 'valora-sample'?)"),
        (["--arrivals", "valora-sample:x"], "'x' is not a whole number"),
        (["--columns", "timestamp"], "is not role=column"),
        (["--rate", "nan"], "nan is not finite"),
        (["--rate", "0"], "0 is not above 0"),
        (["--rate", "1", "--time-scale", "2"], "not allowed with"),
        (["--start", "-1"], "-1 is below 0"),
        (["--ranks", "8,,16"], "'' is not a whole number"),
        (["--seed", "99999999999999999999"], "is not a whole number"),
        (["--max-req", "5"], "unknown argument '--max-req' (did you mean '--max-requests'?)"),
        (["stray"], "unknown argument 'stray'; sim --help"),
    ],
)
def test_bad_options_name_the_near_one(capsys, argv, message):
    assert message in fails(capsys, load, *argv)


def test_commands_name_the_near_one(capsys):
    assert "(did you mean 'inspect'?)" in fails(capsys, main, ["inspct"])
    assert "(did you mean '--requests'?)" in fails(capsys, main, ["synth", "conv", "--request", "5", "--output", "x"])
    assert "(did you mean 'lmm'?)" in fails(capsys, main, ["synth", "lm", "--requests", "5", "--output", "x"])
    assert "required: --output" in fails(capsys, main, ["synth", "conv", "--requests", "5"])


def test_bad_input_exits_with_2_and_one_line(capsys, tmp_path):
    (tmp_path / "bad.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,0,1\n")
    for argv in (["inspect", str(tmp_path / "bad.csv")], ["inspect", str(tmp_path)], ["convert", "none", "x"]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("python -m traces: error: ")
        assert err.count("\n") == 1


def test_inspect_describes(capsys, tmp_path):
    assert main(["synth", "lmm", "--requests", "3000", "--seed", "4", "--output", str(tmp_path / "t.csv")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "t.csv")]) == 0
    first = capsys.readouterr().out
    for word in ("requests     3000 in", "NumImages read as its square root", "prompt tokens", "with images", "IDC"):
        assert word in first
    main(["inspect", str(tmp_path / "t.csv")])
    assert capsys.readouterr().out == first


def test_inspect_counts_what_prefixes_share(capsys, tmp_path):
    rows = [(1, "a", [1, 2]), (2, "a", [1, 2]), (3, "b", [1, 2]), (4, "a", [3, 2])]  # 2 after 3 is not 2 after 1
    lines = [
        f'{{"timestamp": {t}, "input_length": 1024, "output_length": 5, "adapter": "{name}", "hash_ids": {ids}}}\n'
        for t, name, ids in rows
    ]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    assert main(["inspect", str(tmp_path / "t.jsonl")]) == 0
    assert "prefixes     4096 tokens; 1024, 25.0% of all prompt tokens" in capsys.readouterr().out


def test_convert_draws_adapters_and_chains(capsys, tmp_path):
    ours, mooncake, table = (str(tmp_path / name) for name in ("o.jsonl.gz", "m.jsonl", "a.csv"))
    argv = ["--max-requests", "200", "--adapter-assign", "session", "--adapters", "8", "--ranks", "8,64"]
    assert main(["convert", str(SAMPLE), ours, *argv]) == 0
    assert main(["convert", ours, mooncake, "--to", "mooncake"]) == 0
    assert main(["convert", mooncake, table, "--to", "azure"]) == 0
    assert "lost: Azure's columns hold no adapters" in capsys.readouterr().err
    original, last = read_trace(SAMPLE), read_trace(table)
    assert (last.arrival_ns == original.arrival_ns[:200]).all()
    assert read_trace(mooncake).adapters != ()
    assert main(["inspect", mooncake]) == 0
    assert "adapters     " in capsys.readouterr().out


def test_importing_traces_brings_no_heavy_package():
    heavy = "{'pandas', 'pyarrow', 'matplotlib', 'scipy'}"
    code = f"import sys, traces.options, traces.__main__; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_convert_does_not_replace_what_it_reads(capsys, tmp_path):
    path = tmp_path / "azure.csv"
    assert main(["synth", "conv", "--requests", "5", "--output", str(path)]) == 0
    before = path.read_bytes()
    assert main(["convert", str(path), str(tmp_path / "." / "azure.csv")]) != 0
    assert "is the trace that is read; name another file" in capsys.readouterr().err
    assert path.read_bytes() == before
