"""The README's commands work as they stand: every `python -m` line of a ```sh block is run, in order, in a copy.

`azure.csv`, the reader's own trace, is played by the first requests of the sample that ships. A block that must not run is
marked ```sh no-test; commands that need a GPU (engine, kernels) are left out here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NEEDS_GPU = ("engine", "kernels")
REQUESTS = 200
NOT_HERE = ("venv", "pip", "pytest")  # setting up, and this suite itself


def commands() -> list[str]:
    """The lines to run, continued lines joined."""
    if not README.exists():
        return []
    blocks = re.findall(r"^```sh[ \t]*\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("  #")[0].strip() for line in lines if line.strip().startswith("python -m ")]
    modules = [line.split()[2].split(".")[0] for line in found]
    return [line for line, module in zip(found, modules, strict=True) if module not in (*NEEDS_GPU, *NOT_HERE)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy in which commands may write; real traces stay where they are."""
    if not README.exists():
        pytest.skip("there is no README yet")
    copy = tmp_path_factory.mktemp("fresh") / "project"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "results", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    rows = (ROOT / "traces" / "sample.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "azure.csv").write_text("".join(rows[: 1 + REQUESTS]), encoding="utf-8")
    return copy


def test_commands_in_order(project):
    """One test, since a command reads what an earlier one wrote."""
    environment = os.environ | {"PYTHONPATH": str(project)}
    for command in commands():
        words = shlex.split(command)
        if any(word.startswith("../shared/") and not (ROOT / word).exists() for word in words):
            continue
        words = [str(ROOT / word) if word.startswith("../shared/") else word for word in words]
        done = subprocess.run([sys.executable, *words[1:]], cwd=project, env=environment, capture_output=True, text=True,
                              timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, command
