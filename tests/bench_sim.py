"""How fast the simulator is: whole processes and the replay loop alone. Prints figures; asserts nothing.

    python tests/bench_sim.py [--trace AzureLLMInferenceTrace_conv.csv] [--runs 5] [--week]

Without --trace it uses ../shared/traces/azure's conv trace if it is there, else a synthetic one of the same length. --week
adds a synthetic LMM week of a million requests, against 20,000 requests of the same kind. Each figure is the median of the
runs with the fastest in brackets; peak memory is the process's largest resident set.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONV = ROOT.parent / "shared/traces/azure/AzureLLMInferenceTrace_conv.csv"


def run(*arguments: str) -> tuple[float, float, float]:
    """(process seconds, replay seconds, peak MB) of one `python -m sim`."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "sim", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"python -m sim {' '.join(arguments)} failed: {errors}")
    replay = float(re.search(r"replayed ([\d.]+) s", errors).group(1))
    return time.perf_counter() - start, replay, usage.ru_maxrss / 1024


def report(label: str, requests: int, runs: int, *arguments: str) -> float:
    """Print one line; the median replay seconds per request."""
    processes, replays, memory = zip(*(run(*arguments) for _ in range(runs)), strict=True)
    per_request = statistics.median(replays) / requests
    process, replay = (f"{statistics.median(times):6.2f} s ({min(times):.2f})" for times in (processes, replays))
    each = f"{per_request * 1e6:5.1f} us/request"
    print(f"{label:<44} process {process}  replay {replay}  {each}  {max(memory):4.0f} MB", flush=True)
    return per_request


def synth(kind: str, requests: int, folder: str) -> str:
    path = f"{folder}/{kind}-{requests}.csv"
    command = [sys.executable, "-m", "traces", "synth", kind, "--requests", str(requests), "--seed", "1", "--output", path]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default=str(CONV) if CONV.exists() else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--policies", default="valora,slora,dlora,punica,merged-only")
    parser.add_argument("--week", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = args.trace or synth("conv", 19_366, folder)
        requests = sum(1 for line in Path(trace).read_bytes().splitlines() if line) - 1
        for policy in args.policies.split(","):
            report(f"{Path(trace).stem}, {policy}", requests, args.runs, "--policy", policy, "--trace", trace)
        if args.week:
            small, large = synth("lmm", 20_000, folder), synth("lmm", 1_000_000, folder)
            few = report("lmm, 20,000 requests, valora", 20_000, args.runs, "--trace", small, "--model", "qwen2-vl-7b")
            many = report("lmm, 1,000,000 requests, valora", 1_000_000, 1, "--trace", large, "--model", "qwen2-vl-7b")
            print(f"time per request, 1,000,000 against 20,000: {many / few:.2f}x")


if __name__ == "__main__":
    main()
