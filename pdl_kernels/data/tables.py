"""Reads tables by Hugging Face `datasets`: csv, parquet, arrow, folders that it saved, and names on the hub.

Each file is opened on its own: given several, `datasets` would cast all of them to the types of the first one, and its
errors would name none. Nothing is converted on disk: arrow files and saved folders are mapped into memory, everything
else is streamed, because `load_dataset` otherwise writes each corpus a second time below the user's home folder. It
also asks the network about local files, which the readers used here do not.
"""

from __future__ import annotations

import collections
import csv
import io
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pdl_kernels.data import batches
from pdl_kernels.data.contents import STRINGS, Content, held_by_type, missing_column
from pdl_kernels.data.inputs import Input
from pdl_kernels.data.lines import numbered_lines
from pdl_kernels.errors import first_line

BATCH_IDS = 2**22  # label ids read at a time: 32 MiB as int64
LARGEST_BATCH = 2**16  # rows
TEXT_BATCH = 1000  # texts counted at a time
ROWS_READ = 64  # of a table, which may be long


def _datasets() -> Any:
    import datasets

    # It logs each error that it raises; users read those errors with the name of the file.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


class TableFiles(ABC):
    """Rows of tables."""

    problem = "cannot be read"  # what a message says of a file whose reading failed
    batch_size = TEXT_BATCH  # rows to read at a time

    def __init__(self, files: Sequence[Any]) -> None:
        self.files = files

    @abstractmethod
    def open(self, file: Any, columns: Sequence[str]) -> Any:
        """A data set of `datasets` with these columns."""

    @abstractmethod
    def schema(self, file: Any) -> Any:
        """The names and arrow types of a file's columns; None where it has no rows."""

    def contents(self, file: Any) -> Mapping[str, Content] | None:
        """The columns of a file and what they hold; None where it has no rows."""
        with _damage_named(self, file):
            schema = self.schema(file)
        if schema is None:
            return None
        return {field.name: Content(self.held_by(field.type), str(file)) for field in schema}

    def held_by(self, kind: Any) -> str:
        return held_by_type(kind)

    def records(self, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """The rows, each with these of its columns; a file need not have the `optional` ones."""
        for file in self.files:
            yield from self._rows_of(file, self._present(file, columns, optional))

    def _present(self, file: Any, columns: Sequence[str], optional: Sequence[str]) -> list[str]:
        there = self.contents(file) or {}
        for column in columns if there else ():
            if column not in there:
                raise ValueError(missing_column(str(file), column, list(there)))
        return [column for column in (*columns, *optional) if column in there]

    def _rows_of(self, file: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Decoded by `datasets`, which keeps what arrow has no type for, such as contents of several kinds, as JSON."""
        if not columns:
            return
        with _damage_named(self, file):
            for batch in self.open(file, columns).select_columns(list(columns)).iter(ROWS_READ):
                for values in zip(*(batch[column] for column in columns), strict=True):
                    yield dict(zip(columns, values, strict=True))

    def tables(self, file: Any, columns: Sequence[str], skipped: int, batch_size: int) -> Iterator[Any]:
        """The columns as arrow tables, from the row after the first `skipped` on."""
        return batches.arrow_tables(self.open(file, columns), columns, skipped, batch_size)

    def place(self, row: int) -> str:
        """Where a row stands, for a message."""
        for file in self.files:
            rows = sum(1 for _ in self._rows_of(file, [next(iter(self.contents(file) or {}))]))
            if row < rows:
                return f"{file}, row {row}"
            row -= rows
        raise IndexError(row)


class SizedTables(TableFiles):
    """Files that tell how many rows they have before they are read."""

    @abstractmethod
    def rows(self, file: Any) -> int:
        """The number of rows in a file."""

    @abstractmethod
    def ids(self, file: Any, column: str) -> int:
        """About how many ids a column of labels holds."""

    def __len__(self) -> int:
        return sum(self.rows(file) for file in self.files)

    def label_batch_size(self, column: str) -> int:
        """Few passes over the vocabulary where rows are short, bounded memory where they are long."""
        ids = sum(self.ids(file, column) for file in self.files)
        return min(max(BATCH_IDS * len(self) // max(ids, 1), 1), LARGEST_BATCH)

    def arrow_tables(self, column: str, skipped: int, batch_size: int) -> Iterator[Any]:
        """The labels of the rows after the first `skipped`; files before them are not read."""
        for file in self.files:
            rows = self.rows(file)
            if skipped < rows:
                with _damage_named(self, file):
                    yield from self.tables(file, [column], skipped, batch_size)
            skipped = max(skipped - rows, 0)

    def place(self, row: int) -> str:
        """Where a row stands, for a message."""
        sizes = [self.rows(file) for file in self.files]
        ends = np.cumsum(sizes)
        which = int(np.searchsorted(ends, row, side="right"))
        return f"{self.files[which]}, row {row - int(ends[which]) + sizes[which]}"


class ArrowFiles(SizedTables):
    """Files of arrow's stream format, which `datasets` writes, or of its file format; both mapped into memory."""

    problem = "is damaged or no arrow file"

    def open(self, file: Path, columns: Sequence[str] = ()) -> Any:
        with open(file, "rb") as start:
            if start.read(6) == b"ARROW1":  # the file format, which `datasets` does not open by itself
                import pyarrow as pa

                return _datasets().Dataset(pa.ipc.open_file(pa.memory_map(str(file))).read_all())
        return _datasets().Dataset.from_file(str(file))

    def schema(self, file: Path) -> Any:
        dataset = self.open(file)
        return dataset.features.arrow_schema if len(dataset) else None

    def rows(self, file: Path) -> int:
        return len(self.open(file))

    def ids(self, file: Path, column: str) -> int:
        return int(self.open(file).data.column(column).nbytes) // 4


class SavedFolders(ArrowFiles):
    """Folders that `Dataset.save_to_disk` made."""

    problem = "is damaged or no saved data set"

    def open(self, file: Path, columns: Sequence[str] = ()) -> Any:
        return _datasets().load_from_disk(str(file))


class ParquetFiles(SizedTables):
    """Parquet files, streamed."""

    problem = "is damaged or no parquet file"

    def metadata(self, file: Path) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(file)

    def schema(self, file: Path) -> Any:
        metadata = self.metadata(file)
        return metadata.schema.to_arrow_schema() if metadata.num_rows else None

    def rows(self, file: Path) -> int:
        return int(self.metadata(file).num_rows)

    def ids(self, file: Path, column: str) -> int:
        metadata = self.metadata(file)
        leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
        leaf = next((leaf for leaf, path in enumerate(leaves) if path.startswith(f"{column}.")), None)
        if leaf is None:  # no rows, and not even the column
            return 0
        return sum(metadata.row_group(group).column(leaf).num_values for group in range(metadata.num_row_groups))

    def open(self, file: Path, columns: Sequence[str], batch_size: int = TEXT_BATCH) -> Any:
        import pyarrow as pa

        datasets = _datasets()
        # Without `features` it refuses a file in which any column has a type that it lacks, such as a map.
        schema = self.metadata(file).schema.to_arrow_schema()
        kinds = [schema.field(column).type for column in columns]
        kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
        kinds = [pa.string() if pa.types.is_string_view(kind) else kind for kind in kinds]
        chosen = pa.schema(list(zip(columns, kinds, strict=True)), metadata=schema.metadata)
        features = datasets.Features.from_arrow_schema(chosen)
        # Opening writes a lock to the cache, and nothing else; reading does without it.
        with tempfile.TemporaryDirectory() as cache:
            return datasets.IterableDataset.from_parquet(
                str(file), columns=list(columns), features=features, batch_size=batch_size, cache_dir=cache
            )

    def tables(self, file: Path, columns: Sequence[str], skipped: int, batch_size: int) -> Iterator[Any]:
        """Row groups that are skipped are not read."""
        metadata = self.metadata(file)
        first = 0
        while skipped and skipped >= metadata.row_group(first).num_rows:
            skipped -= metadata.row_group(first).num_rows
            first += 1
        dataset = self.open(file, columns, batch_size)
        groups = dataset.reshard() if first else dataset  # one shard for each row group, or one for the file
        for group in range(first, groups.num_shards):
            part = groups.shard(groups.num_shards, group)
            yield from batches.arrow_tables(part, columns, skipped, batch_size)
            skipped = 0


class CsvFiles(TableFiles):
    """Rows of csv files, whose values are texts as they stand there: nothing is taken for a number or for null."""

    problem = "is damaged or no csv file"

    def open(self, file: Path, columns: Sequence[str]) -> Any:
        datasets = _datasets()
        return self._read(file, features=datasets.Features({column: datasets.Value("string") for column in columns}))

    def schema(self, file: Path) -> Any:
        with Input(file).opened() as stream:
            rows = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline=""))
            header, first = next(rows, []), next(rows, [])
        if len(first) > len(header) > 0:  # pandas would take the first field for an index
            raise ValueError(f"its header has {len(header)} fields, and the row after it {len(first)}")
        return _first_schema(self._read(file, nrows=1))

    def held_by(self, kind: Any) -> str:
        return STRINGS

    def _read(self, file: Path, **options: Any) -> Any:
        with tempfile.TemporaryDirectory() as cache:
            return _datasets().IterableDataset.from_csv(str(file), keep_default_na=False, cache_dir=cache, **options)


