"""What each request of a trace asks for: the trace's own tokens, or one of VaLoRA's two applications; and clipping.

Arrival times stay the trace's. Sources: VaLoRA (EuroSys 2025) for the two applications and their shapes (retrieval: one
image, a short question, up to 120 output tokens; video: 6 images, 3 for LLaVA, no text, one output token with a task
head, 7 decoded without). The lengths of questions and templates are not in it; `QUESTION_*` and `TEMPLATE_TOKENS` are
assumptions, named here, and not measurements. It knows nothing of adapters and of the model but the counts given.
"""

from __future__ import annotations

import numpy as np

from traces.request import MAX_TOKENS, TASKS, Trace, TraceError
from traces.suggest import near

WORKLOADS = ("trace", "retrieval", "video")
RETRIEVAL_TASKS = ("vqa", "caption", "refer")
MAX_OUTPUT = 120
HEADLESS_OUTPUT = 7
TEMPLATE_TOKENS = 8
"""Begin and role marks of a chat template. A video request has no other text: the head needs a last token to read."""
QUESTION_MEDIAN_TOKENS = 16
QUESTION_SIGMA = 0.5
QUESTION_RANGE = (4, 128)
RECENT = 256
"""A repeated image is that of one of the last so many requests: questions about an image follow it soon."""
WORKLOAD_STREAM = 3


def apply_workload(
    trace: Trace,
    name: str = "trace",
    *,
    image_tokens: int,
    video_images: int,
    seed: int = 0,
    repeat_images: float = 0.0,
    head: bool = True,
    max_output: int = MAX_OUTPUT,
) -> Trace:
    """The requests of `trace` turned into those of workload `name`, at the same times.

    trace      tokens as they stand; image tokens count inside the prompt, which is raised to hold them plus one
    retrieval  1 image + template + question (log-normal, median 16 tokens, sigma 0.5, 4..128); output min(trace's,
               max_output); task vqa, caption or refer alike
    video      video_images images + template; head: 1 output token and no decode; without: 7 tokens

    image_tokens: prompt tokens of an image. repeat_images: share of the requests with images that repeat the images of
    one of the RECENT requests before them; their image tokens lead the prompt as prefix segments keyed by content, one
    an image. head False also decodes the head requests that a trace brings, 7 tokens each.
    """
    if name not in WORKLOADS:
        raise TraceError(f"--workload {name!r}: unknown{near(name, WORKLOADS)}; one of {', '.join(WORKLOADS)}")
    if not 0 <= repeat_images <= 1:
        raise TraceError(f"--repeat-images {repeat_images:g}: a share in 0..1")
    if image_tokens < 1 or video_images < 1 or max_output < 1:
        counts = f"image_tokens {image_tokens}, video_images {video_images}, max_output {max_output}"
        raise TraceError(f"{counts}: at least 1 each")
    rng = np.random.default_rng([seed, WORKLOAD_STREAM])
    if name == "retrieval":
        trace = _retrieval(trace, rng, image_tokens, max_output)
    elif name == "video":
        trace = _video(trace, image_tokens, video_images, head)
    else:
        trace = _hold_images(trace, image_tokens)
        trace = trace if head else _without_heads(trace)
    if repeat_images:
        trace = _repeat_images(trace, rng, image_tokens, repeat_images)
    settings = {"workload": name, "image_tokens": image_tokens, "repeat_images": repeat_images, "head": head}
    if name == "video":
        settings["video_images"] = video_images
    if name == "retrieval":
        settings["max_output"] = max_output
    trace = trace.with_(settings=settings)
    trace.check()
    return trace


