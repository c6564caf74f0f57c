"""The loss on logits with split columns under autograd: in place, repeated backward, no gradient, checkpoints."""

import contextlib

import torch
from helpers import Watching, make_logits, make_weights, run_reference
from helpers.linear import make_problem
from helpers.rank_cases import Cases
from helpers.vocabulary import (
    UNEVEN,
    V,
    assert_every_rank_raises,
    assert_same_bits,
    border_targets,
    check_split,
    check_split_linear,
    columns,
    everything,
    own,
)
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.eager import pieces

cases = Cases()
SPLIT = UNEVEN[2]
TARGETS = border_targets(SPLIT)
N = len(TARGETS)
WEIGHTS = make_weights("random", V)
LOGITS = make_logits(N, V)


def expected(ranks, logits=LOGITS, targets=TARGETS, **options):
    """This rank's part of the gradient."""
    gradient = run_reference(logits, targets, WEIGHTS, **options).gradient
    return gradient[..., columns(SPLIT, ranks.rank)].float()


def produced(ranks, logits=LOGITS, make=lambda leaf: leaf * 1):
    """(leaf, this rank's columns as a model made them)"""
    leaf = logits[..., columns(SPLIT, ranks.rank)].clone().requires_grad_()
    return leaf, make(leaf)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


@cases(2, upstream=[1.0, -3.0, 0.0], own_weights=[False, True])
def inplace(ranks, upstream, own_weights):
    """Forward leaves the logits, backward puts the gradient in their storage."""
    table = own(WEIGHTS, SPLIT, ranks.rank) if own_weights else WEIGHTS
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 9.0}, {"reduction": "sum"}):
        leaf, logits = produced(ranks)
        loss = pdl_cross_entropy(logits, TARGETS, table, group=ranks.group(), inplace=True, **options)
        assert torch.equal(logits, leaf)
        (given,) = torch.autograd.grad(loss, logits, torch.tensor(upstream))
        assert given.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        assert torch.equal(given, logits.detach())
        close(given, expected(ranks, upstream=upstream, **options))
        assert (given[3] == 0).all()  # the ignored row


@cases(2)
def inplace_in_other_layouts(ranks):
    logits, targets = make_logits(3, 4, V), torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(0))
    wanted, mine = expected(ranks, logits, targets), columns(SPLIT, ranks.rank)
    for make in (
        lambda leaf: (leaf * 1).transpose(0, 1).contiguous().transpose(0, 1),
        lambda leaf: torch.cat([leaf, leaf[:, :1]], 1)[:, :-1],
        lambda leaf: torch.cat([leaf, leaf], -1)[..., : leaf.shape[-1]],
    ):
        leaf = logits[..., mine].clone().requires_grad_()
        pdl_cross_entropy(make(leaf), targets, WEIGHTS, group=ranks.group(), inplace=True).backward()
        close(leaf.grad, wanted)


@cases(2)
def inplace_is_as_out_of_place_bit_for_bit(ranks):
    group, found = ranks.group(), []
    for dtype in (torch.float32, torch.bfloat16):
        for flag in (False, True):
            leaf, logits = produced(ranks, LOGITS.to(dtype))
            loss = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, inplace=flag, label_smoothing=0.1)
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        assert_same_bits(found[-2], found[-1], "out of place and in place")


@cases(2)
def inplace_goes_backward_once(ranks):
    leaf, logits = produced(ranks)
    loss = 3 * pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=ranks.group(), inplace=True)
    loss.backward(retain_graph=True)
    wanted = expected(ranks, upstream=3.0)
    close(leaf.grad, wanted)
    assert_every_rank_raises(ranks, RuntimeError, loss.backward, "second backward", "inplace=True", "use inplace=False")
    close(leaf.grad, wanted)


@cases(2)
def inplace_without_effect(ranks):
    """Where no gradient is needed."""
    group = ranks.group()
    leaf, logits = produced(ranks)
    with torch.no_grad():
        pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, inplace=True)
        pdl_cross_entropy(leaf, TARGETS, WEIGHTS, group=group, inplace=True)
    assert torch.equal(logits, leaf)
    assert logits._version == 0
    frozen = leaf.detach().clone()
    assert not pdl_cross_entropy(frozen, TARGETS, WEIGHTS, group=group, inplace=True).requires_grad
    assert torch.equal(frozen, leaf)


@cases(2)
def inplace_per_row(ranks):
    """Backward writes over the logits there too; rows whose upstream gradient is 0 get one of 0."""
    leaf, logits = produced(ranks)
    rows = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=ranks.group(), inplace=True, reduction="none")
    upstream = torch.linspace(0, 2, N)
    assert torch.equal(logits, leaf)
    rows.backward(upstream, retain_graph=True)
    close(leaf.grad, expected(ranks, reduction="none", upstream=upstream))
    assert torch.equal(logits.detach(), leaf.grad)
    assert_every_rank_raises(ranks, RuntimeError, lambda: rows.backward(upstream), "second backward")


