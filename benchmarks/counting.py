"""How fast tokens are counted, and in how much memory.

    python -m benchmarks.counting --output results/counting.json

Ten million targets of a Zipf law in 20,000 sequences of different lengths, counted from a data set on disk, from the
files that `pdl-kernels count` takes (the same folder, and parquet), from numpy rows, from a padded tensor, and from a
data set with document counts. Each way runs in fresh processes; tokens per second are of the counting alone, memory is
the process's peak, with torch and datasets loaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.environment import cpu_name
from benchmarks.results import write_record
from pdl_kernels import TokenCounts
from pdl_kernels.data.corpora import open_corpus

VOCAB_SIZE = 131_072
SEQUENCES = 20_000
Way = Callable[[str], Callable[[], TokenCounts]]  # from the folder of the data to what is timed
MEAN_LENGTH = 500  # tokens; lengths run from 1 to twice this


def make_dataset(folder: str) -> None:
    import datasets

    generator = np.random.default_rng(0)
    probability = 1 / np.arange(1, VOCAB_SIZE + 1)
    lengths = generator.integers(1, 2 * MEAN_LENGTH, SEQUENCES)
    ids = generator.choice(VOCAB_SIZE, lengths.sum(), p=probability / probability.sum()).astype(np.int32)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_dict({"labels": rows})
    dataset.save_to_disk(folder)
    ids.astype(np.uint32).tofile(f"{folder}.bin")
    dataset.to_parquet(parquet_file(folder), batch_size=4000)


def parquet_file(folder: str) -> str:
    return f"{folder}.parquet"


def _load(folder: str):
    import datasets

    return datasets.load_from_disk(folder)


def from_dataset(folder: str) -> Callable[[], TokenCounts]:
    dataset = _load(folder)
    return lambda: TokenCounts.from_dataset(dataset, VOCAB_SIZE, progress=False)


def _from_files(name: str) -> Callable[[], TokenCounts]:
    import datasets  # noqa: F401  # its import is no part of the counting

    corpus = open_corpus([name], "labels")
    return lambda: TokenCounts.from_dataset(
        corpus.rows, VOCAB_SIZE, corpus.reading.column, batch_size=corpus.batch_size, progress=False
    )


def from_saved_folder(folder: str) -> Callable[[], TokenCounts]:
    return _from_files(folder)


def from_parquet_file(folder: str) -> Callable[[], TokenCounts]:
    return _from_files(parquet_file(folder))


def from_dataset_with_documents(folder: str) -> Callable[[], TokenCounts]:
    dataset = _load(folder)
    return lambda: TokenCounts.from_dataset(dataset, VOCAB_SIZE, documents=True, progress=False)


def map_and_numpy(folder: str) -> Callable[[], TokenCounts]:
    """What one would write without this package: `map` of datasets, and numpy in it."""
    import datasets

    datasets.disable_progress_bars()
    dataset = _load(folder)

    def count(batch):
        ids = np.concatenate([row[1:] for row in batch["labels"]])
        return {"counts": [np.bincount(ids[ids != -100], minlength=VOCAB_SIZE)]}

    def run() -> TokenCounts:
        parts = dataset.with_format("numpy").map(
            count, batched=True, remove_columns=["labels"], load_from_cache_file=False, keep_in_memory=True
        )
        counts = TokenCounts(VOCAB_SIZE)
        counts.counts += torch.from_numpy(np.sum(list(parts["counts"]), axis=0))
        return counts

    return run


def from_token_file(folder: str) -> Callable[[], TokenCounts]:
    return lambda: TokenCounts.from_stream(f"{folder}.bin", VOCAB_SIZE, dtype="uint32", progress=False)


def update_rows(folder: str) -> Callable[[], TokenCounts]:
    rows = list(_load(folder).with_format("numpy")["labels"])
    return lambda: TokenCounts(VOCAB_SIZE).update(rows, shift=True)


def update_padded_tensor(folder: str) -> Callable[[], TokenCounts]:
    rows = _load(folder).with_format("torch")["labels"]
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-100)
    return lambda: TokenCounts(VOCAB_SIZE).update(padded, shift=True)


WAYS = (
    from_dataset,
    from_saved_folder,
    from_parquet_file,
    from_token_file,
    map_and_numpy,
    update_rows,
    update_padded_tensor,
    from_dataset_with_documents,
)


def peak_memory() -> int:
    """Bytes. Not getrusage: on Linux its figure includes what the parent held when it started this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def measure(way: Way, folder: str) -> dict[str, float]:
    """In this process, which should be fresh."""
    torch.set_num_threads(1)
    count = way(folder)
    start = time.perf_counter()
    counts = count()
    seconds = time.perf_counter() - start
    checksum = zlib.crc32(counts.counts.numpy().tobytes())
    return {"tokens": counts.total, "seconds": seconds, "peak_bytes": peak_memory(), "checksum": checksum}


def print_table(samples: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':30}{'million tokens/s':>20}{'peak memory':>16}")
    for name, runs in samples.items():
        rate = statistics.median(run["tokens"] / run["seconds"] for run in runs)
        peak = max(run["peak_bytes"] for run in runs)
        print(f"{name:30}{rate / 1e6:>20.2f}{peak / 2**20:>12.0f} MiB")


def environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "machine": cpu_name(),
        "date": time.strftime("%Y-%m-%d"),
    }


def options_of(arguments: Sequence[str] | None, description: str | None, output: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--runs", type=int, default=3, help="fresh processes for each way (default %(default)s)")
    return parser.parse_args(arguments)


def measure_all(ways: Sequence[Way], runs: int, folder: str) -> dict[str, list[dict[str, float]]]:
    """Each way, `runs` times, in turn and in fresh processes."""
    fresh = multiprocessing.get_context("spawn")
    samples: dict[str, list[dict[str, float]]] = {way.__name__: [] for way in ways}
    for way in tqdm([way for _ in range(runs) for way in ways], desc="counting", unit="run"):
        with ProcessPoolExecutor(1, mp_context=fresh) as process:
            samples[way.__name__].append(process.submit(measure, way, folder).result())
    return samples


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments, __doc__, "results/counting.json")
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/labels"
        make_dataset(folder)
        samples = measure_all(WAYS, options.runs, folder)
    print_table(samples)
    record = {"environment": environment(), "vocab_size": VOCAB_SIZE, "sequences": SEQUENCES, "samples": samples}
    write_record(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
