"""Logits that are a DTensor: their placements say who has which columns and rows, and all numbers are of the whole."""

import torch
from helpers import make_logits, make_weights, run_reference
from helpers.rank_cases import Cases
from helpers.vocabulary import V, assert_every_rank_raises, assert_same_bits, everything
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from pdl_kernels import pdl_cross_entropy

cases = Cases()
B, S = 3, 5
LOGITS = make_logits(B, S, V)
TARGETS = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
TARGETS[0, 1] = -100
WEIGHTS = make_weights("random", V)
U = everything(B * S)["token_weights"].view(B, S)
CLASS, BATCH, SEQ, ALL = Shard(2), Shard(0), Shard(1), Replicate()
PLACED = {  # of logits on a mesh of 2 x 2
    "class and copies": (CLASS, ALL),
    "copies and class": (ALL, CLASS),
    "batch and class": (BATCH, CLASS),
    "class and batch": (CLASS, BATCH),
    "sequence and class": (SEQ, CLASS),
    "class and sequence": (Shard(-1), SEQ),
    "batch and sequence": (BATCH, SEQ),
    "batch twice": (BATCH, BATCH),
    "copies": (ALL, ALL),
}
WEIGHTS_AS = ["none", "plain", "own", "copies", "partial"]


def mesh_of(ranks):
    shape = {2: (2,), 4: (2, 2)}[ranks.size]
    return DeviceMesh("cpu", torch.arange(ranks.size).view(shape))


def rows_of(placements):
    """The placements of what has the logits' rows and no columns."""
    return tuple(ALL if placed in (CLASS, Shard(-1)) else placed for placed in placements)


def table_as(kind, weights, mesh, placements):
    if kind in ("none", "plain"):
        return None if kind == "none" else weights
    own = [Shard(0) if placed in (CLASS, Shard(-1)) else ALL for placed in placements]
    if kind == "partial":  # any other way to hold it is gathered
        part = weights if mesh.get_coordinate()[-1] == 0 else torch.zeros_like(weights)
        return DTensor.from_local(part, mesh, [*[ALL] * (mesh.ndim - 1), Partial()])
    return distribute_tensor(weights, mesh, own if kind == "own" else [ALL] * mesh.ndim)


