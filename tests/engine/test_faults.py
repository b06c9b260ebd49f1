"""A bad request, adapter or image ends alone; memory that is not there shrinks the batch; what is shared stays right."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.peft_format import random_adapter, write_adapter  # noqa: E402
from engine.prompts import Prompt  # noqa: E402


def status_of(w):
    from engine.replay import record

    run = record(w.driver, w.trace, {"notes": []}, operator="x", page_bytes=w.engine.page_bytes)
    run.check()
    return run, run.requests["status"].tolist()


COMPLETED, ABORTED, UNSERVABLE, FAILED = range(4)


def assert_same(got, expected):
    """The logits of all tokens of all requests agree."""
    assert got.keys() == expected.keys()
    for request, rows in expected.items():
        torch.testing.assert_close(got[request], rows, rtol=0, atol=2e-5)


def test_prefix_reuse_gives_the_same_tokens(world, trace, model):
    """Requests about one image share its pages; the answers are those without sharing."""
    n, tokens = 6, model("tiny-llava")[0].shape.image_tokens
    requests = trace(n, images=0, output=6, adapter=np.array([0, 0, 1, 0, -1, 0], np.int32))
    prefix = tuple((((i % 2) << 16, tokens), (7, 8)) for i in range(n))
    requests = requests.with_(images=np.ones(n, np.int64), prompt_tokens=requests.prompt_tokens + tokens + 8, prefix=prefix)
    shared = world("tiny-llava", requests, limits=(4, 30, 256))
    alone = world("tiny-llava", requests, limits=(4, 30, 256), prefix_cache=False)
    assert_same(shared.logits(), alone.logits())
    assert shared.ledger.journal.counters["prefix_hit_tokens"] > 0
    assert alone.ledger.journal.counters["prefix_hit_tokens"] == 0


@pytest.mark.parametrize("policy", ["slora", "valora"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_gives_the_same_tokens(world, trace, policy, prefix_cache):
    requests = trace(8, images=1, output=40)
    prefix = tuple(((i % 3, 20),) if not requests.images[i] else () for i in range(8))
    requests = requests.with_(prefix=prefix, prompt_tokens=requests.prompt_tokens + 20)
    roomy = world("tiny-llava", requests, policy, prefix_cache=prefix_cache)
    tight = world("tiny-llava", requests, policy, pages=14, prefix_cache=prefix_cache)
    assert_same(tight.logits(), roomy.logits())
    assert tight.ledger.journal.counters["preemptions"] > 0
    assert roomy.ledger.journal.counters["preemptions"] == 0


def test_a_bad_adapter_fails_its_requests_alone(world, trace, model, tmp_path):
    shape = model("tiny-llava")[0].shape
    requests = trace(9, images=1, output=5, adapter=np.arange(9, dtype=np.int32) % 3)
    for adapter in requests.adapters:
        rng = np.random.default_rng(1)
        write_adapter(tmp_path, random_adapter(shape, adapter.name, adapter.rank, ("qkv", "o"), rng), "tiny-llava")
    expected = world("tiny-llava", requests, root=tmp_path).logits()
    config = tmp_path / "lora-1" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    w = world("tiny-llava", requests, root=tmp_path)
    got = w.logits()
    assert "use_dora = true is not supported" in w.found.reasons["lora-1"]
    assert_same(got, {request: rows for request, rows in expected.items() if request % 3 != 1})
    _, status = status_of(w)
    assert status == [FAILED if request % 3 == 1 else COMPLETED for request in range(9)]


def test_bad_images_fail_their_request_alone(world, trace):
    requests = trace(6, images=1, output=5)
    requests = requests.with_(images=np.ones(6, np.int64), prompt_tokens=np.full(6, 30))
    requests = requests.with_(prompt_tokens=np.where(np.arange(6) == 2, 16, 30), images=np.where(np.arange(6) == 4, 65, 1))
    w = world("tiny-llava", requests)
    got = w.run()
    _, status = status_of(w)
    assert sorted(got) == [0, 1, 3, 5]
    assert [status[i] for i in (2, 4)] == [FAILED, FAILED]
    assert w.driver.reasons[2] == "16 prompt tokens do not hold 1 images of 16 and text"
    assert w.driver.reasons[4].startswith("65 images, at most 64 are served")


def test_pixels_that_are_not_numbers_fail_while_others_run(world, trace, model):
    """Found only when the request's turn comes, in one plan with others."""
    shape = model("tiny-llava")[0].shape
    requests = trace(5, images=0, output=8, span_ns=10)
    requests = requests.with_(images=np.array([0, 0, 1, 0, 0]), prompt_tokens=np.full(5, 40))
    pixels = torch.full((3, shape.image_size, shape.image_size), torch.nan)
    ids = np.full(40, 9, np.int32)
    ids[:16] = shape.image_token_id
    expected = world("tiny-llava", requests).logits()
    w = world("tiny-llava", requests, prompts={2: Prompt(ids, (0,), [pixels])})
    del expected[2]
    assert_same(w.logits(), expected)
    assert w.driver.reasons == {2: f"image 0 is not {shape.pixels} finite numbers"}


