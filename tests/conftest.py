"""What every test shares: Hypothesis draws the same examples each time, GPU tests are skipped where there is no GPU, and a
latency profile so small that a test can count in it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from hypothesis import HealthCheck, settings

from policies.profile import Profile

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None,
                          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
settings.load_profile("deterministic")


PAGE_BYTES = 64
OPERATORS = ("atmm", "dlora", "slora", "punica", "vllm")


def _profile(pool_pages: int = 1000, **changes) -> Profile:
    """Times in the tens of microseconds; attention with several segments; KV 16 bytes a token, 4 tokens a page of 64."""
    attention = {
        1: [(0.0, 0.0), (7.0, 3.3), (20.0, 4.1), (60.0, 19.7)],
        4: [(0.0, 1.0), (13.0, 5.9), (40.0, 11.2)],
        16: [(0.0, 2.0), (10.0, 9.0), (100.0, 77.7)],
    }
    lora = {
        operator: {
            phase: {
                8: {1: [(1.0, 2.0 + i), (64.0, 5.0 + i)], 4: [(1.0, 3.0 + i), (64.0, 9.0 + i)]},
                16: {1: [(1.0, 3.0 + i), (64.0, 8.0 + i)], 4: [(1.0, 4.5 + i), (64.0, 16.0 + i)]},
            }
            for phase in ("decode", "prefill")
        } | {"pads": operator in ("vllm", "dlora")}
        for i, operator in enumerate(OPERATORS)
    }
    values = {
        "name": "tiny", "kind": "analytic", "sha256": "0" * 64, "provenance": {"made_by": "a test"}, "model": "tiny",
        "max_context": 4096, "image_tokens": 6, "video_images": 3, "kv_bytes_per_token": 16,
        "adapter_bytes_per_rank": 16, "weights_bytes": 100, "golden_bytes": 0, "reserve_bytes": 0,
        "device_bytes": 100 + pool_pages * PAGE_BYTES, "linear": [(1.0, 20.0), (8.0, 21.5), (64.0, 40.0)],
        "decode_attention": attention,
        "prefill_attention": {0: [(1.0, 0.1), (64.0, 9.0)], 32: [(1.0, 0.7), (64.0, 21.3)]},
        "vision": [(1.0, 12.0), (8.0, 31.0)], "output": [(1.0, 1.3), (16.0, 2.9)], "lora": lora,
        "switch": {"fused": [(8.0, 15.0), (16.0, 18.0)], "addmm": [(8.0, 40.0)]}, "load_gb_per_s": 0.003,
        "load_latency_us": 10.0, "host_step_us": 1.7, "host_request_us": 0.23,
    }  # fmt: skip
    return Profile(**(values | changes))


@pytest.fixture(scope="session")
def tiny_profile():
    """Function: (pool_pages, **fields to change) -> Profile, with pages of 4 tokens; an adapter takes rank / 4 pages."""
    return _profile


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """With pytest-xdist a process gets neighbouring tests, and makes what those of a module share once; who has done its own
    takes the last of another's."""
    if getattr(config.option, "dist", "no") == "load":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config, items):
    """Skip what is marked `gpu` where CUDA is absent (torch is only imported if such a test was collected), and what is
    marked `long` unless it is asked for."""
    _skip(items, "gpu", "needs a CUDA GPU", _has_gpu)
    _skip(items, "long", "takes minutes; run it with -m long", lambda: "long" in config.getoption("-m"))


def _skip(items, name, reason, unless):
    marked = [item for item in items if item.get_closest_marker(name)]
    if marked and not unless():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session):
    """Let Triton's interpreter, where kernels need one, prepare its language once a launch and not again for each call of a
    function within, which takes most of the time of a kernel of many functions."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    language = interpreter.tl
    modules = (language, language.core)

    def call(self, *args, **kwargs):
        used = [module for module in modules if any(value is module for value in self.fn.__globals__.values())]
        if any(language.core.is_builtin(module.arange) for module in used):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