def check(ranks, mesh, placements, kind="none", *, logits=LOGITS, targets=TARGETS, u=None, upstream=None, **options):
    """Loss, gradient, statistics and their placements against float64 on the whole."""
    placements = tuple(placements)
    rows = rows_of(placements)
    split_rows = any(isinstance(placed, Shard) for placed in rows)
    spread = (lambda tensor: distribute_tensor(tensor, mesh, rows)) if split_rows else (lambda tensor: tensor)
    leaf = distribute_tensor(logits, mesh, placements).requires_grad_()
    table = table_as(kind, WEIGHTS, mesh, placements)
    given = leaf * 1 if options.get("inplace") else leaf
    out = pdl_cross_entropy(given, spread(targets), table, token_weights=None if u is None else spread(u), **options)
    loss, stats = out if options.get("return_stats") else (out, None)
    per_row = options.get("reduction") == "none"
    assert isinstance(loss, DTensor)
    assert not loss.requires_grad or loss.grad_fn is not None
    assert loss.placements == (rows if per_row else (ALL,) * mesh.ndim), loss.placements
    if upstream is None:
        upstream = torch.linspace(-1, 2, targets.numel()).view(targets.shape) if per_row else torch.tensor(-1.5)
    spread_upstream = distribute_tensor(upstream, mesh, rows if per_row else [ALL] * mesh.ndim)
    loss.backward(spread_upstream)
    gradient = leaf.grad
    assert isinstance(gradient, DTensor)
    assert gradient.placements == leaf.placements, gradient.placements
    assert gradient.to_local().shape == leaf.to_local().shape

    whole_loss, whole_gradient = loss.detach().full_tensor(), gradient.full_tensor()
    item = None if per_row else loss.item()
    seen = ranks.everyones((whole_loss, item, None if stats is None else tuple(stats)))
    for rank, other in enumerate(seen):
        assert_same_bits(other[0], whole_loss, f"rank {rank} and here")
        assert other[1] == item
        if stats is not None:
            assert_same_bits(other[2], tuple(stats), f"statistics of rank {rank} and here")
    settings = {name: value for name, value in options.items() if name not in ("inplace", "return_stats", "backend")}
    reference = run_reference(
        logits, targets, None if kind == "none" else WEIGHTS, token_weights=u, upstream=upstream, **settings
    )
    tolerance = {torch.bfloat16: 2**-7, torch.float64: 1e-12}.get(logits.dtype, 1e-5)
    assert whole_loss.shape == reference.loss.shape
    torch.testing.assert_close(
        whole_loss.double(), reference.loss, rtol=min(tolerance, 2e-6), atol=1e-6 * (tolerance > 1e-9)
    )
    torch.testing.assert_close(whole_gradient.double(), reference.gradient, rtol=tolerance, atol=1e-7)
    if stats is not None:
        for name in ("nll", "accuracy", "weight_sum", "token_count"):
            got, expected = getattr(stats, name), getattr(reference.stats, name)
            assert not isinstance(got, DTensor)
            torch.testing.assert_close(
                got.double(), expected.double(), rtol=2e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
    return loss


REDUCTIONS = {"none": ["mean", "none"], "plain": ["token_mean"], "own": ["mean", "none"], "copies": ["sum"],
              "partial": ["mean"]}  # fmt: skip


@cases(4, placed=PLACED, kind=["none", "own"])
@cases(4, placed=["class and batch", "batch and class", "copies"], kind=["plain", "copies", "partial"])
def placements(ranks, placed, kind):
    """z-loss beside weights, which have denominators of their own."""
    mesh = mesh_of(ranks)
    for reduction in REDUCTIONS[kind]:
        options = {"reduction": reduction, "return_stats": True, "z_loss": 0.01, "label_smoothing": 0.1}
        check(ranks, mesh, PLACED[placed], kind, u=U, **options)


@cases(4, placed=["class and batch", "batch and sequence"], reduction=["mean", "token_mean", "sum", "none"])
def every_reduction(ranks, placed, reduction):
    check(ranks, mesh_of(ranks), PLACED[placed], "own", reduction=reduction)


@cases(2, placed=["class", "batch", "copies"], kind=WEIGHTS_AS)
def placements_on_two(ranks, placed, kind):
    mesh = mesh_of(ranks)
    where = {"class": [CLASS], "batch": [BATCH], "copies": [ALL]}[placed]
    for options in ({"reduction": "mean", "return_stats": True}, {"reduction": "none", "softcap": 5.0}):
        check(ranks, mesh, where, kind, **options)
        check(ranks, mesh, where, kind, **options, u=U, z_loss=0.1, label_smoothing=0.1)
    for n in (0.0, 3, torch.tensor(2.5), DTensor.from_local(torch.tensor(2.5), mesh, [ALL])):
        plain = n.to_local() if isinstance(n, DTensor) else n
        leaf = distribute_tensor(LOGITS, mesh, where).requires_grad_()
        targets = distribute_tensor(TARGETS, mesh, [BATCH]) if placed == "batch" else TARGETS
        loss = pdl_cross_entropy(leaf, targets, table_as(kind, WEIGHTS, mesh, where), normalizer=n, z_loss=0.1)
        expected = run_reference(LOGITS, TARGETS, None if kind == "none" else WEIGHTS, normalizer=plain, z_loss=0.1)
        torch.testing.assert_close(loss.full_tensor().double(), expected.loss, rtol=2e-6, atol=0)
        loss.backward()
        torch.testing.assert_close(leaf.grad.full_tensor().double(), expected.gradient, rtol=1e-5, atol=1e-8)


@cases(4, dtype=[torch.float32, torch.bfloat16, torch.float64])
def dtypes(ranks, dtype):
    check(ranks, mesh_of(ranks), [BATCH, CLASS], "own", logits=LOGITS.to(dtype), u=U, z_loss=0.1, return_stats=True)


@cases(4)
def uneven_sizes(ranks):
    """Columns and rows that some ranks have less of, or none; 5 columns on 4 ranks are 2, 2, 1 and 0."""
    flat = DeviceMesh("cpu", torch.arange(4))
    square = mesh_of(ranks)
    for wide, rows in ((5, 3), (9, 1)):
        logits = make_logits(rows, 2, wide)
        targets = torch.randint(wide, (rows, 2), generator=torch.Generator().manual_seed(wide))
        for mesh, where in ((flat, [CLASS]), (flat, [BATCH]), (square, [BATCH, CLASS]), (square, [CLASS, BATCH]),
                            (square, [BATCH, BATCH])):  # fmt: skip
            for reduction in ("mean", "none"):
                check(ranks, mesh, where, logits=logits, targets=targets, reduction=reduction, return_stats=True)


@cases(4, placed=["class and batch", "batch and class", "copies and class"])
def nothing_counted_somewhere(ranks, placed):
    """All targets of one part of the rows are ignored; then all of all; then all weights are 0."""
    mesh = mesh_of(ranks)
    half = TARGETS.clone()
    half[: (B + 1) // 2] = -100
    options = {"return_stats": True, "z_loss": 0.01, "label_smoothing": 0.1}
    for targets in (half, torch.full_like(TARGETS, -100)):
        for reduction in ("mean", "token_mean"):
            check(ranks, mesh, PLACED[placed], "own", targets=targets, reduction=reduction, **options)
    loss = check(ranks, mesh, PLACED[placed], u=torch.zeros(B, S), **options)
    assert loss.item() == 0


@cases(4)
def in_place(ranks):
    mesh = mesh_of(ranks)
    for placed in ("class and batch", "batch and class", "class and copies", "batch and sequence", "copies"):
        for kind in ("none", "own"):
            check(ranks, mesh, PLACED[placed], kind, inplace=True, label_smoothing=0.1)


@cases(2)
def in_place_overwrites_and_comes_once(ranks):
    mesh = mesh_of(ranks)
    leaf = distribute_tensor(LOGITS, mesh, [CLASS]).requires_grad_()
    assert_every_rank_raises(ranks, ValueError, lambda: pdl_cross_entropy(leaf, TARGETS, inplace=True), "a leaf")
    logits = leaf * 1
    loss = pdl_cross_entropy(logits, TARGETS, inplace=True)
    assert torch.equal(logits.to_local(), leaf.to_local())
    loss.backward(retain_graph=True)
    assert torch.equal(logits.to_local(), leaf.grad.to_local())
    assert_every_rank_raises(ranks, RuntimeError, loss.backward, "second backward")


@cases(2, placed=["class", "batch"])
def backward_again(ranks, placed):
    mesh = mesh_of(ranks)
    where = [CLASS] if placed == "class" else [BATCH]
    leaf = distribute_tensor(LOGITS, mesh, where).requires_grad_()
    targets = distribute_tensor(TARGETS, mesh, [BATCH]) if placed == "batch" else TARGETS
    loss = pdl_cross_entropy(leaf, targets, WEIGHTS, z_loss=0.1)
    loss.backward(retain_graph=True)
    first = leaf.grad.full_tensor().clone()
    leaf.grad = None
    (2 * loss).backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), 2 * first, rtol=1e-6, atol=1e-8)


