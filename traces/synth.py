"""Synthetic traces with the marginals, the dependence and the burstiness of Azure's: code, conv (2023) and lmm (2025).

The parameters in `synth_params.json` are quantile knots, rates and transition matrices fitted to
AzureLLMInferenceTrace_code.csv and _conv.csv (Patel et al., Splitwise, ISCA 2024) and digitised from the figures of
AzureLMMInferenceDataset2025.ipynb (Qiu et al., ModServe, SoCC 2025), both Azure/AzurePublicDataset, CC-BY-4.0. The
traces themselves are not part of this project. Known gaps: in windows of 10 s the dispersion of `code` is 0.86 to 1.14
of the real file's (20 seeds); over 5 minutes it is larger than there. The joint law of images and context in `lmm` is a
Gaussian copula, inferred and not published. Knows nothing of files.
"""

from __future__ import annotations

import json
import math
from itertools import accumulate
from pathlib import Path

import numpy as np

from traces.request import MAX_TOKENS, Trace, TraceError
from traces.rows import MAX_ROWS
from traces.suggest import near

KINDS = ("code", "conv", "lmm")
STARTS = {"code": "2023-11-16T18:17:00", "conv": "2023-11-16T18:15:00", "lmm": "2024-10-15T12:00:00"}
"""Wall-clock start of each kind, fixed so that the same seed gives the same bytes."""
RESOLUTION_NS = {"code": 1_000, "conv": 1_000, "lmm": 1_000_000}
"""Azure's stamps carry whole microseconds in 2023 and milliseconds in 2025."""

SLOW_SHARE, SLOW_RHO = 0.35, 0.985
"""Weight and memory of the slow term in the order of `code`'s gaps, set by hand to the dispersion of the real file."""


def synthesize(kind: str, requests: int, seed: int = 0) -> Trace:
    """A trace of exactly `requests` requests; the same (kind, requests, seed) gives the same trace.

    code: bursts; a 6-state hidden Markov chain orders the gaps, their quantiles are the real ones; duration grows with
    the number of requests. conv: a Poisson process whose rate follows the real hour minute by minute and then repeats
    it. lmm: text and image streams over the real week (Tuesday noon on), which repeats; 1,000,000 requests are a week.
    """
    if kind not in KINDS:
        raise TraceError(f"unknown kind of trace {kind!r}{near(kind, KINDS)}; one of {', '.join(KINDS)}")
    if not 1 <= requests <= MAX_ROWS:
        raise TraceError(f"--requests {requests}: between 1 and {MAX_ROWS}")
    parameters = json.loads(Path(__file__).with_name("synth_params.json").read_text("utf-8"))[kind]
    rng = np.random.default_rng([seed, 4, KINDS.index(kind)])
    seconds, prompt, output, images = {"code": _code, "conv": _conv, "lmm": _lmm}[kind](parameters, requests, rng)
    resolution_ns = RESOLUTION_NS[kind]
    stamp_ns = np.rint(seconds * (1e9 / resolution_ns)).astype(np.int64) * resolution_ns
    start_ns = int(np.datetime64(STARTS[kind], "ns").astype(np.int64))
    return Trace.build(
        stamp_ns - stamp_ns[0], _tokens(prompt), _tokens(output), images=images,
        source=f"synthetic {kind}", format="azure", notes=(f"synthetic {kind} trace, seed {seed}",),
        settings={"synthetic": kind, "seed": seed, "first_stamp_ns": start_ns + int(stamp_ns[0])},
    )  # fmt: skip


def _tokens(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 1, MAX_TOKENS).astype(np.int64)


def _code(p: dict, n: int, rng: np.random.Generator):
    """Independent context and output by inverse CDF; gaps in hidden-Markov order, remapped to the real quantiles.

    The slow term is ours: without it gaps ten requests apart are independent, which the real ones are not.
    """
    states = np.array(_markov_path(p["hmm"]["A"], rng.random(n)))
    log_gap = rng.normal(np.array(p["hmm"]["mu"])[states], np.array(p["hmm"]["sd"])[states])
    log_gap += SLOW_SHARE * log_gap.std() * _autoregressive(rng.standard_normal(n), SLOW_RHO)
    rank = np.empty(n)
    rank[np.argsort(log_gap, kind="stable")] = np.arange(n) + 0.5
    gap = np.exp(np.interp(rank / n, p["iat_q"], p["iat_knots_log"]))
    prompt = np.interp(rng.random(n), p["q129"], p["ctx_knots"])
    output = np.interp(rng.random(n), p["q129"], p["gen_knots"][0])
    return np.cumsum(gap), prompt, output, np.zeros(n, np.int64)


def _markov_path(transition: list[list[float]], uniform: np.ndarray) -> list[int]:
    """States of a chain that starts in its stationary law, one for each uniform draw."""
    matrix = np.array(transition)
    stationary = np.linalg.matrix_power(matrix / matrix.sum(1, keepdims=True), 512)[0]
    rows = [np.cumsum(row) / np.sum(row) for row in (stationary, *matrix)]
    # The next state for each possible state, then one pass that follows them: no search inside the loop.
    following = [np.minimum(np.searchsorted(row, uniform, side="right"), len(matrix) - 1).tolist() for row in rows]
    start, *step = following
    return list(accumulate(range(1, len(uniform)), lambda state, i: step[state][i], initial=start[0]))


