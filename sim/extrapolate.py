"""`python -m sim extrapolate h200-llava-1.5-7b --to a100-80gb`: a profile of a GPU that nobody measured, from another's.

Every time is scaled by what bounds it, memory bandwidth or 16-bit matrix throughput, by the ratio of the two GPUs' data
sheets. It says *extrapolated* wherever it is printed. Left out: what the other GPU's kernels do better or worse than the
data sheet says, its caches, and its clock under load; the host's times stay as they were.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from policies.profile import LORA_PHASES, Profile, ProfileError, load_profile
from sim.__main__ import PROFILES, find_profile
from traces.suggest import SuggestingParser, near


class DataSheet(NamedTuple):
    """Of one GPU: bytes of memory, TB/s to it, TFLOP/s of dense bf16, GB/s of the link to the host (one direction)."""

    name: str
    device_bytes: int
    tb_per_s: float
    tflop_per_s: float
    link_gb_per_s: float


SHEETS = {  # NVIDIA's data sheets of the SXM modules; without sparsity
    "h200": DataSheet("NVIDIA H200", 143_771 * 2**20, 4.8, 989.0, 64.0),
    "h100": DataSheet("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 3.35, 989.0, 64.0),
    "a100-80gb": DataSheet("NVIDIA A100-SXM4-80GB", 81_920 * 2**20, 2.039, 312.0, 32.0),
}


def extrapolated(data: dict, profile: Profile, source: DataSheet, target: DataSheet) -> dict:
    """`data`, the parsed file of `profile`, which is of `source`, as it would be on `target`."""
    memory, compute = source.tb_per_s / target.tb_per_s, source.tflop_per_s / target.tflop_per_s
    params = profile.weights_bytes / 2

    def linear(tokens: float) -> float:
        """Read all weights, or multiply them: the longer of both on either GPU."""
        read = profile.weights_bytes / (source.tb_per_s * 1e6)
        multiply = 2 * params * tokens / (source.tflop_per_s * 1e6)
        return max(read * memory, multiply * compute) / max(read, multiply)

    scaled = dict(data)
    for name, ratio in {"linear": linear, "prefill_linear": linear, "vision": lambda _: compute,
                        "output": lambda _: memory}.items():  # fmt: skip
        if data.get(name):
            scaled[name] = _points(data[name], ratio)
    for name, ratio in {"decode_attention": memory, "mixed_attention": memory, "prefill_attention": compute,
                        "switch": memory}.items():  # fmt: skip
        if data.get(name):
            scaled[name] = {key: _points(points, lambda _, ratio=ratio: ratio) for key, points in data[name].items()}
    scaled["lora"] = {operator: _operator(table, memory) for operator, table in data["lora"].items()}
    scaled["load_gb_per_s"] = data["load_gb_per_s"] * min(1.0, target.link_gb_per_s / source.link_gb_per_s)
    scaled["device_bytes"] = target.device_bytes
    scaled["kind"] = "extrapolated"
    scaled.pop("boost", None)  # of that GPU's limit of power
    scaled["provenance"] = {
        "device": f"{target.name} (extrapolated)",
        "made_by": f"python -m sim extrapolate {profile.name}",
        "from": f"{profile.name}, sha256 {profile.sha256}, {profile.kind}, of {data['provenance'].get('device', '?')}",
        "scaled": f"what memory bounds by {memory:.4g}, what arithmetic bounds by {compute:.4g} (data sheets: "
        f"{source.tb_per_s:g} to {target.tb_per_s:g} TB/s, {source.tflop_per_s:g} to {target.tflop_per_s:g} TFLOP/s)",
    }
    return _rounded(scaled)


def _points(points: list, ratio: Callable[[float], float]) -> list:
    return [[x, us * ratio(x)] for x, us in points]


def _operator(table: dict, ratio: float) -> dict:
    """The branch reads and writes rows and factors for few operations a byte: memory bounds it in either phase."""
    return {
        phase: ranks if phase not in LORA_PHASES else {
            rank: {adapters: _points(points, lambda _: ratio) for adapters, points in curves.items()}
            for rank, curves in ranks.items()
        }
        for phase, ranks in table.items()
    }  # fmt: skip


def _rounded(value):
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def sheet_of(profile: Profile) -> DataSheet:
    """The data sheet of the GPU that a profile is of. ProfileError for one that is not known."""
    device = str(profile.provenance.get("device", ""))
    for sheet in SHEETS.values():
        if sheet.name.split()[1].lower() in device.lower():
            return sheet
    known = ", ".join(SHEETS)
    raise ProfileError(f"profile {profile.name}: is of {device!r}, whose data sheet is not known; known are {known}")


def write(path: Path, data: dict) -> None:
    """Write a profile in one piece, after it was read back from where it was prepared."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial.json")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        load_profile(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = SuggestingParser("python -m sim extrapolate", description="Make a profile of a GPU that nobody measured.")
    parser.add_argument("profile", metavar="NAME|FILE", help="a measured or an analytic profile")
    parser.add_argument("--to", default="a100-80gb", metavar="GPU", help=f"one of {', '.join(SHEETS)} (default a100-80gb)")
    parser.add_argument("--out", metavar="FILE", help="where to (default: beside the shipped profiles, as GPU-MODEL.json; "
                        "analytic-GPU-MODEL.json where it comes from an analytic one)")  # fmt: skip
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except (ProfileError, ValueError, OSError) as error:
        parser.error(str(error))


def _is_extrapolated(path: Path) -> bool:
    """Whether a file is a profile that was made here, which may be made anew."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("kind") == "extrapolated"
    except (OSError, ValueError, AttributeError):
        return False


def run(args: argparse.Namespace) -> int:
    """Everything between the command line and the exit code."""
    if args.to not in SHEETS:
        raise ValueError(f"--to {args.to!r}: unknown{near(args.to, SHEETS)}; one of {', '.join(SHEETS)}")
    profile = find_profile(args.profile, "")
    if profile.kind == "extrapolated":
        raise ProfileError(f"profile {profile.name} is extrapolated itself; start from the one that it was made from")
    path = Path(args.profile) if args.profile.endswith(".json") else PROFILES / f"{args.profile}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    prefix = "analytic-" if profile.kind == "analytic" else ""
    out = Path(args.out) if args.out else PROFILES / f"{prefix}{args.to}-{profile.model}.json"
    if out.exists() and not _is_extrapolated(out):
        raise ValueError(f"{out}: is there already and no extrapolated profile; name another file with --out")
    write(out, extrapolated(data, profile, sheet_of(profile), SHEETS[args.to]))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