@cases(2, placed=["class", "batch", "copies"])
def without_a_gradient(ranks, placed):
    mesh = mesh_of(ranks)
    where = {"class": [CLASS], "batch": [BATCH], "copies": [ALL]}[placed]
    logits = distribute_tensor(LOGITS, mesh, where)
    targets = distribute_tensor(TARGETS, mesh, [BATCH]) if placed == "batch" else TARGETS
    expected = run_reference(LOGITS, TARGETS, WEIGHTS).loss
    for given in (logits, logits.clone().requires_grad_()):
        with torch.no_grad():
            loss = pdl_cross_entropy(given, targets, WEIGHTS, inplace=True)
        assert not loss.requires_grad
        torch.testing.assert_close(loss.full_tensor().double(), expected, rtol=2e-6, atol=0)
    assert torch.equal(logits.full_tensor(), LOGITS)


@cases(2, placed=["class", "batch"])
def through_a_model(ranks, placed):
    """The head is a DTensor too, and its gradient comes back as it is placed."""
    mesh = mesh_of(ranks)
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(B * S, 4, generator=generator), torch.randn(V, 4, generator=generator)
    by_class = placed == "class"
    x = distribute_tensor(hidden, mesh, [ALL if by_class else BATCH]).requires_grad_()
    w = distribute_tensor(head, mesh, [BATCH if by_class else ALL]).requires_grad_()
    targets = TARGETS.flatten() if by_class else distribute_tensor(TARGETS.flatten(), mesh, [BATCH])
    logits = x @ w.t()
    assert logits.placements == (Shard(1) if by_class else BATCH,)
    pdl_cross_entropy(logits, targets, WEIGHTS, label_smoothing=0.1, inplace=True).backward()
    leaves = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    from reference.pdl import reference_cross_entropy

    reference_cross_entropy(leaves[0] @ leaves[1].T, TARGETS.flatten(), WEIGHTS, label_smoothing=0.1)[0].backward()
    for ours, theirs in ((x, leaves[0]), (w, leaves[1])):
        torch.testing.assert_close(ours.grad.full_tensor().double(), theirs.grad, rtol=1e-5, atol=1e-7)


@cases(2)
def a_mesh_in_another_order(ranks):
    """As DTensor itself has it: what `distribute_tensor` spreads is what `full_tensor` puts together."""
    mesh = DeviceMesh("cpu", torch.tensor([1, 0]))
    targets = TARGETS.clamp_max(15)
    placed = distribute_tensor(LOGITS[..., :16], mesh, [CLASS])
    assert torch.equal(placed.full_tensor(), LOGITS[..., :16])
    check(ranks, mesh, [CLASS], "none", logits=LOGITS[..., :16], targets=targets, reduction="none")


