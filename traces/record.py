"""What a run leaves behind: the columns of its results, shared by the simulator, the engine and the analysis.

One `RunResult` is one policy on one trace. Everything in it is an array or a plain number, so that a million requests
cost tens of megabytes. It knows nothing of policies, latencies or files (`result_files`), and judges nothing
(`metrics`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STATUS = ("completed", "aborted", "unservable", "failed")
"""How a request ended; `requests["status"]` holds indices into this tuple.

completed: every token was delivered. aborted: given up by the policy (its SLO could not be met). unservable: larger
than the context of the model or the memory pool. failed: anything else.
"""

MODES = ("base", "unmerged", "merged", "mixture")
"""State of the weights during a step; `steps["mode"]` holds indices into this tuple."""

PLACES = ("linear", "attention", "vision", "lora", "host", "switch")
"""Where the time of a step goes; `steps` has one column `<place>_ns` for each."""

REQUEST_COLUMNS = (
    "id",
    "server",
    "adapter",
    "task",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "generated_tokens",
    "images",
    "arrival_ns",
    "scheduled_ns",
    "first_token_ns",
    "finish_ns",
    "preemptions",
    "status",
)
"""One row per request of the trace, in id order, int64.

adapter: index, -1 the base model | task: index into `traces.request.TASKS` | cached_tokens: of the prompt, served from
the prefix cache | output_tokens: asked for | generated_tokens: delivered | scheduled_ns (first time in a batch),
first_token_ns, finish_ns: -1 where it never happened | status: index into STATUS.
"""

STEP_COLUMNS = (
    "server",
    "start_ns",
    "duration_ns",
    "steps",
    "mode",
    "merged",
    "decodes",
    "prefills",
    "prefill_tokens",
    "images",
    "adapters",
    "context_tokens",
    *(f"{place}_ns" for place in PLACES),
)
"""One row per lease (a run of equal decode steps, or one step with prefill), int64.

steps: forward passes in the lease | merged: index of the adapter in the weights, or -1 | decodes, prefills: requests of
the batch in that phase | adapters: distinct in the batch | the last six, where the time went, sum to duration_ns.
"""


@dataclass
class RunResult:
    """One policy on one trace.

    requests: REQUEST_COLUMNS, arrays of shape (requests,). steps: STEP_COLUMNS, arrays of shape (leases,), or None when
    they were not recorded. itl: inter-token gaps as (value in microseconds, how many times), sorted by value. counters:
    plain numbers by name (switches, adapter_loads, gpus, end_ns ...). time_ns: {"mode": {mode: ns}, "where": {place or
    "idle": ns}}. config: the resolved configuration, JSON-able; its `notes` are sentences for the reader of the result.
    """

    policy: str
    operator: str
    requests: dict[str, np.ndarray]
    steps: dict[str, np.ndarray] | None
    itl: tuple[np.ndarray, np.ndarray]
    counters: dict
    time_ns: dict
    config: dict