@cases(2, who=["producer", "consumer before", "consumer after", "second loss", "first loss out of place"])
def inplace_is_seen_by_whoever_saved_the_logits(ranks, who):
    """Autograd's error, or the right gradient: never another one."""
    group = ranks.group()

    def loss_on(logits, *, inplace=True):
        return pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, inplace=inplace)

    leaf, logits = produced(ranks, make=torch.exp if who == "producer" else lambda leaf: leaf * 1)
    if who == "producer":
        total = loss_on(logits)  # exp has saved its result, which is the logits
    elif who == "consumer before":
        other = logits.square().sum()
        total = loss_on(logits) + other
    elif who == "consumer after":
        total = loss_on(logits)
        total = total + logits.square().sum()
    else:
        first = loss_on(logits, inplace=who == "second loss")
        total = first + loss_on(logits)
    error = None
    try:
        total.backward()
    except RuntimeError as raised:
        error = str(raised)
    assert len(set(ranks.everyones(error is None))) == 1
    if who != "consumer after":
        assert error is not None
    if error is None:
        close(leaf.grad, expected(ranks) + 2 * leaf.detach())
    else:
        assert "modified by an inplace operation" in error


@cases(2)
def inplace_refused(ranks):
    """A leaf, a view of one, and elements that share memory; on every rank, so that none waits for another."""
    group = ranks.group()
    mine = columns(SPLIT, ranks.rank)
    leaf = LOGITS[:, mine].clone().requires_grad_()
    for logits, word in (
        (leaf, "a leaf"),
        (leaf[:, :], "view of a leaf"),
        ((leaf * 1)[:1].expand(N, -1), "overlap"),
    ):
        assert_every_rank_raises(
            ranks, ValueError, lambda z=logits: pdl_cross_entropy(z, TARGETS, group=group, inplace=True),
            "inplace=True", word, same=False,
        )  # fmt: skip


@cases(2, inplace=[False, True])
def logits_changed_before_backward(ranks, inplace):
    """Backward reads them, so autograd says so."""
    _, logits = produced(ranks)
    loss = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=ranks.group(), inplace=inplace)
    logits.detach().zero_()
    assert_every_rank_raises(ranks, RuntimeError, loss.backward, "modified by an inplace operation", same=False)


@cases(2, own_weights=[False, True])
def backward_again(ranks, own_weights):
    """The same gradient in other memory, whatever became of the first one; and for another upstream gradient."""
    table = own(WEIGHTS, SPLIT, ranks.rank) if own_weights else WEIGHTS
    for reduction in ("mean", "none"):
        leaf, logits = produced(ranks)
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
        loss = pdl_cross_entropy(logits, TARGETS, table, group=ranks.group(), **options).sum()
        (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
        kept = first.clone()
        first.fill_(torch.nan)
        (second,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert_same_bits(kept, second, "first and second backward")
        (third,) = torch.autograd.grad(loss, logits, torch.tensor(-2.0))
        close(third, -2 * kept)
        assert torch.equal(logits, leaf)
        assert logits._version == 0


@cases(2)
def two_losses_on_the_same_logits(ranks):
    leaf, logits = produced(ranks)
    group = ranks.group()
    first = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group)
    second = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, reduction="sum", z_loss=0.1)
    (first + 2 * second).backward()
    close(leaf.grad, expected(ranks) + 2 * expected(ranks, reduction="sum", z_loss=0.1))


@cases(2)
def second_derivatives_raise(ranks):
    leaf, logits = produced(ranks)
    loss = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=ranks.group())
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    close(gradient.detach(), expected(ranks))
    assert_every_rank_raises(
        ranks,
        RuntimeError,
        lambda: torch.autograd.grad(gradient.square().sum(), leaf),
        "cannot be differentiated twice",
    )


@cases(2, kind=["grad", "vmap", "jvp", "batched"])
def transforms_raise(ranks, kind):
    """Before anything is sent, so that no rank waits."""
    group = ranks.group()
    leaf, logits = produced(ranks)

    def loss_of(z):
        return pdl_cross_entropy(z, TARGETS, WEIGHTS, group=group, reduction="none" if kind == "batched" else "mean")

    calls = {
        "grad": lambda: torch.func.grad(loss_of)(logits.detach()),
        "vmap": lambda: torch.vmap(loss_of)(logits.detach()[None]),
        "jvp": lambda: torch.func.jvp(loss_of, (logits.detach(),), (torch.ones_like(logits),)),
        "batched": lambda: torch.autograd.grad(loss_of(logits), leaf, torch.eye(N), is_grads_batched=True),
    }
    assert_every_rank_raises(ranks, RuntimeError, calls[kind], "does not support", "pdl_cross_entropy(..., group=...)")


# ---------------------------------------------------------------------------------------------------------------------
# No gradient, memory, other ways to run


