"""`python -m engine`: replay, generate and make-adapters, end to end on a tiny model."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.__main__ import main  # noqa: E402
from traces.result_files import read_results  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def profile_file(tmp_path, profile):
    values = dataclasses.asdict(profile)
    del values["name"], values["sha256"]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(values))
    return str(path)


@pytest.fixture
def replay(profile_file):
    """The arguments of a small replay."""
    return [
        "replay", "--model", "tiny-llava", "--device", "cpu", "--profile", profile_file, "--max-requests", "6",
        "--time-scale", "0.001", "--clip", "--max-context", "128", "--adapters", "2", "--ranks", "4,8",
        "--adapter-assign", "round-robin", "--max-batch", "4", "--max-batch-tokens", "64", "--warmup", "1",
        "--check-invariants",
    ]  # fmt: skip


def test_replay_writes_what_the_simulator_writes(replay, tmp_path, capsys):
    out = tmp_path / "results"
    assert main([*replay, "--policy", "slora,base", "--output", str(out)]) == 0
    printed = capsys.readouterr()
    assert "slora" in printed.out
    assert "warmed up" in printed.err
    slora, base = read_results(out)
    assert [slora.policy, base.policy] == ["slora", "base"]
    assert (slora.requests["status"] == 0).all()
    assert (slora.requests["generated_tokens"] == slora.requests["output_tokens"]).all()
    assert slora.counters["adapter_loads"] == 2
    assert slora.counters["load_bytes"] == sum(2 * 4 * (3 * 64 + 192 + 128) * 16 for _ in range(2))  # ranks padded to 16
    assert slora.steps is not None
    assert slora.config["engine"]["model"]["weights"] == "random"
    assert slora.operator == "reference"
    assert slora.config["notes"]


def test_replay_in_a_closed_loop_with_a_pinned_adapter_and_a_memory_for_one_more(replay, tmp_path, capsys):
    out = tmp_path / "results"
    command = [*replay, "--policy", "slora,base", "--adapters", "4", "--ranks", "16", "--max-requests", "16"]
    command += ["--time-scale", "9", "--closed-loop", "3", "--pin", "adapter-002", "--adapter-memory", "0.000125"]
    assert main([*command, "--output", str(out)]) == 0
    assert "0.00 GiB for adapters" in capsys.readouterr().err
    slora, base = read_results(out)
    for run in (slora, base):
        table = run.requests
        assert (table["status"] == 0).all()
        events = [(at, 1) for at in table["arrival_ns"]] + [(at, -1) for at in table["finish_ns"]]
        in_flight = np.cumsum([change for _, change in sorted(events)])
        assert in_flight.max() == 3
        assert (in_flight[2:-3] >= 2).all(), "one arrives when one ends"
        assert any(note.startswith("closed loop: 3 requests in flight") for note in run.config["notes"])
    assert slora.counters["adapter_evictions"] > 0
    assert slora.config["engine"]["pins"] == ["adapter-002"]
    hits = slora.counters["adapter_hits"]
    assert hits >= (slora.requests["adapter"] == 2).sum() > 0


def test_the_baseline_serves_the_same_requests_by_peft(replay, tmp_path, capsys):
    out = tmp_path / "results"
    command = ["baseline", *replay[1:], "--policy", "slora", "--closed-loop", "3", "--baseline-steps", "2"]
    assert main([*command, "--output", str(out)]) == 0
    printed = capsys.readouterr()
    assert "slora: " in printed.err
    assert "over the whole run of 6 requests, prefills included; transformers + PEFT: " in printed.err
    (run,) = read_results(out)
    found = run.config["baseline"]
    assert (found["requests"], found["adapters"], found["steps"]) == (3, 2, 2)
    assert found["decode_tokens_per_s"] == pytest.approx(3 / found["decode_step_ms"] * 1e3, rel=0.01)
    longest = found["prefill_s"] + (found["longest_output_tokens"] - 1) * found["decode_step_ms"] / 1e3
    assert found["batch_tokens_per_s"] == pytest.approx(3 * found["mean_output_tokens"] / longest, rel=0.05)
    full = found["engine_full_tokens_per_s"]
    assert found["ratio_to_decode"] == pytest.approx(full / found["decode_tokens_per_s"], rel=0.01)
    assert full > 0
    assert any("transformers + PEFT" in note for note in run.config["notes"])
    with pytest.raises(SystemExit):
        main([*command, "--workload", "video"])
    assert "PEFT's mixed batch takes no images" in capsys.readouterr().err


def test_replay_with_adapters_from_files_and_heads(replay, tmp_path, capsys):
    folder = str(tmp_path / "adapters")
    made = ["make-adapters", "--model", "tiny-llava", "--out", folder, "--adapters", "2", "--ranks", "4,8"]
    assert main([*made, "--head-classes", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder}/adapter-000", f"{folder}/adapter-001"]
    (tmp_path / "adapters" / "adapter-001" / "adapter_config.json").write_text("{}")
    out = tmp_path / "results"
    command = [*replay, "--policy", "slora", "--adapter-dir", folder, "--workload", "video", "--output", str(out)]
    assert main(command) == 0
    (run,) = read_results(out)
    failed = run.requests["adapter"] == 1
    assert (run.requests["status"] == np.where(failed, 3, 0)).all()
    assert 0 < failed.sum() < 6
    assert any("adapter-001 was left out" in note for note in run.config["notes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "valro"], "did you mean 'valora'?"),
        (["--operator", "atm"], "unknown operator 'atm'"),
        (["--max-context", "9999"], "--max-context 9999 is above the model's 512"),
        (["--pin", "cats"], "--pin cats: the trace has no such adapter; there are adapter-000, adapter-001"),
        (["--adapter-memory", "1e-9"], "change --adapter-memory or take smaller ranks"),
        (["--page-tokens", "24"], "must divide 64"),
        (["--device", "cuda"], "torch finds no GPU"),
        (["--device", "foo"], "--device foo: there are cpu, cuda and cuda:N"),
        (["--dtype", "bfloat16"], "right in float32 only"),
        (["--model", "no/such"], "neither a directory nor one of"),
        (["--profile", "missing.json"], "missing.json: No such file"),
        (["--trace", "missing.csv"], "missing.csv"),
        (["--adapter-dir", "missing"], "adapter-000"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(replay, arguments, words, capsys):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if arguments[0] == "--adapter-dir":  # every adapter is missing: a result all the same, and each is named
        assert main([*replay, "--policy", "slora", *arguments]) == 0
        assert words in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as ended:
        main([*replay, *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_signal_ends_the_replay_and_what_has_finished_is_written(replay, tmp_path):
    out = tmp_path / "results"
    arguments = [*replay, "--policy", "slora", "--output", str(out)]
    arguments[arguments.index("--max-requests") + 1] = "400"
    arguments[arguments.index("--time-scale") + 1] = "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stderr:
        if "warmed up" in line:
            break
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    (run,) = read_results(out)
    assert (run.requests["status"] == 0).sum() > 0
    assert len(run.requests["id"]) < 400
    assert any(note.startswith("interrupted: ") for note in run.config["notes"])


def test_generate_answers_with_an_adapter_and_an_image(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (80, 60), (0, 128, 255)).save(tmp_path / "blue.png")
    folder = str(tmp_path / "adapters")
    made = ["make-adapters", "--model", "tiny-llava", "--out", folder, "--adapters", "1", "--ranks", "4"]
    assert main([*made, "--head-classes", "5"]) == 0
    capsys.readouterr()
    common = ["generate", "--model", "tiny-llava", "--device", "cpu", "--ids", "5,300,6,7"]
    common += ["--image", str(tmp_path / "blue.png")]
    assert main([*common, "--max-tokens", "4"]) == 0
    plain = capsys.readouterr().out
    assert 1 <= len(plain.strip().split(",")) <= 4
    adapted = [*common, "--adapter-dir", folder, "--adapter", "adapter-000"]
    assert main([*adapted, "--max-tokens", "4"]) == 0
    capsys.readouterr()
    assert main([*adapted, "--head"]) == 0
    assert int(capsys.readouterr().out) in range(5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ids", "5,6", "--image", "x.png"], "x.png: cannot be read"),
        (["--ids", "5,300,6"], "1 image tokens (300) in the prompt for 0 images"),
        (["--ids", "5,999"], "'999' is not a token id in 0..319"),
        (["a question"], "has random weights and no tokenizer"),
        ([], "give a prompt, or --ids"),
        (["--ids", "5", "--adapter", "x"], "say with --adapter-dir"),
        (["--ids", "5", "--adapter", "../x", "--adapter-dir", "."], "a name has letters"),
        (["--ids", "5", "--max-tokens", "600"], "pass the model's context of 512"),
    ],
)
def test_generate_refuses_bad_input(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", "tiny-llava", "--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_generate_from_a_checkpoint_with_its_tokenizer(tmp_path, model, capsys):
    """A checkpoint directory as transformers saves it; the answer is transformers' own greedy one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from engine.models import random_model

    hf = random_model("tiny-llava", dtype=torch.float32, device="cpu", seed=4).hf
    hf.save_pretrained(tmp_path)
    words = {f"w{i}": i for i in range(320) if i not in (5, 6, 7)} | {"USER:": 5, "ASSISTANT:": 6, "what": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["generate", "--model", str(tmp_path), "--device", "cpu", "--max-tokens", "5", "what"]) == 0
    ids = torch.tensor([[5, 7, 6]])
    expected = hf.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    assert capsys.readouterr().out.split() == [f"w{i}" for i in expected if i > 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda p: (p / "config.json").write_text('{"model_type": "gpt2"}'), "model_type 'gpt2'; supported are llava"),
        (lambda p: (p / "model.safetensors").rename(p / "model.bin"), "pickled weights are never loaded"),
        (
            lambda p: (p / "config.json").write_text(
                json.dumps(json.loads((p / "config.json").read_text()) | {"auto_map": {"AutoModel": "x.Y"}})
            ),
            "asks to run code of the checkpoint",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_trusted_is_refused(tmp_path, model, change, words):
    from engine.models import ModelError, load_checkpoint, random_model

    random_model("tiny-llava", dtype=torch.float32, device="cpu").hf.save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=words):
        load_checkpoint(tmp_path, dtype=torch.float32, device="cpu")


