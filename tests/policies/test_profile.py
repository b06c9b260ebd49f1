"""Profile files: whatever is wrong is said with the file, the key and the value."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from policies.profile import ProfileError, load_profile
from sim.analytic import SHAPES, analytic_profile

PROFILES = Path(__file__).parents[2] / "sim" / "profiles"


@pytest.fixture(scope="module")
def good():
    return analytic_profile("llava-1.5-7b")


def clock(**changes) -> dict:
    """What a profile says of a GPU's clock."""
    return {"settle_us": 9.0, "rest_us": 3.0, "rested": [[1, 0.9]], "settled": [[1, 1]], "vision_rested": 0.9,
            "vision_settled": 1.0} | changes  # fmt: skip


def write(path: Path, data) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("model", SHAPES)
def test_the_committed_analytic_profiles_are_what_the_module_makes(model):
    committed = json.loads((PROFILES / f"analytic-h200-{model}.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(analytic_profile(model)))
    assert committed["kind"] == "analytic"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_profile_loads(path):
    profile = load_profile(path)
    assert profile.name == path.stem
    assert profile.pool_bytes(golden=True) < profile.pool_bytes(golden=False)


SPOILT = {
    "unknown key": (lambda d: d.update(linaer=[]), "'linaer' is unknown"),
    "missing key": (lambda d: d.pop("vision"), "'vision' is missing"),
    "kind": (lambda d: d.update(kind="guessed"), "kind 'guessed'"),
    "NaN": (lambda d: d.update(load_latency_us=math.nan), "load_latency_us"),
    "negative": (lambda d: d.update(weights_bytes=-1), "weights_bytes"),
    "NaN point": (lambda d: d["linear"].__setitem__(0, [1, math.nan]), "linear"),
    "infinite point": (lambda d: d["output"].__setitem__(0, [1, math.inf]), "output"),
    "negative point": (lambda d: d["vision"].__setitem__(0, [1, -3]), "vision"),
    "descending points": (lambda d: d["linear"].reverse(), "ascend"),
    "equal points": (lambda d: d["linear"].insert(1, d["linear"][0]), "ascend"),
    "no points": (lambda d: d.update(linear=[]), "linear: no points"),
    "not points": (lambda d: d.update(linear=7), "linear"),
    "not pairs": (lambda d: d.update(linear=[1, 2]), "linear"),
    "no batches": (lambda d: d.update(decode_attention={}), "decode_attention"),
    "batch is no number": (lambda d: d["decode_attention"].update(x=[[0, 1]]), "decode_attention"),
    "a table that is none": (lambda d: d.update(prefill_attention=[1]), "prefill_attention"),
    "lora without a phase": (lambda d: d["lora"]["slora"].pop("decode"), r"lora\[slora\]"),
    "a skew that is none": (lambda d: d["lora"]["slora"].update(skew=-1.0), r"lora\[slora\].skew: -1.0"),
    "lora that is none": (lambda d: d["lora"].update(slora=3), r"lora\[slora\]"),
    "lora without ranks": (lambda d: d["lora"]["slora"].update(decode={}), r"lora\[slora\]"),
    "text for a number": (lambda d: d.update(max_context="4096"), "max_context"),
    "truth for a number": (lambda d: d.update(max_context=True), "max_context"),
    "no bandwidth": (lambda d: d.update(load_gb_per_s=0), "load_gb_per_s"),
    "an unknown part of a lease": (lambda d: d.update(lease_us={"bas": 1.0}), r"lease_us\[bas\] is unknown"),
    "a clock without its time": (lambda d: d.update(boost={"rested": [[1, 1]]}), r"boost: has rested; it must have settle"),
    "a clock that stands still": (lambda d: d.update(boost=clock(rest_us=0.0)), r"boost: settle_us, rest_us and"),
    "a clock a hundred times faster": (lambda d: d.update(boost=clock(rested=[[1, 0.0]])), r"factors must be above 0"),
    "a clock of words": (lambda d: d.update(boost=clock(vision_settled="fast")), r"boost: vision_settled: 'fast'"),
    "a negative part of a lease": (lambda d: d.update(lease_us={"base": -1.0}), r"lease_us\[base\]: -1.0"),
    "a decision that is no time": (lambda d: d.update(decide_us={"valora": "1"}), r"decide_us\[valora\]"),
    "no alignment": (lambda d: d.update(rank_align=0), "rank_align 0"),
    "two steps ahead": (lambda d: d.update(steps_ahead=2), "steps_ahead 2"),
    "half a scatter": (lambda d: d.update(scatter={"linear": [1.0]}), r"scatter\[linear\]"),
    "no mixed attention": (lambda d: d.update(mixed_attention={"x": [[0, 1]]}), "mixed_attention"),
    "a prefill that is none": (lambda d: d.update(prefill_linear=[[1, -1]]), "prefill_linear"),
    "no bytes a token": (lambda d: d.update(kv_bytes_per_token=0), "kv_bytes_per_token"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_profile_is_refused(name, good, tmp_path):
    spoil, message = SPOILT[name]
    data = copy.deepcopy(good)
    spoil(data)
    path = write(tmp_path / "spoilt.json", data)
    with pytest.raises(ProfileError, match=message) as caught:
        load_profile(path)
    assert "spoilt.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufeff{}", "{} {}", '{"a": 1}'])
def test_what_is_no_profile_is_refused(text, tmp_path):
    with pytest.raises(ProfileError, match=r"odd\.json"):
        load_profile(write(tmp_path / "odd.json", text))


def test_an_absent_file_and_a_model_larger_than_the_gpu(good, tmp_path):
    with pytest.raises(ProfileError, match=r"absent\.json"):
        load_profile(tmp_path / "absent.json")
    small = load_profile(write(tmp_path / "small.json", good | {"device_bytes": 10**9}))
    with pytest.raises(ProfileError, match="leave no memory"):
        small.pool_bytes(golden=False)


def test_an_adapter_takes_the_memory_of_its_padded_rank(good, tmp_path):
    profile = load_profile(write(tmp_path / "padded.json", good | {"rank_align": 16}))
    of_one = good["adapter_bytes_per_rank"]
    assert [profile.adapter_bytes(rank) // of_one for rank in (1, 8, 16, 17, 64)] == [16, 16, 16, 32, 64]