@cases(4)
def a_mesh_of_some_ranks(ranks):
    """The others do nothing, and go on to other meshes."""
    for members in ([0, 1, 2], [1, 3], [2]):
        mesh = DeviceMesh("cpu", torch.tensor(members))
        if ranks.rank in members:
            leaf = distribute_tensor(LOGITS, mesh, [CLASS]).requires_grad_()
            loss = pdl_cross_entropy(leaf, TARGETS, WEIGHTS)
            loss.backward()
            expected = run_reference(LOGITS, TARGETS, WEIGHTS)
            torch.testing.assert_close(loss.full_tensor().double(), expected.loss, rtol=2e-6, atol=0)
            torch.testing.assert_close(leaf.grad.full_tensor().double(), expected.gradient, rtol=1e-5, atol=1e-7)
        ranks.everyones()


@cases(4)
def refused(ranks):
    """On every rank, in the same words, before anything is sent."""
    mesh = mesh_of(ranks)
    targets, group = TARGETS, ranks.group()

    def placed(*placements):
        return distribute_tensor(LOGITS, mesh, placements)

    partial = DTensor.from_local(LOGITS, mesh, [Partial(), ALL])
    by_class = placed(CLASS, ALL)
    by_row = distribute_tensor(targets, mesh, [BATCH, ALL])
    other_mesh = distribute_tensor(targets, DeviceMesh("cpu", torch.arange(4)), [ALL])
    short = distribute_tensor(torch.ones(V - 1), mesh, [Shard(0), ALL])
    for error, call, words in (
        (TypeError, lambda: pdl_cross_entropy(partial, targets), ("Partial", "accepted are Shard and Replicate")),
        (TypeError, lambda: pdl_cross_entropy(placed(CLASS, CLASS), targets), ("one dimension of the mesh at most",)),
        (TypeError, lambda: pdl_cross_entropy(placed(BATCH, CLASS), targets), ("targets are a plain tensor", "rows")),
        (
            TypeError,
            lambda: pdl_cross_entropy(placed(BATCH, CLASS), by_row, token_weights=torch.ones(B, S)),
            ("token_weights are a plain tensor", "rows are split"),
        ),
        (ValueError, lambda: pdl_cross_entropy(by_class, targets, group=group), ("group is given with logits",)),
        (ValueError, lambda: pdl_cross_entropy(by_class, other_mesh), ("targets are on the mesh", "accepted is one")),
        (ValueError, lambda: pdl_cross_entropy(by_class, targets[:, :-1]), ("targets have shape (3, 4)",)),
        (ValueError, lambda: pdl_cross_entropy(by_class, by_row[:1]), ("targets have shape (1, 5)",)),
        (ValueError, lambda: pdl_cross_entropy(by_class, targets, WEIGHTS[:-1]), ("weights have shape (16,)", "(17,)")),
        (ValueError, lambda: pdl_cross_entropy(by_class, targets, short), ("weights have shape (16,)", "(17,)")),
        (ValueError, lambda: pdl_cross_entropy(placed(ALL, ALL), targets, short), ("(16,)", "(17,)")),
        (TypeError, lambda: pdl_cross_entropy(by_class, targets.float()), ("targets are torch.float32",)),
        (IndexError, lambda: pdl_cross_entropy(by_class, targets + V), ("class indices from 0 to 16",)),
        (TypeError, lambda: pdl_cross_entropy(by_class.to_local(), by_row), ("targets are a DTensor",)),
        (
            NotImplementedError,
            lambda: pdl_cross_entropy(by_class, targets, WEIGHTS.clone().requires_grad_()),
            ("weights require grad",),
        ),
        (
            NotImplementedError,
            lambda: pdl_cross_entropy(
                by_class, targets, distribute_tensor(WEIGHTS, mesh, [Shard(0), ALL]).requires_grad_()
            ),
            ("weights require grad",),
        ),
    ):
        assert_every_rank_raises(ranks, error, call, *words, same=False)


@cases(2)
def triton_counts_tokens_too(ranks):
    """The kernels count only for statistics, and the sum over the rows' ranks needs the number always."""
    from helpers import quick_interpreter

    quick_interpreter.speed_up()
    mesh = mesh_of(ranks)
    small = {"logits": LOGITS[:, :1], "targets": torch.tensor([[3], [-100], [16]]), "backend": "triton"}
    for where in ([BATCH], [CLASS]):
        for reduction in ("mean", "token_mean", "none"):
            check(ranks, mesh, where, "own", reduction=reduction, z_loss=0.1, **small)
