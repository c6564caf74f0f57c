"""PDL in torchtitan: alone against plain torch, and in its Trainer, on a CPU (see ranks/torchtitan_ranks.py)."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("torchtitan")

from helpers.ranks import run_ranks
from helpers.traffic_counters import Allocations
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig, ConfigManager
from torchtitan.models.common.linear import Linear
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.models.muse_glimmer.model import SoftCappedLinear

from pdl_kernels import save_weights
from pdl_kernels.integrations import torchtitan as integration
from pdl_kernels.integrations import training_loss
from pdl_kernels.integrations.torchtitan import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss
from reference import reference_cross_entropy

RANKS = Path(__file__).parent / "ranks" / "torchtitan_ranks.py"
B, L, H, V = 3, 8, 4, 11
W = 0.1 + 2.9 * torch.rand(V, generator=torch.Generator().manual_seed(0))
ROUTES = ["logits", "chunks", "linear"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(path, W)
    return str(path)


@pytest.fixture
def batch():
    """Hidden states, an output layer, and targets of which some are ignored, unequally many in each row; float64."""
    hidden = torch.randn(B, L, H, dtype=torch.float64)
    lm_head = Linear.Config(in_features=H, out_features=V).build().double()
    torch.nn.init.normal_(lm_head.weight)
    labels = torch.randint(V, (B, L))
    labels[0, 3:] = labels[1, 1] = -100
    return hidden, lm_head, labels


def build(route, lm_head, weights="", **options):
    """The loss of the Trainer's hidden states, or logits, by one of three routes."""
    if route == "linear":
        loss = PDLLinearCrossEntropyLoss.Config(weights=weights, **options).build(compile_config=CompileConfig())
        loss.set_lm_head(lm_head)
        return loss
    on_logits = PDLCrossEntropyLoss.Config(weights=weights, **options)
    if route == "chunks":
        loss = ChunkedLossWrapper.Config(loss_fn=on_logits, num_chunks=4).build(compile_config=CompileConfig())
        loss.set_lm_head(lm_head)
        return loss
    loss = on_logits.build(compile_config=CompileConfig())
    return lambda hidden, *inputs, **named: loss(lm_head(hidden), *inputs, **named)


def step_of(loss, batch, count, rows=slice(None), upstream=1.0, **named):
    """The value of a training call, and the gradients of hidden states and output layer."""
    hidden, lm_head, labels = batch
    hidden = hidden[rows].clone().requires_grad_()
    lm_head.weight.grad = None
    value, metrics = loss(hidden, labels[rows], count, **named)
    assert metrics == {}
    (upstream * value).backward()
    return value.detach(), hidden.grad, lm_head.weight.grad


def expected_of(batch, count, weights=W, upstream=1.0, **options):
    """The same in plain torch."""
    hidden, lm_head, labels = batch
    hidden = hidden.clone().requires_grad_()
    logits = F.linear(hidden, lm_head.weight)
    if options:
        value = reference_cross_entropy(logits, labels, weights, reduction="sum", **options)[0] / count
    else:
        weights = None if weights is None else weights.double()
        value = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weights, reduction="sum") / count
    return value.detach(), *torch.autograd.grad(upstream * value, (hidden, lm_head.weight))


def assert_close(found, expected, route):
    """float64, but for torchtitan's chunks: they pass the gradient of hidden states on in float32, and the loss."""
    tolerance = 1e-6 if route == "chunks" else 1e-12
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("route", ROUTES)
def test_loss_and_gradients(route, batch, file):
    count = torch.tensor(50)  # more than this batch has: of all micro-batches and processes
    assert_close(step_of(build(route, batch[1], file), batch, count), expected_of(batch, 50), route)


@pytest.mark.parametrize("route", ROUTES)
def test_without_weights_it_is_the_stock_loss(route, batch):
    count = torch.tensor(50)
    found = step_of(build(route, batch[1]), batch, count)
    assert_close(found, expected_of(batch, 50, weights=None), route)
    stock = CrossEntropyLoss.Config().build()
    stock_loss = step_of(lambda hidden, *inputs: stock(batch[1](hidden), *inputs), batch, count)
    torch.testing.assert_close([t.float() for t in found], [t.float() for t in stock_loss])


