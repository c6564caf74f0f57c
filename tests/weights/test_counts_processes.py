"""Counting in several processes, and adding up over them."""

import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.counting import V, count, oracle, random_rows

from pdl_kernels import TokenCounts

ROOT = Path(__file__).resolve().parents[2]


def count_shard(path, start, stop):
    rows = np.load(path, mmap_mode="r")[start:stop]
    return TokenCounts(V, documents=True).update(rows, shift=True)


def test_shards_counted_by_worker_processes(tmp_path):
    rows = random_rows(90, 20)
    np.save(tmp_path / "rows.npy", rows)
    bounds = [0, 17, 40, 40, 90]
    context = multiprocessing.get_context("spawn")  # what every system has
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        shards = pool.map(count_shard, [tmp_path / "rows.npy"] * 4, bounds, bounds[1:])
        total = sum(shards)
    assert total == count(rows, documents=True)
    assert total.counts.tolist() == oracle(rows.tolist(), True)


def test_partial_counts_by_datasets_map():
    datasets = pytest.importorskip("datasets")
    rows = random_rows(40, 50).tolist()

    def partial(batch):
        return {"counts": [TokenCounts(V).update(batch["labels"], shift=True).counts.numpy()]}

    dataset = datasets.Dataset.from_dict({"labels": rows})
    shards = dataset.map(partial, batched=True, batch_size=10, num_proc=2, remove_columns=["labels"])
    assert len(shards) == 4
    total = np.sum(shards.with_format("numpy")["counts"][:], axis=0)
    assert total.tolist() == oracle(rows, True)


COUNT_IN_A_FORK = """
import multiprocessing
import torch
from pdl_kernels import TokenCounts
V = 300_000  # torch works on tensors of this size with its threads
torch.set_num_threads(2)
torch.ones(V) + torch.ones(V)

def work():
    counts = TokenCounts(V, documents=True).update([[0, V - 1, 5]], shift=True)
    assert (counts + counts).total == 4

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join(5)
if worker.is_alive():
    worker.kill()
    raise SystemExit("the worker hangs")
raise SystemExit(worker.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_forked_workers_count_large_vocabularies():
    """`datasets.map(num_proc=...)` forks; a parent that has used torch's threads leaves none to its children."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_IN_A_FORK],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def reduce_on_rank(rank, folder, rows):
    """Three reductions in one pair of processes; what each rank saw goes to a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    seen = {}
    mine = TokenCounts(V, documents=True).update(rows[rank::2], shift=True)
    seen["returned self"] = mine.all_reduce() is mine
    seen["sum"] = (mine.counts, mine.document_counts, mine.sequences)
    unequal = {
        "vocab_size": TokenCounts(V + rank),
        "documents": TokenCounts(V, documents=rank == 1),
    }
    for name, counts in unequal.items():
        try:
            counts.all_reduce()
        except ValueError as error:
            seen[name] = str(error)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    seen["group of one"] = count(rows[rank::2]).all_reduce(alone).counts
    seen["afterwards"] = TokenCounts(V).update([[0, rank]], shift=True).all_reduce().counts
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_all_reduce_over_two_processes(tmp_path):
    rows = [[0, 1, 2, 2], [0, 3], [], [0, 2, 5, 5, 11]]
    torch.multiprocessing.spawn(reduce_on_rank, (str(tmp_path), rows), nprocs=2)
    whole = count(rows, documents=True)
    for rank in range(2):
        seen = torch.load(tmp_path / f"{rank}.pt")
        counts, document_counts, number = seen["sum"]
        assert seen["returned self"]
        assert counts.tolist() == oracle(rows, True) == whole.counts.tolist()
        assert counts.dtype == torch.int64
        assert document_counts.tolist() == whole.document_counts.tolist()
        assert number == 4
        assert f"vocab_size from {V} to {V + 1}" in seen["vocab_size"]
        assert "documents False or True" in seen["documents"]
        assert seen["group of one"].tolist() == oracle(rows[rank::2], True)
        assert seen["afterwards"].tolist() == [1, 1] + [0] * (V - 2), "a refused reduction must not upset the next"


def test_all_reduce_without_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="init_process_group"):
        TokenCounts(V).all_reduce()
