"""Accuracy of answers: what each metric says of predictions against targets, with a standard error.

Text metrics compare strings, box metrics compare lists of `Box`. Each but mAP is a mean of one score an example, and the
standard error is that of the mean; for mAP it comes from a jackknife over ten blocks. It knows no model and no files.
Sources: VQA accuracy: Antol et al. 2015; CIDEr: Vedantam et al. 2015 (without the D variant's clipping and length penalty);
average precision: PASCAL VOC 2010 (area under the whole curve); box accuracy at IoU .5: RefCOCO (Yu et al. 2016).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

IOU_THRESHOLD = 0.5
BLOCKS = 10
ARTICLES = {"a", "an", "the"}
CIDER_ORDER = 4


class MetricError(ValueError):
    """A metric that does not exist, or predictions that do not match their targets."""


class Box(NamedTuple):
    """A labelled box, corners in 0..1 of the image's width and height; `score` ranks predictions for mAP."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    score: float = 1.0


class Score(NamedTuple):
    """value: the metric, higher is better. stderr: its standard error on this sample. n: examples."""

    value: float
    stderr: float
    n: int


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0..1; labels are not compared."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - both)


def normalise(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    cleaned = re.sub(rf"[{re.escape(string.punctuation)}]", " ", text.lower())
    return [word for word in cleaned.split() if word not in ARTICLES]


# -- one score an example --------------------------------------------------------------------------------------------------
def _top1(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    return [float(p.strip().lower() in {t.strip().lower() for t in ts}) for p, ts in zip(predictions, targets, strict=True)]


def _vqa(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """min(people who gave this answer / 3, 1); with fewer than three answers, 1 if any of them is met."""
    scores = []
    for prediction, answers in zip(predictions, targets, strict=True):
        hits = sum(normalise(prediction) == normalise(answer) for answer in answers)
        scores.append(min(hits / min(3, len(answers)), 1.0))
    return scores


def _token_f1(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    def f1(a: Counter, b: Counter) -> float:
        common = sum((a & b).values())
        return 2 * common / (a.total() + b.total()) if common else float(not a and not b)

    counted = ((Counter(normalise(p)), [Counter(normalise(t)) for t in ts])
               for p, ts in zip(predictions, targets, strict=True))  # fmt: skip
    return [max(f1(prediction, answer) for answer in answers) for prediction, answers in counted]


def _cider(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> list[float]:
    """Mean over n = 1..4 of the TF-IDF cosine with each reference, times 10; documents are the images' references."""
    references = [[normalise(text) for text in texts] for texts in targets]
    total = np.zeros(len(predictions))
    for order in range(1, CIDER_ORDER + 1):
        counts = [[_ngrams(words, order) for words in texts] for texts in references]
        documents = Counter(gram for texts in counts for gram in {g for text in texts for g in text})
        for i, prediction in enumerate(predictions):
            ours = _weighted(_ngrams(normalise(prediction), order), documents, len(targets))
            theirs = [_weighted(text, documents, len(targets)) for text in counts[i]]
            total[i] += sum(_cosine(ours, other) for other in theirs) / len(theirs)
    return (10 * total / CIDER_ORDER).tolist()


def _ngrams(words: list[str], order: int) -> Counter:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def _weighted(grams: Counter, documents: Counter, count: int) -> dict:
    return {gram: n * math.log(count / max(1, documents[gram])) for gram, n in grams.items()}


def _cosine(a: dict, b: dict) -> float:
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(value * b.get(gram, 0.0) for gram, value in a.items()) / norm if norm else 0.0


def _iou50(predictions: Sequence[Sequence[Box]], targets: Sequence[Sequence[Box]]) -> list[float]:
    return [float(bool(p) and iou(p[0], t[0]) >= IOU_THRESHOLD) for p, t in zip(predictions, targets, strict=True)]


def _f1(predictions: Sequence[Sequence[Box]], targets: Sequence[Sequence[Box]]) -> list[float]:
    """F1 of each image at IoU .5, averaged over images; an image without objects counts 1 if nothing was found in it."""
    scores = []
    for found, real in zip(predictions, targets, strict=True):
        hits = sum(hit for _, hit in _matched(found, real))
        scores.append(2 * hits / (len(found) + len(real)) if found or real else 1.0)
    return scores


def _matched(found: Sequence[Box], real: Sequence[Box]) -> list[tuple[float, bool]]:
    """(score, hit) of each prediction, best first; a real box is hit once, by the prediction ranked first."""
    free = list(real)
    result = []
    for box in sorted(found, key=lambda b: -b.score):
        best = max((t for t in free if t.label == box.label), key=lambda t: iou(box, t), default=None)
        hit = best is not None and iou(box, best) >= IOU_THRESHOLD
        if hit:
            free.remove(best)
        result.append((box.score, hit))
    return result


# -- mAP: of the whole sample ----------------------------------------------------------------------------------------------
def average_precision(predictions: Sequence[Sequence[Box]], targets: Sequence[Sequence[Box]]) -> float:
    """Mean over the labels that occur in the targets of the area under precision against recall, IoU .5."""
    areas = []
    for label in sorted({box.label for real in targets for box in real}):
        ranked, positives = [], 0
        for found, real in zip(predictions, targets, strict=True):
            wanted = [box for box in real if box.label == label]
            positives += len(wanted)
            ranked += _matched([box for box in found if box.label == label], wanted)
        ranked.sort(key=lambda pair: -pair[0])
        hits = np.cumsum([hit for _, hit in ranked])
        precision = hits / np.arange(1, len(ranked) + 1) if ranked else np.zeros(0)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        areas.append(float(sum(envelope[i] for i, (_, hit) in enumerate(ranked) if hit)) / positives)
    return float(np.mean(areas)) if areas else 1.0


def _jackknife(predictions: Sequence, targets: Sequence) -> Score:
    n = len(targets)
    blocks = min(BLOCKS, n)
    left_out = []
    for block in range(blocks if blocks > 1 else 0):
        keep = [i for i in range(n) if i % blocks != block]
        left_out.append(average_precision([predictions[i] for i in keep], [targets[i] for i in keep]))
    spread = math.sqrt((blocks - 1) ** 2 / blocks * np.var(left_out, ddof=1)) if blocks > 1 else 0.0
    return Score(average_precision(predictions, targets), float(spread), n)


METRICS: dict[str, Callable] = {
    "top1": _top1, "vqa": _vqa, "token_f1": _token_f1, "cider": _cider, "iou50": _iou50, "f1_50": _f1, "map50": _jackknife,
}  # fmt: skip
BY_TASK = {
    "classify": ("top1",), "detect": ("f1_50", "map50"), "vqa": ("vqa", "token_f1"), "caption": ("token_f1", "cider"),
    "refer": ("iou50",), "video": ("top1",),
}  # fmt: skip
"""Task -> the metrics that fit it; the first is the default."""
HIGHEST = dict.fromkeys(METRICS, 1.0) | {"cider": 10.0}


def score(metric: str, predictions: Sequence, targets: Sequence) -> Score:
    """The metric over a sample. Text: str against a list of accepted answers; boxes: lists of Box against lists of Box.

    MetricError for an unknown name, for lists of different length, and for an empty sample.
    """
    if metric not in METRICS:
        raise MetricError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")
    if len(predictions) != len(targets) or not targets:
        raise MetricError(f"{metric}: {len(predictions)} predictions for {len(targets)} targets")
    if metric == "map50":
        return _jackknife(predictions, targets)
    each = np.asarray(METRICS[metric](predictions, targets), float)
    # one success more and one failure more: a sample without an error still says that its error is not zero
    spread = max(float(each.std()), math.sqrt(len(each) + 1) / (len(each) + 2)) if len(each) > 1 else 0.0
    return Score(float(each.mean()), spread / math.sqrt(len(each)), len(each))
