"""TokenCounts: what is counted, what is refused, and that counts are a sum."""

import concurrent.futures
import copy
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pdl_kernels import TokenCounts
from pdl_kernels.data.labels import BLOCK_IDS

ROOT = Path(__file__).resolve().parents[2]
V = 12

sequences = st.lists(st.lists(st.sampled_from([-100, *range(V)]), max_size=6), max_size=8)


def for_all(**strategies):
    def decorate(check):
        return settings(max_examples=60, deadline=None, derandomize=True, database=None)(given(**strategies)(check))

    return decorate


def oracle(rows, shift, ignore_index=-100, vocab_size=V):
    """(V,) counts of `rows`, a list of sequences, in plain Python."""
    counter = Counter(token for row in rows for token in row[int(shift) :] if token != ignore_index)
    return [counter[token] for token in range(vocab_size)]


def count(rows, shift=True, documents=False, **options):
    return TokenCounts(V, documents=documents).update(rows, shift=shift, **options)


def random_rows(*shape, seed=0, vocab_size=V):
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


# ---------------------------------------------------------------------------------------------------------------------
# What update takes

TORCH_INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", TORCH_INTEGERS, ids=str)
def test_integer_dtypes_of_torch(dtype, shift):
    rows = random_rows(7, 5)
    assert count(torch.from_numpy(rows).to(dtype), shift).counts.tolist() == oracle(rows.tolist(), shift)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u2"])
def test_integer_dtypes_of_numpy(dtype, shift):
    rows = random_rows(7, 5)
    assert count(rows.astype(dtype), shift).counts.tolist() == oracle(rows.tolist(), shift)


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1,), (1, 1), (4, 6), (4, 1), (2, 3, 5), (2, 1, 3, 4)])
def test_the_last_dimension_runs_over_time(shape, shift, convert):
    rows = random_rows(*shape)
    got = count(convert(rows), shift)
    flat = rows.reshape(-1, shape[-1]).tolist()
    assert got.counts.tolist() == oracle(flat, shift)
    assert got.total == sum(len(row) - shift for row in flat)
    assert got.sequences == len(flat)


@pytest.mark.parametrize("shift", [True, False])
def test_strides(shift):
    rows = random_rows(8, 10)
    layouts = [np.asfortranarray(rows), rows[::2], rows[:, ::-2], rows[2:5, 3:], np.broadcast_to(rows[0], (3, 10))]
    for layout in layouts:
        expected = oracle(layout.tolist(), shift)
        assert count(layout, shift).counts.tolist() == expected
        assert count(torch.from_numpy(layout.copy()).t().contiguous().t(), shift).counts.tolist() == expected
    expanded = torch.from_numpy(rows[0]).expand(3, 10)
    assert count(expanded, shift).counts.tolist() == oracle(layouts[-1].tolist(), shift)


def test_memory_map(tmp_path):
    rows = random_rows(50, 8).astype(np.uint16)
    rows.tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", np.uint16, "r", shape=(50, 8))
    assert count(mapped).counts.tolist() == oracle(rows.tolist(), True)
    assert count(mapped[3:].T).counts.tolist() == oracle(rows[3:].T.tolist(), True)


@pytest.mark.parametrize("shift", [True, False])
def test_ragged(shift):
    rows = [[3], [], [1, 1, 2], [5, 4]]
    tensors = [torch.tensor(row, dtype=torch.int32) for row in rows]
    objects = np.empty(4, object)
    objects[:] = rows
    forms = {
        "lists": rows,
        "tuples": tuple(tuple(row) for row in rows),
        "tensors": tensors,
        "arrays": [np.array(row, dtype=np.uint16) for row in rows],
        "object array": objects,
        "nested, jagged": torch.nested.nested_tensor(tensors, layout=torch.jagged),
        "deeper": [rows[:2], rows[2:]],
        "mixed": [tensors[0], rows[1], np.array(rows[2]), range(5, 3, -1)],
    }
    for name, form in forms.items():
        got = count(form, shift)
        assert got.counts.tolist() == oracle(rows, shift), name
        assert got.sequences == 4, name


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors():
    nested = torch.nested.nested_tensor([torch.tensor([1, 2, 2]), torch.tensor([3, 4])])
    assert count(nested).counts.tolist() == oracle([[1, 2, 2], [3, 4]], True)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    ("labels", "number"),
    [([], 1), ([[], []], 2), (torch.empty(3, 0, dtype=torch.int64), 3), (np.empty((0, 4), np.int32), 0)],
    ids=["list", "lists", "tensor", "array"],
)
def test_nothing_to_count(labels, number, shift):
    got = count(labels, shift, documents=True)
    assert (got.total, got.sequences) == (0, number)
    assert got.counts.tolist() == got.document_counts.tolist() == [0] * V


