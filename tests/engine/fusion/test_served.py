"""What the engine answered, in the form that metrics take."""

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from engine.fusion.evaluate import answer_of
from engine.fusion.metrics import Box, score
from engine.fusion.served import _said
from engine.runner import Answer

WRITTEN = {0: "cup [10, 20, 30, 40]", 1: "no box at all"}


def test_a_decoded_box_is_judged_as_one_by_the_engine_as_in_training():
    """An adapter that tells in words where something is: the metric takes boxes, whoever decoded them."""
    bench = SimpleNamespace(wording=SimpleNamespace(text=lambda ids: WRITTEN[ids[0]]))
    refer, detect, ask = (SimpleNamespace(boxed=boxed, task=task) for boxed, task in (
        (True, "refer"), (True, "detect"), (False, "vqa")))  # fmt: skip
    for domain, label in ((refer, "object"), (detect, "cup")):
        (box,) = said = _said(bench, domain, None, Answer([0]))
        assert said == answer_of(domain, WRITTEN[0])
        assert box.label == label
        assert score("iou50", [said], [[Box("object", 0.1, 0.2, 0.3, 0.4)]]).value == 1.0
    assert _said(bench, refer, None, Answer([1])) == []
    assert _said(bench, ask, None, Answer([1])) == "no box at all"
