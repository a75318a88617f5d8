"""The Llama example: KV cache, compiled decoding, int8, prompts of unequal lengths."""

import math
from dataclasses import replace

import pytest
import torch
from llama_models import CONFIG, PROMPT, build, generated

from lesson_code import CheckpointError
from real_world.common import CheckFailed
from real_world.llama import parity
from real_world.llama.generate import (
    decode_one_token,
    generate,
    make_caches,
    pad_left,
)
from real_world.llama.quantize import Int8Linear, quantize_int8
from real_world.llama.sampling import SamplingParams


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_raise_checkpoint_error(temperature):
    model = build()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    params = SamplingParams(temperature=temperature)
    with pytest.raises(CheckpointError, match="the logits are not finite"):
        next(generate(model, PROMPT, 5, params))


def test_export_leaves_other_models_alone():
    """A table that models shared was one of fake tensors after an export."""
    model = build()
    torch.export.export(model, (PROMPT,))
    with torch.no_grad():
        logits = build()(PROMPT)
    assert type(logits) is torch.Tensor
    assert build().to(torch.bfloat16).float().model.inv_freq.equal(model.model.inv_freq)


def test_number_of_new_tokens_must_not_be_negative():
    assert list(generate(build(), PROMPT, 0)) == []
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0, got -1"):
        list(generate(build(), PROMPT, -1))


def test_kv_cache_processes_every_token_once():
    model, lengths = build(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, y: lengths.append(y.shape[1]))
    generated(model, PROMPT, 5)
    generated(model, PROMPT, 5, use_cache=False)
    assert lengths == [3, 1, 1, 1, 1, 3, 4, 5, 6, 7]


# %% Compiled, and in int8


@pytest.fixture
def nan_in_new_memory():
    """Fill memory that nothing has been written to with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_compiled_tokens_equal_eager_ones(nan_in_new_memory):
    model = build(replace(CONFIG, num_key_value_heads=2), scale=5)
    tokens, mask = pad_left(PROMPTS)
    expected = generated(model, tokens, 20, attention_mask=mask)
    compiled = generated(model, tokens, 20, attention_mask=mask, compile=True)
    assert compiled.equal(expected)
    # Other lengths use the same compiled step, up to a multiple of 256.
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = generated(model, tokens[:, 1:], 25, attention_mask=mask[:, 1:], compile=True)
    assert compiled[:, :20].equal(generated(model, tokens[:, 1:], 20, attention_mask=mask[:, 1:]))


def test_compiled_caches_keep_their_address():
    """CUDA graphs are skipped if a tensor that they change may be elsewhere in the next call."""
    static = []

    def backend(graph, inputs):
        static.extend(getattr(tensor, "_dynamo_static_input_type", None) for tensor in inputs)
        return graph

    model = build()
    decode = torch.compile(decode_one_token, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        decode(model, PROMPT[0, :1], PROMPT[0, :1], make_caches(model, 1, 8), torch.ones(1, 8) > 0)
    assert static.count(None) == 3  # the token, its position, and the mask


def test_int8_weights_are_rounded_to_half_a_step():
    linear = torch.nn.Linear(40, 30, bias=False)
    quantized = Int8Linear(linear)
    error = (quantized.weight * quantized.scales[:, None] - linear.weight).abs()
    assert (error <= quantized.scales[:, None] / 2 + 1e-7).all()
    assert quantized.weight.abs().amax(dim=1).eq(127).all()
    x = torch.randn(2, 5, 40)
    torch.testing.assert_close(quantized(x), linear(x), atol=0.03, rtol=0)


def test_int8_model_has_no_other_linear_layers():
    model = build(replace(CONFIG, tie_word_embeddings=True))
    expected = model(PROMPT)
    quantize_int8(model)
    assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())
    difference = (model(PROMPT) - expected).abs().max()
    assert 0 < difference < 0.02 * expected.abs().max()


def test_cache_that_cannot_be_allocated_raises_check_failed():
    model = build(replace(CONFIG, max_position_embeddings=2**41))
    with pytest.raises(CheckFailed, match=r"no memory for a KV cache of 1 x 1,099,511,627,778 tok"):
        next(generate(model, PROMPT, 2**40))


# %% Several prompts


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20], [30, 31, 32, 33]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_unequal_lengths_equal_transformers_and_each_alone(use_cache):
    model = build(replace(CONFIG, num_key_value_heads=2), scale=5)
    tokens, mask = pad_left(PROMPTS)
    assert tokens[1].tolist() == [0] * 6 + [20]
    new = generated(model, tokens, 20, attention_mask=mask, use_cache=use_cache)
    reference = parity.to_transformers(model)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert new.equal(reference.generate(tokens, attention_mask=mask.long(), **options)[:, 7:])
    for row, prompt in zip(new, PROMPTS, strict=True):
        assert row.equal(generated(model, torch.tensor([prompt]), 20)[0])
    tokens[~mask] = 50  # whatever padding is
    assert new.equal(generated(model, tokens, 20, attention_mask=mask, use_cache=use_cache))


def test_logits_of_padded_prompts_equal_each_alone():
    model = build(scale=5)
    tokens, mask = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
        assert logits.isfinite().all()
        for row, prompt in zip(logits, PROMPTS, strict=True):
            expected = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(row[-len(prompt) :], expected, atol=1e-4, rtol=0)


def test_prompts_padded_on_the_right_raise_value_error():
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(ValueError, match="pad prompts on the left"):
        next(generate(build(), PROMPT, 1, attention_mask=mask))


def test_each_row_ends_at_its_own_end_of_sequence():
    model = build(scale=5)
    tokens, mask = pad_left(PROMPTS)
    new = generated(model, tokens, 30, attention_mask=mask).tolist()
    eos = (new[0][9], new[1][4], new[2][2])
    model.config = replace(CONFIG, eos_token_ids=eos)
    ended = generated(model, tokens, 30, attention_mask=mask)
    reference = parity.to_transformers(model)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": eos[0]}
    assert ended.equal(reference.generate(tokens, attention_mask=mask.long(), **options)[:, 7:])
    ends = [next(i for i, token in enumerate(row) if token in eos) for row in new]
    assert len(set(ends)) == 3
    assert ended.shape[1] == max(ends) + 1
    for row, expected, end in zip(ended.tolist(), new, ends, strict=True):
        assert row[: end + 1] == expected[: end + 1]
        assert set(row[end + 1 :]) <= {eos[0]}


def test_warning_beyond_max_position_embeddings(recwarn):
    model = build(replace(CONFIG, max_position_embeddings=8))
    generated(model, PROMPT, 5)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="3 tokens .* 6 new ones exceed .*, 8"):
        assert generated(model, PROMPT, 6).shape == (1, 6)
