"""`TokenCounts.update`: which labels are counted, and which are refused."""

import numpy as np
import pytest
import torch
from helpers.counting import V, count, oracle, random_rows

from pdl_kernels import TokenCounts
from pdl_kernels.data.labels import BLOCK_IDS

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