@pytest.mark.parametrize("route", ROUTES)
def test_micro_batches_make_one_big_batch(route, batch, file):
    """Row 0 has 3 targets, row 1 has 7, row 2 all."""
    loss = build(route, batch[1], file)
    count = batch[2].ne(-100).sum()
    assert count == 18
    values, of_hidden, of_weight = zip(*(step_of(loss, batch, count, rows=[row]) for row in range(B)), strict=True)
    assert_close((sum(values), torch.cat(of_hidden), sum(of_weight)), expected_of(batch, 18), route)


@pytest.mark.parametrize("route", ["logits", "linear"])
def test_upstream_gradient(route, batch, file):
    found = step_of(build(route, batch[1], file), batch, torch.tensor(50), upstream=-3.0)
    assert_close(found, expected_of(batch, 50, upstream=-3.0), route)


def test_gradients_of_processes_are_summed_and_not_averaged(batch, file, monkeypatch):
    """Expecting another upstream gradient, as TrainingLoss does for transformers, would cost a pass over the logits."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    expected = []
    for name in ("pdl_cross_entropy", "pdl_linear_cross_entropy"):
        function = getattr(training_loss, name)

        def recorded(*inputs, function=function, **options):
            expected.append(options["expected_upstream"])
            return function(*inputs, **options)

        monkeypatch.setattr(training_loss, name, recorded)
    for route in ("logits", "linear"):
        step_of(build(route, batch[1], file), batch, torch.tensor(50))
    assert expected == [1.0, 1.0]


@pytest.mark.parametrize("route", ROUTES)
def test_no_targets(route, batch, file):
    hidden, lm_head, labels = batch
    nothing = (hidden, lm_head, torch.full_like(labels, -100))
    for count in (torch.tensor(50), torch.tensor(0)):
        for found in step_of(build(route, lm_head, file), nothing, count):
            assert found.eq(0).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.2}, {"z_loss": 0.1}, {"softcap": 1.5}, {"logit_scale": 0.5}],
    ids=lambda options: "".join(options),
)
def test_options(route, options, batch, file):
    found = step_of(build(route, batch[1], file, **options), batch, torch.tensor(50))
    assert_close(found, expected_of(batch, 50, **options), route)


@pytest.mark.parametrize("route", ROUTES)
def test_token_weights(route, batch, file):
    token_weights = torch.randn(B, L)
    found = step_of(build(route, batch[1], file), batch, torch.tensor(50), token_weights=token_weights)
    assert_close(found, expected_of(batch, 50, token_weights=token_weights), route)


@pytest.mark.parametrize("route", ROUTES)
def test_positions_change_nothing(route, batch, file):
    """The Trainer passes them to the loss."""
    positions = torch.arange(L).expand(B, L)
    found = step_of(build(route, batch[1], file), batch, torch.tensor(50), positions=positions)
    assert_close(found, expected_of(batch, 50), route)


def test_bias_of_the_output_layer(batch, file):
    hidden, _, labels = batch
    lm_head = Linear.Config(in_features=H, out_features=V, bias=True).build().double()
    found = step_of(build("linear", lm_head, file), (hidden, lm_head, labels), torch.tensor(50))
    bias = lm_head.bias.grad
    lm_head.bias.grad = None
    expected = step_of(build("logits", lm_head, file), (hidden, lm_head, labels), torch.tensor(50))
    assert_close((*found, bias), (*expected, lm_head.bias.grad), "linear")
    assert bias.abs().sum() > 0


def test_a_length_that_no_number_of_chunks_divides(batch, file):
    hidden, lm_head, labels = batch
    shorter = (hidden[:, :7], lm_head, labels[:, :7])
    found = step_of(build("linear", lm_head, file, chunk_size=5), shorter, torch.tensor(50))
    assert_close(found, expected_of(shorter, 50), "linear")


@pytest.mark.parametrize("route", ["logits", "chunks"])
def test_nothing_is_read_back_from_the_device(route, batch, file):
    """CUDA graphs, which the Trainer records by default, could not; the loss without logits adapts while they do."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, inputs=(), named=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*inputs, **(named or {}))

    loss, count = build(route, batch[1], file), torch.tensor(50)
    step_of(loss, batch, count)  # the first call copies weights to the device
    with NoReading():
        found = step_of(loss, batch, count)
    assert_close(found, expected_of(batch, 50), route)