class HubDataset(TableFiles):
    """One split of a data set on the Hugging Face hub, streamed."""

    problem = "could not be read from the Hugging Face hub"

    def __init__(self, repository: str, configuration: str | None, split: str) -> None:
        import huggingface_hub

        name = ":".join(part for part in (repository, configuration, split) if part is not None)
        super().__init__([name])
        datasets = _datasets()
        try:
            # All rows come from the commit that `source` names, by which resumed work notices another one.
            commit = huggingface_hub.HfApi().dataset_info(repository).sha
            self.dataset = datasets.load_dataset(
                repository, configuration, split=split, revision=commit, streaming=True
            )
        except Exception as error:  # the libraries raise errors of many kinds
            raise ValueError(
                f"there is no file {name}, and the Hugging Face hub did not give a data set ({first_line(error)}); "
                "accepted on the hub are OWNER/NAME:SPLIT and OWNER/NAME:CONFIG:SPLIT"
            ) from None
        self.source = f"data set {name} on the Hugging Face hub, commit {commit}"

    def open(self, file: str, columns: Sequence[str] = ()) -> Any:
        return self.dataset

    def schema(self, file: str) -> Any:
        return _first_schema(self.dataset)

    def arrow_tables(self, column: str, skipped: int, batch_size: int) -> Iterator[Any]:
        with _damage_named(self, self.files[0]):
            yield from self.tables(self.files[0], [column], skipped, batch_size)

    def place(self, row: int) -> str:
        return f"{self.files[0]}, row {row}"


def saved_files(folder: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` made. ValueError: another folder, or one of several splits."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent for path in folder.glob("*/state.json"))
        raise ValueError(f"{folder} holds several splits; accepted is one of {', '.join(map(str, splits))}")
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"{folder} is a folder; accepted are files, such as {folder}/*.jsonl, and folders made by save_to_disk"
        )
    return sorted(path for path in folder.iterdir() if path.is_file())


@contextmanager
def _damage_named(reader: TableFiles, file: Any) -> Iterator[None]:
    """Errors of the reading libraries, with the name of the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        if isinstance(reader, CsvFiles):
            collections.deque(numbered_lines(Input(file)), maxlen=0)  # raises at the line
        raise ValueError(f"{file} is no UTF-8 ({error.reason}); accepted is UTF-8") from None
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, and not what is on it
            raise
        raise ValueError(f"{file} {reader.problem} ({first_line(error)})") from None


def _first_schema(dataset: Any) -> Any:
    return next((table.schema for table in dataset.with_format("arrow").iter(1)), None)
