"""The LoRA example: what it prints, and the checks of a whole run."""

import copy
import dataclasses
import re

import matplotlib.image
import pytest
import torch
from readmes import REAL_WORLD, mask, read_lines
from torch import nn

from real_world.common import CheckFailed
from real_world.llama.checkpoint import load_pretrained, save_pretrained
from real_world.llama.config import LLAMA_TINY
from real_world.llama.costs import flops_per_token
from real_world.llama.model import Llama
from real_world.lora import llama, stable_diffusion
from real_world.lora.__main__ import main
from real_world.lora.adapter import load_adapter
from real_world.lora.config import LLAMA, STABLE_DIFFUSION
from real_world.lora.llama import print_costs
from real_world.lora.lora import LoraConfig, apply_lora
from real_world.lora.stable_diffusion import TARGET_MODULES, finetune_stable_diffusion
from real_world.stable_diffusion.data import load_images
from real_world.stable_diffusion.pipeline import LatentDiffusion, save_model
from real_world.stable_diffusion.unet import UNet


def test_costs_of_a_training_step(capsys):
    config = dataclasses.replace(
        LLAMA_TINY, vocab_size=30_000, hidden_size=512, num_attention_heads=16
    )
    base_model = Llama(config)
    model = copy.deepcopy(base_model)
    apply_lora(model, LoraConfig(("q_proj",), r=64))  # 4 layers of (512 + 512) * 64
    print_costs(model, base_model)
    full, lora = (line.split() for line in capsys.readouterr().out.splitlines()[2:4])
    # 4 bytes per parameter, and 12 more per trained one: the gradient, and Adam's two averages.
    assert full[2:5] == ["20,083,200", "321", "MB"], "16 bytes * 20,083,200"
    assert lora[1:4] == ["262,144", "85", "MB"], "4 bytes * 20,345,344 + 12 bytes * 262,144"
    gflops = 3 * flops_per_token(config, 128) / 1e9  # a forward pass, and twice that backward
    assert full[5] == f"{gflops:.2f}" == "0.12"
    assert lora[4] == "0.08", "without the gradients of the frozen weights: two thirds"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Fine-tune a tiny Llama and an untrained diffusion model; return the folder."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    save_pretrained(Llama(dataclasses.replace(LLAMA_TINY, num_hidden_layers=1)), folder / "smollm2")
    save_model(folder / "stable_diffusion", LatentDiffusion())
    return folder


def test_run_prints_the_transcript_and_saves_adapters(run, capsys, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "SAMPLES", 5)
    main(["--steps", "20", "--rank", "2", "--output", str(run), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert re.search(r"trainable, with rank 2 +\d", printed)
    per_token, per_byte = re.findall(r"-> ([\d.]+) nats per (?:token|byte)", printed)
    assert float(per_byte) == pytest.approx(float(per_token), rel=0.001), "a token is a byte here"

    def lines(text: str) -> list[str]:
        """Return the lines without generated text, and without the results of checks."""
        lines = [line for line in read_lines(text) if not line.startswith("|")]
        return [mask(line).removesuffix(" ok") for line in lines]

    readme = (REAL_WORLD / "lora" / "README.md").read_text(encoding="utf-8")
    transcript = readme.split("```text\n")[1].split("```")[0]
    assert lines(printed) == lines(transcript)
    assert matplotlib.image.imread(run / "lora.png").shape == (816, 1440, 4)

    config = load_adapter(load_pretrained(run / "smollm2"), run / "lora" / "llama")
    assert (config.r, config.lora_alpha) == (2, 4)
    unet = UNet()
    assert load_adapter(unet, run / "lora" / "stable_diffusion").target_modules == TARGET_MODULES


def test_training_without_effect_fails_the_check_of_the_llama(run, monkeypatch):
    monkeypatch.setattr(llama, "train_llama", lambda *_: [1.0])
    with pytest.raises(CheckFailed, match="validation loss"):
        llama.finetune_llama(LLAMA, run, torch.device("cpu"))


@pytest.fixture
def finetune_digits(run, monkeypatch):
    """Return a function that runs the example with given images, before and after training.

    The latents are averages of 2 x 2 pixels.
    """
    encode, decode = nn.functional.avg_pool2d, nn.Upsample(scale_factor=2)
    monkeypatch.setattr(LatentDiffusion, "encode", lambda _, X: encode(X, 2).expand(-1, 2, 4, 4))
    monkeypatch.setattr(LatentDiffusion, "decode", lambda _, latents: decode(latents[:, :1]))
    monkeypatch.setattr(stable_diffusion, "train_unet", lambda *_: [1.0])

    def finetune(*images: torch.Tensor) -> None:
        generated = iter(images)
        monkeypatch.setattr(LatentDiffusion, "generate", lambda *_, **__: next(generated))
        finetune_stable_diffusion(STABLE_DIFFUSION, run, torch.device("cpu"))

    return finetune


def real_and_mirrored() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 50 images per digit, and the same ones with the sevens mirrored."""
    data = load_images()
    images = torch.cat([data.X_train[data.y_train == digit][:50] for digit in range(10)])
    mirrored = images.clone()
    mirrored[350:400] = images[350:400].flip(-1)
    return images, mirrored


def test_figures_of_the_diffusion_model(finetune_digits, capsys):
    real, generated = real_and_mirrored()
    generated[350] = real[350]  # one of 50
    generated[:9] = real[50:59]  # nine of 450
    finetune_digits(real, generated)
    printed = " ".join(capsys.readouterr().out.split())
    assert "trainable, with rank 8 34,816, 4.20%" in printed, "of 828,738"
    assert "prompt 7 0% -> 98% mirrored ok" in printed
    assert "other prompts 100.0% -> 98.0% as prompted ok" in printed
    assert "the model has 3,315 kB" in printed, "4 * 828,738 bytes"


def test_wrong_digits_fail_their_check(finetune_digits):
    real, mirrored = real_and_mirrored()
    sevens = mirrored[350:400].repeat(10, 1, 1, 1)
    for before, after, check in (
        (real, real, "prompt 7"),
        (mirrored, mirrored, "prompt 7"),
        (real, sevens, "the other prompts"),
    ):
        with pytest.raises(CheckFailed, match=f"check failed: {check} "):
            finetune_digits(before, after)


def test_readme_shows_the_layer():
    readme = (REAL_WORLD / "lora" / "README.md").read_text(encoding="utf-8")
    shown = readme.split("```python\n")[1].split("```")[0]
    assert shown in (REAL_WORLD / "lora" / "lora.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [["--only", "bert"], ["--steps", "3"], ["--rank", "0"]])
def test_wrong_options_are_usage_errors(options, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    assert f"error: argument {options[0]}: " in capsys.readouterr().err
