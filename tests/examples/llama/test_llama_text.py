"""The Llama example: streamed text, tokenizers, chat templates."""

import json
from dataclasses import replace

import pytest
import tokenizers
import torch
from llama_models import CONFIG, build, generated

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.llama import __main__ as llama
from real_world.llama.checkpoint import load_pretrained, save_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.generate import (
    batch_generate,
    stream_generate,
)
from real_world.llama.model import Llama
from real_world.llama.sampling import GREEDY, SamplingParams
from real_world.llama.tokenizer import ByteTokenizer, load_tokenizer


def pieces_of(max_new_tokens: int, stop: tuple[str, ...] = ()) -> list[str]:
    """Return what is streamed after "A"."""
    model, prompt = build(LLAMA_TINY), ByteTokenizer().encode("A")
    pieces = stream_generate(model, ByteTokenizer(), prompt, max_new_tokens, SamplingParams(), stop)
    return list(pieces)


def test_streamed_text_has_whole_characters_and_no_control_characters(monkeypatch):
    tokens = iter("né\x1b[2J€\t\u3000\n".encode() + b"\xff")
    monkeypatch.setattr("real_world.llama.generate.sample", lambda *_: torch.tensor([next(tokens)]))
    assert pieces_of(16) == ["n", "é", ".", "[", "2", "J", "€", "\t", "\u3000", "\n", "."]


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        ((), ["e", " ", "o", "n", "e", ".", " ", "é", "\n", "\n", "T"]),
        (("T",), ["e", " ", "o", "n", "e", ".", " ", "é", "\n", "\n"]),
        (("one", "e. é\n"), ["e "]),  # "e" may be the start of a stop string, and waits
        (("e. é\n", "e. x"), ["e ", "o", "n"]),
        (("\n\n\n", "e. \n", "one!"), ["e ", "on", "e. é", "\n\nT"]),
        (("\n\nT!",), ["e", " ", "o", "n", "e", ".", " ", "é", "\n\nT"]),
    ],
)
def test_text_ends_before_a_stop_string(stop, pieces, monkeypatch):
    tokens = iter("e one. é\n\nT".encode())
    monkeypatch.setattr("real_world.llama.generate.sample", lambda *_: torch.tensor([next(tokens)]))
    assert [piece for piece in pieces_of(12, stop) if piece] == pieces


def test_batch_has_the_text_of_each_prompt_alone():
    model, tokenizer = build(LLAMA_TINY, scale=5), ByteTokenizer()
    prompts = [tokenizer.encode(text) for text in ("The", "A longer prompt", "é")]

    def texts(*stop: str) -> list[str]:
        streams = [stream_generate(model, tokenizer, p, 30, GREEDY, stop) for p in prompts]
        alone = ["".join(pieces) for pieces in streams]
        assert batch_generate(model, tokenizer, prompts, 30, GREEDY, stop) == alone
        return alone

    whole = texts()
    letter = next(c for c in whole[0] if c.isascii() and c.isalpha())
    assert texts(letter) != whole
    model.config = replace(model.config, eos_token_ids=(ord(letter),))
    assert texts() != whole


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


def save_instruct_model(folder, model: Llama) -> None:
    """Save a model with a tokenizer that puts a text between w1 and w5, and a chat template."""
    save_pretrained(model, folder)
    tokenizer = word_tokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "w1 $A w5", special_tokens=[("w1", 1), ("w5", 5)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = "w1 {% for m in messages %}w2 {{ m.content }} w3 {% endfor %}"
    (folder / "chat_template.jinja").write_text(chat)


def test_prompt_goes_through_the_chat_template_of_the_folder(tmp_path, capsys):
    model = build(scale=5)
    save_instruct_model(tmp_path, model)
    arguments = ["--weights", str(tmp_path), "--prompt", "w4 w7", "--temperature", "0"]
    arguments += ["--max-new-tokens", "9"]
    for options, prompt, printed in (
        ([], [1, 2, 4, 7, 3], []),
        (["--no-chat"], [1, 4, 7, 5], ["w4", "w7"]),
    ):
        llama.main([*arguments, *options])
        new = generated(model, torch.tensor([prompt]), 9)[0].tolist()
        assert capsys.readouterr().out.split() == [*printed, *(f"w{n}" for n in new)]
    llama.main([*arguments, "--stop", "zz", "--stop", f"w{new[3]} w{new[4]}", "--no-chat"])
    assert capsys.readouterr().out.split() == ["w4", "w7", *(f"w{n}" for n in new[:3])]


def test_prompt_without_tokens(tmp_path):
    save_pretrained(build(), tmp_path)
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckFailed, match=r"--prompt ' ' has no tokens"):
        llama.main(["--weights", str(tmp_path), "--prompt", " "])


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (5, {"eos_token_id": [6, 7]}, (6, 7)),
        (None, {"eos_token_id": 6}, (6,)),
        ([5, 6], {"temperature": 0.6}, (5, 6)),
        (5, None, (5,)),
    ],
)
def test_end_of_sequence_is_that_of_generation_config(
    config, generation_config, expected, tmp_path
):
    save_pretrained(build(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": config}))
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert load_pretrained(tmp_path).config.eos_token_ids == expected


def test_token_that_the_model_does_not_have(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens(["[PAD]"])  # as fine-tuning adds it
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, vocab_size=97)
    assert loaded.encode("w96") == [96]
    with pytest.raises(lesson.CheckpointError, match=r"has token 97, .* vocab_size is 97"):
        loaded.encode("w4 [PAD]")


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
