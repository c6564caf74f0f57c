"""The arms' losses, how a model is trained with them, and what validation says of it."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.quality import V, make_encoded, make_model

from benchmarks.quality import scoring
from benchmarks.quality.arms import ALPHAS, ARMS, NATURAL, TEMPERATURES, undoing_bias, variants_of
from benchmarks.quality.encoding import run_below
from benchmarks.quality.scoring import Targets
from benchmarks.quality.training import GRADIENT_NORM, draw_batches, train, validate
from pdl_kernels import TokenCounts
from reference import power_law_weights, reference_cross_entropy

TRAINED = [name for name, arm in ARMS.items() if arm.trained]
UNSEEN = slice(50, V)  # ids that no target of `make_counts` has


def make_counts():
    """Falling counts, and types without any."""
    counts = TokenCounts(V)
    counts.update([[token for token in range(50) for _ in range(100 // (token + 1))]], shift=False)
    assert (counts.counts[UNSEEN] == 0).all()
    assert (counts.counts[:50] > 0).all()
    return counts


def weights_of(name, counts):  # (V,) int64 -> (V,) float64, or None
    """What the arm is meant to weigh, by the formula."""
    if name in ("cross-entropy", "focal"):
        return None
    if name == "pdl-paper":
        return power_law_weights(counts, alpha=1.0, eps=1e-7)
    alpha, eps = (0.5, 0.0) if name == "inverse-square-root" else (float(name.removeprefix("pdl-")), 1.0)
    weights = power_law_weights(counts, alpha, eps)
    of_a_target = (weights * counts).nan_to_num().sum() / counts.sum()
    return torch.where(counts > 0, weights / of_a_target, 1.0)


def loss_of(name, counts, logits, labels):  # float64, differentiable
    if name == "focal":
        log_p = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
        return (-((1 - log_p.exp()) ** 2) * log_p).mean()
    weights = weights_of(name, counts)
    return reference_cross_entropy(logits, labels, weights, reduction="token_mean")[0]


# Losses and what can be had without training


@pytest.mark.parametrize("name", TRAINED)
def test_an_arms_loss_is_the_formula(name):
    arm, counts = ARMS[name], make_counts()
    logits = (3 * torch.randn(40, V)).requires_grad_()
    labels = torch.randint(0, V, (40,))
    weights = arm.table(counts)
    loss = arm.loss(logits, labels, weights)
    expected = loss_of(name, counts.counts, logits, labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(value, logits) for value in (loss, expected))
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_all_alphas_and_other_losses_are_compared():
    assert TRAINED == [
        "cross-entropy", "pdl-0.25", "pdl-0.4", "pdl-0.75", "pdl-1", "pdl-paper", "inverse-square-root", "focal"
    ]  # fmt: skip
    assert [name for name, arm in ARMS.items() if not arm.trained] == ["untouched"]


def test_cross_entropy_gets_log_weights_added_or_another_temperature():
    counts = make_counts()
    logits = torch.randn(3, V)
    found = {variant.name: variant for variant in variants_of(ARMS["cross-entropy"])}
    names = [NATURAL, *(f"adjusted-{tau:g}" for tau in ALPHAS), *(f"temperature-{value}" for value in TEMPERATURES)]
    assert list(found) == [*names, "adjusted-0.4-seen"]
    assert torch.equal(found[NATURAL].transform(counts, None)(logits), logits)
    for tau in ALPHAS:
        expected = logits + weights_of(f"pdl-{tau:g}", counts.counts).log()
        torch.testing.assert_close(found[f"adjusted-{tau:g}"].transform(counts, None)(logits), expected.float())
    for temperature in TEMPERATURES:
        variant = found[f"temperature-{temperature}"]
        torch.testing.assert_close(variant.transform(counts, None)(logits), logits / temperature)
        assert (variant.greedy, variant.sampled) == (False, True)
    assert [variant.name for variant in variants_of(ARMS["untouched"])] == [NATURAL]
    assert [variant.name for variant in variants_of(ARMS["focal"])] == [NATURAL]


def test_types_never_seen_need_not_be_raised():
    counts = make_counts()
    (variant,) = [one for one in variants_of(ARMS["cross-entropy"]) if one.name == "adjusted-0.4-seen"]
    assert (variant.greedy, variant.sampled) == (True, True)
    bias = variant.transform(counts, None)(torch.zeros(1, V))[0]
    log_weights, seen = weights_of("pdl-0.4", counts.counts).log().float(), counts.counts > 0
    torch.testing.assert_close(bias[seen], log_weights[seen])
    assert (bias[~seen] == bias.min()).all()
    assert bias.argmin() == counts.counts.argmax() or bias[counts.counts.argmax()] == bias.min()
    assert bias.min() < 0


@pytest.mark.parametrize("name", ["pdl-0.25", "pdl-1", "pdl-paper"])
def test_pdl_has_its_shift_taken_away(name):
    arm, counts = ARMS[name], make_counts()
    logits, weights = torch.randn(3, V), arm.table(counts)
    natural, half, whole = variants_of(arm)
    assert (natural.name, half.name, whole.name) == (NATURAL, "half-undone", "undone")
    log_weights = torch.where(counts.counts > 0, weights_of(name, counts.counts).log(), 0.0)
    assert torch.equal(natural.transform(counts, weights)(logits), logits)
    for variant, strength in ((half, 0.5), (whole, 1.0)):
        expected = (logits - strength * log_weights).float()
        torch.testing.assert_close(variant.transform(counts, weights)(logits), expected)
        assert variant.greedy == variant.sampled == (name == "pdl-1")


def test_types_that_training_never_saw_have_no_shift_to_undo():
    counts = make_counts()
    weights = ARMS["pdl-paper"].table(counts)
    assert (weights[UNSEEN] > 1e6).all()
    bias = undoing_bias(weights, counts)
    assert (bias[UNSEEN] == 0).all()
    torch.testing.assert_close(bias[:50], counts.counts[:50].log().float())


# Batches


def test_an_epoch_has_each_row_once():
    lengths = torch.randint(5, 60, (1000,)).tolist()
    batches = draw_batches(lengths, 10, seed=0)
    assert {len(batch) for batch in batches} == {10}
    assert sorted(row for batch in batches for row in batch) == list(range(1000))
    assert draw_batches(lengths, 10, seed=0) == batches
    other = draw_batches(lengths, 10, seed=1)
    assert sorted(row for batch in other for row in batch) == list(range(1000))
    assert {tuple(sorted(batch)) for batch in other}.isdisjoint({tuple(sorted(batch)) for batch in batches})


def test_rows_that_fill_no_batch_are_left_out():
    batches = draw_batches(list(range(100, 153)), 10, seed=0)
    assert [len(batch) for batch in batches] == [10] * 5
    assert len({row for batch in batches for row in batch}) == 50


def test_little_is_padded_and_long_batches_do_not_come_last():
    lengths = torch.randint(5, 60, (1600,)).tolist()

    def padding(batches):
        return 1 - sum(lengths) / sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)

    batches = draw_batches(lengths, 10, seed=0)
    assert padding([list(range(at, at + 10)) for at in range(0, 1600, 10)]) > 0.3
    assert padding(batches) < 0.06
    longest = [max(lengths[row] for row in batch) for batch in batches]
    steps = list(pairwise(longest))
    assert sum(before < after for before, after in steps) > 60, "the batches' lengths go up and down at random"
    assert sum(before > after for before, after in steps) > 60


# Training


@pytest.mark.parametrize("name", ["cross-entropy", "pdl-1", "focal"])
def test_training_is_that_of_the_whole_model_in_a_slow_loop(name):
    """Each pair by itself through the whole model, of which the last layers and the norm are trained."""
    model, whole = make_model(trained_layers=2)
    encoded, counts = make_encoded(12, targets=6), make_counts()
    arm = ARMS[name]
    batches = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 4, 8, 11]]
    rate = 3e-3
    states = run_below(model, encoded, "tests")
    losses = train(model, arm, arm.table(counts), states, batches, rate, "tests")

    parts = {"layers.0": "model.layers.2", "layers.1": "model.layers.3", "norm.wei": "model.norm.wei"}
    trained = {name: whole.get_parameter(parts[name[:8]] + name[8:]).requires_grad_() for name in model.trained}
    optimiser = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    expected, norms = [], []
    for step, rows in enumerate(batches):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / 4)
        logits = torch.cat(
            [whole(torch.tensor([encoded[row].inputs])).logits[0, len(encoded[row].prompt) - 1 :] for row in rows]
        )
        labels = torch.tensor([token for row in rows for token in encoded[row].targets])
        loss = loss_of(name, counts.counts, logits, labels)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)))
        optimiser.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)
    assert max(norms) > 1.5 * GRADIENT_NORM, "a gradient was shortened"
    assert len(set(losses)) == 4
    for name, parameter in trained.items():
        distance = (parameter - model._initial[name]).norm()
        assert (model.trained[name] - parameter).norm() < 0.01 * distance, name


def test_every_training_starts_from_the_model_as_it_came():
    model, _ = make_model()
    states = run_below(model, make_encoded(8), "tests")
    arm, batches = ARMS["cross-entropy"], [[0, 1, 2, 3], [4, 5, 6, 7]]
    losses = train(model, arm, None, states, batches, 1e-2, "tests")
    after = model.snapshot()
    train(model, arm, None, states, batches, 1.0, "tests")
    assert train(model, arm, None, states, batches, 1e-2, "tests") == losses
    assert all(torch.equal(value, after[name]) for name, value in model.snapshot().items())


def test_training_teaches():
    model, _ = make_model()
    states = run_below(model, make_encoded(8), "tests")
    losses = train(model, ARMS["cross-entropy"], None, states, [[0, 1, 2, 3], [4, 5, 6, 7]] * 10, 1e-2, "tests")
    assert sum(losses[-2:]) < 0.3 * sum(losses[:2])


@pytest.mark.parametrize("trained_layers", [2, None])
def test_everything_is_trained_in_bfloat16_with_float32_parameters(trained_layers):
    model, _ = make_model(trained_layers, dtype=torch.bfloat16)
    exact, _ = make_model(trained_layers)
    encoded = make_encoded(8)
    found, expected = (
        train(one, ARMS["cross-entropy"], None, run_below(one, encoded, "tests"), [[*range(8)]] * 6, 1e-3, "tests")
        for one in (model, exact)
    )
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert {parameter.dtype for parameter in model.parameters} == {torch.float32}


# Validation


def make_targets(rows=23, seen_only=False):
    states = torch.randn(rows, 32)
    labels = torch.randint(0, 50 if seen_only else V, (rows,))
    return Targets(states, labels, torch.zeros(rows, dtype=torch.int64))


@pytest.mark.parametrize("name", ["cross-entropy", "pdl-0.4", "pdl-paper", "focal"])
def test_validation_says_two_numbers(name, monkeypatch):
    monkeypatch.setattr(scoring, "ROWS_AT_A_TIME", 10)
    model, _ = make_model()
    arm, counts, targets = ARMS[name], make_counts(), make_targets()
    seen = targets.labels < 50
    assert 0 < seen.sum() < len(seen)
    found = validate(model, arm, arm.table(counts), targets, counts)

    logits = F.linear(targets.states.double(), model.output_weight.double())
    own = loss_of(name, counts.counts, logits[seen], targets.labels[seen])
    assert found.own_loss == pytest.approx(float(own), rel=1e-5)
    weights = weights_of(name, counts.counts)
    if weights is not None:
        logits = logits - torch.where(counts.counts > 0, weights.log(), 0.0)
    assert found.calibrated_nll == pytest.approx(float(F.cross_entropy(logits, targets.labels)), rel=1e-5)


@pytest.mark.parametrize("name", ["pdl-0.4", "focal"])
def test_a_piece_without_a_seen_type_adds_nothing_to_the_own_loss(name, monkeypatch):
    model, _ = make_model()
    arm, counts, targets = ARMS[name], make_counts(), make_targets()
    expected = validate(model, arm, arm.table(counts), targets, counts)
    monkeypatch.setattr(scoring, "ROWS_AT_A_TIME", 1)
    found = validate(model, arm, arm.table(counts), targets, counts)
    assert found.own_loss == pytest.approx(expected.own_loss, rel=1e-5)


def test_a_model_that_diverged_has_no_number():
    model, _ = make_model()
    arm, counts = ARMS["pdl-1"], make_counts()
    weights = arm.table(counts)
    states = run_below(model, make_encoded(8), "tests")
    train(model, arm, weights, states, [[0, 1, 2, 3]] * 3, 1e30, "tests")
    found = validate(model, arm, weights, scoring.find_targets(model, states), counts)
    assert math.isnan(found.calibrated_nll)
    assert math.isnan(found.own_loss)
