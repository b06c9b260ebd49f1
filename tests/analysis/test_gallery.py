"""The README's gallery: its pictures are there with their numbers, and its commands are those that drew them."""

import re
import shlex
from pathlib import Path

import pytest

from analysis.__main__ import build_parser as analysis_parser
from sim.__main__ import build_parser as sim_parser
from sim.capacity import build_parser as capacity_parser
from sim.sweep import build_parser as sweep_parser
from sim.sweep import instead

ROOT = Path(__file__).resolve().parents[2]
GALLERY = ROOT / "analysis" / "gallery"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ("llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-7b")
PICTURES = re.findall(r"!\[[^]]+\]\((analysis/gallery/[^)]+)\)", README)


def commands(text: str) -> list[str]:
    """Its `python -m` lines, continued ones joined, with the folder and the profile that make.sh has by default; those of a
    loop over models for each."""
    text = text.replace("\\\n", " ").replace("$out", "results/gallery").replace("$profile", "h200")
    found = [" ".join(line.split()) for line in text.splitlines() if line.strip().startswith("python -m ")]
    models = [line.replace("$model", model) for line in found if "$model" in line for model in MODELS]
    return [line for line in found if "$model" not in line] + models


MADE = commands((GALLERY / "make.sh").read_text(encoding="utf-8"))
SHOWN = commands(README.partition("## Gallery")[2].partition("\n## ")[0])


def test_pictures_are_small_and_have_their_numbers_beside_them():
    assert len(PICTURES) == 6
    for picture in PICTURES:
        path = ROOT / picture
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000, picture
        assert len(path.with_suffix(".csv").read_text(encoding="utf-8").splitlines()) > 3, picture
        assert "/" not in path.with_suffix(".csv").read_text(encoding="utf-8").splitlines()[0]


def test_the_commands_shown_are_those_that_drew_the_pictures():
    assert len(SHOWN) == 16
    assert set(SHOWN) <= set(MADE)
    report = set(MADE) - set(SHOWN)
    assert [line.split()[:4] for line in report] == [["python", "-m", "analysis", "report"]], "make.sh adds a report alone"


@pytest.mark.parametrize("command", MADE, ids=lambda command: " ".join(command.split()[2:5]))
def test_every_option_exists(command):
    """They take minutes; that each would be understood is proved here."""
    _, _, module, *words = shlex.split(command)
    if module == "analysis":
        args = analysis_parser().parse_args(words)
        assert args.command in ("figures", "report")
    elif words[0] == "sweep":
        args = sweep_parser().parse_args(words[1:])
        assert (ROOT / args.grid).exists()
        assert set(instead(args)) >= {"trace", "profile"}
    elif words[0] == "capacity":
        assert capacity_parser().parse_args(words[1:]).gpus == (1, 4)
    elif module == "sim" and words[0].startswith("-"):
        assert sim_parser().parse_args(words).policy == "valora,dlora,cost-aware"
    else:
        assert [module, words[0]] in (["traces", "synth"], ["sim", "extrapolate"])
