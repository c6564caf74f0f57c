"""Texts from a model: each against `generate` or a slow loop that reads the whole text again for every token."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.quality import EOS, LAYERS, V, make_encoded, make_model
from transformers.cache_utils import DynamicLayer

from benchmarks.quality import decoding
from benchmarks.quality.decoding import Answer, RoomyLayer, Transform, decode, draw, prepare_prompts, roomy

NEW_TOKENS = 10
AS_IT_IS = Transform()


@pytest.fixture(autouse=True)
def _two_batches(monkeypatch):
    """Prompts that differ in length are decoded together, in two batches that mix up their order."""

    def odd_and_even(lengths, tokens):
        return [list(range(start, len(lengths), 2)) for start in (1, 0)]

    monkeypatch.setattr(decoding, "batches_of_similar_length", odd_and_even)


@pytest.fixture
def shrunk(monkeypatch):
    """How many texts were left each time that finished ones left their batch."""
    sizes = []
    select = RoomyLayer.select

    def noted(layer, rows):
        sizes.append(len(rows))
        select(layer, rows)

    monkeypatch.setattr(RoomyLayer, "select", noted)
    return sizes


def answers(model, encoded, transform=AS_IT_IS, new_tokens=NEW_TOKENS, uniforms=None):
    return decode(
        model, model.upper_for_decoding(), prepare_prompts(model, encoded), transform, new_tokens, uniforms, "tests"
    )


def slow_nucleus(probabilities):  # (V,) float64 -> ids, likeliest first
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    mass = 0.0
    for size, token in enumerate(order, 1):
        mass += float(probabilities[token])
        if mass >= 0.9:
            return order[:size]
    raise AssertionError(mass)


def slow_draw(probabilities, uniform):
    nucleus = slow_nucleus(probabilities)
    shares = (probabilities[nucleus] / probabilities[nucleus].sum()).cumsum(0)
    return nucleus[int((shares <= uniform).sum())]


@torch.no_grad()
def slow_answer(whole, prompt, choose, new_tokens=NEW_TOKENS):
    """`choose` takes the logits in float64 and the number of the step."""
    written = []
    for step in range(new_tokens):
        token = choose(whole(torch.tensor([prompt + written])).logits[0, -1].double(), step)
        if token == EOS:
            return Answer(written, ended=True)
        written.append(token)
    return Answer(written, ended=False)


WINDOWS = {  # some layers see the last six tokens alone
    "use_sliding_window": True,
    "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}


@pytest.mark.parametrize(
    ("kind", "changes", "trained_layers"),
    [("Llama", {}, 2), ("Llama", {}, None), ("Qwen3", {}, 2), ("Qwen3", {}, None), ("Qwen3", WINDOWS, 2)],
)
def test_greedy_texts_are_those_of_generate(kind, changes, trained_layers, shrunk):
    model, whole = make_model(trained_layers, kind, **changes)
    encoded = make_encoded(10)
    found = answers(model, encoded)
    for one, answer in zip(encoded, found, strict=True):
        ids = whole.generate(
            torch.tensor([one.prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=EOS, pad_token_id=0
        )[0, len(one.prompt) :].tolist()
        assert answer == Answer([token for token in ids if token != EOS], ended=EOS in ids)
    assert len({answer.ended for answer in found}) == 2
    assert len(set(shrunk)) > 1, "texts left their batch at several moments"
    assert len({len(one.prompt) for one in encoded}) > 5


@pytest.mark.parametrize("trained_layers", [2, None])
def test_sampled_texts_are_those_of_a_slow_loop(trained_layers, shrunk):
    model, whole = make_model(trained_layers)
    encoded = make_encoded(10)
    bias = torch.linspace(-1, 1, V).index_fill(0, torch.tensor(EOS), 3.0)
    uniforms = torch.rand(len(encoded), NEW_TOKENS)
    found = answers(model, encoded, Transform(bias, temperature=1.5), uniforms=uniforms)

    def choose(row, logits, step):
        return slow_draw(((logits + bias) / 1.5).softmax(-1), uniforms[row, step])

    expected = [slow_answer(whole, one.prompt, partial(choose, row)) for row, one in enumerate(encoded)]
    assert found == expected
    assert len(set(shrunk)) > 1
    assert answers(model, encoded, Transform(bias, temperature=1.5), uniforms=uniforms) == found
    assert answers(model, encoded, Transform(bias, temperature=1.5), uniforms=uniforms.flip(0)) != found
    assert answers(model, encoded, Transform(bias), uniforms=uniforms) != found
    assert answers(model, encoded, Transform(temperature=1.5), uniforms=uniforms) != found


def test_a_bias_decides_greedy_texts_and_a_temperature_does_not():
    model, whole = make_model()
    encoded = make_encoded(4)
    bias = torch.linspace(-8, 8, V)
    found = answers(model, encoded, Transform(bias, temperature=1.3))
    assert found == [slow_answer(whole, one.prompt, lambda logits, _: int((logits + bias).argmax())) for one in encoded]
    assert found == answers(model, encoded, Transform(bias))
    assert found != answers(model, encoded)


def test_logits_get_the_bias_before_the_temperature_in_float32():
    logits = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    changed = Transform(torch.tensor([1.0, 0.0, -1.0]), temperature=2.0)(logits)
    assert changed.dtype == torch.float32
    assert changed.tolist() == [[1.0, 1.0, 1.5]]
    assert Transform()(logits).dtype == torch.float32


def test_a_text_ends_with_eos_or_is_marked_as_cut():
    model, _ = make_model()
    encoded = make_encoded(5)
    never, at_once = (torch.zeros(V).index_fill(0, torch.tensor(EOS), value) for value in (-1e9, 1e9))
    for new_tokens in (1, 6):
        assert answers(model, encoded, Transform(at_once), new_tokens) == [Answer([], ended=True)] * 5
        cut = answers(model, encoded, Transform(never), new_tokens)
        assert [(len(answer.tokens), answer.ended) for answer in cut] == [(new_tokens, False)] * 5


def test_an_end_at_the_last_token_allowed_is_an_end():
    model, _ = make_model()
    encoded = make_encoded(10)
    ended = next(answer for answer in answers(model, encoded) if answer.ended and len(answer.tokens) > 2)
    row = answers(model, encoded).index(ended)
    assert answers(model, encoded, new_tokens=len(ended.tokens) + 1)[row] == ended
    assert answers(model, encoded, new_tokens=len(ended.tokens))[row] == Answer(ended.tokens, ended=False)


@pytest.mark.parametrize("trained_layers", [2, None])
def test_tokens_are_chosen_from_float32_logits(trained_layers):
    """Each odd token is likelier than its neighbour by less than bfloat16 can say; of a tie, argmax takes the first."""
    model, _ = make_model(trained_layers, dtype=torch.bfloat16)
    with torch.no_grad():
        model.output_weight.copy_(model.output_weight.bfloat16().float())
        model.output_weight[1::2] = model.output_weight[::2] * (1 + 2**-11)
        model.output_weight[EOS : EOS + 2] = 0
    encoded = make_encoded(4)
    found = answers(model, encoded)
    assert {token % 2 for answer in found for token in answer.tokens} == {1}
    prompts = prepare_prompts(model, encoded)[0]
    with torch.inference_mode():
        states = model.above(
            prompts.inputs,
            model.upper_for_decoding(),
            attention_mask=prompts.mask,
            position_ids=prompts.positions,
        )[:, -1]
        rounded = F.linear(states, model.output_weight.bfloat16())
    assert states.dtype == torch.bfloat16
    assert torch.equal(rounded[:, ::2], rounded[:, 1::2])


def test_prompts_serve_many_decodings():
    model, _ = make_model()
    encoded = make_encoded(6)
    prompts = prepare_prompts(model, encoded)
    decode_again = partial(decode, model, model.upper_for_decoding(), prompts)
    first = decode_again(AS_IT_IS, NEW_TOKENS, None, "tests")
    assert decode_again(AS_IT_IS, 3, torch.rand(6, 3), "tests") != first
    assert decode_again(AS_IT_IS, NEW_TOKENS, None, "tests") == first


# The cache


def test_a_roomy_layer_is_a_dynamic_layer_that_copies_nothing():
    def states(columns):
        return torch.randn(3, 2, columns, 4), torch.randn(3, 2, columns, 4)

    prompt, plain, start = DynamicLayer(), DynamicLayer(), states(5)
    prompt.update(*start)
    plain.update(*start)
    (layer,) = roomy([prompt], room=4).layers
    for columns in (1, 1, 2):
        memory = [buffer.data_ptr() for buffer in layer.buffers]
        new = states(columns)
        for found, expected in zip(layer.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)
        assert layer.get_seq_length() == plain.get_seq_length()
        assert layer.get_mask_sizes(1) == plain.get_mask_sizes(1)
        assert [buffer.data_ptr() for buffer in layer.buffers] == memory
        rows = torch.tensor([2, 0, 1])
        layer.select(rows)
        plain.batch_select_indices(rows)
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)
    assert torch.equal(prompt.keys, start[0]), "other decodings begin with it, too"
    assert torch.equal(prompt.values, start[1])


def test_prompts_are_padded_on_the_left_and_counted_from_their_first_token():
    model, _ = make_model(trained_layers=None)
    encoded = make_encoded(6)
    for batch in prepare_prompts(model, encoded):
        assert batch.rows in ([1, 3, 5], [0, 2, 4])
        for row, inputs, mask, positions in zip(batch.rows, batch.inputs, batch.mask, batch.positions, strict=True):
            length = len(encoded[row].prompt)
            assert inputs[-length:].tolist() == encoded[row].prompt
            assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
            assert positions[-length:].tolist() == list(range(length))


def test_each_part_has_the_layers_of_its_own_cache():
    model, _ = make_model(trained_layers=2)
    prompts = prepare_prompts(model, make_encoded(4))
    assert [len(batch.layers) for batch in prompts] == [LAYERS - 2] * 2
    model, _ = make_model(trained_layers=None)
    assert [batch.layers for batch in prepare_prompts(model, make_encoded(4))] == [[]] * 2


# Drawing


def grid(number):
    """Uniform numbers so even that an interval's share of them is its length, to one in `number`."""
    return (torch.arange(number) + 0.5) / number


