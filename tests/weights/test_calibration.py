"""What training with the weights does to a model's distribution, and how it is undone."""

import math

import pytest
import torch

from pdl_kernels import PowerLawWeighting, TokenCounts, calibration_bias, pdl_cross_entropy

V = 6
# Three contexts, in how many targets each of six tokens follows: no zeros, so that the optimum is finite.
FOLLOWS = torch.tensor([[40, 10, 5, 3, 1, 1], [2, 30, 20, 5, 2, 1], [7, 7, 7, 7, 1, 1]])  # (3, V)


def solve(table, reduction):
    """Logits (3, V) at the minimum of PDL over the corpus of FOLLOWS, by Newton's method on the loss's gradient."""
    contexts, targets = FOLLOWS.nonzero().repeat_interleave(FOLLOWS.flatten(), dim=0).unbind(1)  # (N,), (N,)
    weight = (torch.ones(V) if table is None else table).double()[targets]  # (N,)
    mass = torch.zeros(3, dtype=torch.float64).index_add(0, contexts, weight)  # (3,) of each context
    mass /= weight.sum() if reduction == "mean" else len(targets)
    logits = torch.zeros(3, V, dtype=torch.float64, requires_grad=True)
    for _ in range(20):
        loss = pdl_cross_entropy(logits[contexts], targets, table, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss, logits)
        if gradient.abs().max() < 1e-14:
            return logits.detach()
        # The curvature only chooses the step; where to stop is the gradient's word.
        q = logits.detach().softmax(-1)
        curvature = mass[:, None, None] * (torch.diag_embed(q) - q[:, :, None] * q[:, None, :])  # (3, V, V)
        # A constant added to a row changes nothing: the pseudo-inverse leaves that direction alone.
        step = torch.linalg.pinv(curvature, rtol=1e-9, hermitian=True) @ gradient[:, :, None]
        logits = (logits.detach() - step[:, :, 0]).requires_grad_()
    raise AssertionError("not converged")


@pytest.mark.parametrize("reduction", ["mean", "token_mean"])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_the_optimum_is_p_over_a_power_of_the_frequency(alpha, reduction):
    p = FOLLOWS.double() / FOLLOWS.sum(1, keepdim=True)
    contexts_targets = [[token for token, n in enumerate(row) for _ in range(n)] for row in FOLLOWS.tolist()]
    counts = TokenCounts(V).update(contexts_targets, shift=False)
    assert counts.counts.tolist() == FOLLOWS.sum(0).tolist()
    table = PowerLawWeighting(alpha, eps=0.0).table(counts)
    logits = solve(table, reduction)

    tilted = p / counts.counts.double() ** alpha
    expected = tilted / tilted.sum(1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-6, atol=1e-7)
    assert (logits.softmax(-1) - p).abs().max() > 0.03, "the shift is there to be undone"
    torch.testing.assert_close((logits + calibration_bias(table)).softmax(-1), p, rtol=1e-6, atol=1e-7)


def test_without_weights_the_optimum_is_p():
    p = FOLLOWS.double() / FOLLOWS.sum(1, keepdim=True)
    torch.testing.assert_close(solve(None, "mean").softmax(-1), p, rtol=1e-12, atol=1e-12)
    assert calibration_bias(torch.ones(4)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_bias_is_minus_log_w(dtype):
    table = torch.tensor([1e-7, 0.5, 1.0, 3.0, 1e7]).to(dtype).requires_grad_()
    bias = calibration_bias(table)
    assert bias.dtype == torch.float32
    assert not bias.requires_grad
    assert bias.tolist() == pytest.approx([-math.log(w) for w in table.tolist()], rel=1e-7)


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (torch.tensor([1.0, 0.0]), ValueError, r"table\[1\] is 0; accepted are weights > 0"),
        (torch.tensor([1.0, -1.0]), ValueError, r"table\[1\] is -1"),
        (torch.tensor([torch.nan]), ValueError, r"table\[0\] is nan"),
        (torch.ones(2, 2), ValueError, "table has shape"),
        (torch.ones(2, dtype=torch.int64), TypeError, "table is torch.int64"),
        ([1.0], TypeError, "table is list"),
    ],
)
def test_tables_that_cannot_be_undone(table, error, message):
    with pytest.raises(error, match=message):
        calibration_bias(table)


