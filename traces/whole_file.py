"""Files that are there whole or as they were before: written beside their place, brought to the disk, and renamed.

It knows bytes and texts. Folders of results (`result_files`) and traces of any length (`writers`) have ways of their own.
"""

from __future__ import annotations

import os
from pathlib import Path


def replace_bytes(path: Path, content: bytes) -> Path:
    """Write a file in one piece, in a folder that exists; its path."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def replace_text(path: Path, text: str) -> Path:
    """`replace_bytes` of a text in UTF-8."""
    return replace_bytes(path, text.encode())
