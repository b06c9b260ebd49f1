"""The command-line options of the engine's commands but `fuse`. No torch here: a misspelt option is answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from traces.options import add_trace_arguments, count, names, not_negative, positive, ranks

MODELS = ("llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-7b", "tiny-llava", "tiny-qwen2-vl")
TARGETS = {"attention": ("qkv", "o"), "all": ("qkv", "o", "gate_up", "down")}
ROUTES = ("affinity", "consolidate", "least-outstanding", "round-robin")
"""Routers that processes can follow: dLoRA's moves waiting requests from one replica to another."""
DTYPES = ("bfloat16", "float16", "float32")
EXIT_TIME = 75
"""Exit code of `campaign`, `fuse` and `profile` when their time was up and the same command goes on."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, in which type."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default=MODELS[0], metavar="NAME|DIR",
        help=f"a checkpoint directory, or random weights of {', '.join(MODELS)} (default {MODELS[0]})")  # fmt: skip
    add("--device", help="cuda or cpu (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, help="type of weights and cache (default bfloat16 on a GPU, float32 elsewhere)")
    add("--targets", choices=TARGETS, default="attention", help="linears that adapters may touch (default attention)")
    add("--adapter-dir", metavar="DIR", help="folder with one PEFT folder an adapter, by name (default: random adapters)")


def add_replay_arguments(parser: argparse.ArgumentParser, policies: Iterable[str], closed_loop: int = 0) -> None:
    """Options of `replay`: the simulator's for traces, policies and output, and the engine's own."""
    add = parser.add_argument
    add("--policy", default="valora", metavar="NAME[,NAME...]", help="one, or several in turn: " + ", ".join(policies))
    add("--policy-option", action="append", default=[], metavar="[POLICY.]KEY=VALUE",
        help="a parameter of a policy, e.g. valora.theta_s=2; may be repeated")  # fmt: skip
    add_trace_arguments(parser)
    add_model_arguments(parser)
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add("--profile", metavar="FILE", help="latency profile that policies predict with (default: the model's)")
    add("--operator", metavar="NAME", help="LoRA operator for every policy (default: each policy's own)")
    add("--memory-share", type=positive, default=1.0, metavar="F", help="share of the free memory to use (default 1)")
    add("--adapter-memory", type=positive, metavar="GIB",
        help="memory of the adapters (default: what all of them need, up to a quarter of the free memory)")  # fmt: skip
    add("--pin", type=names, default=(), metavar="NAME[,NAME...]", help="adapters that are there from the start and stay")
    add("--closed-loop", type=count, default=closed_loop, metavar="N",
        help="N requests in flight, one arrives when one ends"
        + (f" (default {closed_loop})" if closed_loop else " (default: they arrive by the trace)"))  # fmt: skip
    add("--drain", type=not_negative, metavar="S",
        help="end the run S seconds after the last arrival (default: when every request has ended)")  # fmt: skip
    add("--router", choices=ROUTES, default="least-outstanding",
        help="which process a request goes to, under torchrun (default least-outstanding)")  # fmt: skip
    add("--page-tokens", type=count, default=16, metavar="N", help="KV tokens a page (default 16)")
    add("--max-batch", type=count, default=64, metavar="N", help="requests in one step, MaxBS (default 64)")
    add("--max-batch-tokens", type=count, default=2048, metavar="N", help="tokens in one step (default 2048)")
    add("--max-context", type=count, metavar="N", help="tokens of a request (default: the model's, up to 4096)")
    add("--no-prefix-cache", action="store_true", help="forget prefixes when their request ends")
    add("--no-graphs", action="store_true", help="launch every decode step kernel by kernel")
    add("--warmup", type=count, default=8, metavar="N", help="requests served before the clock starts (default 8)")
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="SLOs, e.g. ttft:200 tpot:50; fills request_goodput")
    add("--per-adapter", action="store_true", help="a table by adapter as well")
    add("--output", metavar="DIR", help="write requests, steps, summary and a Perfetto trace there")
    add("--overwrite", action="store_true", help="replace results that --output finds there")
    add("--progress", choices=("auto", "off"), default="auto", help="progress on stderr (default: on a terminal)")
    add("--check-invariants", action="store_true", help="prove the books after every step (slower)")


def add_baseline_arguments(parser: argparse.ArgumentParser, policies: Iterable[str]) -> None:
    """Options of `baseline`: those of `replay`, in a closed loop."""
    add_replay_arguments(parser, policies, closed_loop=32)
    parser.add_argument("--baseline-steps", type=count, default=12, metavar="N",
                        help="decode steps of transformers + PEFT that are timed (default 12)")  # fmt: skip


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    add = parser.add_argument
    add("prompt", nargs="?", help="the question; needs the tokenizer of a checkpoint")
    add("--ids", metavar="N,N,...", help="token ids instead of a prompt; each image token stands for one whole image")
    add("--image", action="append", default=[], metavar="FILE", help="an image file; may be repeated")
    add("--adapter", metavar="NAME", help="adapter of --adapter-dir to answer with")
    add("--head", action="store_true", help="let the adapter's vision task head answer")
    add("--max-tokens", type=count, default=128, metavar="N", help="tokens of the answer at most (default 128)")
    add("--seed", type=count, default=0, metavar="N", help="seed of random weights (default 0)")
    add_model_arguments(parser)


def add_make_adapters_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `make-adapters`."""
    add = parser.add_argument
    add("--model", default=MODELS[0], choices=MODELS, help=f"model that they fit (default {MODELS[0]})")
    add("--out", required=True, metavar="DIR", help="folder to write them into")
    add("--adapters", type=count, default=16, metavar="N", help="how many (default 16); named as `replay` asks for them")
    add("--ranks", type=ranks, default=(64,), metavar="R,R,...", help="ranks they cycle over (default 64)")
    add("--targets", choices=TARGETS, default="attention", help="linears that they touch (default attention)")
    add("--head-classes", type=count, default=0, metavar="N", help="give each a task head with N classes")
    add("--head-queries", type=count, default=0, metavar="N", help="make the head a detector with N queries")
    add("--seed", type=count, default=0, metavar="N", help="seed (default 0)")


