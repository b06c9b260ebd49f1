"""Metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.fusion.metrics import Box, MetricError, average_precision, iou, normalise, score

A, B = Box("car", 0.0, 0.0, 0.4, 0.4), Box("car", 0.5, 0.5, 0.9, 0.9)


def value(metric, predictions, targets):
    return score(metric, predictions, targets).value


def test_text_metrics():
    assert value("top1", ["Cat", "dog "], [["cat"], ["dog", "hound"]]) == 1.0
    assert value("top1", ["cat", "dog"], [["cat"], ["cow"]]) == 0.5
    assert normalise("The red, Car!") == ["red", "car"]
    assert value("vqa", ["Two."], [["two"] * 3 + ["three"] * 7]) == 1.0
    assert value("vqa", ["two"], [["two"] * 1 + ["three"] * 9]) == pytest.approx(1 / 3)
    assert value("vqa", ["a yes"], [["yes"]]) == 1.0
    assert value("token_f1", ["red ball"], [["red box", "a red ball here"]]) == pytest.approx(2 * 2 / 5)
    assert value("token_f1", [""], [["red"]]) == 0.0


def test_cider_prefers_what_is_particular_to_the_image():
    references = [["red ball on display here"], ["blue box on display here"], ["green cone on display here"]]
    own, others = [r[0] for r in references], ["red ball on display here"] * 3
    # a word of every caption weighs log(3 / 3) = 0, the rest match in full at each order that has weight: 10 at most
    assert value("cider", own, references) == pytest.approx(10.0)
    assert 3.3 < value("cider", others, references) < 5
    assert value("cider", ["", "", ""], references) == 0.0


def test_boxes():
    assert iou(A, A) == 1.0
    assert iou(A, B) == 0.0
    assert iou(A, Box("car", 0.2, 0.0, 0.6, 0.4)) == pytest.approx(1 / 3)
    assert value("iou50", [[A], [], [A]], [[A], [A], [B]]) == pytest.approx(1 / 3)
    assert value("f1_50", [[A, B], [], [A]], [[A], [], []]) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert value("f1_50", [[A._replace(label="truck")]], [[A]]) == 0.0
    assert value("f1_50", [[A, A]], [[A]]) == pytest.approx(2 / 3), "a real box is found once"


def test_average_precision():
    first_wrong = [[B._replace(score=0.9), A._replace(score=0.8)]]
    assert average_precision(first_wrong, [[A]]) == pytest.approx(0.5)
    assert average_precision([[A._replace(score=0.9), B._replace(score=0.8)]], [[A]]) == 1.0
    assert average_precision([[A]], [[A, B]]) == pytest.approx(0.5)
    assert average_precision([[A, Box("bus", 0.1, 0.5, 0.2, 0.6)]], [[A, Box("bus", 0.7, 0.0, 0.8, 0.1)]]) == 0.5
    assert score("map50", [[A]] * 20, [[A]] * 20).stderr == 0.0


def test_standard_error_covers_the_truth():
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(300):
        hits = rng.random(100) < 0.8
        found = score("top1", ["a"] * 100, [["a"] if hit else ["b"] for hit in hits])
        missed += abs(found.value - 0.8) > 1.96 * found.stderr
    assert missed < 30
    assert score("top1", ["a"] * 98, [["a"]] * 98).stderr == pytest.approx(math.sqrt(99) / 100 / math.sqrt(98))


def test_bad_input_is_named():
    with pytest.raises(MetricError, match="unknown metric 'f1'; there are top1"):
        score("f1", ["a"], [["a"]])
    with pytest.raises(MetricError, match="2 predictions for 1 targets"):
        score("top1", ["a", "b"], [["a"]])
    with pytest.raises(MetricError, match="0 predictions for 0"):
        score("top1", [], [])
