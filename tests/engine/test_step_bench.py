"""What the engine's step bench gives the GPU to compute, without one."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

ARGS = SimpleNamespace(adapters=2, ranks=[16], batches=[1, 4], prefills=[64], context=40, targets="attention")


def test_requests_say_what_real_ones_do_and_no_two_the_same(model):
    from engine.step_bench import Bench

    bench = Bench(model("tiny-llava")[0], ARGS)
    sequences = [bench.served(number, 40, 1, number % 2) for number in range(4)]
    ids = np.stack([sequence.prompt.ids for sequence in sequences])
    assert ids.shape == (4, 41)
    assert ids.min() >= 3
    assert ids.max() < min(bench.model.shape.vocab, bench.model.shape.image_token_id)
    assert len(np.unique(ids)) > 50, "of some 300 tokens that text has"
    assert all((ids[a] != ids[b]).sum() > 30 for a in range(4) for b in range(a))
    assert bench.runner.last_tokens[:4].tolist() == ids[:, -1].tolist(), "a decode step's tokens"
    bench.release(sequences)
    again = bench.served(2, 40, 1, 0)
    assert np.array_equal(again.prompt.ids, ids[2]), "the same in every run"
    prompts = [bench.served(number, 0, 64, -1).prompt.ids for number in range(2)]
    assert (prompts[0] != prompts[1]).any()