def test_one_position_is_no_target_of_a_causal_model():
    assert count([[5], [6]], shift=True).total == 0
    assert count([[5], [6]], shift=False).total == 2


@pytest.mark.lesson("gather at ignore_index")
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, V, 10**6])
def test_ignore_index_inside_and_outside_the_vocabulary(ignore_index):
    rows = random_rows(5, 9)
    rows[:, 4] = rows[2] = ignore_index
    for labels in (rows, torch.from_numpy(rows), rows.tolist()):
        got = count(labels, ignore_index=ignore_index)
        assert got.counts.tolist() == oracle(rows.tolist(), True, ignore_index)
        assert got.sequences == 5


def test_unsigned_labels_and_a_negative_ignore_index():
    """-100 is 65436 in uint16: here an id like any other, and refused as such."""
    rows = np.array([[1, 2, 65436]], dtype=np.uint16)
    with pytest.raises(IndexError, match=r"labels\[0, 2\] is 65436"):
        count(rows)


def test_labels_are_left_alone():
    rows = torch.tensor([[1, -100, 2]])
    count(rows)
    assert rows.tolist() == [[1, -100, 2]]


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_labels_on_an_accelerator(device):
    rows = random_rows(5, 9)
    assert count(torch.from_numpy(rows).to(device)).counts.tolist() == oracle(rows.tolist(), True)


# ---------------------------------------------------------------------------------------------------------------------
# What update refuses


def test_shift_is_always_said():
    with pytest.raises(TypeError, match="shift"):
        TokenCounts(V).update([[1, 2]])
    for shift in (1, None, "yes"):
        with pytest.raises(TypeError, match=f"shift is {shift!r}"):
            TokenCounts(V).update([[1, 2]], shift=shift)
        with pytest.raises(TypeError, match=f"shift is {shift!r}"):
            TokenCounts.from_dataset([{"labels": [1, 2]}], V, shift=shift)
        with pytest.raises(TypeError, match=f"shift is {shift!r}"):
            TokenCounts.from_dataloader([{"labels": [1, 2]}], V, shift=shift)


@pytest.mark.parametrize("ignore_index", [None, -100.0, True])
def test_ignore_index_is_an_integer(ignore_index):
    with pytest.raises(TypeError, match="ignore_index is a"):
        TokenCounts(V).update([[1, 2]], shift=True, ignore_index=ignore_index)


@pytest.mark.parametrize(
    ("vocab_size", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("5", TypeError)]
)
def test_vocab_size(vocab_size, error):
    with pytest.raises(error, match="vocab_size is"):
        TokenCounts(vocab_size)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([1.0]),
        torch.tensor([1], dtype=torch.complex64),
        torch.tensor([True]),
        np.array([1.0]),
        np.array(["a"]),
        [[1.0, 2.0]],
        [["a", "b"]],
        "labels",
        b"labels",
        {"labels": [1]},
        None,
        iter([1, 2]),
        [[1, 2], None],
        [1, [2]],
        5,
        [[1, None]],
    ],
    ids=lambda labels: type(labels).__name__ + str(labels)[:12].split(" at")[0],
)
def test_labels_that_are_not_integers(labels):
    counts = TokenCounts(V)
    with pytest.raises(TypeError, match="labels"):
        counts.update(labels, shift=False)
    assert counts == TokenCounts(V)


