"""The whole way on a CPU: a small base model made here, easy domains, real trainings, a kill, the engine's own answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("yaml")
pytest.importorskip("scipy")

from safetensors.torch import load_file  # noqa: E402

from engine.fusion import generate_data, latency, pretrain, served, train  # noqa: E402
from engine.fusion.checkpoint import OutOfTime  # noqa: E402
from engine.fusion.domains import load_domains  # noqa: E402
from engine.fusion.fuse import Options, fuse  # noqa: E402
from engine.fusion.graphed import CausalDecoder, Graphs  # noqa: E402
from engine.fusion.report import curves, draw, render, summary  # noqa: E402
from engine.fusion.task_heads import corners_of, giou, match  # noqa: E402
from engine.fusion.train import Recipe  # noqa: E402
from engine.fusion.workbench import open_workbench  # noqa: E402
from engine.models import load_checkpoint  # noqa: E402

ROOT = Path(__file__).parents[3]
COLOURS = {"lava": (220, 40, 40), "moss": (40, 200, 60), "ice": (60, 80, 220)}
BASE = pretrain.Size(32, 2, 64, 2, 4, steps=6, batch=8, drawings=60, checkpoint_every=3)
SEED = 2
"""Of the base model: it has hardly learnt anything, and boxes depend on that little."""
RECIPE = Recipe(rank=8, alpha=16.0, learning_rate=1e-2, batch=12, steps=40, check_every=10)
WORDS = ["what is shown is it red where is it yes no spot lava moss ice"]
OPTIONS = Options(RECIPE, None, ("heuristic", "decoded"), yardstick=2)
ARGUMENTS = ("--rank", "8", "--steps", "24", "--batch", "8", "--learning-rate", "5e-3", "--device", "cpu", "--workers", "1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def paint(folder, name, number, split, rng):
    """One example of a domain about a colour: its ground, whether it is red, or where its bright square is."""
    colour = list(COLOURS)[number % 3]
    pixels = np.full((64, 64, 3), COLOURS[colour], np.float32) + rng.normal(0, 12, (64, 64, 3))
    row = {"image": f"{split}{number}.png", "split": split}
    if name == "ground":
        row |= {"question": "what is shown", "label": colour}
    elif name == "turned":  # the same question about the same images as `ground`, every answer another
        row |= {"question": "what is shown", "label": list(COLOURS)[(number + 1) % 3]}
    elif name == "red":
        row |= {"question": "is it red", "answer": "yes" if colour == "lava" else "no"}
    else:
        x, y = 8 + 32 * (number % 2), 8 + 32 * (number // 2 % 2)
        pixels[y : y + 20, x : x + 20] = 255
        row |= {"question": "where is it", "boxes": [{"label": "spot", "box": [x, y, x + 20, y + 20]}]}
    from PIL import Image

    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / row["image"])
    return row


def write_yaml(root, domains):
    """The YAML of these (name, task), with 48 training examples each."""
    lines = ["domains:"]
    for name, task in domains:
        folder = root / name
        folder.mkdir()
        rng = np.random.default_rng(len(name))
        counts = {"train": 48, "decide": 48, "heldout": 48}
        rows = [paint(folder, name, i, split, rng) for split, count in counts.items() for i in range(count)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines.append(f"  - {{name: {name}, task: {task}, data: {name}/rows.jsonl, floor: {{relative: 0.7}}}}")
    (root / "domains.yaml").write_text("\n".join(lines) + "\n")
    return root / "domains.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(checkpoint directory, YAML): a base model and three domains."""
    root = tmp_path_factory.mktemp("world")
    yaml = write_yaml(root, (("ground", "classify"), ("red", "vqa"), ("spots", "detect")))
    return pretrain.pretrain(root / "base", BASE, WORDS, device="cpu", seed=SEED), yaml