def test_a_request_larger_than_the_context_is_unservable(world, trace):
    requests = trace(4, images=0)
    requests = requests.with_(prompt_tokens=np.array([10, 300, 10, 10]))
    w = world("tiny-llava", requests)
    assert sorted(w.run()) == [0, 2, 3]
    assert status_of(w)[1] == [COMPLETED, UNSERVABLE, COMPLETED, COMPLETED]


def test_out_of_memory_shrinks_the_batch_and_goes_on(world, trace):
    requests = trace(10, images=1, output=6, span_ns=100)
    expected = world("tiny-llava", requests, limits=(8, 128, 256)).logits()
    w = world("tiny-llava", requests, limits=(8, 128, 256))
    failures = []

    class SmallMemory:
        def __getattr__(self, name):
            return getattr(w.decoder, name)

        def forward(self, hidden, *rest):
            if len(hidden) > 40:
                failures.append(len(hidden))
                raise torch.OutOfMemoryError("made up")
            return w.decoder.forward(hidden, *rest)

    w.runner.decoder = SmallMemory()
    assert_same(w.logits(), expected)
    assert failures
    assert w.ledger.limits.max_batch_tokens < 64
    assert status_of(w)[1] == [COMPLETED] * 10


@pytest.mark.parametrize("every", [3, 5])
def test_out_of_memory_at_any_step_loses_no_token(world, trace, every):
    """Now the first step of a lease finds no memory, now a later one, whose pages were prepared already."""
    requests = trace(8, images=1, output=40, span_ns=100)
    expected = world("tiny-llava", requests, limits=(8, 2048, 256)).logits()
    w = world("tiny-llava", requests, limits=(8, 2048, 256))
    calls = []

    class Sometimes:
        def __getattr__(self, name):
            return getattr(w.decoder, name)

        def forward(self, *rest):
            calls.append(w.ledger.limits)
            if len(calls) % every == 0 and len(calls) < 40:
                raise torch.OutOfMemoryError("made up")
            return w.decoder.forward(*rest)

    w.runner.decoder = Sometimes()
    assert_same(w.logits(), expected)
    assert len(calls) > 40


def test_no_memory_at_all_fails_the_requests_and_ends(world, trace):
    w = world("tiny-llava", trace(3, images=0, output=3), limits=(2, 32, 256))

    class NoMemory:
        def __getattr__(self, name):
            raise torch.OutOfMemoryError("made up")

    w.runner.decoder = NoMemory()
    assert w.run() == {}
    assert set(status_of(w)[1]) == {FAILED}
    assert set(w.driver.reasons.values()) == {"no memory even for the smallest step"}


def test_an_interruption_keeps_what_has_finished(world, trace):
    requests = trace(12, images=0, output=20, span_ns=20_000_000)
    w = world("tiny-llava", requests)
    settle = w.runner.settle

    def stop_soon(ledger, steps):
        settle(ledger, steps)
        w.driver.stop = len(w.runner.answers) >= 3

    w.runner.settle = stop_soon
    tokens = w.run()
    run, status = status_of(w)
    assert len(tokens) >= 3
    assert [i for i, s in enumerate(status) if s == COMPLETED] == sorted(tokens)
    assert status.count(FAILED) == len(status) - len(tokens) > 0
    assert len(status) < 12
    assert any(note.startswith("interrupted: ") for note in run.config["notes"])
