"""The bytes of a trace file: plain or gzip, hashed as they are read, handed out in chunks of whole lines.

Bounded whatever the file holds: a line, the unpacked size and the gzip ratio have caps. It knows nothing of columns.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from traces.request import TraceError
from traces.suggest import near

CHUNK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 20
MAX_BYTES = 8 << 30
# Deflate reaches 1032:1; traces reach 5 to 20. Small files may do as they like: they cannot hurt.
MAX_RATIO = 300
RATIO_FLOOR_BYTES = 64 << 20

_FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first, or use gzip",
    b"BZh": "bzip2-compressed: unpack it first, or use gzip",
    b"\xfd7zXZ": "xz-compressed: unpack it first, or use gzip",
    b"PAR1": "a Parquet file: export it as CSV",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}


class Source:
    """One open trace file; a context manager. Raises TraceError for anything the file system or gzip may say."""

    def __init__(self, path: str | Path):
        self.name = str(path)
        self._hash = hashlib.sha256()
        self._stored_bytes = 0
        self._bytes = 0
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise TraceError(f"{self.name}: {error.strerror or error}{self._neighbour(path)}") from None
        except ValueError as error:  # a NUL in the name
            raise TraceError(f"{self.name!r}: {error}") from None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_):
        self._file.close()

    @property
    def sha256(self) -> str:
        """Hash of the stored bytes read so far: of the file as it lies on disk, once the chunks are exhausted."""
        return self._hash.hexdigest()

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """(number of the first line, bytes) of successive runs of whole lines, each line ended by a newline."""
        tail, line = b"", 1
        for block in self._blocks():
            joined = tail + block if tail else block
            cut = joined.rfind(b"\n") + 1
            whole, tail = joined[:cut], joined[cut:]
            if whole:
                self._check_lengths(whole, line)
                yield line, whole
                line += whole.count(b"\n")
            if len(tail) > MAX_LINE_BYTES:
                self._too_long(line)
        if tail:
            yield line, tail + b"\n"

    def _blocks(self) -> Iterator[bytes]:
        """The unpacked content, without a byte-order mark, at most CHUNK_BYTES at a time."""
        try:
            head = self._file.read(8)
            stream = io.BufferedReader(_Tap(self, head), CHUNK_BYTES)
            packed = head.startswith(b"\x1f\x8b")
            reader = gzip.GzipFile(fileobj=stream) if packed else stream
            first = reader.read(CHUNK_BYTES)
            for magic, what in _FOREIGN.items():
                if first.startswith(magic):
                    raise TraceError(f"{self.name}: this is {what}")
            block = first.removeprefix(b"\xef\xbb\xbf")
            while block:
                self._bytes += len(block)
                self._check_size(packed)
                yield block
                block = reader.read(CHUNK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TraceError(f"{self.name}: broken gzip after {self._bytes} bytes: {error}") from None
        except OSError as error:
            raise TraceError(f"{self.name}: {error.strerror or error}") from None

    def _check_size(self, packed: bool) -> None:
        if self._bytes > MAX_BYTES:
            raise TraceError(f"{self.name}: more than {MAX_BYTES >> 30} GiB unpacked; split the trace")
        if packed and self._bytes > max(RATIO_FLOOR_BYTES, MAX_RATIO * self._stored_bytes):
            raise TraceError(
                f"{self.name}: {self._bytes} bytes out of {self._stored_bytes} of gzip, over {MAX_RATIO}:1, "
                "is no trace; unpack it yourself if you trust it"
            )

    def _check_lengths(self, whole: bytes, line: int) -> None:
        ends = np.flatnonzero(np.frombuffer(whole, np.uint8) == ord("\n"))
        long = np.flatnonzero(np.diff(ends, prepend=-1) > MAX_LINE_BYTES)
        if len(long):
            self._too_long(line + int(long[0]))

    def _too_long(self, line: int) -> None:
        raise TraceError(f"{self.name}:{line}: a line of more than {MAX_LINE_BYTES} bytes is no row of a trace")

    @staticmethod
    def _neighbour(path: str | Path) -> str:
        try:
            parent = Path(path).parent
            return near(Path(path).name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""
        except OSError:
            return ""


class _Tap(io.RawIOBase):
    """The file's raw bytes, counted and hashed on their way; starts with the `head` already taken from it."""

    def __init__(self, source: Source, head: bytes):
        self._source = source
        self._head = head

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._head or self._source._file.read(len(buffer))
        self._head = b""
        self._source._hash.update(data)
        self._source._stored_bytes += len(data)
        buffer[: len(data)] = data
        return len(data)
