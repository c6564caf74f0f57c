"""The losses on shards of the vocabulary, alone, by each of two processes; after torchtitan's Trainer in the same ones.

Every process holds value and gradients against plain torch in float64, for every option.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.linear import Linear

from pdl_kernels import save_weights
from pdl_kernels.integrations.torchtitan import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss
from reference import reference_cross_entropy

B, L, H, V = 2, 8, 4, 11  # the first process has 6 of the columns
COUNT = 50  # more targets than there are here: those of all micro-batches and processes
OPTIONS = [{}, {"label_smoothing": 0.2}, {"z_loss": 0.1}, {"softcap": 1.5}, {"logit_scale": 0.5}]
OPTIONS += [{name: value for options in OPTIONS for name, value in options.items()}]
CONFIGS = {"logits": PDLCrossEntropyLoss.Config, "linear": PDLLinearCrossEntropyLoss.Config}


def make_batch():
    """The same on all processes: hidden states, the output layer's weight and bias, targets, token weights, weights."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator).double() for size in [(B, L, H), (V, H), (V,)])
    labels = torch.randint(V, (B, L), generator=generator)
    labels[0, 3:] = -100
    token_weights, weights = torch.randn(B, L, generator=generator), 0.1 + torch.rand(V, generator=generator)
    return hidden, weight, bias, labels, token_weights, weights


def expected_of(batch, with_token_weights, weighted, count=COUNT, **options):
    """The loss, and the gradients of logits, hidden states, weight and bias."""
    *parameters, labels, token_weights, weights = batch
    parameters = [parameter.clone().requires_grad_() for parameter in parameters]
    logits = F.linear(*parameters)
    logits.retain_grad()
    options |= {"token_weights": token_weights} if with_token_weights else {}
    loss = reference_cross_entropy(logits, labels, weights if weighted else None, reduction="sum", **options)[0] / count
    loss.backward()
    return loss.detach(), logits.grad, *(parameter.grad for parameter in parameters)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def make_lm_head(weight, bias):
    lm_head = Linear.Config(in_features=H, out_features=V, bias=True).build()
    lm_head.weight, lm_head.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return lm_head


# ---------------------------------------------------------------------------------------------------------------------
# What torchtitan's backends hand over, and what they make of the gradients


class OnDTensors:
    """The backend "partial_dtensor"."""

    def __init__(self, mesh):
        self.mesh = mesh

    def logits(self, whole):
        shard = distribute_tensor(whole, self.mesh, [Shard(2)]).requires_grad_()
        return shard, lambda: shard.grad.full_tensor()

    def hidden(self, whole):
        """Gathered by the norm, as sequence parallelism does."""
        shard = distribute_tensor(whole, self.mesh, [Shard(1)]).requires_grad_()
        gathered = shard.redistribute(placements=[Replicate()], async_op=True)
        return gathered, lambda: shard.grad.full_tensor()

    def lm_head(self, weight, bias):
        shards = make_lm_head(*(distribute_tensor(whole, self.mesh, [Shard(0)]) for whole in (weight, bias)))
        return shards, lambda: [shards.weight.grad.full_tensor(), shards.bias.grad.full_tensor()]


class OnPlainTensors(OnDTensors):
    """The backend "spmd_types"."""

    def mine(self, whole, dim):
        return distribute_tensor(whole, self.mesh, [Shard(dim)]).to_local()

    def gathered(self, mine, dim, shape):
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(mine, self.mesh, [Shard(dim)], shape=shape, stride=stride).full_tensor()

    def logits(self, whole):
        shard = self.mine(whole, 2).requires_grad_()
        return shard, lambda: self.gathered(shard.grad, 2, whole.shape)

    def hidden(self, whole):
        """The type is R: torchtitan adds up the gradients of the processes."""
        mine = whole.clone().requires_grad_()

        def gradient():
            torch.distributed.all_reduce(mine.grad, group=self.mesh.get_group())
            return mine.grad

        return mine, gradient

    def lm_head(self, weight, bias):
        shards = make_lm_head(self.mine(weight, 0), self.mine(bias, 0))

        def gradients():
            return [self.gathered(shards.weight.grad, 0, (V, H)), self.gathered(shards.bias.grad, 0, (V,))]

        return shards, gradients


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def build(route, file, **options):
    return CONFIGS[route](weights=file, **options).build(compile_config=CompileConfig())


def check_options(backend, file):
    """Without a file the weights are 1."""
    batch = make_batch()
    hidden, weight, bias, labels, token_weights, _ = batch
    for number, options in enumerate(OPTIONS):
        with_token_weights = number % 2 == 1
        named = {"token_weights": token_weights} if with_token_weights else {}
        value, of_logits, of_hidden, *of_lm_head = expected_of(batch, with_token_weights, bool(file), **options)
        logits, gradient = backend.logits(F.linear(hidden, weight, bias))
        loss, metrics = build("logits", file, **options)(logits, labels, torch.tensor(COUNT), **named)
        assert (type(loss), metrics) == (torch.Tensor, {})
        loss.backward()
        assert_close((loss.detach(), gradient()), (value, of_logits))
        pred, gradient = backend.hidden(hidden)
        linear = build("linear", file, **options)
        lm_head, gradients = backend.lm_head(weight, bias)
        linear.set_lm_head(lm_head)
        loss, metrics = linear(pred, labels, torch.tensor(COUNT), **named)
        assert (type(loss), metrics) == (torch.Tensor, {})
        loss.backward()
        assert_close((loss.detach(), gradient(), *gradients()), (value, of_hidden, *of_lm_head))