def test_a_single_number_is_no_sequence():
    for number in (torch.tensor(3), np.int64(3)):
        with pytest.raises(ValueError, match="single number"):
            count(number)


NESTED = torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([1, 2, V])], layout=torch.jagged)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 2, V], rf"labels\[2\] is {V}; .* from 0 to {V - 1} \(vocab_size {V}\)"),
        ([[1, 2, 3], [4, -100, -5]], r"labels\[1, 2\] is -5|labels\[1\]\[2\] is -5"),
        (torch.tensor([[1, -100, 3], [4, -100, V]]), rf"labels\[1, 2\] is {V}"),
        (np.array([[[1, 2]], [[3, -1]]]), r"labels\[1, 0, 1\] is -1"),
        ([[1], [], [2, -100, 99]], r"labels\[2\]\[2\] is 99"),
        ([torch.tensor([1, 2]), torch.tensor([3, 99])], r"labels\[1\]\[1\] is 99"),
        ([[[1, 2], [3]], [[4, 99]]], r"labels\[1\]\[0\]\[1\] is 99"),
        (NESTED, rf"labels\[1\]\[2\] is {V}"),
        (np.array([[1, 2**64 - 1]], np.uint64), rf"labels.*{2**64 - 1}"),
        (torch.tensor([[1, 2**62]]), rf"labels\[0, 1\] is {2**62}"),
    ],
    ids=["list", "lists", "tensor", "array", "ragged", "tensors", "deep", "nested", "uint64", "huge"],
)
def test_an_id_outside_the_vocabulary_is_named_with_its_place(labels, message):
    counts = count([[0, 1, 1]])
    before = counts.copy()
    for documents in (False, True):
        with pytest.raises(IndexError, match=message):
            count(labels, documents=documents)
    with pytest.raises(IndexError, match=message):
        counts.update(labels, shift=True)
    assert counts == before


def test_position_0_of_a_shifted_sequence_is_never_read():
    assert count([[99, 1], [-7]], shift=True).counts.tolist() == oracle([[0, 1]], True)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("form", ["array", "lists", "tensors", "three dimensions", "one sequence"])
def test_an_id_beyond_the_first_block(form, shift):
    """Ids are counted in blocks; the position is the whole input's, and what came before is not kept."""
    rows = random_rows(2500, 1000)
    assert rows.size > 2 * BLOCK_IDS
    rows[::3, 5] = -100
    rows[2345, 67] = 4321
    labels, place = {
        "array": (rows, r"\[2345, 67\]"),
        "lists": ([row.tolist() for row in rows], r"\[2345\]\[67\]"),
        "tensors": ([torch.from_numpy(row) for row in rows], r"\[2345\]\[67\]"),
        "three dimensions": (rows.reshape(50, 50, 1000), r"\[46, 45, 67\]"),
        "one sequence": (rows.ravel(), r"\[2345067\]"),
    }[form]
    counts = count([[1, 2, 3]])
    before = counts.copy()
    with pytest.raises(IndexError, match=rf"labels{place} is 4321"):
        counts.update(labels, shift=shift)
    assert counts == before
    rows[2345, 67] = 7
    assert count(rows, shift).counts.tolist() == np.bincount(rows[:, int(shift) :][rows[:, int(shift) :] >= 0]).tolist()


