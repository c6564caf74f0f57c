"""Schedules, from plain cross entropy to a table."""

import math

import pytest
import torch

from pdl_kernels import PDLCrossEntropyLoss, WeightSchedule

TABLE = torch.tensor([0.0, 1e-7, 0.5, 1.0, 3.0, 1e7])


def test_the_ramp():
    schedule = WeightSchedule(TABLE, steps=8, start=3)
    for step in range(20):
        r = min(max(step - 3, 0) / 8, 1)
        assert schedule.ratio_at(step) == r
        weights = schedule.weights_at(step)
        assert weights.dtype == torch.float32
        expected = [1 + r * (w - 1) for w in TABLE.tolist()] if r < 1 else TABLE.tolist()
        assert weights.tolist() == pytest.approx(expected, rel=1e-6)
        assert (weights >= 0).all()
    assert torch.equal(schedule.weights_at(3), torch.ones(6)), "plain cross entropy at the start"


def test_the_end_is_the_table_bit_for_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        schedule = WeightSchedule(TABLE.to(dtype), steps=2)
        for step in (2, 3, 10**9):
            assert torch.equal(schedule.weights_at(step), TABLE.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_float32_at_every_step(dtype):
    schedule = WeightSchedule(TABLE.to(dtype), steps=4)
    assert {schedule.weights_at(step).dtype for step in range(6)} == {torch.float32}


def test_no_steps_jump_at_the_start():
    schedule = WeightSchedule(TABLE, steps=0, start=2)
    assert torch.equal(schedule.weights_at(1), torch.ones(6))
    assert torch.equal(schedule.weights_at(2), TABLE)


def test_weights_in_place_of_the_losss():
    schedule = WeightSchedule(torch.tensor([3.0, 0.5]), steps=4)
    loss = PDLCrossEntropyLoss(torch.ones(2), reduction="sum")
    storage = loss.weights.data_ptr()
    for step, expected in ((0, [1, 1]), (1, [1.5, 0.875]), (4, [3, 0.5])):
        assert schedule.weights_at(step, loss.weights) is loss.weights
        assert loss.weights.tolist() == expected
        assert loss(torch.zeros(1, 2), torch.tensor([0])).item() == pytest.approx(expected[0] * math.log(2), rel=1e-6)
    assert loss.weights.data_ptr() == storage


def test_a_schedules_weights_are_ones_own():
    schedule = WeightSchedule(TABLE, steps=1)
    schedule.weights_at(5).zero_()
    assert torch.equal(schedule.weights_at(5), TABLE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((TABLE, -1), ValueError, "steps is -1"),
        ((TABLE, 1, -1), ValueError, "start is -1"),
        ((TABLE, math.nan), ValueError, "steps is nan"),
        ((-TABLE, 1), ValueError, r"table\[1\] is"),
        ((TABLE[None], 1), ValueError, "table has shape"),
        ((TABLE.long(), 1), TypeError, "table is torch.int64"),
        (([1.0], 1), TypeError, "table is list"),
    ],
)
def test_bad_schedules(arguments, error, message):
    with pytest.raises(error, match=message):
        WeightSchedule(*arguments)


@pytest.mark.parametrize("step", [-1, math.nan])
def test_bad_steps(step):
    with pytest.raises(ValueError, match="step is"):
        WeightSchedule(TABLE, 3).weights_at(step)
