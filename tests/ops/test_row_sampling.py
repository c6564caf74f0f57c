"""Leaving light rows out of the backward products: without bias, for good of no type, and with the same end."""

import pytest
import torch
from helpers.linear import (
    Products,
    assert_equal,
    assert_same,
    make_problem,
    make_token_weights,
    run_linear,
    run_linear_reference,
)

from pdl_kernels import pdl_linear_cross_entropy, power_law_weights
from pdl_kernels.ops.row_sampling import sample_rows

ROWS, V = 60, 37


def uneven_weights(device="cpu"):
    """Weights of which a few own most of the sum, as power laws make them."""
    return (10 * torch.rand(V, generator=torch.Generator().manual_seed(4)) ** 6 + 1e-3).to(device)


def seed_of(number):
    return torch.tensor(float(number), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The sample


def test_factors_carry_what_they_stand_for():
    """Rows from tau on are kept as they are; lighter ones are kept at tau or not at all."""
    factors = torch.tensor([8.0, -4.0, 1.0, 0.5, -0.25, 0.25, 0.0])
    share = 1.1 / 14  # the rows lighter than 1 hold 1.0 of 14.0, those lighter than 4 hold 2.0
    for seed in range(20):
        kept, scale = sample_rows(factors, share, seed_of(seed))
        assert kept[:3].all()
        assert not kept[6]
        assert (scale[:3] == 1).all()
        carried = (factors * scale)[3:6][kept[3:6]]
        torch.testing.assert_close(carried.abs(), torch.ones_like(carried))
        assert kept[3:6].sum() == 1, "the probabilities of the light rows sum to 1"


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_expected_factors_are_exact(share):
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(200, generator=generator) * torch.rand(200, generator=generator) ** 4
    seeds = 2000
    mean, ever, fewest = torch.zeros(200, dtype=torch.float64), torch.zeros(200, dtype=torch.bool), 200
    for seed in range(seeds):
        kept, scale = sample_rows(factors, share, seed_of(seed))
        mean += torch.where(kept, factors.double() * scale, 0) / seeds
        ever |= kept
        fewest = min(fewest, int(kept.sum()))
    # Consecutive seeds spread evenly, so that the mean converges like 1 / seeds and not like its root.
    torch.testing.assert_close(mean, factors.double(), rtol=0, atol=5 / seeds * factors.abs().max().item())
    light = factors.abs() < factors.abs().max() / 100
    assert ever[factors.abs() * seeds > 5 * factors.abs().max()].all(), "dropped for good"
    assert light.any()
    assert fewest < 200


def test_the_light_rows_hold_the_share():
    generator = torch.Generator().manual_seed(2)
    magnitudes = torch.rand(500, generator=generator) ** 5
    for share in (0.01, 0.1, 0.4):
        never_scaled = torch.stack([sample_rows(magnitudes, share, seed_of(s)).scale == 1 for s in range(200)])
        always = torch.stack([sample_rows(magnitudes, share, seed_of(s)).kept for s in range(200)])
        heavy = never_scaled.all(0) & always.all(0)
        assert magnitudes[~heavy].sum() <= share * magnitudes.sum() + magnitudes[heavy].min()
        assert magnitudes[~heavy].max() <= magnitudes[heavy].min()
        assert magnitudes[~heavy].sum() >= 0.9 * share * magnitudes.sum()


@pytest.mark.parametrize(
    "factors", [[], [0.0, 0.0], [3.0], [1.0] * 5, [1e-30, 1e30], [1e-7, 1e7, 1.0]],
    ids=["none", "zeros", "one", "equal", "60 orders", "14 orders"],
)  # fmt: skip
def test_odd_factors(factors):
    kept, scale = sample_rows(torch.tensor(factors), 0.3, seed_of(3))
    assert kept.shape == scale.shape == (len(factors),)
    assert scale.isfinite().all()
    if factors and max(factors) > 0:
        assert kept[torch.tensor(factors).argmax()]
    if len(set(factors)) == 1:
        assert (scale == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# In the loss


def test_zero_is_off(backend, device):
    problem = make_problem(4, device=device)
    assert_equal(run_linear(backend, problem, row_sampling=0.0, seed=3), run_linear(backend, problem))


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_over_seeds_is_the_exact_gradient(reduction, smoothing, device):
    """With signed token weights, ignored rows and per-row upstream gradients; the loss and statistics never change."""
    problem = make_problem(ROWS, device=device, ignored=(3, 50))
    options = {
        "reduction": reduction,
        "label_smoothing": smoothing,
        "token_weights": make_token_weights(ROWS, device),
        "upstream": torch.linspace(-1, 2, ROWS) if reduction == "none" else 0.5,
    }
    weights = uneven_weights(device)
    exact = run_linear("eager", problem, weights, return_stats=True, **options)
    expected = run_linear_reference(problem, weights, **options).gradients
    mean = {name: torch.zeros_like(want) for name, want in expected.items()}
    seeds, away = 300, 0.0
    for seed in range(seeds):
        got = run_linear("eager", problem, weights, row_sampling=0.2, seed=seed, return_stats=True, **options)
        torch.testing.assert_close(got.loss, exact.loss, rtol=1e-5, atol=1e-7)
        for ours, theirs in zip(got.stats, exact.stats, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        for name, gradient in got.gradients.items():
            mean[name] += gradient.cpu().double() / seeds
        difference = got.gradients["lm_head_weight"].cpu().double() - expected["lm_head_weight"]
        away = max(away, (difference.norm() / expected["lm_head_weight"].norm()).item())
    assert away > 0.01, "nothing was sampled"
    for name, want in expected.items():
        assert (mean[name] - want).norm() < 6e-3 * want.norm(), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_type_is_dropped_for_good(reduction, device):
    """Over the seeds, each type's rows enter the products, however light the type is."""
    problem = make_problem(ROWS, device=device)
    weights = torch.where(uneven_weights(device) < 1, 0.05, 1.0)
    unsampled = run_linear("eager", problem, weights, reduction=reduction).gradients["hidden"]
    entered = torch.zeros(ROWS, dtype=torch.bool, device=device)
    often = 0
    for seed in range(100):
        options = {"reduction": reduction, "row_sampling": 0.3, "seed": seed}
        rows = run_linear("eager", problem, weights, **options).gradients["hidden"].abs().sum(-1) > 0
        entered |= rows
        often += int(rows.sum())
    assert (unsampled.abs().sum(-1) > 0).all()
    assert entered.all()
    assert often < 0.8 * 100 * ROWS, "hardly anything was left out"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_left_out_are_not_multiplied(reduction, device):
    problem = make_problem(ROWS, device=device)
    weights = uneven_weights(device)
    with Products() as done:
        got = run_linear("eager", problem, weights, reduction=reduction, row_sampling=0.2, seed=1, chunk_size=16)
    rows = int((got.gradients["hidden"].abs().sum(-1) > 0).sum())
    assert 0 < rows < 0.8 * ROWS
    assert done.weight_rows == done.hidden_rows == rows
    assert done.logit_rows == (ROWS + rows if reduction == "none" else ROWS)


def test_the_same_seed_keeps_the_same_rows(backend, device):
    problem = make_problem(5, device=device)
    weights = uneven_weights(device)
    runs = {
        name: run_linear(backend, problem, weights, row_sampling=0.6, seed=seed)
        for name, seed in {
            "int": 5, "again": 5, "float": 5.0, "tensor": torch.tensor(5, device=device),
            "float tensor": torch.tensor(5.0, device=device), "int32": torch.tensor(5, dtype=torch.int32),
        }.items()
    }  # fmt: skip
    for got in runs.values():
        assert_equal(got, runs["int"])


def test_another_seed_keeps_others(device):
    problem = make_problem(ROWS, device=device)
    results = [run_linear("eager", problem, uneven_weights(device), row_sampling=0.2, seed=s) for s in (1, 2, 2**31)]
    gradients = [r.gradients["hidden"] for r in results]
    assert not torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[1], gradients[2])


def test_without_a_seed_torchs_generator_draws_it(device):
    problem = make_problem(ROWS, device=device)
    results = []
    for number in (7, 7, 8):
        torch.manual_seed(number)
        results.append(run_linear("eager", problem, uneven_weights(device), row_sampling=0.2))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0].gradients["hidden"], results[2].gradients["hidden"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_keeps_the_same_rows(reduction, device):
    problem = make_problem(ROWS, device=device)
    weight = problem.lm_head_weight.requires_grad_()
    loss = pdl_linear_cross_entropy(
        problem.hidden, weight, problem.targets, uneven_weights(device), row_sampling=0.2, reduction=reduction
    )
    first, second = (torch.autograd.grad(loss.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_nan(reduction, device):
    problem = make_problem(ROWS, device=device, ignored=(0, 7))
    weights, ignored = uneven_weights(device), [0, 7]
    u, upstream = torch.ones(ROWS, device=device), torch.ones(ROWS)

    def sampled():
        given = upstream if reduction == "none" else 1.0
        options = {"reduction": reduction, "row_sampling": 0.2, "seed": 4, "upstream": given, "token_weights": u}
        return run_linear("eager", problem, weights, **options)

    clean = sampled()
    for tensor in (u, upstream, problem.hidden):
        tensor[ignored] = torch.nan
    assert_same(sampled(), clean, rtol=1e-6, atol=1e-7)


def test_float16(device):
    """The factor that rows carry beyond their own must fit the narrow range."""
    problem = make_problem(ROWS, dtype=torch.float16, device=device)
    weights = torch.logspace(-7, 3, V, device=device)
    expected = run_linear_reference(problem, weights).gradients["lm_head_weight"]
    mean = torch.zeros_like(expected)
    for seed in range(100):
        got = run_linear("eager", problem, weights, row_sampling=0.01, seed=seed)
        assert all(gradient.isfinite().all() for gradient in got.gradients.values())
        mean += got.gradients["lm_head_weight"].cpu().double() / 100
    assert (mean - expected).norm() < 5e-3 * expected.norm()


def test_errors():
    hidden, weight, _, targets = make_problem(4)
    for options, error, words in (
        ({"row_sampling": 0.1, "z_loss": 0.1}, ValueError, "row_sampling is 0.1 with z_loss 0.1"),
        ({"row_sampling": -0.1}, ValueError, "row_sampling is -0.1"),
        ({"row_sampling": 1}, ValueError, "row_sampling is 1"),
        ({"row_sampling": float("nan")}, ValueError, "row_sampling is nan"),
        ({"row_sampling": True}, TypeError, "row_sampling is a bool"),
        ({"row_sampling": 0.1, "compact": False}, ValueError, "row_sampling needs to know"),
        ({"row_sampling": 0.1, "seed": "1"}, ValueError, "seed is '1'"),
        ({"row_sampling": 0.1, "seed": float("inf")}, ValueError, "seed is inf"),
        ({"row_sampling": 0.1, "seed": torch.zeros(2)}, ValueError, r"seed has shape \(2,\)"),
        ({"seed": True}, ValueError, "seed is True"),
    ):
        with pytest.raises(error, match=words):
            pdl_linear_cross_entropy(hidden, weight, targets, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_training_ends_where_it_ends_without(device):
    """A table of next-token logits, trained to convergence on a bigram language with Zipf frequencies."""
    types, features = 48, 24
    generator = torch.Generator().manual_seed(0)
    frequencies = 1 / torch.arange(1, types + 1, dtype=torch.float64)
    contexts = torch.multinomial(frequencies, 4096, replacement=True, generator=generator)
    noise = torch.multinomial(frequencies, 4096, replacement=True, generator=generator)
    targets = torch.where(torch.rand(4096, generator=generator) < 0.7, (contexts * 7 + 3) % types, noise)
    weights = power_law_weights(torch.bincount(targets, minlength=types), 1.0, 1.0).float()

    def train(row_sampling):
        torch.manual_seed(1)
        embedding = torch.randn(types, features).requires_grad_()
        head = (0.1 * torch.randn(types, features)).requires_grad_()
        optimizer = torch.optim.Adam([embedding, head], lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        left_out = 0
        for step in range(400):
            optimizer.zero_grad()
            rows = torch.arange(512) + 512 * (step % 8)
            hidden = embedding[contexts[rows]]
            hidden.retain_grad()
            pdl_linear_cross_entropy(
                hidden, head, targets[rows], weights, row_sampling=row_sampling, seed=step, backend="eager"
            ).backward()
            left_out += int((hidden.grad.abs().sum(-1) == 0).sum())
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            _, stats = pdl_linear_cross_entropy(embedding[contexts], head, targets, return_stats=True)
            loss = pdl_linear_cross_entropy(embedding[contexts], head, targets, weights)
        return stats.nll.item(), loss.item(), left_out / (400 * 512)

    without, with_sampling = train(0.0), train(2**-4)
    assert without[2] == 0
    assert 0.1 < with_sampling[2] < 0.7
    assert abs(with_sampling[0] - without[0]) < 0.01, (with_sampling, without)
    assert abs(with_sampling[1] - without[1]) < 0.01, (with_sampling, without)
