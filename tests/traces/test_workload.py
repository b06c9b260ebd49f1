"""Workloads: what the two applications ask for, how repeated images share prefixes, and clipping that says so."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from traces.request import TASKS, Trace, TraceError
from traces.workload import TEMPLATE_TOKENS, apply_workload, clip

LLAVA = {"image_tokens": 576, "video_images": 3}


def world(n=1000, **columns):
    rng = np.random.default_rng(0)
    arrivals = np.sort(rng.integers(0, 10**12, n))
    return Trace.build(arrivals, rng.integers(1, 5000, n), rng.integers(1, 1000, n), **columns)


def test_retrieval_is_an_image_and_a_short_question():
    trace = apply_workload(world(), "retrieval", **LLAVA)
    question = trace.prompt_tokens - 576 - TEMPLATE_TOKENS
    assert (trace.images == 1).all()
    assert 4 <= question.min() <= question.max() <= 128
    assert np.median(question) == pytest.approx(16, abs=1)
    assert (trace.output_tokens == np.minimum(world().output_tokens, 120)).all()
    assert {TASKS[t] for t in trace.task.tolist()} == {"vqa", "caption", "refer"}
    assert not trace.head.any()
    assert (trace.arrival_ns == world().arrival_ns).all()
    assert trace.prefix is None
    assert "120" in trace.notes[-1]


@pytest.mark.parametrize(("head", "output"), [(True, 1), (False, 7)])
def test_video_is_images_and_one_forward_pass(head, output):
    trace = apply_workload(world(), "video", head=head, **LLAVA)
    assert set(trace.prompt_tokens.tolist()) == {3 * 576 + TEMPLATE_TOKENS}
    assert set(trace.output_tokens.tolist()) == {output}
    assert set(trace.head.tolist()) == {head}
    assert set(trace.images.tolist()) == {3}
    assert {TASKS[t] for t in trace.task.tolist()} == {"video"}


def test_trace_raises_only_prompts_that_cannot_hold_their_images():
    trace = Trace.build([0, 1, 2], [100, 2000, 100], [5, 5, 5], images=np.array([1, 2, 0]))
    raised = apply_workload(trace, "trace", **LLAVA)
    assert raised.prompt_tokens.tolist() == [577, 2000, 100]
    assert raised.output_tokens.tolist() == [5, 5, 5]
    assert raised.notes == ("raised the prompts of 1 of 3 requests to hold their images of 576 tokens",)
    with pytest.raises(TraceError, match="9000 images of 2880 tokens pass 10000000"):
        apply_workload(trace.with_(images=np.array([0, 9000, 0])), image_tokens=2880, video_images=3)


def test_no_head_decodes_the_heads_a_trace_brings():
    trace = Trace.build([0, 1], [10, 10], [1, 5], head=np.array([True, False]))
    assert apply_workload(trace, **LLAVA).head.tolist() == [True, False]
    decoded = apply_workload(trace, head=False, **LLAVA)
    assert (decoded.head.tolist(), decoded.output_tokens.tolist()) == ([False, False], [7, 5])


@pytest.mark.parametrize("name", ["retrieval", "video"])
def test_repeated_images_share_their_leading_segments(name):
    trace = apply_workload(world(2000), name, repeat_images=0.3, seed=2, **LLAVA)
    images = 1 if name == "retrieval" else 3
    assert {tuple(tokens for _, tokens in prefix) for prefix in trace.prefix} == {(576,) * images}
    keys = [tuple(key for key, _ in prefix) for prefix in trace.prefix]
    last, repeats = {}, 0
    for place, key in enumerate(keys):
        if key in last:
            repeats += 1
            assert place - last[key] <= 256 * 20  # through a chain of repeats, each at most 256 back
        last[key] = place
    assert repeats / 2000 == pytest.approx(0.3, abs=0.03)
    assert f"{repeats} of 2000 requests" in trace.notes[-1]
    flat = [key for group in set(keys) for key in group]
    assert len(flat) == len(set(flat))  # no key means two contents


def test_repeats_of_trace_images_only_touch_requests_with_images():
    trace = Trace.build(range(6), [4000] * 6, [5] * 6, images=np.array([2, 0, 2, 0, 1, 2]))
    every = apply_workload(trace, repeat_images=1.0, **LLAVA)
    assert [len(prefix) for prefix in every.prefix] == [2, 0, 2, 0, 1, 2]
    assert len({prefix[0] for prefix in every.prefix if prefix}) == 1
    assert every.prefix[0] == every.prefix[2] == every.prefix[5]


def test_repeat_images_refuses_what_it_cannot_do():
    with pytest.raises(TraceError, match="no request has an image"):
        apply_workload(world(5), repeat_images=0.5, **LLAVA)
    own = world(1, prefix=(((1, 1),),), images=np.array([1]))
    with pytest.raises(TraceError, match="prefixes of its own"):
        apply_workload(own, repeat_images=0.5, **LLAVA)
    with pytest.raises(TraceError, match="--repeat-images"):
        apply_workload(world(5), "video", repeat_images=float("nan"), **LLAVA)
    with pytest.raises(TraceError, match="did you mean 'retrieval'"):
        apply_workload(world(5), "retrival", **LLAVA)


def test_the_seed_decides():
    def keys(seed):
        trace = apply_workload(world(), "retrieval", repeat_images=0.5, seed=seed, **LLAVA)
        return trace.prompt_tokens.tolist(), trace.prefix

    assert keys(1) == keys(1)
    assert keys(1) != keys(2)


@example([(5000, 1, 3)], 577, 288)  # the prompt ends exactly with the last image: it goes, a token must follow
@given(st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(0, 20)), min_size=1, max_size=20),
       st.integers(2, 9000), st.integers(0, 600))  # fmt: skip
def test_clip_fits_everything_and_touches_nothing_else(rows, max_context, image_tokens):
    prompt, output, images = (np.array(column) for column in zip(*rows, strict=True))
    prefix = tuple(((1, int(p) // 2 + 1), (2, int(p) - int(p) // 2 - 1))[: 2 if p > 2 else 1] for p in prompt)
    trace = Trace.build(range(len(rows)), prompt, output, images=images, prefix=prefix)
    clipped = clip(trace, max_context, image_tokens)
    clipped.check()
    assert (clipped.prompt_tokens + clipped.output_tokens <= max_context).all()
    fits = prompt + output <= max_context
    for name in ("prompt_tokens", "output_tokens", "images"):
        assert (getattr(clipped, name)[fits] == getattr(trace, name)[fits]).all()
        assert (getattr(clipped, name) <= getattr(trace, name)).all()
    for segments, before, tokens in zip(clipped.prefix, prefix, clipped.prompt_tokens.tolist(), strict=True):
        assert sum(length for _, length in segments) == min(tokens, sum(length for _, length in before))
        assert all(length >= 1 for _, length in segments)
    assert len(clipped.notes) == (not fits.all())
    if image_tokens:
        assert (clipped.images * image_tokens < clipped.prompt_tokens)[~fits].all()


def test_clip_says_how_many():
    trace = Trace.build([0, 1, 2], [5000, 100, 10], [100, 100, 9000], images=np.array([8, 0, 0]))
    clipped = clip(trace, 4096, 576)
    assert clipped.prompt_tokens.tolist() == [3996, 100, 10]
    assert clipped.output_tokens.tolist() == [100, 100, 4086]
    assert clipped.images.tolist() == [6, 0, 0]
    assert clipped.notes == ("clipped 2 of 3 requests to a context of 4096 tokens (--clip)",)
