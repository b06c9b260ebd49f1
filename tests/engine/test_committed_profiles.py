"""The committed profiles of a GPU are what the committed rows of its measurements make."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from engine.profile import operators_of
from engine.profile_fit import profile_of
from engine.rows_file import RowsFile

ROOT = Path(__file__).parents[2]
ROWS = sorted((ROOT / "engine" / "results" / "profile-rows").glob("*.rows.jsonl"))


def flat(value, where=""):
    """Numbers and words by their place."""
    if isinstance(value, dict):
        return {place: leaf for key, item in value.items() for place, leaf in flat(item, f"{where}.{key}").items()}
    if isinstance(value, list):
        return {place: leaf for i, item in enumerate(value) for place, leaf in flat(item, f"{where}[{i}]").items()}
    return {where: value}


@pytest.mark.parametrize("rows", ROWS, ids=lambda path: path.name)
def test_a_committed_profile_follows_from_its_rows(rows, tmp_path):
    committed = json.loads((ROOT / "sim" / "profiles" / rows.name.replace(".rows.jsonl", ".json")).read_text())
    (tmp_path / rows.name).write_bytes(rows.read_bytes())
    file = RowsFile(tmp_path / rows.name)
    made, steps = profile_of(file.rows, file.facts, committed["provenance"], tmp_path / "x.json",
                             operators_of(file.facts["model"]))  # fmt: skip
    assert file.facts["device"]["name"] == committed["provenance"]["device"] == "NVIDIA H200"
    assert len(file.rows) == committed["provenance"]["rows"]
    assert len(steps) == 10
    ours, theirs = flat(json.loads(json.dumps(made))), flat(committed)
    assert ours.keys() == theirs.keys()
    for place, value in theirs.items():
        assert ours[place] == (value if isinstance(value, str) else pytest.approx(value, rel=2e-3, abs=1e-3)), place


def test_every_model_has_one():
    assert {path.name for path in ROWS} == {
        f"h200-{model}.rows.jsonl" for model in ("llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-7b")
    }
