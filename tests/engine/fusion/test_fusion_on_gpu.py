"""Training on a GPU: bf16, CUDA graphs that compute what plain launches do, the same bytes each time and by each worker."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("yaml")
pytest.importorskip("scipy")

from safetensors.torch import load_file  # noqa: E402

from engine.fusion import pretrain, train  # noqa: E402
from engine.fusion.domains import load_domains  # noqa: E402
from engine.fusion.fuse import Options, fuse  # noqa: E402
from engine.fusion.graphed import Graphs  # noqa: E402
from engine.fusion.train import Recipe  # noqa: E402
from engine.fusion.workbench import open_workbench  # noqa: E402
from engine.fusion.workers import repeatable_arithmetic  # noqa: E402

pytestmark = pytest.mark.gpu
SIZE = pretrain.Size(64, 3, 128, 3, 4, steps=24, batch=32, drawings=240, checkpoint_every=12)
RECIPE = Recipe(rank=8, alpha=16.0, learning_rate=5e-3, batch=16, steps=60, check_every=20)
GROUNDS = {"lava": (220, 40, 40), "moss": (40, 200, 60), "ice": (60, 80, 220)}


@pytest.fixture(scope="module", autouse=True)
def arithmetic():
    repeatable_arithmetic()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(base model pre-trained on the GPU, YAML of a domain of classes, one of boxes and one of words, what was said)."""
    from PIL import Image

    root, lines, said = tmp_path_factory.mktemp("world"), ["domains:"], []
    for name, task in (("ground", "classify"), ("spots", "detect"), ("red", "vqa")):
        (root / name).mkdir()
        rng, rows = np.random.default_rng(len(name)), []
        for number in range(144):
            split, label = ("train", "decide", "heldout")[number // 48], list(GROUNDS)[number % 3]
            pixels = np.full((64, 64, 3), GROUNDS[label], np.float32) + rng.normal(0, 12, (64, 64, 3))
            x, y = 8 + 32 * (number % 2), 8 + 32 * (number // 2 % 2)
            pixels[y : y + 20, x : x + 20] = 255
            row = {"image": f"{number}.png", "split": split, "question": "what is shown", "label": label}
            if name == "spots":
                row = row | {"question": "where is it", "boxes": [{"label": "spot", "box": [x, y, x + 20, y + 20]}]}
                del row["label"]
            elif name == "red":
                row = row | {"question": "is it red", "label": "yes" if label == "lava" else "no"}
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / row["image"])
            rows.append(json.dumps(row) + "\n")
        (root / name / "rows.jsonl").write_text("".join(rows))
        lines.append(f"  - {{name: {name}, task: {task}, data: {name}/rows.jsonl, floor: {{relative: 0.7}}}}")
    (root / "domains.yaml").write_text("\n".join(lines) + "\n")
    words = ["what is shown is it red where is it yes no spot lava moss ice"]
    base = pretrain.pretrain(root / "base", SIZE, words, device="cuda", log=said.append)
    return base, root / "domains.yaml", said


def trained(world, folder, name, capture, dropout=0.05):
    """(weights, losses, what was said) of one training."""
    base, yaml, _ = world
    said = []
    bench = open_workbench(base, load_domains(yaml), rank=8, alpha=16.0, dropout=dropout, device="cuda", log=said.append)
    assert bench.model.dtype == torch.bfloat16
    bench.graphs = Graphs(said.append, capture)
    task = train.Task((name,), (name,), cap=60)
    result = train.train(bench, folder, task, RECIPE, lambda score, name: score.value)
    return load_file(folder / "adapter" / "adapter_model.safetensors"), [loss for _, loss, _ in result.history], said


@pytest.mark.parametrize("name", ["ground", "spots", "red"])
def test_graphs_train_as_plain_launches_do_and_the_same_each_time(world, tmp_path, name):
    first, losses, said = trained(world, tmp_path / "first", name, True)
    second, _, _ = trained(world, tmp_path / "second", name, True)
    assert not [line for line in said if "no CUDA graph" in line]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert losses[-1] < losses[0]
    first, losses, _ = trained(world, tmp_path / "graphs", name, True, dropout=0.0)  # else other masks may be drawn
    plain, plain_losses, _ = trained(world, tmp_path / "plain", name, False, dropout=0.0)
    assert losses == pytest.approx(plain_losses, rel=0.1, abs=0.03)
    flat = [torch.cat([w[key].float().flatten() for key in sorted(w)]) for w in (first, plain)]
    assert (flat[0] - flat[1]).norm() < 0.3 * flat[1].norm()


def test_pre_training_runs_as_graphs(world):
    _, _, said = world
    assert [line for line in said if "loss" in line]
    assert not [line for line in said if "no CUDA graph" in line]


@pytest.mark.slow
def test_workers_share_the_gpu_and_make_the_same_bytes(world, tmp_path):
    base, yaml, _ = world
    options = [Options(RECIPE, None, ("heuristic",), yardstick=2, workers=workers) for workers in (1, 3)]
    reports = [fuse(base, yaml, tmp_path / str(o.workers), o, device="cuda") for o in options]
    assert reports[0]["packing"] == reports[1]["packing"]
    assert reports[0]["domains"] == reports[1]["domains"]
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1" / "runs").rglob("*.safetensors"))
    assert len(files) > 4
    assert all((tmp_path / "1" / path).read_bytes() == (tmp_path / "3" / path).read_bytes() for path in files)
