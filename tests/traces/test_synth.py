"""Synthetic traces: as the real files where those are at hand, as the published curves for lmm, and reproducible."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from traces import synth
from traces.readers import read_trace
from traces.request import TraceError
from traces.synth import synthesize

AZURE_DIR = Path(__file__).parents[3] / "shared" / "traces" / "azure"
SEEDS = (0, 1, 2)


def dispersion(trace, window_s=10):
    counts = np.bincount(trace.arrival_ns // (window_s * 10**9))[:-1]
    return counts.var() / counts.mean()


def memory(trace, lag):
    """Autocorrelation of the logarithms of gaps that stand `lag` requests apart."""
    gaps = np.log(np.maximum(np.diff(trace.arrival_ns), 1))
    return np.corrcoef(gaps[lag:], gaps[:-lag])[0, 1]


def volume(trace):
    return int((trace.prompt_tokens + trace.output_tokens).sum())


@pytest.mark.parametrize("kind", ["code", "conv"])
@pytest.mark.parametrize("seed", SEEDS)
def test_like_the_real_file(kind, seed):
    path = AZURE_DIR / f"AzureLLMInferenceTrace_{kind}.csv"
    if not path.exists():
        pytest.skip("the Azure traces are not part of the project")
    real = read_trace(path)
    ours = synthesize(kind, len(real), seed)

    def distance(a, b):
        return ks_2samp(a, b, method="asymp").statistic

    assert distance(ours.prompt_tokens, real.prompt_tokens) <= 0.03
    assert distance(ours.output_tokens, real.output_tokens) <= 0.03
    assert distance(np.diff(ours.arrival_ns), np.diff(real.arrival_ns)) <= 0.03
    assert dispersion(ours) == pytest.approx(dispersion(real), rel=0.35)
    assert volume(ours) == pytest.approx(volume(real), rel=0.05)
    assert ours.arrival_ns[-1] == pytest.approx(real.arrival_ns[-1], rel=0.05)
    for lag in (1, 5):
        assert memory(ours, lag) == pytest.approx(memory(real, lag), abs=0.07)


def test_lmm_follows_the_published_curves():
    trace = synthesize("lmm", 300_000, seed=1)
    curves = json.loads(Path(synth.__file__).with_name("synth_params.json").read_text())["lmm"]
    with_image = trace.images > 0
    assert with_image.mean() == pytest.approx(0.48, abs=0.03)
    for stream, inside in (("image", with_image), ("text", ~with_image)):
        for column, values in (("ContextTokens", trace.prompt_tokens), ("GeneratedTokens", trace.output_tokens)):
            knots, q = np.array(curves[f"{column}_{stream}"]), np.array(curves["q"])
            above = (knots > 1.5) & (q < 1)  # up to 1 the curve is an atom: a request has at least one token
            reached = np.searchsorted(np.sort(values[inside]), knots[above] + 0.5) / inside.sum()
            assert np.abs(reached - q[above]).max() <= 0.03
    pmf = {int(square): share for square, share in curves["num_images_sq_pmf"].items()}
    for square, share in pmf.items():
        assert (trace.images[with_image] ** 2 == square).mean() == pytest.approx(share, abs=0.005)
    assert np.corrcoef(np.log(trace.images[with_image]), np.log(trace.prompt_tokens[with_image]))[0, 1] > 0.6


def test_a_million_lmm_requests_are_a_week():
    trace = synthesize("lmm", 1_000_000, seed=0)
    assert len(trace) == 1_000_000
    assert trace.arrival_ns[-1] / 1e9 / 3600 == pytest.approx(168, rel=0.05)
    minutes = np.bincount(trace.arrival_ns[trace.images > 0] // 60_000_000_000, minlength=10_080)[:10_000]
    blocks = minutes.reshape(-1, 8)
    assert blocks.max(1).mean() == pytest.approx(124, rel=0.1)  # published: images come in bursts of minutes
    assert np.median(blocks.min(1)) < 10


@pytest.mark.parametrize("kind", synth.KINDS)
@pytest.mark.parametrize("requests", [1, 2, 3, 1000])
def test_any_number_of_requests(kind, requests):
    trace = synthesize(kind, requests, seed=9)
    assert len(trace) == requests
    assert trace.arrival_ns[0] == 0
    assert not (trace.arrival_ns % synth.RESOLUTION_NS[kind]).any()


def test_conv_repeats_its_hour():
    trace = synthesize("conv", 60_000, seed=3)
    assert trace.arrival_ns[-1] / 1e9 == pytest.approx(60_000 / 19_366 * 3501.72, rel=0.03)
    hours = trace.arrival_ns // 3_501_721_936_941
    assert np.bincount(hours)[:3] == pytest.approx([19_366] * 3, rel=0.03)


def test_the_seed_decides():
    for kind in synth.KINDS:
        first, again, other = (synthesize(kind, 200, seed) for seed in (1, 1, 2))
        assert first.arrival_ns.tolist() == again.arrival_ns.tolist()
        assert first.prompt_tokens.tolist() == again.prompt_tokens.tolist()
        assert first.prompt_tokens.tolist() != other.prompt_tokens.tolist()


def test_bad_orders():
    with pytest.raises(TraceError, match="did you mean 'conv'"):
        synthesize("convs", 5)
    for requests in (0, -1, 10**12):
        with pytest.raises(TraceError, match="--requests"):
            synthesize("conv", requests)
