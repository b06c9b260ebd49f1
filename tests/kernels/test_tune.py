"""The search for tilings: what it tries for each shape, and in which order. Nothing is timed."""

import json
from dataclasses import replace

import pytest

from kernels import tune
from kernels.batch import LONG
from kernels.tiles import Shape, Tiling

SQUARE = (4096, (4096,))


def test_every_candidate_of_every_shape_has_its_launches():
    forms = set()
    for shape in tune.shapes():
        search = tune.Search(shape)
        search.timed = {tiling: float(i) for i, tiling in enumerate(search.first())}
        candidates = [*search.timed, *search.second()]
        assert len(search.launches(candidates)) >= len(candidates) > 1, shape
        forms |= {(tiling.form, shape.tokens < LONG) for tiling in candidates}
    assert forms == {("two", True), ("under", True), ("two", False), ("stream", False), ("one", False)}


def test_the_second_stage_keeps_the_best_shrink_of_every_form():
    search = tune.Search(Shape(*SQUARE, 64, 8, 8))
    search.timed = {tiling: float(i) for i, tiling in enumerate(search.first())}
    best = {form: next(tiling for tiling in search.timed if tiling.form == form) for form in ("two", "under")}
    for tiling in search.second():
        like = best[tiling.form]
        assert (tiling.k_block, tiling.split, tiling.rank_block) == (like.k_block, like.split, like.rank_block)
    widths = {tiling.n_block for tiling in search.second() if tiling.form == "under"}
    assert len(widths) > 2


