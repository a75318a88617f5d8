"""The Llama example: sampling, KV cache, tokenizers, streaming."""

import json
import math
from dataclasses import replace

import pytest
import tokenizers
import torch

import lesson_code as lesson
from lesson_code import CheckpointError
from real_world.common import CheckFailed
from real_world.llama import __main__ as llama
from real_world.llama import parity
from real_world.llama.checkpoint import load_pretrained, save_pretrained
from real_world.llama.config import LLAMA_TINY, LlamaConfig
from real_world.llama.generate import (
    batch_generate,
    decode_one_token,
    generate,
    make_caches,
    pad_left,
    stream_generate,
)
from real_world.llama.model import Llama
from real_world.llama.quantize import Int8Linear, quantize_int8
from real_world.llama.sampling import GREEDY, SamplingParams, filter_logits
from real_world.llama.tokenizer import ByteTokenizer, load_tokenizer

CONFIG = parity.BASE
PROMPT = torch.tensor([[1, 2, 3]])


def build(config: LlamaConfig = CONFIG, scale: float = 1.0) -> Llama:
    """Return a model with seeded weights; if these are larger, earlier tokens matter more."""
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def generated(model: Llama, prompt: torch.Tensor, n: int, **options) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, n, **options)), dim=1)


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


# %% Text


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