# ---------------------------------------------------------------------------------------------------------------------
# Validation: without gradients and without a count


@pytest.mark.parametrize("route", ROUTES)
def test_validation_is_the_unweighted_sum(route, batch, file):
    hidden, lm_head, labels = batch
    loss = build(route, lm_head, file, label_smoothing=0.2, z_loss=0.1)
    with torch.no_grad():
        found = loss(hidden, labels, token_weights=torch.rand(B, L))[0]
    assert_close([found], [expected_of(batch, 1, weights=None)[0]], route)


@pytest.mark.parametrize("route", ROUTES)
def test_validation_with_weights(route, batch, file):
    hidden, lm_head, labels = batch
    loss = build(route, lm_head, file, label_smoothing=0.2, weighted_evaluation=True)
    with torch.no_grad():
        found = loss(hidden, labels)[0]
    assert_close([found], [expected_of(batch, 1, label_smoothing=0.2)[0]], route)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("route", ROUTES)
def test_weights_of_another_length(route, batch, tmp_path):
    path = str(tmp_path / "longer.safetensors")
    save_weights(path, torch.ones(V + 1))
    with pytest.raises(ValueError, match=rf"weights have shape \({V + 1},\); accepted is \({V},\)"):
        step_of(build(route, batch[1], path), batch, torch.tensor(50))


@pytest.mark.parametrize("config", [PDLCrossEntropyLoss.Config, PDLLinearCrossEntropyLoss.Config])
def test_what_is_refused_when_it_is_built(config, file):
    with pytest.raises(FileNotFoundError, match="no_such_file"):
        config(weights="no_such_file.safetensors").build(compile_config=CompileConfig())
    with pytest.raises(ValueError, match=r"label_smoothing is 2\.0"):
        config(weights=file, label_smoothing=2.0).build(compile_config=CompileConfig())


