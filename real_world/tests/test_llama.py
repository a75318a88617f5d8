"""A Llama that is everybody's Llama, and what it takes to trust its weights, words and numbers."""

import json
import math
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib.image
import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import lesson_code as lesson
from real_world import llama, write_tensors
from real_world.llama import page, proofs, sizes, training
from real_world.llama.model import rotate, rotation
from real_world.llama.weights import read_config
from real_world.tests.processes import ROOT, Run, torchrun

PAGE = ["-m", "real_world.llama"]
SMALL = llama.LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def small(seed: int = 0, **changes: object) -> llama.Llama:
    torch.manual_seed(seed)
    return llama.Llama(msgspec.structs.replace(SMALL, **changes))


# The same network


@pytest.mark.parametrize("seed", range(8))
def test_any_configuration_answers_and_learns_as_transformers_does(seed):
    draw = torch.Generator().manual_seed(seed)

    def choose(*values: object) -> object:
        return values[torch.randint(len(values), (), generator=draw)]

    heads, head_size = choose(2, 4, 6), choose(4, 8)
    model = small(
        seed,
        hidden_size=heads * choose(4, 6),
        num_attention_heads=heads,
        num_key_value_heads=choose(1, 2, heads),
        head_dim=head_size,
        num_hidden_layers=choose(1, 2, 3),
        tie_word_embeddings=choose(True, False),
        rope_theta=choose(10_000.0, 500_000.0),
        rope_scaling=choose(None, llama.RopeScaling(8.0, 1.0, 4.0, 16)),
        rms_norm_eps=choose(1e-5, 1e-3),
    )
    with torch.no_grad():
        for weights in model.parameters():  # norms too, and more than 0.02
            weights += torch.randn(weights.shape, generator=draw) * 0.1
    twin = proofs.hugging_face_twin(model)
    tokens = torch.randint(50, (choose(1, 3), choose(2, 20, 70)), generator=draw)
    logits, gradients = proofs.differences(model, twin, tokens)
    assert max(logits, gradients) <= 1e-5
    prompt = tokens[:, :2]
    theirs = twin.generate(prompt, max_new_tokens=20, do_sample=False)[:, 2:]
    for cached in (True, False):
        ours = torch.stack(list(llama.generate(model, prompt, 20, cached=cached)), dim=1)
        assert torch.equal(ours, theirs)


def test_in_bfloat16_it_answers_as_transformers_does_far_into_a_text():
    model = small(rope_theta=10_000.0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += torch.randn(weights.shape) * 0.2
    model.bfloat16()
    tokens = torch.randint(50, (1, 600))
    twin = proofs.hugging_face_twin(model)
    with torch.no_grad():
        apart = (model(tokens) - twin(tokens).logits).float()
    assert apart.abs().mean() < 0.05  # rounding; with angles in bfloat16 it would be 0.2


def test_the_comparison_sees_a_network_that_is_not_the_same():
    model = small()
    twin = proofs.hugging_face_twin(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.01
    tokens = torch.arange(40).reshape(2, 20)
    assert min(proofs.differences(model, twin, tokens)) > 1e-5


def test_the_embedding_is_rotated_relative_to_the_other_token():
    """What a query and a key say to each other depends on how far apart they stand alone."""
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(first: int, second: int) -> torch.Tensor:
        turned = (
            rotate(x, rotation(SMALL, at, 1, like=x)) for x, at in ((query, first), (key, second))
        )
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(product(3, 5), product(103, 105), atol=1e-5, rtol=0)
    assert abs(product(3, 5) - product(3, 9)) > 1e-3


def test_no_token_sees_those_after_it():
    model = small()
    tokens = torch.randint(50, (1, 30))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


# Weights from a folder


def test_weights_move_both_ways_without_renaming(tmp_path):
    from transformers import LlamaForCausalLM

    tokens = torch.randint(50, (2, 20))
    for number, tied in enumerate((True, False)):
        model = small(tie_word_embeddings=tied, rope_scaling=sizes.LLAMA_3_1_SCALING)
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"theirs{number}"
        model.save_pretrained(ours)
        twin = LlamaForCausalLM.from_pretrained(ours)
        twin.save_pretrained(theirs)
        again = llama.Llama.from_pretrained(theirs)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens), twin(tokens).logits, atol=1e-6, rtol=0)
            assert torch.equal(model(tokens), again(tokens))
        assert msgspec.structs.replace(again.config, head_dim=None) == model.config
        tie = again.lm_head.weight is again.model.embed_tokens.weight
        assert tie == tied
        assert not list(tmp_path.glob("*/.*")), "nothing is left over"


