"""What a measured file says of its origin, and how it is written: whole or not at all.

It knows no measurement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import torch
import triton


def asked(command: str) -> dict[str, str]:
    """Date and command, folders left out of it."""
    words = (Path(word).name if "/" in word else word for word in command.split())
    return {"date": datetime.now(UTC).date().isoformat(), "command": " ".join(words)}


def provenance(command: str) -> dict[str, str]:
    """What was `asked`, of which device and versions. Needs a GPU."""
    return {
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}",
    } | asked(command)


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name when it is complete and on the disk; after an error, nothing has changed."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