@pytest.mark.parametrize("length", [1, 2, 999, BLOCK_IDS - 1, BLOCK_IDS, BLOCK_IDS + 1])
def test_sizes_around_a_block(length):
    rows = random_rows(max(2, BLOCK_IDS // length + 2), length)
    got = TokenCounts(V, documents=True).update(rows, shift=False)
    assert got.counts.tolist() == np.bincount(rows.ravel(), minlength=V).tolist()
    assert got.document_counts.tolist() == [int((rows == token).any(1).sum()) for token in range(V)]
    assert got.sequences == len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Counts are a sum


@for_all(rows=sequences, shift=st.booleans(), ignore_index=st.sampled_from([-100, 0, 5]))
def test_lists_against_the_oracle(rows, shift, ignore_index):
    rows = [[token if token != -100 else ignore_index for token in row] for row in rows]
    got = count(rows, shift, documents=True, ignore_index=ignore_index)
    assert got.counts.tolist() == oracle(rows, shift, ignore_index)
    held = Counter(token for row in rows for token in set(row[int(shift) :]) - {ignore_index})
    assert got.document_counts.tolist() == [held[token] for token in range(V)]
    assert got.sequences == (len(rows) or 1)  # [] is one empty sequence


@for_all(rows=sequences, shift=st.booleans(), cuts=st.lists(st.integers(0, 8), max_size=4), data=st.data())
def test_any_partition_gives_the_same(rows, shift, cuts, data):
    ends = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    parts = [rows[a:b] for a, b in itertools.pairwise(ends)]
    whole = TokenCounts(V, documents=True)
    for part in parts:
        whole.update(part, shift=shift)
    order = data.draw(st.permutations(parts))
    partial = [count(part, shift, documents=True) for part in order]
    total = sum(partial, start=TokenCounts(V, documents=True))
    assert total == whole
    if rows:
        assert total == count(rows, shift, documents=True)
        assert sum(partial) == total


@for_all(a=sequences, b=sequences, c=sequences, documents=st.booleans())
def test_merging_is_associative_and_commutative(a, b, c, documents):
    a, b, c = (count(rows, documents=documents) for rows in (a, b, c))
    kept = copy.deepcopy((a, b, c))
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + TokenCounts(V, documents=documents) == a
    assert (a, b, c) == kept, "adding may not change what is added"
    assert a.copy().merge(b) == a + b


def test_merging_is_in_place_and_returns_self():
    a, b = count([[0, 1, 2]]), count([[0, 2, 2]])
    assert a.merge(b) is a
    assert a.counts.tolist() == oracle([[0, 1, 2], [0, 2, 2]], True)
    assert a.sequences == 2
    assert b == count([[0, 2, 2]])
    assert a.merge(a).total == 8
    a += b
    assert a.total == 10


def test_copies_share_nothing():
    original = count([[0, 1, 2]], documents=True)
    original.tokenizer, original.counted = "animals", "a corpus"
    for duplicate in (original.copy(), copy.deepcopy(original), pickle.loads(pickle.dumps(original)), sum([original])):
        assert duplicate == original
        assert (duplicate.tokenizer, duplicate.counted) == ("animals", "a corpus")
        duplicate.update([[0, 5, 5]], shift=True)
        assert duplicate.total == 4
    assert original.total == 2
    assert original.document_counts.sum() == 2


def test_equality_sees_every_number():
    counts = count([[0, 1, 2]], documents=True)
    assert counts != count([[0, 1, 2]])
    assert counts != count([[0, 1, 3]], documents=True)
    assert counts != count([[0, 1, 2], []], documents=True)
    assert counts != TokenCounts(V + 1, documents=True).update([[0, 1, 2]], shift=True)
    assert counts != "counts"
    with pytest.raises(TypeError, match="unhashable"):
        hash(counts)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (TokenCounts(V + 1), ValueError, rf"vocab_size {V + 1}; accepted is {V}"),
        (TokenCounts(V, documents=True), ValueError, "documents=True; accepted is False"),
        (TokenCounts(V, tokenizer="b"), ValueError, "'b'; accepted is 'a'"),
        (torch.zeros(V), TypeError, "other is a Tensor"),
    ],
)
def test_counts_that_do_not_merge(other, error, message):
    counts = TokenCounts(V, tokenizer="a").update([[0, 1]], shift=True)
    before = counts.copy()
    with pytest.raises(error, match=message):
        counts.merge(other)
    with pytest.raises(error):
        counts + other
    assert counts == before


def test_the_name_of_the_tokenizer_survives_merging():
    assert (TokenCounts(V) + TokenCounts(V, tokenizer="a")).tokenizer == "a"
    assert (TokenCounts(V, tokenizer="a") + TokenCounts(V)).tokenizer == "a"


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


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


# ---------------------------------------------------------------------------------------------------------------------
# Memory

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
