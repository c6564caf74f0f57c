"""A model that trains without logits is otherwise as it was: it evaluates, generates, and is copied and saved."""

import copy
import functools
import inspect
import io
import types

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.trainer_models import make_model, sharp_model, take_gradients, transformers
from helpers.transformers_hooks import W, assert_same, draw_token_weights
from helpers.transformers_linear import each_model, expected_of, patched, step

from pdl_kernels.integrations.transformers import use_pdl_linear_loss

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@each_model
def test_evaluation(name, batch):
    """Logits and plain cross entropy, in training mode as in evaluation mode: gradients decide."""
    model = sharp_model(name)
    with torch.no_grad():
        stock = model(**batch)
    use_pdl_linear_loss(model, W, label_smoothing=0.1, z_loss=0.1)
    u = draw_token_weights(batch["labels"])
    for mode in (True, False):
        with torch.no_grad():
            found = model.train(mode)(**batch, token_weights=u)
        assert torch.equal(found.logits, stock.logits)
        assert found.loss.item() == pytest.approx(stock.loss.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart", "mixtral"])
@pytest.mark.parametrize("how", ["evaluation_logits", "skip_logits"])
def test_evaluation_without_logits(name, how, batch):
    model = sharp_model(name)
    with torch.no_grad():
        expected = model(**batch).loss.item()
        use_pdl_linear_loss(model, W, label_smoothing=0.1, evaluation_logits=how != "evaluation_logits")
        found = model(**batch, **({"skip_logits": True} if how == "skip_logits" else {}))
    assert found.logits is None
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("evaluation_logits", [True, False])
def test_weighted_evaluation(evaluation_logits, batch):
    model = patched("llama", evaluation_logits=evaluation_logits, weighted_evaluation=True, label_smoothing=0.1)
    expected = expected_of("llama", batch, label_smoothing=0.1)[0]
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_in_inference_mode_comes_first(batch):
    """As Lightning begins: what was made there serves training, and new weights, too."""
    model = patched("llama", weighted_evaluation=True)
    with torch.inference_mode():
        model(**batch)
    assert_same(step(model, batch), expected_of("llama", batch))
    model.pdl_linear_loss.set_weights(W.flip(0))
    assert_same(step(model, batch), expected_of("llama", batch, weights=W.flip(0)))


def test_labels_are_not_needed(batch):
    del batch["labels"]
    model = sharp_model("llama")
    expected = model(**batch)
    use_pdl_linear_loss(model, W)
    found = model(**batch)
    assert found.loss is None
    assert torch.equal(found.logits, expected.logits)
    assert found.keys() == expected.keys()


@each_model
def test_generate(name, batch):
    """The same ids before, with and after, greedily and by sampling."""
    model = sharp_model(name)
    inputs = {"input_ids": batch["input_ids"][:2, :4]}

    def generate():
        torch.manual_seed(0)
        greedy = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        return greedy.tolist(), model.generate(**inputs, max_new_tokens=5, do_sample=True).tolist()

    before = generate()
    loss = use_pdl_linear_loss(model, W)
    model(**batch).loss.backward()
    assert generate() == before
    loss.undo()
    assert generate() == before


# ---------------------------------------------------------------------------------------------------------------------
# Undoing it


@each_model
def test_undo(name, batch):
    model = sharp_model(name)
    stock = model(**batch)
    stock.loss.backward()
    expected = stock.loss.item(), take_gradients(model)
    before = {module: dict(module.__dict__) for module in model.modules()}
    loss = use_pdl_linear_loss(model, W)
    with_loss = step(model, batch)
    assert loss.undo() is model
    after = {module: dict(module.__dict__) for module in model.modules()}
    assert [d.keys() for d in after.values()] == [d.keys() for d in before.values()]
    assert model.forward.__func__ is type(model).forward
    outputs = model(**batch)
    assert torch.equal(outputs.logits, stock.logits)
    outputs.loss.backward()
    assert_same((outputs.loss.item(), take_gradients(model)), expected, 1e-7)
    with pytest.raises(RuntimeError, match="undone before"):
        loss.undo()
    use_pdl_linear_loss(model, W)
    assert_same(step(model, batch), with_loss, 1e-7)


def replace_forward(module, called):
    """As accelerate's hooks do."""
    stock = module.forward

    @functools.wraps(stock.__func__)
    def forward(self, *arguments, **named):
        called.append(type(self).__name__)
        return stock.__func__(self, *arguments, **named)

    module.forward = types.MethodType(forward, module)
    return module.forward


def test_forwards_that_were_replaced_before(batch):
    """They are called, and put back."""
    model = sharp_model("llama")
    called = []
    forwards = replace_forward(model, called), replace_forward(model.lm_head, called)
    loss = use_pdl_linear_loss(model, W)
    called.clear()
    assert_same(step(model, batch), expected_of("llama", batch))
    assert called == ["LlamaForCausalLM"]
    loss.undo()
    assert (model.forward, model.lm_head.forward) == forwards


def test_a_copy_of_a_model_whose_forwards_were_replaced_before(batch):
    """It runs its own layers, in training and in evaluation."""
    model = sharp_model("llama")
    replace_forward(model, []), replace_forward(model.lm_head, [])
    use_pdl_linear_loss(model, W)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(**batch).logits
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(twin(**batch).logits, expected)
    assert_same(step(twin, batch), expected_of("llama", batch))


# ---------------------------------------------------------------------------------------------------------------------
# The model is otherwise as it was


@each_model
def test_signature(name):
    model = sharp_model(name)
    before = inspect.signature(model.forward)
    use_pdl_linear_loss(model, W)
    assert inspect.signature(model.forward) == before


def test_random_numbers_are_left_alone(batch):
    """With dropout, too: the patch calls the model once."""
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    use_pdl_linear_loss(model, W)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.manual_seed(1)
    with_dropout = model(**batch).loss
    torch.manual_seed(1)
    again = model(**batch).loss
    other = model(**batch).loss
    assert with_dropout == again != other, "dropout is on while the model trains"


def test_modes_of_submodules_are_kept():
    model = sharp_model("llama")
    model.model.layers[0].eval()
    use_pdl_linear_loss(model, W)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_saving_and_loading(batch, tmp_path):
    model = sharp_model("llama")
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    use_pdl_linear_loss(model, W)
    model.save_pretrained(tmp_path / "with")
    assert list(model.state_dict()) == names
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("before", "with")]
    assert files[0] == files[1]
    for file in files[0]:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "with" / file).read_bytes(), file
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert "forward" not in loaded.__dict__
    assert loaded(**batch).logits is not None
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})
    expected_model = sharp_model("llama")
    expected_model.load_state_dict(model.state_dict())
    assert_same(step(model, batch), expected_of("llama", batch, expected_model))


