"""Rows of a Hugging Face dataset saved on this disk: a folder of Parquet or Arrow files, with or without split folders.

Read with pyarrow alone: the columns have the names of a JSONL row, images are the library's struct of bytes and path. Bytes
are written once into `images/` beside the files, named by their hash, so that an example is paths whatever it came from.
A folder train/, test/, validation/ gives its rows the split of that name. It runs no loading script and fetches nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

MAX_IMAGE_BYTES = 64 << 20
SPLIT_OF = {"train": "train", "validation": "decide", "valid": "decide", "dev": "decide", "decide": "decide",
            "test": "heldout", "heldout": "heldout"}  # fmt: skip


def rows_of_folder(folder: Path, root: Path) -> Iterator[tuple[int, dict]]:
    """(number, row) of every file below `folder`, in the order of names. DomainError for unreadable files and images."""
    import pyarrow as pa

    from engine.fusion.domains import DomainError

    files = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".arrow") and path.is_file())
    if not files:
        raise DomainError(f"{folder}: holds no .parquet or .arrow file; save the dataset with save_to_disk or to_parquet")
    number = 0
    for path in files:
        if not path.resolve().is_relative_to(root.resolve()):
            raise DomainError(f"{path}: leads out of {root}; links out of the YAML's folder are not followed")
        split = next((SPLIT_OF[part] for part in reversed(_parts(path, folder)) if part in SPLIT_OF), None)
        try:
            for batch in _batches(path):
                for raw in batch.to_pylist():
                    number += 1
                    row = {key: value for key, value in raw.items() if value is not None}
                    yield number, _with_paths(f"{path}: row {number}", row, folder) | ({"split": split} if split else {})
        except (OSError, pa.ArrowException) as error:
            raise DomainError(f"{path}: cannot be read ({str(error)[:200]})") from None


def _parts(path: Path, folder: Path) -> list[str]:
    return [*path.relative_to(folder).parent.parts, path.stem.split("-")[0]]


def _batches(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(256)
        return
    with pa.memory_map(str(path)) as source:
        yield from pa.ipc.open_stream(source)


def _with_paths(where: str, row: dict, folder: Path) -> dict:
    if isinstance(row.get("image"), dict):
        row["image"] = _extracted(where, row["image"], folder)
    if isinstance(row.get("frames"), list):
        row["frames"] = [_extracted(where, f, folder) if isinstance(f, dict) else f for f in row["frames"]]
    return row


def _extracted(where: str, image: dict, folder: Path) -> str:
    """The path, relative to `folder`, of an image given as {bytes, path}."""
    from engine.fusion.domains import DomainError

    content = image.get("bytes")
    if content is None:
        return image.get("path")
    if not isinstance(content, bytes) or len(content) > MAX_IMAGE_BYTES:
        raise DomainError(f"{where}: an image of {len(content)} bytes; at most {MAX_IMAGE_BYTES}")
    target = folder / "images" / f"{hashlib.sha256(content).hexdigest()[:32]}.img"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    return f"images/{target.name}"
