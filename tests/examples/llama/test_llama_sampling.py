"""How the Llama example chooses the next token."""

import math

import pytest
import torch
from llama_models import PROMPT, build, generated

from real_world.llama import parity
from real_world.llama.generate import (
    pad_left,
)
from real_world.llama.sampling import SamplingParams, filter_logits


def test_filter_logits_equals_transformers():
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(6, 50) * 3
    for temperature, top_k, top_p, min_p in (
        (0.5, 50, 1.0, 0.0),
        (1.3, 7, 1.0, 0.0),
        (1.0, 50, 0.6, 0.0),
        (1.0, 50, 1.0, 0.1),
        (2.0, 9, 0.8, 0.3),
    ):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, expected))
        expected = MinPLogitsWarper(min_p)(None, expected)
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        torch.testing.assert_close(filter_logits(logits, params), expected)


def test_top_p_is_reached_exactly():
    logits = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log()
    filtered = filter_logits(logits, SamplingParams(temperature=1.0, top_p=0.8))
    assert filtered.isfinite().tolist() == [[True, False, False, True]]


def test_sampling_is_seeded():
    model = build()

    def tokens(temperature: float, **params) -> list[int]:
        sampling = SamplingParams(temperature=temperature, **params)
        return generated(model, PROMPT, 30, params=sampling)[0].tolist()

    assert tokens(1.0, seed=1) == tokens(1.0, seed=1) == tokens(1.0, seed=1, top_k=1000)
    assert tokens(1.0, seed=1) != tokens(1.0, seed=2)
    assert tokens(0.0) == tokens(1.0, top_k=1) == tokens(1.0, top_p=1e-9) == tokens(1e-9)
    assert tokens(0.0) == tokens(1.0, min_p=1.0)
    batch = generated(model, PROMPT.repeat(4, 1), 10, params=SamplingParams(temperature=1.0))
    assert len({tuple(row) for row in batch.tolist()}) == 4


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.001},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 2.0},
        {"top_p": -1.0},
        {"top_k": 0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_wrong_sampling_params_raise_value_error(params):
    with pytest.raises(ValueError, match=f"{next(iter(params))} must be"):
        SamplingParams(**params)


@pytest.mark.parametrize("penalty", [0.5, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    model = build(scale=5)
    params = SamplingParams(repetition_penalty=penalty)
    expected = parity.to_transformers(model).generate(
        PROMPT, max_new_tokens=30, do_sample=False, repetition_penalty=penalty
    )
    new = generated(model, PROMPT, 30, params=params)
    assert new.equal(expected[:, 3:])
    assert not new.equal(generated(model, PROMPT, 30))
    tokens, mask = pad_left([PROMPT[0].tolist(), [4, 5, 6, 7, 8]])
    tokens[~mask] = new[0, 0]
    padded = generated(model, tokens, 30, params=params, attention_mask=mask)
    assert padded[0].equal(new[0]), "padding does not count"