def clip(trace: Trace, max_context: int, image_tokens: int = 0) -> Trace:
    """Requests shortened so that prompt + output fits `max_context` tokens; the note says how many were.

    The prompt gives way first, down to half the context; then the output. With image_tokens, images whose tokens the
    prompt no longer holds are dropped too. Prefix segments end with the prompt.
    """
    if max_context < 2:
        raise TraceError(f"a context of {max_context} tokens holds no request; at least 2")
    over = trace.prompt_tokens + trace.output_tokens > max_context
    settings = {"clip": True, "max_context": max_context}
    if not over.any():
        return trace.with_(settings=settings)
    floor = np.minimum(trace.prompt_tokens, max_context - max_context // 2)
    prompt = np.where(over, np.maximum(max_context - trace.output_tokens, floor), trace.prompt_tokens)
    output = np.minimum(trace.output_tokens, max_context - prompt)
    columns = {"prompt_tokens": prompt, "output_tokens": output}
    if image_tokens:
        columns["images"] = np.where(over, np.minimum(trace.images, (prompt - 1) // image_tokens), trace.images)
    if trace.prefix is not None:
        shorter = list(trace.prefix)
        for i in np.flatnonzero(over).tolist():
            shorter[i] = _leading(shorter[i], int(prompt[i]))
        columns["prefix"] = tuple(shorter)
    note = f"clipped {over.sum()} of {len(trace)} requests to a context of {max_context} tokens (--clip)"
    return trace.with_(note=note, settings=settings, **columns)


def _retrieval(trace: Trace, rng: np.random.Generator, image_tokens: int, max_output: int) -> Trace:
    n = len(trace)
    question = np.exp(rng.normal(np.log(QUESTION_MEDIAN_TOKENS), QUESTION_SIGMA, n)).round()
    question = np.clip(question, *QUESTION_RANGE).astype(np.int64)
    tasks = np.array([TASKS.index(task) for task in RETRIEVAL_TASKS], np.int8)
    return trace.with_(
        note=f"visual retrieval: 1 image of {image_tokens} tokens, a question of about {QUESTION_MEDIAN_TOKENS} "
        f"tokens, output up to {max_output} tokens",
        prompt_tokens=image_tokens + TEMPLATE_TOKENS + question,
        output_tokens=np.minimum(trace.output_tokens, max_output),
        images=np.ones(n, np.int64),
        task=rng.choice(tasks, n),
        head=np.zeros(n, bool),
        prefix=None,
    )


def _video(trace: Trace, image_tokens: int, video_images: int, head: bool) -> Trace:
    n = len(trace)
    answer = "a task head answers, 1 output token" if head else f"no task head, {HEADLESS_OUTPUT} tokens decoded"
    return trace.with_(
        note=f"video analytics: {video_images} images of {image_tokens} tokens, {TEMPLATE_TOKENS} template tokens, "
        f"{answer}",
        prompt_tokens=np.full(n, video_images * image_tokens + TEMPLATE_TOKENS, np.int64),
        output_tokens=np.full(n, 1 if head else HEADLESS_OUTPUT, np.int64),
        images=np.full(n, video_images, np.int64),
        task=np.full(n, TASKS.index("video"), np.int8),
        head=np.full(n, head),
        prefix=None,
    )


def _hold_images(trace: Trace, image_tokens: int) -> Trace:
    needed = np.where(trace.images > 0, trace.images * image_tokens + 1, 0)
    short = needed > trace.prompt_tokens
    if not short.any():
        return trace
    if needed.max() > MAX_TOKENS:
        at = int(needed.argmax())
        raise TraceError(
            f"{trace.source}: request {at}: {trace.images[at]} images of {image_tokens} tokens pass {MAX_TOKENS} "
            "tokens; read the counts with --images sqrt or cap=N"
        )
    note = f"raised the prompts of {short.sum()} of {len(trace)} requests to hold their images of {image_tokens} tokens"
    return trace.with_(note=note, prompt_tokens=np.maximum(trace.prompt_tokens, needed))


def _without_heads(trace: Trace) -> Trace:
    if not trace.head.any():
        return trace
    return trace.with_(
        note=f"{trace.head.sum()} requests for a task head decode {HEADLESS_OUTPUT} tokens instead (--no-head)",
        output_tokens=np.where(trace.head, HEADLESS_OUTPUT, trace.output_tokens),
        head=np.zeros(len(trace), bool),
    )


def _repeat_images(trace: Trace, rng: np.random.Generator, image_tokens: int, share: float) -> Trace:
    if trace.prefix is not None:
        raise TraceError(f"{trace.source}: --repeat-images: the trace has prefixes of its own; leave the option out")
    with_images = np.flatnonzero(trace.images > 0)
    m = len(with_images)
    if m == 0:
        raise TraceError(f"{trace.source}: --repeat-images: no request has an image; try --workload retrieval")
    repeats = rng.random(m) < share
    repeats[0] = False
    place = np.arange(m)
    back = 1 + (rng.random(m) * np.minimum(np.maximum(place, 1), RECENT)).astype(np.int64)
    origin = np.where(repeats, place - back, place)
    while (origin != origin[origin]).any():  # follow repeats of repeats to the first showing; halves the chains
        origin = origin[origin]
    prefix: list[tuple[tuple[int, int], ...]] = [()] * len(trace)
    shown: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
    for i, first, count in zip(with_images.tolist(), origin.tolist(), trace.images[with_images].tolist(), strict=True):
        if (first, count) not in shown:
            shown[first, count] = tuple(((first << 16) + k, image_tokens) for k in range(count))
        prefix[i] = shown[first, count]
    note = f"{repeats.sum()} of {m} requests with images repeat those of one of the {RECENT} before"
    return trace.with_(note=note, prefix=tuple(prefix))


def _leading(segments: tuple[tuple[int, int], ...], tokens: int) -> tuple[tuple[int, int], ...]:
    """The segments that lie within the first `tokens` tokens, the last one cut.

    A cut segment keeps its key: who shares it has to look at its length too, as the prefix cache does.
    """
    kept = []
    for key, length in segments:
        if tokens <= 0:
            break
        kept.append((key, min(length, tokens)))
        tokens -= length
    return tuple(kept)
