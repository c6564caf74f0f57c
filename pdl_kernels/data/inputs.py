"""Files and standard input as streams of bytes, decompressed, and how much of them was read."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
STANDARD_INPUT = "-"
SAMPLES = 16
SAMPLE_BYTES = 2**16


class Input:
    """A file of lines.

    Args:
        path: the file.
        form: the suffix that says how to read it, such as ".jsonl.gz"; default that of the file's name.
    """

    def __init__(self, path: Path, form: str | None = None) -> None:
        self.path = path
        self.form = suffix_of(path) if form is None else form
        self.raw: Any = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def base(self) -> str:
        """The suffix that tells the format, such as .jsonl of rows.jsonl.gz."""
        return self.form.removesuffix(self.packed)

    @property
    def size(self) -> int | None:
        """Bytes, as they lie on the disk."""
        return self.path.stat().st_size

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The bytes, decompressed. ValueError, which names the file: damaged or cut short."""
        packed = self.packed
        self.raw = self._open()
        try:
            if packed:
                import pyarrow as pa

                yield io.BufferedReader(pa.input_stream(self.raw, compression=COMPRESSION[packed]))
            else:
                yield io.BufferedReader(self.raw) if isinstance(self.raw, io.RawIOBase) else self.raw
        finally:
            self._close()

    def bytes_read(self) -> int:
        """Since it was opened last, of what lies on the disk."""
        return 0 if self.raw is None or self.raw.closed else int(self.raw.tell())

    @property
    def packed(self) -> str:
        """The suffix that tells the compression, or nothing."""
        return next((packed for packed in COMPRESSION if self.form.endswith(packed)), "")

    def _open(self) -> Any:
        return open(self.path, "rb")

    def _close(self) -> None:
        self.raw.close()


class StandardInput(Input):
    """Standard input can be read once: what is read before counting starts is kept and comes again."""

    size = None

    def __init__(self, form: str) -> None:
        super().__init__(Path(STANDARD_INPUT), form)
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        self.source = getattr(sys.stdin, "buffer", sys.stdin)
        self.head = bytearray()
        self.started = False

    def __str__(self) -> str:
        return "standard input"

    def start(self) -> None:
        """What is read from here on is not kept. ValueError: it was read before."""
        if self.started:
            raise ValueError("standard input was read before, and comes once")
        self.started = True

    def _open(self) -> Any:
        return Replayed(self.source, self.head, keep=not self.started)

    def _close(self) -> None:
        pass


class Replayed(io.RawIOBase):
    """Gives the kept bytes again, and then more of the source, which it keeps too if asked."""

    def __init__(self, source: Any, head: bytearray, keep: bool) -> None:
        self.source, self.head, self.keep = source, head, keep
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.position < len(self.head):
            data = bytes(self.head[self.position : self.position + len(buffer)])
        else:
            data = self.source.read1(len(buffer)) if hasattr(self.source, "read1") else self.source.read(len(buffer))
            if self.keep:
                self.head += data
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def tell(self) -> int:
        return self.position


def suffix_of(path: Path) -> str:
    """The suffix that tells the form, with that of the compression: .jsonl, .csv.gz."""
    suffixes = path.suffixes[-2:] if path.suffix.lower() in COMPRESSION else [path.suffix]
    return "".join(suffixes).lower()


def total_size(inputs: Sequence[Input]) -> int | None:
    sizes = [part.size for part in inputs]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def fingerprint(files: Sequence[Path]) -> str:
    """Of the sizes and of samples spread over each file: reading all of a large corpus takes as long as counting it."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as file:
            # Whole where it is small; otherwise the first sample, the last, and others evenly between.
            last = max(size - SAMPLE_BYTES, 0)
            for start in sorted({last * sample // (SAMPLES - 1) for sample in range(SAMPLES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