@torch.no_grad()
def check_validation(backend, file):
    """The unweighted sum."""
    batch = make_batch()
    hidden, weight, bias, labels, *_ = batch
    with torch.enable_grad():
        expected = expected_of(batch, False, False, count=1)[0]
    linear = build("linear", file, label_smoothing=0.2)
    linear.set_lm_head(backend.lm_head(weight, bias)[0])
    assert_close(linear(backend.hidden(hidden)[0], labels)[0], expected)
    logits = backend.logits(F.linear(hidden, weight, bias))[0]
    assert_close(build("logits", file, label_smoothing=0.2)(logits, labels)[0], expected)


def check_refused_dtensors(mesh, file):
    hidden, weight, bias, labels, *_ = make_batch()
    pairs = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp_shard", "tp"))
    data = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    for other_mesh, placements in ((pairs, [Shard(0), Shard(2)]), (data, [Shard(0)])):
        logits = distribute_tensor(F.linear(hidden, weight), other_mesh, placements)
        with pytest.raises(TypeError, match=r"pred is a DTensor.*'dp_shard',.*full_dtensor.*accepted are.*spmd_types"):
            build("logits", file)(logits, distribute_tensor(labels, data, [Shard(0)]))
    linear = build("linear", file)
    instead = r"ChunkedLossWrapper\.Config\(loss_fn=PDLCrossEntropyLoss"
    everywhere = distribute_tensor(hidden, mesh, [Replicate()])
    for weight_mesh, placements, pred, match in (
        (pairs, [Shard(0), Shard(0)], everywhere, "the output layer's weight is a DTensor.*full_dtensor"),
        (mesh, [Shard(1)], everywhere, rf"placed \(Shard\(dim=1\),\), and pred is \(Replicate\(\),\).*{instead}"),
        (mesh, [Shard(0)], hidden, rf"and pred is a plain tensor; accepted are.*{instead}"),
        (None, None, everywhere, rf"pred is a DTensor placed \(Replicate\(\),\), and.*{instead}"),
    ):
        placed = weight if weight_mesh is None else distribute_tensor(weight, weight_mesh, placements)
        linear.set_lm_head(make_lm_head(placed, bias))
        with pytest.raises(TypeError, match=match):
            linear(pred, labels)


def check_refused_plain_tensors(file):
    """What is whole on every process would pass for a shard."""
    hidden, weight, bias, labels, *_ = make_batch()
    with pytest.raises(ValueError, match=f"pred has {V} columns, as many as there are weights, on each of 2 processes"):
        build("logits", file)(F.linear(hidden, weight), labels)
    linear = build("linear", file)
    linear.set_lm_head(make_lm_head(weight, bias))
    with pytest.raises(ValueError, match=f"has all {V} rows on each of 2 processes"):
        linear(hidden, labels)


def check_chunks(mesh, file):
    """`ChunkedLossWrapper` as it is."""
    batch = make_batch()
    hidden, weight, bias, labels, *_ = batch
    value, _, of_hidden, *of_lm_head = expected_of(batch, False, True)
    config = ChunkedLossWrapper.Config(loss_fn=PDLCrossEntropyLoss.Config(weights=file), num_chunks=4)
    chunks = config.build(compile_config=CompileConfig())
    backend = OnDTensors(mesh)
    lm_head, gradients = backend.lm_head(weight, bias)
    chunks.set_lm_head(lm_head)
    pred, gradient = backend.hidden(hidden)
    loss = chunks(pred, labels, torch.tensor(COUNT))[0]
    loss.backward()
    found = loss.detach(), gradient(), *gradients()
    # It passes gradients of hidden states on in float32, and the loss.
    for one, other in zip(found, (value, of_hidden, *of_lm_head), strict=True):
        one = one.full_tensor() if isinstance(one, DTensor) else one
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)


def check_shards(folder):
    file = f"{folder}/few_weights.safetensors"
    save_weights(file, make_batch()[-1])  # each process writes the same
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    set_spmd_backend("partial_dtensor")
    check_options(OnDTensors(mesh), file)
    check_options(OnDTensors(mesh), "")
    with loss_parallel():  # other versions of torchtitan enter it
        check_options(OnDTensors(mesh), file)
    check_validation(OnDTensors(mesh), file)
    check_chunks(mesh, file)
    check_refused_dtensors(mesh, file)
    set_spmd_backend("spmd_types")
    with set_current_spmd_mesh(mesh):
        check_options(OnPlainTensors(mesh), file)
        check_options(OnPlainTensors(mesh), "")
        check_validation(OnPlainTensors(mesh), file)
        check_refused_plain_tensors(file)
    print("all options of shards")