def test_the_third_stage_tries_the_next_shrinks_with_the_best_expand():
    search = tune.Search(Shape(*SQUARE, 64, 256, 8))
    search.timed = {tiling: float(i + 1) for i, tiling in enumerate(search.first())}
    two = [tiling for tiling in search.timed if tiling.form == "two"]
    search.timed[best := replace(two[0], n_block=64, expand_warps=8)] = 0.5
    like = {"n_block": 64, "expand_warps": 8, "expand_rows": best.expand_rows}
    again = [replace(tiling, **like) for tiling in two[1:5]]
    assert search.third()[:4] == again
    deep = search.third()[4:]
    assert {replace(tiling, stages=3) for tiling in deep} <= {best, *again[:2]}
    assert all(3 < tiling.stages <= 1 + 4096 // (tiling.k_block * tiling.split) for tiling in deep)
    search.timed[next(tiling for tiling in search.timed if tiling.form == "under")] = 0.1
    assert not search.third(), "its halves are one launch"
    beside = tune.Search(search.shape, forms=("under",))
    beside.timed = {best: 0.1}
    assert not beside.third(), "two launches are not asked for"


def test_what_was_timed_is_not_timed_again(monkeypatch):
    worlds, timed = [], []
    monkeypatch.setattr(tune, "World", lambda point, cold_bytes: worlds.append(point.skew))
    monkeypatch.setattr(tune.Search, "_us", lambda search, world, tiling: timed.append(tiling) or 2.0)
    search = tune.Search(Shape(*SQUARE, 64, 32, 8))
    search.time([Tiling(), Tiling()])
    assert (worlds, timed, search.timed) == (["uniform", "skew60"], [Tiling()] * 2, {Tiling(): 4.0})
    search.time([Tiling()])
    assert len(worlds) == 2, "no world is built for nothing"


def test_a_loop_gets_no_more_stages_than_it_has_steps_or_memory():
    shape = Shape(*SQUARE, 128, 256, 1)
    stages = lambda **sizes: [t.stages for t in tune.deeper(shape, Tiling(rows=32, stages=3, **sizes))]  # noqa: E731
    assert stages(k_block=128, split=4, rank_block=32) == [6, 9], "8 blocks of 16 KB"
    assert stages(k_block=128, split=8, rank_block=32) == [4, 5], "4 blocks"
    assert stages(k_block=128, split=2, rank_block=128) == [5, 6], "40 KB each"
    assert not stages(k_block=512, split=8, rank_block=32), "one step"
    spans = [(t.stages, t.expand_stages) for t in tune.deeper(shape, Tiling(k_block=512, split=8, span=8, expand_rows=64))]
    assert spans == [(3, 4), (3, 5)], "the expand's loop, 48 KB each"


def test_short_steps_whose_shares_may_be_unequal_have_more_parts_and_a_higher_row_tile():
    one, several = (Shape(*SQUARE, 128, 256, adapters) for adapters in (1, 8))
    assert {t.split for t in tune.shrinks(several)} - {t.split for t in tune.shrinks(one)} >= {5, 6, 7}
    assert tune._row_tiles(several) == (16, 32, 64)
    assert tune._row_tiles(one) == (32, 64, 128)
    assert tune._row_tiles(Shape(*SQUARE, 64, 8, 8)) == (16,), "a row each"


def test_a_form_that_is_not_asked_for_is_not_tried():
    search = tune.Search(Shape(*SQUARE, 64, 8, 8), forms=("under",), known=[Tiling()])
    search.timed = dict.fromkeys(search.first(), 1.0)
    assert search.first()[0] == Tiling(), "the one to beat"
    assert {tiling.form for tiling in [*search.first()[1:], *search.second()]} == {"under"}


def test_of_a_form_that_is_far_behind_the_least_bad_shrink_is_tried_with_other_expands(monkeypatch):
    search = tune.Search(Shape(*SQUARE, 64, 4096, 8, uneven=True))
    streams = [tiling for tiling in search.first() if tiling.form == "stream"]
    took = dict.fromkeys(search.first(), 99.0) | {streams[0]: 200.0, streams[1]: 130.0}
    monkeypatch.setattr(search, "_us", lambda world, tiling: took[tiling] if tiling.form == "two" else took[tiling] + 50)
    search.timed = {tiling: search._product([0], tiling) for tiling in search.first()}
    assert {search.timed[tiling] for tiling in streams} == {float("inf")}
    least = min(streams, key=took.get)
    for tiling in search.second():
        if tiling.form == "stream":
            assert (tiling.k_block, tiling.split, tiling.residents) == (least.k_block, least.split, least.residents)


def test_unequal_shares_are_expanded_in_whole_waves(monkeypatch):
    monkeypatch.setattr(tune, "processors", lambda: 132)
    uneven = Shape(*SQUARE, 128, 4096, 8, uneven=True)  # 2,458 rows and seven times 234: 39 + 28 tiles of 64
    assert [*tune._whole_waves(uneven, 64, 128)] == [11, 5, 3], "3 runs of 67 tiles on 264 places, 7 on 528, 11 on 792"
    tried = {(tiling.expand_rows, tiling.n_block, tiling.span) for tiling in tune.expands(uneven, Tiling())}
    assert {(64, 128, span) for span in (11, 5, 3)} <= tried
    assert not [*tune._whole_waves(Shape(*SQUARE, 128, 4096, 8), 64, 128)], "equal shares fill them by themselves"


def test_a_tiling_far_behind_the_best_is_timed_no_further(monkeypatch):
    search, took = tune.Search(Shape(*SQUARE, 64, 32, 8)), {Tiling(): [2.0, 4.0], Tiling(n_block=256): [2.5, 0.0]}
    monkeypatch.setattr(search, "_us", lambda world, tiling: took[tiling][world])
    assert [search._product([0, 1], tiling) for tiling in took] == [8.0, float("inf")]


def test_what_was_chosen_in_steps_is_not_searched_again(tmp_path, monkeypatch):
    shapes = [Shape(*SQUARE, 64, tokens, 8) for tokens in (8, 16, 32)]
    path = tmp_path / "a-gpu.json"
    entries = [tune.as_entry(shape, Tiling(), 4.0) for shape in shapes[:2]]
    before = {"command": "a run before", "in_step": {"runs": []}}
    tune.write_table(path, before, [entries[0] | {"in_step": True}, entries[1]])
    searched, to_beat = [], []

    class Search(tune.Search):
        def first(self):
            return []

        def second(self):
            return []

        def third(self):
            return []

        def time(self, candidates):
            """Nothing."""

        def finish(self):
            searched.append(self.shape)
            to_beat.append(self.known)
            return tune.as_entry(self.shape, Tiling("under"), 3.0)

    for name, stand_in in (("shapes", lambda: shapes), ("Search", Search), ("compile_all", lambda launches: None),
                           ("provenance", lambda command: {"command": command}),
                           ("neighbours", lambda shape, each: [Tiling(split=2)])):  # fmt: skip
        monkeypatch.setattr(tune, name, stand_in)
    tune.tune(path, again=lambda shape: True)
    assert searched == shapes[1:]
    assert to_beat == [[Tiling(), Tiling(split=2)], [Tiling(split=2)]], "the file's own, and the device's neighbours"
    told = json.loads(path.read_text())
    assert (told["earlier"], told["in_step"]) == ([{"command": "a run before"}], {"runs": []})
    assert [tiling.form for tiling in tune.load(path).values()] == ["two", "under", "under"]


@pytest.mark.gpu
def test_a_search_ends_with_a_tiling_that_is_right():
    for ready in (False, True):
        search = tune.Search(Shape(512, (512,), 16, 8, 4, ready=ready))
        for stage in (search.first, search.second, search.third):
            search.time(stage())
        assert 0 < search.finish()["us"] < 1000
