"""The Llama example: sampling, KV cache, tokenizers, streaming."""

import math
from dataclasses import replace

import pytest
import tokenizers
import torch

import lesson_code as lesson
from real_world.llama import __main__ as llama
from real_world.llama import parity
from real_world.llama.checkpoint import save_pretrained
from real_world.llama.config import LLAMA_TINY, LlamaConfig
from real_world.llama.generate import SamplingParams, filter_logits, generate, stream_generate
from real_world.llama.model import Llama
from real_world.llama.tokenizer import ByteTokenizer, load_tokenizer

CONFIG = parity.BASE
PROMPT = torch.tensor([[1, 2, 3]])


def build(config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(0)
    return Llama(config)


def generated(model: Llama, prompt: torch.Tensor, n: int, **options) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, n, **options)), dim=1)


def test_filter_logits_equals_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50) * 3
    for temperature, top_k, top_p in ((0.5, 50, 1.0), (1.3, 7, 1.0), (1.0, 50, 0.6), (2.0, 9, 0.8)):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, expected))
        torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p), expected)


def test_sampling_depends_on_the_seed_and_on_nothing_if_greedy():
    model = build()

    def tokens(*params) -> list[int]:
        return generated(model, PROMPT, 30, params=SamplingParams(*params))[0].tolist()

    assert tokens(1.0, None, 1.0, 1) == tokens(1.0, None, 1.0, 1) == tokens(1.0, 1000, 1.0, 1)
    assert tokens(1.0, None, 1.0, 1) != tokens(1.0, None, 1.0, 2)
    assert tokens(0.0) == tokens(1.0, 1) == tokens(1.0, None, 1e-9) == tokens(1e-9)
    batch = generated(model, PROMPT.repeat(4, 1), 10, params=SamplingParams(1.0))
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
    ],
)
def test_wrong_sampling_params_raise_value_error(params):
    with pytest.raises(ValueError, match=f"{next(iter(params))} must be"):
        SamplingParams(**params)


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


def test_streamed_text_has_whole_characters_and_no_control_characters(monkeypatch):
    tokens = iter("né\x1b[2J€\n".encode() + b"\xff")
    monkeypatch.setattr("real_world.llama.generate.sample", lambda *_: torch.tensor([next(tokens)]))
    pieces = list(stream_generate(build(LLAMA_TINY), ByteTokenizer(), "A", 12, SamplingParams()))
    assert pieces == ["A", "n", "é", ".", "[", "2", "J", "€", "\n", "."]


def word_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer with 97 words, w0 to w96."""
    words = tokenizers.models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def test_tokenizer_neither_truncates_nor_pads(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = word_tokenizer()
    tokenizer.enable_truncation(4)  # as fine-tuning stores it
    tokenizer.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(path))
    loaded = load_tokenizer(tmp_path, vocab_size=97)
    for length in (2, 10):
        prompt = " ".join(f"w{n}" for n in range(length))
        assert loaded.encode(prompt) == reference(prompt)["input_ids"] == list(range(length))


def test_generation_with_a_tokenizer_stops_at_the_end_of_sequence(tmp_path, capsys):
    tokenizer = word_tokenizer()
    model = build()
    new = generated(model, torch.tensor([[4, 7]]), 12)[0].tolist()
    model.config = replace(CONFIG, eos_token_ids=(96, new[5]))
    save_pretrained(model, tmp_path)
    arguments = ["--weights", str(tmp_path), "--prompt", "w4 w7", "--temperature", "0"]
    with pytest.raises(lesson.CheckpointError, match=r"has no tokenizer\.json"):
        llama.main(arguments)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    llama.main(arguments)
    expected = [4, 7, *new[: new.index(new[5])]]
    assert capsys.readouterr().out.split() == [f"w{n}" for n in expected]
