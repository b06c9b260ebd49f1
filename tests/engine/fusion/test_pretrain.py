"""What the base model made here is taught beside words: where a patch is, what it shows, the corners of what is asked."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("yaml")
pytest.importorskip("scipy")

from engine.fusion import generate_data, pretrain  # noqa: E402
from engine.fusion.drawings import COLOURS, PLAIN, SHAPES, SIZE, plain_move, plain_where  # noqa: E402
from engine.fusion.wording import Packed  # noqa: E402

SIDE = SIZE // pretrain.PATCH


def drawings(count=40):
    rng = np.random.default_rng(3)
    return [plain_where(rng) for _ in range(count)] + [plain_move(rng)]


def test_each_patch_knows_the_thing_that_it_is_part_of():
    drawn = drawings()
    kinds, boxes = pretrain._patches(drawn)
    assert (kinds[-1] == pretrain.UNKNOWN).all()  # a clip: nobody says what stands where
    for drawing, kind, box in zip(drawn[:-1], kinds, boxes, strict=False):
        assert 1 <= len(drawing.things) <= 3
        for thing in drawing.things:
            x1, y1, x2, y2 = thing.box
            column, row = int((x1 + x2) / 2 / pretrain.PATCH), int((y1 + y2) / 2 / pretrain.PATCH)
            patch = row * SIDE + column
            middle = ((column + 0.5) * pretrain.PATCH, (row + 0.5) * pretrain.PATCH)
            if x1 < middle[0] < x2 and y1 < middle[1] < y2:
                shape, colour = divmod(int(kind[patch]) - 1, len(COLOURS))
                assert (SHAPES[shape], list(COLOURS)[colour]) == (thing.shape, thing.colour)
                assert box[patch].tolist() == pytest.approx([v / SIZE for v in thing.box], abs=1e-6)
        assert ((kind > 0) == (box.sum(-1) > 0)).all()
        assert 0 < int((kind > 0).sum()) < SIDE * SIDE


def test_waves_tell_all_patches_apart_by_column_and_row():
    waves = pretrain.places_of_patches(SIDE, 48).view(SIDE, SIDE, 48)
    flat = waves.flatten(0, 1)
    apart = torch.cdist(flat, flat) + 9 * torch.eye(len(flat))
    assert apart.min() > 0.1
    assert torch.equal(waves[0, :, :24], waves[5, :, :24])
    assert torch.equal(waves[:, 0, 24:], waves[:, 6, 24:])


def test_what_is_taught_aside_is_learnt():
    """Features that hold the answers: the losses fall to a fifth; patches of unknown scenes count for nothing."""
    torch.manual_seed(0)
    kinds, boxes = pretrain._patches(drawings())
    named = torch.nn.functional.one_hot(kinds.clamp(min=0), 1 + len(SHAPES) * len(COLOURS)).float()
    middles, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    features = torch.cat([named, middles.logit(1e-2), sizes.logit(1e-2), torch.ones(*kinds.shape, 1)], -1)
    alike = features[:, :, -1:].expand_as(features)
    aside = pretrain.Aside(features.shape[-1])
    packed = Packed(*[torch.zeros(0)] * 4, last=torch.full((41,), 63))
    corners = torch.tensor([0.2, 0.3, 0.4, 0.6]).expand(41, 4)
    optimizer = torch.optim.Adam(aside.parameters(), 0.02)
    losses = []
    for _ in range(500):
        loss = aside.patches(features, kinds, boxes) + aside.pointing(alike, packed, corners)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    unknown = aside.patches(features, torch.full_like(kinds, pretrain.UNKNOWN), boxes)
    assert unknown.item() == 0.0


def test_lessons_point_at_one_thing_and_keep_clips_apart():
    tokenizer = pretrain.build_tokenizer([f"{d.question} {d.answer}" for d in drawings()])
    wording = pretrain.Wording("llava", tokenizer, len(tokenizer) - 1)
    drawn = [draw(np.random.default_rng(number)) for number in range(30) for draw in PLAIN]
    lessons = pretrain._Lessons(drawn, wording, torch.device("cpu"))
    kinds = [lessons.of_step(0, step, 6) for step in range(80)]
    assert 8 < sum(pointed for pointed, _ in kinds) < 40
    for pointed, chosen in kinds:
        assert len({len(drawn[i].frames) for i in chosen}) == 1
        if pointed:
            assert all(len(drawn[i].boxes) == 1 and lessons.asked[i][0][-8:] == wording.query_ids for i in chosen)
    assert kinds == [lessons.of_step(0, step, 6) for step in range(80)]


def test_domains_of_many_combinations_get_more_to_train_on(tmp_path, monkeypatch):
    monkeypatch.setitem(generate_data.SIZES, "seconds", (4, 2, 2))
    generate_data.write_domains(tmp_path, "seconds", 0, ("textures", "pointing"))
    for name, times in (("textures", 1), ("pointing", 3)):
        rows = [json.loads(line) for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()]
        assert sum(row["split"] == "train" for row in rows) == 4 * times
        assert sum(row["split"] != "train" for row in rows) == 4