class Allocations(Watching):
    """Bytes of every new storage that an operator returns."""

    def __init__(self):
        super().__init__()
        self.seen, self.alive = {}, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((arguments, keywords)) if isinstance(t, torch.Tensor)}
        outputs = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                self.seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                self.alive.append(tensor)  # so that no address comes again
        return outputs


@contextlib.contextmanager
def small_pieces():
    before, pieces.CPU_PIECE_BYTES = pieces.CPU_PIECE_BYTES, 1 << 14
    try:
        yield
    finally:
        pieces.CPU_PIECE_BYTES = before


@cases(2)
def memory(ranks):
    """Nothing of the logits' size without a gradient or in place, one such buffer otherwise, and that in backward."""
    rows, wide, group = 200, 300, ranks.group()
    leaf = make_logits(rows, wide // 2, seed=ranks.rank).requires_grad_()
    targets = torch.randint(wide, (rows,), generator=torch.Generator().manual_seed(0))
    options = {"group": group, "return_stats": True, "label_smoothing": 0.1, "softcap": 5.0}
    size = leaf.untyped_storage().nbytes()
    with small_pieces():
        with torch.no_grad(), Allocations() as without:
            value = pdl_cross_entropy(leaf, targets, **options)[0]
        assert not value.requires_grad
        assert 0 < max(without.seen.values()) < size / 2
        with Allocations() as frozen:
            pdl_cross_entropy(leaf.detach(), targets, **options)
        assert max(frozen.seen.values()) < size / 2
        for inplace in (False, True):
            logits = leaf * 1
            with Allocations() as forward:
                loss = pdl_cross_entropy(logits, targets, inplace=inplace, **options)[0]
            assert torch.equal(loss, value)
            assert max(forward.seen.values()) < size / 2
            with Allocations() as backward:
                torch.autograd.grad(loss, logits)
            assert sum(nbytes > size / 2 for nbytes in backward.seen.values()) == (0 if inplace else 1)


@cases(2)
def memory_that_nobody_has_written(ranks):
    """torch.empty holds nan here."""
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({}, everything(N), {"reduction": "none"}):
            for own_weights in (False, True):
                for split in (SPLIT, (V, 0)):
                    check_split(ranks, LOGITS, TARGETS, WEIGHTS, split=split, own_weights=own_weights, **options)
        problem = make_problem(N, V=V)._replace(targets=TARGETS)
        for options in ({"chunk_size": 4}, {"compact": False, "reduction": "none"}, {"sequence_parallel": True}):
            check_split_linear(ranks, problem, WEIGHTS, **options)
    finally:
        torch.use_deterministic_algorithms(False)


@cases(2)
def gradients_on_some_ranks_only(ranks):
    """Backward sends nothing, so that a rank may leave it out."""
    _, logits = produced(ranks)
    group = ranks.group()
    for somebody in (0, 1):
        if ranks.rank == somebody:
            (given,) = torch.autograd.grad(pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group), logits)
            close(given, expected(ranks))
        elif somebody:
            with torch.no_grad():
                pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group)
        else:
            pdl_cross_entropy(logits.detach(), TARGETS, WEIGHTS, group=group)


@cases(2)
def after_inference_mode(ranks):
    """What is remembered of a call in inference mode serves one with a gradient."""
    group = ranks.group()
    leaf, logits = produced(ranks)
    for smoothing in (0.0, 0.1):
        with torch.inference_mode():
            value = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, label_smoothing=smoothing)
        loss = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, label_smoothing=smoothing)
        assert torch.equal(loss, value)
        (given,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        close(given, expected(ranks, label_smoothing=smoothing))


@cases(2)
def autocast_changes_nothing(ranks):
    group = ranks.group()
    results = []
    for enabled in (False, True):
        leaf, logits = produced(ranks)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = pdl_cross_entropy(logits, TARGETS, WEIGHTS, group=group, label_smoothing=0.1, z_loss=0.1)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert_same_bits(results[0], results[1], "without and with autocast")


@cases(2, reentrant=[False, True])
def checkpoints(ranks, reentrant):
    """The forward that a backward repeats is one on every rank."""
    group = ranks.group()
    for reduction in ("mean", "none"):
        leaf, logits = produced(ranks)

        def loss_of(z, reduction=reduction):
            return pdl_cross_entropy(z * 1, TARGETS, WEIGHTS, group=group, reduction=reduction)

        checkpoint(loss_of, logits, use_reentrant=reentrant).sum().backward()
        close(leaf.grad, expected(ranks, reduction=reduction))


@cases(2)
def saved_tensors_may_be_moved(ranks):
    """Hooks that copy what is saved, as offloading to a CPU does."""
    leaf, logits = produced(ranks)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved.clone()):
        loss = pdl_cross_entropy(logits, TARGETS, own(WEIGHTS, SPLIT, ranks.rank), group=ranks.group())
    loss.backward()
    close(leaf.grad, expected(ranks))
