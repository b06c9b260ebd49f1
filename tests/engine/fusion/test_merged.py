"""Merging adapters without a step: nothing is lost that the rank can hold, and each domain keeps its rows of the head."""

from __future__ import annotations

import types

import pytest

torch = pytest.importorskip("torch")

from engine.fusion.merged import merge_heads, merged_factors  # noqa: E402
from engine.fusion.task_heads import Head, write_head  # noqa: E402

NAMES = ("layer.q_proj.lora_A.weight", "layer.q_proj.lora_B.weight")


def adapter(seed, rank, width=12, out=10, true_rank=None):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)
    if true_rank is not None:
        b[:, true_rank:] = 0
    return dict(zip(NAMES, (a, b), strict=True))


def product(weights):
    return weights[NAMES[1]] @ weights[NAMES[0]]


def domain(name, task, labels):
    return types.SimpleNamespace(name=name, task=task, labels=labels, head=True, boxed=task in ("detect", "refer"))


def test_what_the_rank_can_hold_is_kept_exactly():
    parts = [adapter(seed, 4, true_rank=2) for seed in (1, 2)]
    found = merged_factors(parts)
    assert {name: tensor.shape for name, tensor in found.items()} == {NAMES[0]: (4, 12), NAMES[1]: (10, 4)}
    torch.testing.assert_close(product(found), product(parts[0]) + product(parts[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_what_it_cannot_hold_is_cut_where_that_loses_least(rank):
    """Also where the rank is above the layer's widths."""
    parts = [adapter(seed, rank) for seed in range(5)]
    whole = sum(product(part) for part in parts)
    lost = torch.linalg.matrix_norm(whole - product(merged_factors(parts)))
    best = torch.linalg.svdvals(whole)[rank:].square().sum().sqrt()
    torch.testing.assert_close(lost, best, atol=1e-3, rtol=1e-4)


def test_one_adapter_is_itself():
    part = adapter(7, 4)
    found = merged_factors([part])
    assert all(torch.equal(found[name], part[name]) for name in NAMES)


def test_heads_keep_their_rows_and_share_their_boxes(tmp_path):
    kinds, cars, nodules = domain("kinds", "classify", "ab"), domain("cars", "detect", "c"), domain("nodules", "detect", "n")
    parts = []
    for number, one in enumerate((kinds, cars, nodules)):
        parts.append(Head([one], 6, number))
        (tmp_path / one.name).mkdir()
        write_head(tmp_path / one.name, parts[-1], [one], [1])
    (tmp_path / "words").mkdir()
    head = Head([cars, kinds, nodules], 6, 9)
    merge_heads(head, [tmp_path / name for name in ("kinds", "words", "cars", "nodules")])
    assert head.rows == ("cars/c", "kinds/a", "kinds/b", "nodules/n", "no object")
    expected = torch.stack([parts[1].classes[0], *parts[0].classes, parts[2].classes[0], parts[2].classes[1]])
    assert torch.equal(head.classes, expected)
    assert torch.equal(head.boxes, (parts[1].boxes + parts[2].boxes) / 2)