def test_output_layers_that_do_more(file):
    loss = PDLLinearCrossEntropyLoss.Config(weights=file).build(compile_config=CompileConfig())
    with pytest.raises(TypeError, match="is a SoftCappedLinear, which does more than a product"):
        loss.set_lm_head(SoftCappedLinear.Config(in_features=H, out_features=V, output_soft_cap_temp=2.0).build())
    with pytest.raises(RuntimeError, match="call set_lm_head first"):
        loss(torch.zeros(1, 1, H), torch.zeros(1, 1, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_the_trainer_hands_over_the_output_layer():
    """It asks with isinstance."""
    assert issubclass(PDLLinearCrossEntropyLoss, ChunkedLossWrapper)


def test_example_of_the_docstring(file):
    lines = PDLCrossEntropyLoss.__doc__.split("config_registry`::\n\n")[1].split("\n\n")[0]
    lines += PDLLinearCrossEntropyLoss.__doc__.split("config_registry`::\n\n")[1]
    code = re.sub("^ +", "", lines, flags=re.MULTILINE).replace("weights.safetensors", file)
    assert code.count(file) == 2
    names = {**vars(integration), "llama3_debugmodel": llama3_debugmodel}
    kinds = []
    for line in code.splitlines():
        exec(line, names)
        if "loss" in line:
            loss = names["config"].loss.build(compile_config=CompileConfig())
            kinds.append(type(loss))
            of_pdl = loss.loss_fn if kinds[-1] is ChunkedLossWrapper else loss
            assert torch.equal(of_pdl.loss.table, W)
            assert names["config"].to_dict()["loss"]
    assert kinds == [PDLCrossEntropyLoss, ChunkedLossWrapper, PDLLinearCrossEntropyLoss]


def test_options_from_the_command_line(file, monkeypatch):
    """As `--module MINE --config FUNCTION --loss.weights FILE`."""
    config = llama3_debugmodel()
    config.loss = PDLLinearCrossEntropyLoss.Config()
    monkeypatch.setattr(ConfigManager, "_load_config", lambda self, arguments: (config, arguments))
    parsed = ConfigManager().parse_args(["--loss.weights", file, "--loss.z-loss", "0.1", "--loss.chunk-size", "64"])
    assert (parsed.loss.weights, parsed.loss.z_loss, parsed.loss.chunk_size) == (file, 0.1, 64)
    loss = parsed.loss.build(compile_config=parsed.compile)
    assert isinstance(loss, PDLLinearCrossEntropyLoss)
    assert torch.equal(loss.loss.table, W)
    assert loss.loss.options["chunk_size"] == 64


@pytest.mark.parametrize("route", ROUTES)
def test_no_logits_of_all_tokens(route, batch, file):
    """In forward and backward, with chunks of 4 of 24 tokens; logits, to show that the watch sees them."""
    loss = build(route, batch[1], file, **({"chunk_size": 4} if route == "linear" else {}))
    with Allocations() as allocated:
        step_of(loss, batch, torch.tensor(50))
    assert bool(allocated.large(B * L * V)) == (route == "logits")


@pytest.mark.parametrize("route", ["logits", "linear"])
def test_in_a_compiled_step(route, batch, file):
    """The graph does not break."""
    loss = build(route, batch[1], file)
    compiled = torch.compile(lambda *inputs: loss(*inputs)[0], fullgraph=True, backend="aot_eager")
    for count in (50, 18):
        found = step_of(lambda *inputs: (compiled(*inputs), {}), batch, torch.tensor(count))
        assert_close(found, expected_of(batch, count), route)


# ---------------------------------------------------------------------------------------------------------------------
# In the Trainer

NEW = hasattr(dist, "set_timeout")  # torch 2.14, which torchtitan 0.3 needs for much of what several processes do
BACKEND = "spmd_types" if NEW else "partial_dtensor"


def calls_of(*losses):
    """With the default backend a process can have one Trainer alone."""
    return pytest.mark.parametrize("losses", [[loss] for loss in losses] if NEW else [losses], ids=" ".join)


several = calls_of(*ROUTES)


@pytest.mark.trainers
def test_trainer(tmp_path):
    """Two steps of four micro-batches, and a validation between them; FSDP's hooks run with one process, too."""
    losses = [*ROUTES, "linear tied", "linear bfloat16"]
    (said,) = run_ranks(1, RANKS, tmp_path, "spmd_types", "data", *losses)
    assert said.count("relative error of the gradient") == 2 * len(losses), said
    assert said.count("in plain torch") == len(losses), said


@pytest.mark.trainers
@several
def test_trainer_of_two_processes(losses, tmp_path):
    for said in run_ranks(2, RANKS, tmp_path, BACKEND, "data", *losses):
        assert said.count("relative error of the gradient") == 2 * len(losses), said
        assert said.count("in plain torch") == len(losses), said


@pytest.mark.trainers
@pytest.mark.skipif(not NEW, reason="torchtitan 0.3 gives torch's pipelines arguments that torch 2.13 does not know")
@several
def test_trainer_with_pipeline_parallelism(losses, tmp_path):
    """The last process has the output layer and the loss."""
    first, last = run_ranks(2, RANKS, tmp_path, BACKEND, "pipeline", *losses)
    assert first.count("relative error of the gradient") == last.count("relative error of the gradient") == 2, last
    assert (first.count("in plain torch"), last.count("in plain torch")) == (0, 1), last


@pytest.mark.trainers
@pytest.mark.skipif(not NEW, reason='the backend "spmd_types" of torchtitan 0.3, which it is for, needs torch 2.14')
@pytest.mark.parametrize("kind", ["checked", "checked_tensor"])
@several
def test_trainer_that_checks_types(losses, kind, tmp_path):
    for said in run_ranks(2, RANKS, tmp_path, BACKEND, kind, *losses):
        assert said.count("relative error of the gradient") == 2 * len(losses), said


@pytest.mark.trainers
@calls_of(*ROUTES, "shards")
def test_trainer_with_tensor_parallelism(losses, tmp_path):
    """A vocabulary that is sharded over two processes; "shards" are the losses alone, with every option."""
    trained = len([name for name in losses if name != "shards"])
    for said in run_ranks(2, RANKS, tmp_path, BACKEND, "tensor", *losses):
        assert said.count("relative error of the gradient") == 2 * trained, said
        assert said.count("in plain torch") == trained, said
        assert said.count("all options of shards") == len(losses) - trained, said


@pytest.mark.trainers
def test_trainer_with_data_and_tensor_parallelism(tmp_path):
    for said in run_ranks(4, RANKS, tmp_path, BACKEND, "tensor", "linear"):
        assert said.count("relative error of the gradient") == 2, said
        assert said.count("in plain torch") == 1, said