def add_campaign_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `campaign`."""
    add = parser.add_argument
    add("file", metavar="FILE.yaml", help="the replays (engine/campaign_file.py has the format), or the name of a campaign "
        "that ships")  # fmt: skip
    add("--traces", metavar="DIR", help="folder of the trace files that it names")
    add("--output", metavar="DIR", help="one results directory a replay; what is there is not run again")
    add("--only", metavar="PATTERN[,...]", help="replays, or replay/policy, by shell patterns, e.g. 'retrieval*,*/valora'")
    add("--stop-after", type=positive, metavar="SECONDS", help="begin no cell that may end later, to go on in another call")
    add("--dry-run", action="store_true", help="print the cells and how long each will take, by the profile; run nothing")
    add("--overwrite", action="store_true", help="replace records of other options that --output holds")
    add("--progress", choices=("auto", "off"), default="auto", help="progress on stderr (default: on a terminal)")


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `profile`."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--out", required=True, metavar="FILE", help="the profile, by custom sim/profiles/GPU-MODEL.json; its rows beside")
    add("--parts", metavar="NAME,...", help="some of linear, prefill, attention, vision, switch, load, host, lora, ranks, "
        "check (default all)")  # fmt: skip
    add("--operators", metavar="NAME,...", help="some of atmm, slora, punica, dlora, vllm (default all)")
    add("--ranks", type=ranks, default=(64, 16, 128), metavar="R,R,...", help="ranks of adapters; all else is timed with "
        "the first (default 64,16,128)")  # fmt: skip
    add("--adapters", type=count, default=16, metavar="N", help="adapters of the engine (default 16)")
    add("--quick", action="store_true", help="fewer points, the first rank only")
    add("--max-seconds", type=positive, metavar="S", help="begin no measurement after S seconds; run again to go on")
    add("--max-batch", type=count, default=64, metavar="N", help="requests in one step, as in replay (default 64)")
    add("--max-batch-tokens", type=count, default=2048, metavar="N", help="tokens in one step, as in replay (default 2048)")
    add("--max-context", type=count, metavar="N", help="tokens of a request (default: the model's, up to 4096)")
    add("--memory-share", type=positive, default=1.0, metavar="F", help="share of the free memory to use (default 1)")
    add("--profile", metavar="FILE", help="latency profile that policies predict with meanwhile (default: the model's)")
    add("--host-seconds", type=positive, default=3.0, metavar="S", help="length of a replay that times the host (default 3)")
    add("--seed", type=count, default=0, metavar="N", help="seed of random weights (default 0)")
    add("--overwrite", action="store_true", help="forget the rows that are there")
