"""Files of nothing but token ids: those of nanoGPT, of llm.c, and Megatron's .bin with its .idx.

    nanoGPT     ids, in a dtype that the file does not tell
    llm.c       256 int32 numbers, of which the first names the dtype and the third the number of ids; then ids
    Megatron    ids; beside it in X.idx: b"MMIDIDX\\0\\0", version (uint64, 1), dtype (uint8, see MEGATRON_DTYPES),
                S sequences and D + 1 bounds of documents (uint64 both), then the lengths of the sequences (S int32),
                where they start in bytes (S int64), and the bounds as numbers of sequences (D + 1 int64)

Sources: data/openwebtext/prepare.py of nanoGPT, dev/data/data_common.py of llm.c, and
megatron/core/datasets/indexed_dataset.py of Megatron-LM.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pdl_kernels.data.batches import Batch, Batches
from pdl_kernels.data.inputs import fingerprint
from pdl_kernels.data.labels import Block, Integers

DTYPES = ("uint16", "uint32", "int32", "int64")
LLM_C_DTYPES = {20240520: "uint16", 20240801: "uint32"}
LLM_C_HEADER = 256 * 4  # bytes
MEGATRON = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
BLOCK_IDS = 2**22  # read at a time


class TokenFile(NamedTuple):
    path: Path
    dtype: str
    offset: int  # bytes before the first id
    ends: Integers | None  # (documents,) where each ends, in ids from the file's start; None: not told

    @property
    def ids(self) -> Any:
        """(n,) the ids, mapped into memory."""
        if self.path.stat().st_size == self.offset:
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset)


class TokenFiles:
    """Each file is one stream: every id but the file's first is predicted from those before it.

    Args:
        paths: .bin files; a file X.idx beside X.bin says what is in it.
        dtype: of the ids, "uint16", "uint32", "int32" or "int64"; where the files tell it, None will do.
        separator: the id that ends a document, such as EOS; it is a target like others. With it, or with an .idx,
            documents are counted apart; without, a file is one.

    Raises:
        ValueError: an unknown or missing dtype; a size that holds no whole number of ids; an .idx that does not fit.
    """

    def __init__(self, paths: Sequence[Path], dtype: str | None = None, separator: int | None = None) -> None:
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; accepted are {', '.join(DTYPES)}")
        if separator is not None and (isinstance(separator, bool) or not isinstance(separator, int) or separator < 0):
            raise ValueError(f"separator is {separator!r}; accepted is the id that ends a document, >= 0")
        self.separator = separator
        self.indices = [_index_of(path) for path in paths]
        self.files = [_open(path, index, dtype) for path, index in zip(paths, self.indices, strict=True)]
        if separator is not None and any(file.ends is not None for file in self.files):
            raise ValueError(
                f"separator is {separator}, and an .idx tells where documents end; accepted is one of them"
            )
        if not len(self):
            raise ValueError(f"{', '.join(map(str, paths))}: there is no token in there; accepted is at least one")

    def __len__(self) -> int:
        return sum(len(file.ids) for file in self.files)

    @property
    def source(self) -> str:
        """What is counted, and a fingerprint of it, so that a checkpoint knows its files."""
        parts = [*(file.path for file in self.files), *(index for index in self.indices if index is not None)]
        return f"{self.describe()}; {len(self):,} ids, fingerprint {fingerprint(parts)}"

    def describe(self) -> str:
        dtypes = " and ".join(dict.fromkeys(file.dtype for file in self.files))
        names = ", ".join(file.path.name for file in self.files[:3]) + (", ..." if len(self.files) > 3 else "")
        if any(file.ends is not None for file in self.files):
            documents = ", documents as its .idx tells"
        else:
            documents = "" if self.separator is None else f", documents end with id {self.separator}"
        return f"{dtypes} tokens of {names}, each file one stream{documents}"

    def blocks(self, skipped: int, whole: bool) -> Batches:
        """The ids after the first `skipped`, some at a time, and how many; with `whole`, no document is cut."""
        for file in self.files:
            ids = file.ids
            start, skipped = min(skipped, len(ids)), max(skipped - len(ids), 0)
            while start < len(ids):
                stop = min(start + BLOCK_IDS, len(ids))
                if whole and stop < len(ids):
                    stop = self._end_of_document(file, ids, stop)
                yield Batch(stop - start, iter([self._block(file, ids, start, stop)]))
                start = stop

    def _end_of_document(self, file: TokenFile, ids: Any, stop: int) -> int:
        """The first end of a document at or after `stop`."""
        if file.ends is not None:
            return int(file.ends[np.searchsorted(file.ends, stop)])
        while self.separator is not None and stop < len(ids):
            found = np.flatnonzero(ids[stop - 1 : stop - 1 + BLOCK_IDS] == self.separator)
            if len(found):
                return stop + int(found[0])
            stop += BLOCK_IDS
        return len(ids)

    def _block(self, file: TokenFile, ids: Any, start: int, stop: int) -> Block:
        first = max(start, 1)  # the file's first id is no target
        part = ids[first:stop].astype(np.int64)
        ends = self._ends(file, ids, start, stop)
        # One length for each document that ends in here; where documents are counted, all of them also begin in here.
        lengths = np.diff(np.concatenate([[first], np.maximum(ends, first)]))
        return Block(part, lengths, lambda index: f"{file.path}: token {first + index}")

    def _ends(self, file: TokenFile, ids: Any, start: int, stop: int) -> Integers:
        """Where documents end in (start, stop]; the end of the file is one, whatever its last id."""
        if file.ends is not None:
            before = np.searchsorted(file.ends, start, "right") if start else 0  # documents without ids may come first
            return file.ends[before : np.searchsorted(file.ends, stop, "right")]
        found: Integers = np.empty(0, np.int64)
        if self.separator is not None:
            found = np.flatnonzero(ids[start:stop] == self.separator) + start + 1
        if stop == len(ids) and (not len(found) or found[-1] < stop):
            found = np.append(found, stop)
        return found


def _index_of(path: Path) -> Path | None:
    index = path.with_suffix(".idx")
    return index if index.exists() else None


def _open(path: Path, index: Path | None, dtype: str | None) -> TokenFile:
    size = path.stat().st_size
    if index is not None:
        return _megatron(path, size, index, dtype)
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(LLM_C_HEADER), np.uint8)
    if len(header) == LLM_C_HEADER and int(header.view("<i4")[0]) in LLM_C_DTYPES:
        return _llm_c(path, size, header.view("<i4"), dtype)
    if dtype is None:
        raise ValueError(
            f"{path} does not tell the dtype of its ids, and --dtype is missing; accepted are {', '.join(DTYPES)}"
        )
    if size % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} has {size:,} bytes, which is no whole number of ids of {dtype}")
    return TokenFile(path, dtype, 0, None)


def _llm_c(path: Path, size: int, header: Any, dtype: str | None) -> TokenFile:
    found = LLM_C_DTYPES[int(header[0])]
    if dtype not in (None, found):
        raise ValueError(f"--dtype is {dtype}, and the header of {path} says {found}")
    expected = LLM_C_HEADER + int(header[2]) * np.dtype(found).itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, and its header says {int(header[2]):,} ids, {expected:,} bytes")
    return TokenFile(path, found, LLM_C_HEADER, None)


def _megatron(path: Path, size: int, index: Path, dtype: str | None) -> TokenFile:
    content = index.read_bytes()
    problem = f"{index} does not fit {path}: "
    if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON):
        raise ValueError(f"{index} is no index of Megatron, which begins with {MEGATRON!r}; without it, pass --dtype")
    _, version, code, sequences, bounds = MEGATRON_HEADER.unpack_from(content)
    if version != 1 or code not in MEGATRON_DTYPES:
        raise ValueError(
            f"{index} has version {version} and dtype {code}; accepted are version 1 and dtypes "
            f"{', '.join(f'{number} ({name})' for number, name in MEGATRON_DTYPES.items())}"
        )
    found = MEGATRON_DTYPES[code]
    if dtype not in (None, found):
        raise ValueError(f"--dtype is {dtype}, and {index} says {found}")
    if len(content) - MEGATRON_HEADER.size < sequences * 12 + bounds * 8:
        raise ValueError(
            f"{index} is cut short: it announces {sequences:,} sequences and {bounds:,} bounds of documents"
        )
    at = MEGATRON_HEADER.size
    lengths = np.frombuffer(content, "<i4", sequences, at).astype(np.int64)
    documents = np.frombuffer(content, "<i8", bounds, at + 12 * sequences)
    ids = int(lengths.sum())
    if (lengths < 0).any():
        raise ValueError(f"{problem}it has a sequence of length {lengths.min()}")
    if ids * np.dtype(found).itemsize != size:
        raise ValueError(f"{problem}it announces {ids:,} ids of {found}, and the file has {size:,} bytes")
    rising = bool((np.diff(documents) >= 0).all())
    if not (bounds and documents[0] == 0 and documents[-1] == sequences and rising):
        raise ValueError(f"{problem}the bounds of its documents do not run from 0 to its {sequences:,} sequences")
    return TokenFile(path, found, 0, np.concatenate([[0], np.cumsum(lengths)])[documents[1:]])