def test_a_copy_trains_itself(batch):
    model = patched("bart")
    model(**batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        model.final_logits_bias.zero_()
    assert_same(step(twin, batch), expected_of("bart", batch))
    assert all(parameter.grad is None for parameter in model.parameters())
    twin.pdl_linear_loss.undo()
    assert "forward" not in twin.__dict__
    assert "forward" in model.__dict__


def test_the_loss_of_a_copy_is_its_own(batch):
    """Weights that are set for the copy are those of the copy, and its record is."""
    model = patched("llama")
    twin = copy.deepcopy(model)
    twin.pdl_linear_loss.set_weights(W.flip(0))
    twin.pdl_linear_loss.keep_record()
    assert_same(step(twin, batch), expected_of("llama", batch, weights=W.flip(0)))
    assert_same(step(model, batch), expected_of("llama", batch))
    assert twin.pdl_linear_loss.read_record().calls == 1


def test_a_pickled_model(batch):
    """As a process that is spawned gets it: it trains with PDL, and not silently without."""
    model = patched("llama")
    expected = step(model, batch)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(step(torch.load(file, weights_only=False), batch), expected)


def test_accelerate_takes_its_own_wrapper_off(batch):
    """Unwrapping removes the wrapper that mixed precision needs, and nothing else."""
    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        model = patched("llama")
        expected = step(model, batch)
        prepared = accelerator.prepare(model)
        assert_same(step(prepared, batch), expected, 3e-2)
        assert_same(step(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), batch), expected)
    finally:
        AcceleratorState._reset_state(True)


def test_moved_to_another_dtype_afterwards(batch):
    model = patched("llama").bfloat16()
    expected = expected_of("llama", batch, sharp_model("llama").bfloat16())
    assert_same(step(model, batch), expected, 2e-2)