def test_a_decoder_with_a_bias_on_the_attention_s_output_is_refused(tmp_path):
    """Llama's attention_bias is on o_proj too, which the engine leaves out; Qwen2-VL's own, on q, k, v, is served."""
    from transformers import LlavaForConditionalGeneration

    from engine.models import ModelError, config_of, load_checkpoint, shape_of

    config = config_of("tiny-llava")
    config.text_config.attention_bias = True
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="attention_bias is not supported; take a checkpoint without"):
        load_checkpoint(tmp_path, dtype=torch.float32, device="cpu")
    assert shape_of("tiny-qwen2-vl", config_of("tiny-qwen2-vl")).family == "qwen2_vl"


@pytest.mark.parametrize(
    ("key", "taken"),
    [
        ("language_model.model.layers.0.self_attn.q_norm.weight", False),
        ("language_model.model.layers.2.input_layernorm.weight", False),
        ("multi_modal_projector.linear_3.weight", False),
        ("something.weight", False),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", True),  # of older checkpoints
        ("vision_tower.vision_model.embeddings.position_ids", True),
        ("vision_tower.vision_model.head.weight", True),
    ],
)
def test_tensors_without_a_place_are_refused_unless_they_change_nothing(tmp_path, key, taken):
    from safetensors.torch import load_file, save_file

    from engine.models import ModelError, load_checkpoint, random_model

    random_model("tiny-llava", dtype=torch.float32, device="cpu").hf.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {key: torch.ones(16)}, file, {"format": "pt"})
    if taken:
        assert load_checkpoint(tmp_path, dtype=torch.float32, device="cpu").shape.layers == 2
        return
    with pytest.raises(ModelError, match=f"1 tensors have no place .*{key.rpartition('.')[0].rpartition('.')[2]}"):
        load_checkpoint(tmp_path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2-vl"])
def test_a_head_tied_to_the_embedding_is_read_with_its_copy_and_without(tmp_path, name):
    import transformers
    from safetensors.torch import load_file, save_file

    from engine.models import FAMILIES, config_of, load_checkpoint

    config = config_of(name)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    getattr(transformers, FAMILIES[config.model_type])(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = next(key for key in tensors if key.endswith("embed_tokens.weight"))
    for copied in ({}, {"lm_head.weight": tensors[embedding].clone()}):
        save_file(tensors | copied, file, {"format": "pt"})
        hf = load_checkpoint(tmp_path, dtype=torch.float32, device="cpu").hf
        assert torch.equal(hf.lm_head.weight, hf.model.language_model.embed_tokens.weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_steps_are_timed_on_a_gpu_only(capsys):
    from engine.step_bench import main as bench

    with pytest.raises(SystemExit) as ended:
        bench(["--model", "tiny-llava"])
    assert ended.value.code == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_weights_beyond_the_memory_are_refused_before_they_are_drawn(monkeypatch):
    from engine import models

    monkeypatch.setattr(models.os, "sysconf", {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}.__getitem__)
    with pytest.raises(models.ModelError, match=r"takes 28\d+ bytes in torch.float32 and this machine has 4294967296"):
        models.load_model("llava-1.5-7b", dtype=torch.float32, device="cpu")