def _conv(p: dict, n: int, rng: np.random.Generator):
    """Poisson arrivals by the repeated minute profile, some with a twin; output drawn by quantile bin of context."""
    share = p["twin_p"] / (1 + p["twin_p"])
    twin = rng.random(n) < share
    twin[0] = False
    mass = np.cumsum(np.where(twin, 0.0, rng.exponential(1.0, n)))
    edges = np.append(np.arange(len(p["per_minute"])) * 60.0, p["duration_s"])
    counts = np.append(0.0, np.cumsum(p["per_minute"])) * (1 - share)  # twins come on top
    hours, rest = np.divmod(mass, counts[-1])
    seconds = hours * p["duration_s"] + np.interp(rest, counts, edges) + twin * rng.exponential(p["twin_mean_s"], n)
    prompt = np.rint(np.interp(rng.random(n), p["q129"], p["ctx_knots"]))
    bins = np.clip(np.searchsorted(p["gen_bins"], prompt, side="right") - 1, 0, len(p["gen_knots"]) - 1)
    uniform = rng.random(n)
    output = np.empty(n)
    for number, knots in enumerate(p["gen_knots"]):
        inside = bins == number
        output[inside] = np.interp(uniform[inside], p["q49"], knots)
    return np.sort(seconds), prompt, output, np.zeros(n, np.int64)


def _lmm(p: dict, n: int, rng: np.random.Generator):
    """A text stream (Poisson by 6-hour levels) and an image stream (Cox, Gamma minutes); copulas tie the sizes."""
    mass = np.cumsum(rng.exponential(1.0, n))
    text, image = _minute_rates(p, mass[-1], rng)
    reached = np.append(0.0, np.cumsum(text + image))
    seconds = np.interp(mass, reached, np.arange(len(reached)) * 60.0)
    minute = np.minimum((seconds / 60).astype(np.int64), len(text) - 1)
    with_image = rng.random(n) < image[minute] / (text + image)[minute]

    z_images = rng.standard_normal(n)
    pmf = np.array(list(p["num_images_sq_pmf"].values()))
    roots = np.array([math.isqrt(int(square)) for square in p["num_images_sq_pmf"]])
    place = np.searchsorted(np.cumsum(pmf) / pmf.sum(), _normal_cdf(z_images))
    images = np.where(with_image, roots[np.minimum(place, len(roots) - 1)], 0)

    rho = np.where(with_image, p["copula_images_ctx"], 0.0)
    z_context = rho * z_images + np.sqrt(1 - rho**2) * rng.standard_normal(n)
    z_output = _correlated(z_context, p["copula_ctx_gen"], rng)
    prompt, output = np.empty(n), np.empty(n)
    for stream, inside in (("image", with_image), ("text", ~with_image)):
        for column, z, values in (("ContextTokens", z_context, prompt), ("GeneratedTokens", z_output, output)):
            knots = np.log(p[f"{column}_{stream}"])
            values[inside] = np.exp(np.interp(_normal_cdf(z[inside]), p["q"], knots))
    return seconds, prompt, output, images


def _minute_rates(p: dict, requests: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Expected text and image requests of each minute, over as many weeks as hold `requests`.

    The image level of an hour of day is what the published hourly counts leave over the text level, scaled to the
    published share of image requests; each minute it is multiplied by a Gamma variate of mean 1, AR(1) in its normal
    score.
    """
    text_hours = np.repeat(p["text_per_min_6h"], 6).astype(float)  # the week starts at 12:00 UTC
    hour_of_day = (12 + np.arange(len(text_hours))) % 24
    total = np.array(p["hour_of_day_counts_utc"]) / 7 / 60
    text_of_day = np.array([text_hours[hour_of_day == hour].mean() for hour in range(24)])
    image_hours = np.maximum(total - text_of_day, 0.05 * total)[hour_of_day]
    image_hours *= p["image_share"] / (1 - p["image_share"]) * text_hours.sum() / image_hours.sum()
    text_week, image_week = np.repeat(text_hours, 60), np.repeat(image_hours, 60)
    text, image, expected = [], [], 0.0
    while expected <= requests:
        scores = _autoregressive(rng.standard_normal(len(text_week)), p["image_minute_ar1"])
        text.append(text_week)
        image.append(image_week * _gamma_quantile(_normal_cdf(scores), p["image_minute_gamma_shape"]))
        expected += float(text[-1].sum() + image[-1].sum())
    return np.concatenate(text), np.concatenate(image)


def _autoregressive(noise: np.ndarray, rho: float) -> np.ndarray:
    """An AR(1) series of unit variance, started in its stationary law, out of standard normal noise."""
    steps = np.append(noise[:1], noise[1:] * math.sqrt(1 - rho**2)).tolist()
    return np.array(list(accumulate(steps, lambda before, step: rho * before + step)))


def _correlated(z: np.ndarray, rho: float, rng: np.random.Generator) -> np.ndarray:
    return rho * z + math.sqrt(1 - rho**2) * rng.standard_normal(len(z))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    """By a table of 4,001 points over +-8 standard deviations: off by less than 1e-6."""
    grid = np.linspace(-8, 8, 4001)
    return np.interp(z, grid, [0.5 * (1 + math.erf(x / math.sqrt(2))) for x in grid.tolist()])


def _gamma_quantile(probability: np.ndarray, shape: float) -> np.ndarray:
    """Quantiles of a Gamma law of mean 1, by numerical integration of its density on 20,001 points."""
    grid = np.linspace(0, 1, 20_001) ** 3 * 40  # dense near 0, where the density is steep
    density = grid ** (shape - 1) * np.exp(-grid)
    cdf = np.append(0.0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid)))
    return np.interp(probability, cdf / cdf[-1], grid) / shape