def test_several_files_and_another_dtype(tmp_path):
    model = proofs.hugging_face_twin(small())
    model.bfloat16().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    stored = llama.Llama.from_pretrained(tmp_path)
    assert {weights.dtype for weights in stored.parameters()} == {torch.bfloat16}
    whole = llama.Llama.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weights in model.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weights)
        assert torch.equal(whole.state_dict()[name], weights.float())


def test_a_config_json_as_meta_published_it_is_read(tmp_path):
    """The rotary embedding stands elsewhere than where transformers 5 writes it."""
    content = msgspec.to_builtins(llama.HERD["Llama 3.1 8B"])
    content |= {"model_type": "llama", "torch_dtype": "bfloat16", "mlp_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_config(tmp_path / "config.json") == llama.HERD["Llama 3.1 8B"]


def test_what_a_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    from transformers import LlamaConfig as TheirConfig

    content = msgspec.to_builtins(SMALL) | {"model_type": "llama"}
    for name in ("rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "head_dim"):
        del content[name]
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = TheirConfig.from_pretrained(tmp_path)
    ours = read_config(tmp_path / "config.json")
    assert ours.rms_norm_eps == theirs.rms_norm_eps == 1e-6
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 10_000
    assert (ours.tie_word_embeddings, ours.head_size) == (False, theirs.head_dim)


def test_what_older_files_repeat_is_not_read(tmp_path):
    """An output that is tied to the embedding, and the frequencies of the rotary embedding."""
    model = small(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors")
    again = llama.Llama.from_pretrained(tmp_path)
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(again(tokens), model(tokens))


def altered(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def with_weights(change):
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return damage


def as_pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_two_files(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors")
    save_file({NORM: weights[NORM]}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors") | {"x": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_index(content: object):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (with_weights(lambda w: w.pop(NORM)), f"lacks 1 tensors of its config.json: {NORM}, ..."),
        (
            with_weights(lambda w: w.update({NORM: torch.ones(31)})),
            f"holds {NORM} as (31,), which is (32,) by config.json",
        ),
        (
            with_weights(lambda w: w.update(more=torch.ones(1))),
            "holds more, which a Llama of this config.json does not have",
        ),
        (as_pickle, "pytorch_model.bin is a pickle, which may run code; only safetensors is read"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "is torn, or no safetensors file"),
        (lambda f: os.truncate(f / "model.safetensors", 3), "is torn, or no safetensors file"),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist; a Llama's folder"),
        (lambda f: (f / "config.json").write_text("{"), "is no configuration of a Llama: "),
        (lambda f: altered(f, model_type="mistral"), "describes mistral, not llama"),
        (lambda f: altered(f, hidden_size="32"), "Expected `int`, got `str` - at `$.hidden_size`"),
        (lambda f: altered(f, hidden_size=-1), "Expected `int` >= 1 - at `$.hidden_size`"),
        (lambda f: altered(f, hidden_size="gone"), "missing required field `hidden_size`"),
        (lambda f: altered(f, hidden_act="gelu"), "has hidden_act gelu; Llama 3 has silu"),
        (lambda f: altered(f, attention_bias=True), "has attention_bias True; Llama 3 has False"),
        (lambda f: altered(f, num_key_value_heads=3), "which does not come out"),
        (
            lambda f: altered(f, rope_scaling={"rope_type": "yarn", "factor": 2}),
            "has a rotary embedding of type yarn; Llama 3 has default or llama3",
        ),
        (
            lambda f: altered(f, rope_scaling={"rope_type": "llama3", "factor": 8}),
            "missing required field `low_freq_factor`",
        ),
        (
            lambda f: altered(
                f, rope_parameters="gone", rope_scaling={"type": "linear", "factor": 4}
            ),
            "has a rotary embedding of type linear; Llama 3 has default or llama3",
        ),
        (lambda f: altered(f, rope_scaling="linear"), "Expected `object`, got `str`"),
        (lambda f: altered(f, rope_theta=0), "Expected `float` > 0.0 - at `$.rope_theta`"),
        (lambda f: altered(f, vocab_size=2**31), "Expected `int` <= 1048576"),
        (lambda f: altered(f, num_attention_heads=64, head_dim=None), "divides 64 heads of 0"),
        (lambda f: altered(f, model_type="a\nb"), "describes a b, not llama"),
        (lambda f: altered(f, model_type="gone"), "describes no type of model, not llama"),
        (lambda f: altered(f, mlp_bias=True), "has mlp_bias True; Llama 3 has False"),
        (lambda f: altered(f, head_dim=7), "divides 4 heads of 7 over 2, which does not come out"),
        (lambda f: altered(f, quantization_config={"bits": 4}), "has quantization_config"),
        (lambda f: (f / "config.json").write_bytes(b"\xff{}"), "is no configuration of a Llama"),
        (
            with_weights(lambda w: w.update({NORM: torch.ones(32, dtype=torch.int8)})),
            f"holds {NORM} in int8; float32, float16 and bfloat16 are read",
        ),
        (
            with_weights(lambda w: w.update({NORM: torch.ones(32, dtype=torch.float16)})),
            "mixes float16 and float32; name the dtype to load it in",
        ),
        (with_index({"weight_map": {NORM: "../x.safetensors"}}), "which is no file beside it"),
        (with_index({"weight_map": {NORM: "x.safetensors"}}), "names x.safetensors, which is no"),
        (in_two_files, f"holds {NORM}, which another file holds too"),
        (with_index({"weight": 1}), "is no index of safetensors files"),
        (with_index([1]), "is no index of safetensors files"),
    ],
)
def test_a_folder_that_is_not_whole_or_not_a_llama_gets_a_sentence(damage, sentence, tmp_path):
    small().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(lesson.CheckpointError, match=re.escape(sentence)) as refused:
        llama.Llama.from_pretrained(tmp_path)
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_loading_holds_one_copy_of_the_weights(tmp_path):
    """The most that a process ever held, above what it holds before, against the file's size."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096}
    model = llama.Llama(msgspec.structs.replace(SMALL, **sizes, num_hidden_layers=4))
    model.bfloat16().save_pretrained(tmp_path)
    script = textwrap.dedent(
        r"""
        import re, sys, torch
        import safetensors.torch
        from real_world import llama
        def most():
            with open("/proc/self/status") as status:
                return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read())[1])
        before = most()
        model = llama.Llama.from_pretrained(sys.argv[1])
        with torch.no_grad():
            model(torch.arange(8).reshape(1, 8))
        print(most() - before)
        """
    )
    command = [sys.executable, "-c", script, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 130e6
    assert 0.9 * size < int(done.stdout) < 1.5 * size


# Generation


def test_drawing_narrows_as_transformers_does():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50) * 3
    for temperature, top_k, top_p in (
        (0.5, None, 1.0),
        (1.3, 7, 1.0),
        (1.0, None, 0.6),
        (2, 9, 0.8),
    ):
        theirs = TemperatureLogitsWarper(float(temperature))(None, logits)
        if top_k:
            theirs = TopKLogitsWarper(top_k)(None, theirs)
        if top_p < 1:
            theirs = TopPLogitsWarper(top_p)(None, theirs)
        torch.testing.assert_close(llama.narrowed(logits, temperature, top_k, top_p), theirs)


def test_a_seed_draws_the_same_and_another_seed_something_else():
    model, prompt = small(), torch.tensor([[1, 2, 3]])

    def drawn(**how: object) -> list[int]:
        return [token.item() for token in llama.generate(model, prompt, 30, **how)]

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1)
    assert drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    likeliest = drawn()
    assert drawn(temperature=1.0, top_k=1) == drawn(temperature=1.0, top_p=0.0) == likeliest
    assert drawn(temperature=1.0, top_k=1000, seed=1) == drawn(temperature=1.0, seed=1)


def test_every_row_of_a_batch_is_drawn_for_itself():
    model, prompts = small(), torch.tensor([[1, 2, 3]] * 4)
    drawn = torch.stack(list(llama.generate(model, prompts, 10, temperature=1.0)), dim=1)
    assert drawn.shape == (4, 10)
    assert len({tuple(row) for row in drawn.tolist()}) == 4


def test_after_a_prompt_tokens_come_one_at_a_time():
    model = small()
    caches = [llama.Cache(SMALL, 1, 20, model.lm_head.weight) for _ in range(2)]
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), caches)
        with pytest.raises(ValueError, match="tokens come one at a time"):
            model(torch.tensor([[4, 5]]), caches)


def test_the_cache_computes_every_token_once():
    model, seen = small(), []
    model.model.embed_tokens.register_forward_hook(lambda module, x, y: seen.append(x[0].shape[1]))
    list(llama.generate(model, torch.tensor([[1, 2, 3]]), 5))
    assert seen == [3, 1, 1, 1, 1]
    seen.clear()
    list(llama.generate(model, torch.tensor([[1, 2, 3]]), 5, cached=False))
    assert seen == [3, 4, 5, 6, 7]


# The text, and training


def test_entropies_of_texts_that_can_be_worked_out():
    coin = torch.tensor([0, 1] * 500, dtype=torch.uint8)
    alone, after_one = training.entropies(coin)
    assert alone == pytest.approx(math.log(2))
    assert after_one == pytest.approx(0, abs=1e-5)
    torch.manual_seed(0)
    dice = torch.randint(6, (200_000,), dtype=torch.uint8)
    assert training.entropies(dice) == (pytest.approx(math.log(6), abs=1e-3),) * 2


def test_windows_pair_every_byte_with_the_next():
    text = torch.arange(100, dtype=torch.uint8)
    draw = training.windows(text, batch=16, length=20, seed=1)
    starts = set()
    for _ in range(30):
        X, y = draw()
        assert X.shape == y.shape == (16, 20)
        assert torch.equal(X + 1, y)
        starts |= set(X[:, 0].tolist())
    assert min(starts) == 0
    assert max(starts) == 79


def test_a_short_training_learns_more_than_a_byte_alone_tells(tmp_path, capsys):
    """Through main: it trains, says so, keeps the network, and goes on with it the next time."""
    options = ["--device", "cpu", "--steps", "150", "--output", str(tmp_path)]
    assert page.main(options) == 0
    printed = capsys.readouterr().out
    alone, _ = training.entropies(llama.library_text())
    assert float(re.search(r"held out +(\S+) nats", printed)[1]) < alone - 0.5
    assert len(re.findall(r"^    step +\d+    loss \S+$", printed, re.MULTILINE)) == 10
    assert printed.count(" ok\n") == 9
    lines = (line for line in printed.splitlines() if str(tmp_path) not in line)
    assert max(map(len, lines)) <= 80
    assert matplotlib.image.imread(tmp_path / "llama.png").shape == (480, 1440, 4)
    assert re.search(r"Llama 3.1 8B .* 131,072 B\n", printed)
    rest = llama.library_text()[-len(llama.library_text()) // 10 :]
    bigram = float(re.search(r"entropy of what is held out +(\S+) nats", printed)[1])
    assert bigram == pytest.approx(training.entropies(rest)[1], abs=2e-3)

    assert page.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    again = capsys.readouterr()
    assert re.search(r"held out, well below a bigram +\S+ nats a byte +FAILED\n", again.out)
    assert page.main([*options, "--prompt", "a"]) == 1
    already = "holds a network already; with --steps goes --train, for another"
    assert capsys.readouterr().err == f"llama: {tmp_path}/llama {already}\n"
    model = llama.Llama.from_pretrained(tmp_path / "llama")
    assert len(json.loads((tmp_path / "llama" / "losses.json").read_text())) == 150
    assert oct((tmp_path / "llama" / "model.safetensors").stat().st_mode)[-3:] == "644"
    model.bfloat16().save_pretrained(tmp_path / "half" / "llama")
    chosen = page.options(["--output", str(tmp_path / "half"), "--device", "cpu"])
    kept, losses = page.network(chosen)
    assert (kept.lm_head.weight.dtype, losses) == (torch.float32, [])
    (tmp_path / "half" / "llama" / "losses.json").write_text("[no")
    with pytest.raises(lesson.CheckpointError, match=r"losses\.json is no list of losses"):
        page.network(chosen)
    small().save_pretrained(tmp_path / "half" / "llama")
    with pytest.raises(lesson.CheckpointError, match="a network whose tokens are not bytes"):
        page.network(chosen)
    capsys.readouterr()

    on = ["--device", "cpu", "--output", str(tmp_path), "--no-train", "--prompt", "The é"]
    said = []
    for seed in ("1", "1", "2"):
        assert page.main([*on, "--tokens", "40", "--seed", seed]) == 0
        said.append(capsys.readouterr().out.split(f"{tmp_path}/llama/\n")[1])
    assert all(each.startswith("The é") for each in said)
    assert said[0] == said[1] != said[2]
    assert not list(tmp_path.glob("**/.*"))


def test_train_is_the_lessons_and_gets_everything_by_its_arguments(monkeypatch):
    calls = []
    original = lesson.train
    monkeypatch.setattr(lesson, "train", lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    model = small(vocab_size=256)
    losses = llama.train_llama(model, llama.library_text(), 20, seed=0, first=3)
    ((arguments, named),) = calls
    assert arguments[0] is model
    assert named["epochs"] == len(losses) == 3


def test_divided_over_two_it_has_the_same_losses(tmp_path):
    with Run(sys.executable, *PAGE, "--steps", 40, "--output", tmp_path / "one") as running:
        status, said = running.end()
    assert status == 0, said
    alone = re.findall(r"step +\d+    loss (\S+)", said)
    status, said = torchrun(2, "--steps", 40, "--output", tmp_path / "two", program=PAGE)
    assert status == 0, said
    assert re.search(r"first 10 losses, one process +differ by \S+ +ok", said)
    losses = re.findall(r"step +\d+    loss (\S+)", said)
    assert len(losses) == 10
    for theirs, ours in zip(losses, alone, strict=True):
        assert float(theirs) == pytest.approx(float(ours), abs=2e-3)
    whole = llama.Llama.from_pretrained(tmp_path / "two" / "llama-divided")
    assert sum(w.numel() for w in whole.parameters()) == sizes.parameter_count(llama.MINIATURE)


# What it costs


def test_costs_follow_from_the_configuration():
    official = {"Llama 3.1 8B": 8_030_261_248, "Llama 3.1 70B": 70_553_706_496}
    official["Llama 3.1 405B"] = 405_853_388_800
    for name, config in llama.HERD.items():
        with torch.device("meta"):
            model = llama.Llama(config)
        count = sum(weights.numel() for weights in model.parameters())
        assert sizes.parameter_count(config) == count == official[name]
    for tied in (True, False):
        model = small(tie_word_embeddings=tied)
        count = sum(weights.numel() for weights in model.parameters())
        assert sizes.parameter_count(model.config) == count
        tokens = torch.zeros(1, 30, dtype=torch.int64)
        plainly = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, plainly:
            model(tokens)
        assert counter.get_total_flops() == 30 * sizes.flops_a_token(model.config, 30)


# Bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--prompt=", "argument --prompt: is empty; a prompt has one character at least"),
        ("--temperature=-1", "argument --temperature: '-1' is not a number from 0 to 100"),
        ("--prompt=a\udcff", "argument --prompt: is not UTF-8"),
        (
            "--tokens=9999999",
            "argument --tokens: '9999999' is not a whole number from 1 to 1000000",
        ),
        ("--temperature=nan", "argument --temperature: 'nan' is not a number from 0 to 100"),
        ("--top-p=1.5", "argument --top-p: '1.5' is not a number from 0 to 1"),
        ("--top-k=0", "argument --top-k: '0' is not a whole number from 1 to 4294967295"),
        ("--steps=19", "argument --steps: '19' is not a whole number from 20 to 4294967295"),
        ("--weights=x", "argument --weights: belongs to --prompt"),
        ("--tokens=3", "argument --tokens: belongs to --prompt"),
    ],
)
def test_a_wrong_option_gets_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        page.main([options])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"llama: {sentence}\n"


@pytest.mark.parametrize(
    ("world", "options", "sentence"),
    [
        ("2", ["--no-train"], "argument --no-train: torchrun is for training"),
        ("2", ["--prompt", "a"], "argument --prompt: torchrun is for training"),
        ("9", [], "torchrun: 8 processes at the most, for a batch has 8 rows"),
    ],
)
def test_what_torchrun_cannot_do_gets_a_sentence(world, options, sentence, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit):
        page.main(options)
    assert capsys.readouterr().err == f"llama: {sentence}\n"


def test_no_paragraph_of_the_text_stands_in_it_twice():
    paragraphs = bytes(llama.library_text().tolist()).decode().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000


def test_what_is_not_there_gets_a_sentence(tmp_path, capsys):
    assert page.main(["--no-train", "--prompt", "a", "--output", str(tmp_path)]) == 1
    lacks = f"{tmp_path}/llama holds no network; without --no-train one is trained there"
    assert capsys.readouterr().err == f"llama: {lacks}\n"
    assert page.main(["--weights", str(tmp_path), "--prompt", "a"]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
    small().save_pretrained(tmp_path)
    assert page.main(["--weights", str(tmp_path), "--prompt", "a"]) == 1
    lacks = f"{tmp_path} has no tokenizer.json, and its tokens are not bytes"
    assert capsys.readouterr().err == f"llama: {lacks}\n"


def test_a_token_that_the_network_does_not_know_gets_a_sentence(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 50}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    small().save_pretrained(tmp_path)
    reason = "the prompt has no token, or one that the network does not know"
    for prompt in ("b", " "):
        assert page.main(["--weights", str(tmp_path), "--prompt", prompt]) == 1
        assert capsys.readouterr().err == f"llama: {reason}\n"


class Saying(torch.nn.Module):
    """Says given bytes one after another, whatever it hears."""

    def __init__(self, said: bytes) -> None:
        super().__init__()
        self.config = msgspec.structs.replace(SMALL, vocab_size=256)
        self.lm_head = torch.nn.Linear(1, 1)
        self.lm_head.forward = lambda x: x
        self.said = iter(said)

    def model(self, tokens: torch.Tensor, caches: object) -> torch.Tensor:
        logits = torch.zeros(1, 1, 256)
        logits[0, 0, next(self.said)] = 100.0
        return logits


def test_what_is_written_is_whole_characters_that_steer_no_terminal(capsys):
    said = "né\x1b[2J€\n".encode()
    chosen = page.options(["--prompt", "A", "--tokens", str(len(said)), "--temperature", "0"])
    page.write_on(Saying(said), None, chosen)
    assert capsys.readouterr().out == "Ané.[2J€\n\n"
    chosen.tokens = 2  # in the midst of a character
    page.write_on(Saying(said), None, chosen)
    assert capsys.readouterr().out == "An\ufffd\n"


def test_a_tokenizer_that_cannot_be_read_gets_a_sentence(tmp_path, capsys):
    small().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert page.main(["--weights", str(tmp_path), "--prompt", "a"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llama: {tmp_path}/tokenizer.json is no tokenizer that can be read (")
    assert error.count("\n") == 1


def test_what_cannot_be_written_gets_a_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        small().save_pretrained(tmp_path)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, largest[1]))  # as on a disk that is full
    try:
        with pytest.raises(OSError, match=r"x could not be written: .*File too large"):
            write_tensors(tmp_path / "x", {"a": torch.ones(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_that_are_no_numbers_get_a_sentence(tmp_path, capsys):
    model = small(vocab_size=256)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path)
    assert page.main(["--weights", str(tmp_path), "--prompt", "a"]) == 1
    reason = "the network answers with no numbers: its weights are not finite"
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("a\n", f"llama: {reason}\n")


def test_far_tokens_are_rotated_in_float32_whatever_the_weights_are_in():
    model = small(rope_theta=10_000.0)
    like = torch.zeros((), dtype=torch.bfloat16)
    far = rotation(model.config, 1001, 1, like)
    exact = rotation(model.config, 1001, 1, torch.zeros(()))
    for ours, expected in zip(far, exact, strict=True):
        assert ours.equal(expected.bfloat16())


@pytest.mark.parametrize("several", [True, False])
def test_a_folder_with_a_tokenizer_goes_on_in_its_words_until_it_ends(several, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = small()
    prompt = torch.tensor([[4, 7]])
    tokens = [token.item() for token in llama.generate(model, prompt, 12)]
    end = tokens.index(tokens[5])
    ending = msgspec.structs.replace(
        model.config, eos_token_id=(49, tokens[5]) if several else tokens[5]
    )
    model.model.config = ending
    model.save_pretrained(tmp_path)
    options = ["--weights", str(tmp_path), "--prompt", "w4 w7", "--temperature", "0"]
    assert page.main([*options, "--tokens", "12"]) == 0
    assert capsys.readouterr().out.split() == ["w4", "w7", *(f"w{n}" for n in tokens[:end])]
