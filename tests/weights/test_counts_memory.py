"""How much memory counting takes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.counting import random_rows

ROOT = Path(__file__).resolve().parents[2]

COUNT_AND_SAY_PEAK = """
import sys
import numpy as np
from pdl_kernels import TokenCounts
form, path, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
if form == "data set":
    import datasets
    counts = TokenCounts.from_dataset(datasets.Dataset.from_file(path), 65536, shift=False, progress=False)
else:
    shape = {"rows": (-1, 1000), "stream": (-1,)}[form]
    counts = TokenCounts(65536).update(np.memmap(path, np.uint16, "r").reshape(shape), shift=False)
assert counts.total == tokens, counts
# Unlike ru_maxrss, this high-water mark does not include what the parent held when it forked.
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(line.split()[1]) / 2**20)
"""


def peak_gib(form, path, tokens):
    done = subprocess.run(
        [sys.executable, "-c", COUNT_AND_SAY_PEAK, form, str(path), str(tokens)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")


@needs_proc
@pytest.mark.parametrize("form", ["rows", "stream", "data set"])
def test_ten_million_tokens_stay_under_one_gigabyte(tmp_path, form):
    rows = random_rows(10_000, 1000, vocab_size=65536).astype(np.uint16)
    path = tmp_path / "tokens"
    if form == "data set":
        pytest.importorskip("datasets")
        pa = pytest.importorskip("pyarrow")
        offsets = np.arange(0, rows.size + 1, 1000, dtype=np.int32)
        table = pa.table({"labels": pa.ListArray.from_arrays(offsets, rows.ravel().astype(np.int32))})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    else:
        rows.tofile(path)
    assert peak_gib(form, path, rows.size) < 1


@needs_proc
def test_one_long_stream_of_tokens_is_counted_in_blocks(tmp_path):
    """A packed corpus is often one flat file: memory may not grow with it."""
    path = tmp_path / "tokens"
    with open(path, "wb") as file:
        file.truncate(2 * 80_000_000)
    assert peak_gib("stream", path, 80_000_000) < 1