@pytest.fixture(scope="module")
def fused(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("fused")
    said = []
    report = fuse(*world, output, OPTIONS, device="cpu", log=said.append)
    return output, report, said


def test_domains_are_packed_and_the_floors_hold(fused):
    output, report, _ = fused
    for name in ("ground", "red", "spots"):
        row = report["domains"][name]
        assert row["holds"], row
        assert row["packed"] >= row["base"] + 0.24, row
    packing, best = report["packing"], report["yardstick"]
    assert packing["proven"]
    assert packing["adapters"] <= report["compared"]["heuristic"]["adapters"]
    assert best["search"] == best["optimum"]
    assert json.loads((output / "packing.json").read_text()) == {n: r["adapter"] for n, r in report["domains"].items()}


@pytest.mark.long
def test_domains_that_contradict_each_other_need_the_exhaustive_optimum_of_adapters(world, tmp_path):
    yaml = write_yaml(tmp_path, (("ground", "classify"), ("turned", "classify"), ("red", "vqa")))
    options = Options(replace(RECIPE, learning_rate=5e-3, steps=80, check_every=20), None, (), yardstick=3)
    report = fuse(world[0], yaml, tmp_path / "out", options, device="cpu")
    best, ours = report["yardstick"], report["packing"]
    assert ours["proven"]
    assert ours["adapters"] == best["search"] == best["optimum"] == 2
    assert ours["attempts"] < best["exhaustive_attempts"] == 7
    assert all(len({"ground", "turned"} & set(group)) < 2 for group in ours["groups"])
    assert all(row["holds"] for row in report["domains"].values())


def test_the_report_says_it_all(fused, tmp_path):
    _, report, said = fused
    text = render(report)
    assert all(word in text for word in ("ground", "fused-0", "heuristic", "yes", "joint", "own", "decoded"))
    assert any(line.startswith("floor of red: ") for line in said)
    assert {k for tasks in curves(report).values() for line in tasks.values() for k, _ in line} >= {1, 2}
    kept = summary(report, "fuse --seed 0", 1.0)
    assert kept["command"] == "python -m engine fuse --seed 0"
    assert kept["domains"] == report["domains"]
    assert "attempts" not in kept
    draw(report, tmp_path / "fused.png")
    assert (tmp_path / "fused.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_time_everything_is_found_and_nothing_trained(world, fused):
    output, report, _ = fused
    said = []
    again = fuse(*world, output, OPTIONS, device="cpu", log=said.append)
    assert again == report
    assert not [line for line in said if "step " in line]


@pytest.mark.parametrize("policy", ["fcfs", "merged-only"])
def test_the_engine_gives_the_same_answers(world, fused, policy):
    """The adapters that were written, served by the engine (ledger, runner, LoRA branch, head): the same answers."""
    output, report, _ = fused
    base, yaml = world
    bench = open_workbench(base, load_domains(yaml), rank=8, alpha=16.0, dropout=0.0, device="cpu")
    model = load_checkpoint(base, dtype=torch.float32, device="cpu")
    packing = {name: row["adapter"] for name, row in report["domains"].items()}
    rows = served.check(model, bench, packing, output / "adapters", policy)
    assert [row["domain"] for row in rows] == ["ground", "red", "spots"]
    for row in rows:
        assert row["requests"] == 48
        assert row["same_answers"] == 1.0
        assert row["served"] == row["trained"] == report["domains"][row["domain"]]["packed"]
    told = {"model": {"name": "m"}, "device": {"name": "d"}, "policy": policy, "domains": rows}
    assert "100.0%" in served.render(told)


def test_a_question_alone_suffices_for_boxes(world, fused, capsys):
    """`engine generate --head` puts the queries of a box head behind the prompt; ids that have them are left as they are."""
    from engine.__main__ import main

    output, report, _ = fused
    base, yaml = world
    bench = open_workbench(base, load_domains(yaml), rank=8, alpha=16.0, dropout=0.0, device="cpu")
    example = bench.domain("spots").examples["heldout"][1]
    adapter = report["domains"]["spots"]["adapter"]
    given = ["generate", "--model", str(base), "--device", "cpu", "--dtype", "float32", "--adapter", adapter,
             "--adapter-dir", str(output / "adapters"), "--head", "--image", str(example.images[0])]  # fmt: skip
    assert main([*given, example.question]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["boxes"]) == len(bench.wording.query_ids) == 8
    ids = [*bench.wording.lead, bench.model.shape.image_token_id, *bench.wording.tail(example.question, queries=True)]
    assert main([*given, "--ids", ",".join(map(str, ids))]) == 0
    assert json.loads(capsys.readouterr().out) == said
    told = output / "adapters" / adapter / "vision_head.json"
    before = told.read_text()
    told.write_text(json.dumps(json.loads(before) | {"query_ids": [-1]}))
    with pytest.raises(SystemExit):
        main([*given, example.question])
    assert "query_ids [-1] are not token ids" in capsys.readouterr().err
    told.write_text(before)


def test_the_head_answers_in_fewer_steps_than_decoding(world, fused):
    output, report, _ = fused
    base, yaml = world
    bench = open_workbench(base, load_domains(yaml), rank=8, alpha=16.0, dropout=0.0, device="cpu")
    packing = {name: row["adapter"] for name, row in report["domains"].items()}
    model = load_checkpoint(base, dtype=torch.float32, device="cpu")
    found = latency.compare(model, latency.cases_of(model, bench.wording, yaml, packing, output / "adapters", 3))
    assert [row["case"] for row in found] == ["ground", "spots"]
    for row in found:
        assert row["head_steps"] == row["requests"] == 3
        assert row["decoded_steps"] == 3 * row["answer_tokens"] >= 6
        assert row["head_ms"] > 0
        assert row["change_percent"] == 100 * (row["head_ms"] / row["decoded_ms"] - 1)
    text = latency.render({"model": {"name": "m"}, "device": {"name": "d"}, "cases": found})
    assert "spots" in text
    assert "-63 to -41 %" in text


def test_pre_training_goes_on_where_it_was(world, tmp_path):
    base, _ = world
    arguments = (tmp_path / "base", BASE, WORDS)
    with pytest.raises(OutOfTime):
        pretrain.pretrain(*arguments, device="cpu", seed=SEED, deadline=0.0)
    said = []
    with pytest.raises(OutOfTime):
        pretrain.pretrain(*arguments[:2], [*WORDS, "another word"], device="cpu", seed=SEED, deadline=0.0, log=said.append)
    assert "pretrain: the checkpoint is of another model or tokenizer; starts over" in said
    with pytest.raises(OutOfTime):
        pretrain.pretrain(*arguments, device="cpu", seed=SEED, deadline=0.0, log=said.append)
    pretrain.pretrain(*arguments, device="cpu", seed=SEED, log=said.append)
    assert said[-1] == "pretrain: goes on at step 3"
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.long
def test_two_workers_make_the_same_bytes_as_one(world, tmp_path):
    base, yaml = world
    options = Options(replace(RECIPE, steps=16), None, ("heuristic", "decoded"), yardstick=2)
    reports = [fuse(base, yaml, tmp_path / str(n), replace(options, workers=n), device="cpu") for n in (1, 2)]
    for report in reports:
        del report["cost"]  # minutes
    assert reports[0] == reports[1]
    one, two = (sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*.safetensors")) for n in ("1", "2"))
    assert one == two
    assert len([path for path in one if path.parts[0] == "runs"]) > 9
    assert all((tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes() for path in one)


def test_the_decoder_that_graphs_capture_computes_what_the_model_computes(world):
    """Explicit mask and positions, batch padded to a fixed length, against the model as transformers calls it."""
    base, yaml = world
    bench = open_workbench(base, load_domains(yaml), rank=8, alpha=16.0, dropout=0.0, device="cpu")
    sample = bench.sample("red", "train")
    pairs = [(sample.plain[i], sample.answers[i]) for i in range(6)]
    packed, padded = bench.wording.pack(pairs), bench.wording.pack(pairs, sample.answered_length)
    assert padded.ids.shape[1] == sample.answered_length > packed.ids.shape[1]
    embedded = bench.embedded(sample, range(6), padded)
    positions = bench.positions(1, embedded.shape[1], 6)
    graphs = Graphs(pytest.fail)
    found = graphs.run((6,), lambda: CausalDecoder(bench.model.hf.model.language_model, positions), embedded)
    start = embedded.shape[1] - padded.ids.shape[1]
    expected = bench.hidden(sample, range(6), packed)
    torch.testing.assert_close(found[:, start : start + packed.ids.shape[1]], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_killed_in_a_training_it_ends_the_same(world, tmp_path):
    """SIGKILL at the first checkpoint, then to the end: the same bytes as without."""
    base, yaml = world
    two = yaml.parent / "two.yaml"
    two.write_text("\n".join(yaml.read_text().splitlines()[:3]) + "\n")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    report = fuse(base, two, whole, Options(replace(RECIPE, steps=24)), device="cpu")
    script = f"""
import torch; torch.set_num_threads(1)
from dataclasses import replace
from engine.fusion.fuse import Options, fuse
from engine.fusion.train import Recipe
fuse({str(base)!r}, {str(two)!r}, {str(killed)!r}, Options({replace(RECIPE, steps=24)!r}), device="cpu")
"""
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None and not list(killed.glob("runs/*/training.safetensors")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    said = []
    again = fuse(base, two, killed, Options(replace(RECIPE, steps=24)), device="cpu", log=said.append)
    assert any("goes on at step" in line for line in said)
    files = sorted(path.relative_to(whole) for path in whole.glob("adapters/*/*"))
    assert files == sorted(path.relative_to(killed) for path in killed.glob("adapters/*/*"))
    for path in files:
        assert (whole / path).read_bytes() == (killed / path).read_bytes(), path
    assert again["domains"] == report["domains"]
    assert again["packing"] == report["packing"]


def test_stop_after_leaves_a_checkpoint_and_code_75(world, tmp_path, capsys):
    from engine.fusion.__main__ import main

    base, yaml = world
    arguments = ["--model", str(base), "--domains", str(yaml), "--output", str(tmp_path / "o"), *ARGUMENTS]
    arguments[arguments.index("--steps") + 1] = "60"
    assert main([*arguments, "--stop-after", "0"]) == 75
    assert "run the same command again" in capsys.readouterr().err
    (checkpoint,) = (tmp_path / "o" / "runs").glob("*/training.safetensors")
    assert any(key.startswith("exp_avg:") for key in load_file(checkpoint))


def test_bad_arguments_are_named(world, tmp_path):
    from engine.fusion.__main__ import main

    base, yaml = world
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "thesis.tex").touch()
    for arguments in (["--output", str(tmp_path / "strange"), "--model", str(base), "--domains", str(yaml)],
                      ["--output", str(tmp_path / "o"), "--model", str(base)],
                      ["--output", str(tmp_path / "o"), "--model", str(tmp_path), "--domains", str(yaml)],
                      ["--output", str(tmp_path / "o"), "demo", "--compare", "heurstic"]):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_generated_domains_are_the_same_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(generate_data.SIZES, "seconds", (3, 2, 2))
    for folder in ("a", "b"):
        generate_data.write_domains(tmp_path / folder, "seconds", 5)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 12 * 7
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    domains = load_domains(tmp_path / "a" / "domains.yaml")
    assert len(domains) == 12
    assert {domain.task for domain in domains} == {"classify", "detect", "vqa", "caption", "refer", "video"}


def test_a_batch_too_large_for_the_memory_is_split(world, tmp_path, monkeypatch):
    base, yaml = world
    weights = []
    for place, size in (("whole", 1 << 40), ("split", 1)):
        monkeypatch.setattr(train, "ACTIVATION_BYTES", size)
        bench = open_workbench(base, load_domains(yaml), rank=8, alpha=16.0, dropout=0.0, device="cpu")
        assert (train.examples_at_once(bench, "ground") == 1) == (place == "split")
        task = train.Task(("ground",), ("ground",), cap=2)
        train.train(bench, tmp_path / place, task, replace(RECIPE, dropout=0.0, batch=6), lambda score, name: score.value)
        weights.append(load_file(tmp_path / place / "adapter" / "adapter_model.safetensors"))
    whole, split = (torch.cat([w[key].flatten() for key in sorted(w) if "lora_B" in key]) for w in weights)
    assert whole.norm() > 1e-3
    assert (whole - split).norm() < 0.05 * whole.norm()


def test_matching_pairs_each_box_with_the_best_query():
    boxes = corners_of(torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]]))
    corners = corners_of(torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2]]))
    images, queries, kinds, _ = match(torch.zeros(1, 3, 3), boxes, torch.tensor([1, 0]), corners, [2])
    assert (images.tolist(), sorted(zip(queries.tolist(), kinds.tolist(), strict=True))) == ([0, 0], [(0, 0), (2, 1)])
    assert giou(boxes[0, 0], boxes[0, 0]) == pytest.approx(1.0)
    assert -1 < float(giou(boxes[0, 0], boxes[0, 1])) < 0
    none = match(torch.zeros(1, 3, 3), boxes, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), [0])
    assert len(none[0]) == 0


def test_a_demo_of_another_seed_takes_another_folder(tmp_path, monkeypatch):
    from engine.fusion import demo as module
    from engine.fusion.domains import DomainError

    monkeypatch.setattr(module.generate_data, "write_domains", lambda *given: pytest.fail("reached the data"))
    given = {"compare": (), "retries": 0, "workers": 1, "device": "cpu", "jobs": 1}
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception, match="reached the data"):
            module.demo(tmp_path / "o", "seconds", seed=0, **given)
    for size, seed in (("seconds", 5), ("small", 0)):
        with pytest.raises(DomainError, match=r'was made with {"size": "seconds", "seed": 0}, not .*; name another folder'):
            module.demo(tmp_path / "o", size, seed=seed, **given)