def test_the_nucleus_is_cut_after_the_token_that_crosses_its_share():
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3]).log()
    uniforms = torch.tensor([0.0, 0.52, 0.53, 0.84, 0.85, 0.999999])  # .5, .8 and .95 of .95
    assert draw(logits.expand(6, 4), uniforms).tolist() == [1, 1, 3, 3, 2, 2]
    exactly = torch.tensor([0.04, 0.96, 0.0]).log()
    assert set(draw(exactly.expand(100, 3), grid(100)).tolist()) == {1}


@pytest.mark.parametrize("likeliest", [512, 3])
def test_tokens_are_drawn_as_often_as_the_nucleus_has_them(likeliest, monkeypatch):
    monkeypatch.setattr(decoding, "LIKELIEST", likeliest)
    logits = 2 * torch.randn(40)
    probabilities = logits.double().softmax(-1)
    nucleus = slow_nucleus(probabilities)
    assert 5 < len(nucleus) < 30
    expected = torch.zeros(40, dtype=torch.float64)
    expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    number = 20_000
    found = draw(logits.expand(number, 40), grid(number)).bincount(minlength=40) / number
    assert (found - expected).abs().max() < 2 / number


def test_rows_whose_nucleus_is_wide_are_sorted_whole():
    """In one batch: nuclei within the 512 likeliest, nuclei beyond, and one of all tokens."""
    scales = torch.tensor([8.0, 0.1, 1.0, 0.0, 8.0, 0.5])[:, None]
    logits = torch.randn(6, 2000) * scales + torch.linspace(0, 1e-3, 2000)
    probabilities = logits.double().softmax(-1)
    beyond = [len(slow_nucleus(row)) > decoding.LIKELIEST for row in probabilities]
    assert beyond == [False, True, True, True, False, True]
    for uniform in (0.0, 0.3, 0.71, 0.99):
        found = draw(logits, torch.full((6,), uniform))
        assert found.tolist() == [slow_draw(row, uniform) for row in probabilities]


def test_how_many_are_looked_at_first_does_not_matter(monkeypatch):
    logits = torch.randn(50, 300) * torch.linspace(0.1, 4, 50)[:, None]
    uniforms = torch.rand(50)
    found = []
    for likeliest in (512, 40, 1):
        monkeypatch.setattr(decoding, "LIKELIEST", likeliest)
        found.append(draw(logits, uniforms).tolist())
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 10