# ---------------------------------------------------------------------------------------------------------------------
# In generate

WIDTH = 40


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def make_model(transformers, kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=WIDTH, n_positions=32, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=WIDTH, **sizes))
    with torch.no_grad():
        model.lm_head.weight *= 20  # random models are nearly uniform
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def table_of(width=WIDTH):
    return torch.logspace(-2, 2, width)[torch.randperm(width, generator=torch.Generator().manual_seed(1))]


def generate(model, processors, **options):
    torch.manual_seed(0)
    prompt = torch.tensor([[3, 1, 4], [1, 5, 9]])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        logits_processor=processors,
        max_new_tokens=6,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.fixture
def processor():
    pytest.importorskip("transformers")
    from pdl_kernels.integrations.transformers import CalibrationLogitsProcessor

    return CalibrationLogitsProcessor


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_strength_in_greedy_generation(transformers, processor, kind):
    model, table = make_model(transformers, kind), table_of()
    plain = generate(model, [], do_sample=False)
    for strength in (0, 0.5, 1.0, -1.0):
        got = generate(model, [processor(table, strength)], do_sample=False)
        for raw, score in zip(got.logits, got.scores, strict=True):
            torch.testing.assert_close(score, raw.float() - strength * table.log(), rtol=1e-6, atol=1e-6)
        tokens = got.sequences[:, 3:]
        assert torch.equal(tokens, torch.stack([score.argmax(-1) for score in got.scores], 1))
        assert torch.equal(got.sequences, plain.sequences) == (strength == 0)
        if strength == 0:
            assert all(map(torch.equal, got.scores, plain.scores)), "unchanged means to the last bit"


def test_it_runs_before_temperature_and_cuts(transformers, processor):
    """The bias belongs to the model's distribution: temperature scales it and top-k and top-p cut after it."""
    model, table = make_model(transformers, "gpt2"), table_of()
    options = {"do_sample": True, "temperature": 0.25, "top_k": 5, "top_p": 0.999999}
    got = generate(model, [processor(table)], **options)
    for raw, score in zip(got.logits, got.scores, strict=True):
        calibrated = raw.float() - table.log()
        kept = score.isfinite()
        assert (kept.sum(-1) <= 5).all()
        top = torch.zeros_like(kept).scatter(1, calibrated.topk(5).indices, True)
        assert not (kept & ~top).any()
        torch.testing.assert_close(score[kept], calibrated[kept] / 0.25, rtol=1e-5, atol=1e-5)


@pytest.mark.lesson("table as long as the tokenizer")
@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1, 1])
def test_a_table_of_another_width(transformers, processor, width):
    model = make_model(transformers, "gpt2")
    with pytest.raises(ValueError, match=f"table has {width} weights; accepted is {WIDTH}, the logits' width"):
        generate(model, [processor(table_of(width))], do_sample=False)


def test_the_scores_are_left_alone_and_keep_their_dtype(processor):
    table = table_of()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        scores = torch.zeros(2, WIDTH, dtype=dtype)
        scores[0, 3] = -torch.inf
        before = scores.clone()
        got = processor(table)(None, scores)
        assert got.dtype == dtype
        assert torch.equal(scores, before)
        assert got[0, 3] == -torch.inf
        assert torch.equal(got[1], calibration_bias(table).to(dtype))


@pytest.mark.parametrize("strength", [math.nan, math.inf])
def test_bad_strength(processor, strength):
    with pytest.raises(ValueError, match="strength is"):
        processor(torch.ones(2), strength)


def test_a_weight_of_0_cannot_be_undone(processor):
    with pytest.raises(ValueError, match=r"table\[0\] is 0"):
        processor(torch.zeros(2))
