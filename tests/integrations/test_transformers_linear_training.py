"""Other ways to train without logits: checkpointing, bfloat16, the compiler, DDP, threads, and adapters of PEFT."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import needs_compiler
from helpers.trainer_models import next_labels, sharp_model, take_gradients
from helpers.transformers_hooks import W, assert_same, reference
from helpers.transformers_linear import ATTENTION, TRANSFORMS, expected_of, patched, step, targets_of, with_adapters
from torch import nn

from pdl_kernels.integrations.transformers import use_pdl_linear_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to train


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_gradient_checkpointing(name, use_reentrant, batch):
    model = patched(name)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_same(step(model, batch), expected_of(name, batch))


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "t5", "bart"])
def test_bfloat16_autocast(name, batch):
    def gradients(model, loss_of):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        assert loss.dtype == torch.float32
        loss.backward()
        return loss.item(), take_gradients(model)

    targets = targets_of(name, batch["labels"])
    expected = gradients(sharp_model(name), lambda model: reference(model(**batch).logits.float(), targets))
    assert_same(gradients(patched(name), lambda model: model(**batch).loss), expected, 3e-2)


@pytest.mark.parametrize("name", ["llama", "granite", "phi", "t5", "bart", "gemma2", "cohere"])
def test_a_bfloat16_model(name, batch):
    model = sharp_model(name).bfloat16()
    expected = expected_of(name, batch, model)
    assert tuple(use_pdl_linear_loss(model, W).transform) == TRANSFORMS.get(name, (1.0, None, False))
    assert_same(step(model, batch), expected, 3e-2)


@pytest.mark.trainers
@needs_compiler
def test_a_compiled_model(batch):
    """It trains as without the compiler; the second step finds the table copied and compiles again, no later one."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    model = patched("llama")
    run = torch.compile(model, backend="aot_eager")
    for count in (17, 18, 19):
        outputs = run(**batch, num_items_in_batch=torch.tensor(float(count)))
        assert outputs.logits is None
        outputs.loss.backward()
        assert_same((outputs.loss.item(), take_gradients(model)), expected_of("llama", batch, count=count))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]
    model.pdl_linear_loss.undo()
    with pytest.raises(TypeError, match="accepted is a PreTrainedModel: call use_pdl_linear_loss before"):
        use_pdl_linear_loss(run, W)


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel(batch):
    model = patched("llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # DDP complains in the second step of what the first one left without gradients
        outputs = wrapped(**batch, num_items_in_batch=torch.tensor(17.0))
        outputs.loss.backward()
        assert_same((outputs.loss.item(), take_gradients(model)), expected_of("llama", batch, count=17))


def test_two_models_in_two_threads(batch):
    """Their losses are their own, and a call of the other's output layer in between is none of them."""
    names = ["llama", "qwen2"]
    models = [patched(name) for name in names]
    models[1].pdl_linear_loss.set_weights(W.flip(0))
    expected = [expected_of("llama", batch), expected_of("qwen2", batch, weights=W.flip(0))]
    inside = threading.Barrier(2)

    def wait(*_):
        inside.wait(timeout=30)  # both models are in the middle of their forward

    for model in models:
        model.model.norm.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(lambda model: step(model, batch), models), expected, strict=True):
            assert_same(found, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


ADAPTERS = {
    "attention": ATTENTION,
    "attention and a trained output layer": ATTENTION | {"modules_to_save": ["lm_head"]},
    "attention, MLP, embeddings": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("order", ["patch first", "adapters first"])
def test_adapters(order, options, batch):
    model = with_adapters(sharp_model("llama"), **options)
    loss = reference(model(**batch).logits, next_labels(batch["labels"]))
    loss.backward()
    expected = loss.item(), take_gradients(model)
    assert any("lora" in name for name in expected[1])
    assert any("lm_head" in name for name in expected[1]) == ("modules_to_save" in options)
    base = sharp_model("llama")
    if order == "patch first":
        use_pdl_linear_loss(base, W)
        model = with_adapters(base, **options)
    else:
        model = with_adapters(base, **options)
        if "modules_to_save" in options:
            with pytest.raises(ValueError, match="output layer"):
                use_pdl_linear_loss(model.get_base_model(), W)
            return
        use_pdl_linear_loss(model.get_base_model(), W)
    found = step(model, batch)
    assert_same(found, expected)
    with torch.no_grad():
        assert model(**batch).logits is not None
    with model.disable_adapter():
        outputs = model(**batch)
    assert outputs.logits is None
    assert outputs.loss.item() == pytest.approx(expected_of("llama", batch)[0], rel=1e-5)


def test_a_trained_output_layer_moves(batch):
    """The copy that PEFT trains is the one whose loss is taken, also after a step."""
    model = with_adapters(patched("llama"), **ADAPTERS["attention and a trained output layer"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        outputs = model(**batch)
        assert outputs.logits is None
        outputs.loss.backward()
        with torch.no_grad():
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            expected = reference(logits, next_labels(batch["labels"])).item()
        assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[2] < losses[0]


ON_THE_OUTPUT_LAYER = {"target_modules": ["q_proj", "lm_head"]}


def test_an_adapter_on_the_output_layer_is_refused_before():
    model = with_adapters(sharp_model("llama"), **ON_THE_OUTPUT_LAYER)
    with pytest.raises(ValueError, match=r"the output layer has an adapter \(peft.*Linear\).*modules_to_save"):
        use_pdl_linear_loss(model.get_base_model(), W)


def test_an_adapter_on_the_output_layer_is_refused_after(batch):
    """Its adapters would get no gradient. Evaluation needs none."""
    model = with_adapters(patched("llama"), **ON_THE_OUTPUT_LAYER)
    with pytest.raises(ValueError, match=r"the output layer has an adapter \(peft.*Linear\).*modules_to_save"):
        model(**batch)
    with torch.no_grad():
        assert model(**batch).logits is not None
