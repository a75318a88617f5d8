"""The Stable Diffusion example: generation, evaluation, command line."""

import contextlib
import io
import re
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch
from readmes import assert_transcript
from sklearn.metrics import accuracy_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from lesson_code import CheckpointError
from real_world.common import CheckFailed
from real_world.stable_diffusion import evaluate
from real_world.stable_diffusion.__main__ import main
from real_world.stable_diffusion.data import load_images
from real_world.stable_diffusion.pipeline import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LatentDiffusion,
    load_model,
)
from real_world.stable_diffusion.plot import save_images, to_text
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.unet import (
    NULL_CLASS,
)
from real_world.training import read_losses


@pytest.fixture(scope="module")
def data():
    return load_images()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the whole example, whose checks must pass, with a short training.

    Returns the folder with its files and `output.txt`, what it printed.
    """
    folder = tmp_path_factory.mktemp("stable_diffusion")
    options = ["--steps", "200", "--vae-epochs", "15", "--inference-steps", "10"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([*options, "--device", "cpu", "--output", str(folder)])
    (folder / "output.txt").write_text(output.getvalue())
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load_model(run / "stable_diffusion")


# Generation


class OracleUNet(nn.Module):
    """Predicts what leads to a known image for each prompt, and for none."""

    def __init__(self, latents, scheduler):
        super().__init__()
        self.latents = latents  # (11, 2, 4, 4)
        self.scheduler = scheduler

    def forward(self, inputs):
        signal_rate, noise_rate = self.scheduler.sqrt_alpha_prods(inputs.timesteps)
        latents = self.latents[inputs.prompts]
        noise = (inputs.latents - signal_rate * latents) / noise_rate
        return self.scheduler.get_target(latents, noise, inputs.timesteps)


@pytest.mark.parametrize("guidance_scale", [0, 0.5, 1, 3])
def test_guidance_moves_from_the_unconditional_to_the_conditional_prediction(guidance_scale):
    latents = torch.randn(11, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    model = LatentDiffusion()
    model.unet = OracleUNet(latents, model.scheduler)
    prompts = torch.tensor([3, 3, 8])
    history = []
    model.generate(prompts, guidance_scale, num_inference_steps=20, on_step_end=history.append)
    assert len(history) == 20
    uncond, cond = latents[NULL_CLASS], latents[prompts]
    expected = uncond + guidance_scale * (cond - uncond)
    torch.testing.assert_close(history[-1], expected, atol=0.15, rtol=0)


def test_generation_follows_the_schedule_of_the_model():
    latents = torch.randn(11, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    model = LatentDiffusion()
    model.scheduler = NoiseScheduler("v_prediction", "trailing")
    model.unet = OracleUNet(latents, model.scheduler)
    timesteps, history = [], []
    model.unet.register_forward_hook(lambda unet, args, _: timesteps.append(args[0].timesteps[0]))
    model.generate(torch.tensor([3, 8]), 1, num_inference_steps=4, on_step_end=history.append)
    assert timesteps == [999, 749, 499, 249]
    torch.testing.assert_close(history[-1], latents[[3, 8]], atol=0.15, rtol=0)


@pytest.fixture
def copying_model(run, data):
    """Return a model that generates, at guidance scale 3, the first training image of a digit."""
    model = load_model(run / "stable_diffusion")
    latents = model.encode(data.X_train)
    uncond = latents.mean(dim=0, keepdim=True)
    first = [int((data.y_train == digit).nonzero()[0]) for digit in range(10)]
    cond = uncond + (latents[first] - uncond) / 3
    model.unet = OracleUNet(torch.cat((cond, uncond)), model.scheduler)
    return model


def copy_all(unet: OracleUNet) -> None:
    """Leave the model as it is."""


def copy_one(unet: OracleUNet) -> None:
    """Generate other images of the same digits, but for one."""
    unet.latents[:9] += 0.15


def other_digits(unet: OracleUNet) -> None:
    unet.latents = unet.latents.roll(1, dims=0)


def without_null_class(unet: OracleUNet) -> None:
    """Use the prompts without guidance, too."""
    unet.register_forward_pre_hook(
        lambda _, args: (args[0]._replace(prompts=args[0].prompts.chunk(2)[1].repeat(2)),)
    )


@pytest.mark.parametrize(
    ("break_model", "check"),
    [
        (without_null_class, "scale 0 ignores the prompt"),
        (other_digits, "scale 3 follows the prompt"),
        (copy_all, "no copies of training images"),
        (copy_one, "no copies of training images"),
    ],
)
def test_broken_model_fails_its_check(copying_model, data, break_model, check):
    break_model(copying_model.unet)
    with pytest.raises(CheckFailed, match=f"check failed: {check} "):
        evaluate.evaluate_generation(copying_model, data, num_inference_steps=10)


def test_accuracies_and_distances_are_those_of_scikit_learn(run, model, data):
    output = (run / "output.txt").read_text()
    classifier = evaluate.train_classifier(data)
    search = NearestNeighbors(n_neighbors=1)
    search.fit(model.decode(model.encode(data.X_train)).flatten(1))
    prompts = torch.arange(10).repeat_interleave(50)
    expected = {}
    for label, images, y in (
        ("guidance scale 3", model.generate(prompts, num_inference_steps=10), prompts),
        ("test images", model.decode(model.encode(data.X_test)), data.y_test),
    ):
        distances, _ = search.kneighbors(images.flatten(1))
        accuracy = accuracy_score(y, classifier(images.flatten(1)).argmax(dim=1))
        expected[label] = np.array([100 * accuracy, np.median(distances), distances.min()])
        printed = re.search(rf"{label} +([\d.]+)% +([\d.]+) +([\d.]+)", output).groups()
        assert [float(number) for number in printed] == pytest.approx(expected[label], abs=0.051)
    ratios = 100 * (expected["guidance scale 3"] / expected["test images"])[1:]
    printed = re.search(r"training images +(\d+)%, (\d+)% of", output).groups()
    assert [float(number) for number in printed] == pytest.approx(ratios, abs=1)


def test_vae_reconstructs_test_images_from_latents_of_unit_variance(model, data):
    assert model.encode(data.X_train).std().item() == pytest.approx(1, abs=1e-4)
    images = model.decode(model.encode(data.X_test))
    assert (images.min() >= 0, images.max() <= 1) == (True, True)
    assert (images - data.X_test).square().mean() < 0.25 * data.X_test.var()


def test_images_as_text_and_as_a_png(tmp_path):
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, :, 3] = 1
    images[1, 0, 0, 0] = 0.5
    lines = to_text(images).splitlines()
    assert lines[0] == " " * 8 + "@@" + " " * 12 + "=="
    assert lines[1:] == [" " * 8 + "@@"] * 7
    save_images(tmp_path / "images.png", images)
    pixels = matplotlib.image.imread(tmp_path / "images.png")[::16, ::16, 0]  # (10, 20)
    assert (1 - pixels).nonzero()[1].tolist() == [4, 11, *7 * [4]]


# Command line; its run passes the checks even after a short training


def test_run_saves_model_and_figure(run):
    folder = run / "stable_diffusion"
    vae_losses, losses = (
        read_losses(folder / f"{name}.jsonl") for name in ("vae_losses", "losses")
    )
    assert (len(vae_losses), len(losses)) == (180, 200)
    assert vae_losses[-1] < vae_losses[0] / 5
    assert sum(losses[-10:]) < sum(losses[:10]) / 4
    assert matplotlib.image.imread(run / "stable_diffusion.png").shape == (780, 1440, 4)
    assert {path.name for path in folder.iterdir()} == {
        *(WEIGHTS_FILE, CONFIG_FILE, "train_config.json", "losses.jsonl", "vae_losses.jsonl")
    }


def test_readme(run):
    # The training here is shorter.
    varying = r"epochs|steps|step |time|scale|test images"
    assert_transcript("stable_diffusion", (run / "output.txt").read_text(), varying)


def test_prompt_generates_images_with_the_saved_model(run, model, capsys):
    path = run / "stable_diffusion" / WEIGHTS_FILE
    saved = path.read_bytes()
    options = ["--guidance", "2", "--inference-steps", "20", "--seed", "5", "--output", str(run)]
    main(["--prompt", "3", *options, "--device", "cpu"])
    output = capsys.readouterr().out
    assert "model loaded from" in output
    images = model.generate(torch.full((4,), 3), 2.0, num_inference_steps=20, seed=5)
    assert to_text(images) in output
    images = model.generate(torch.full((4,), 3), 2.0, num_inference_steps=20, seed=6)
    assert to_text(images) not in output
    assert (run / "stable_diffusion-3.png").exists()
    assert path.read_bytes() == saved
    with pytest.raises(CheckFailed, match=r"--guidance 1e.38 is too large"):
        main(["--prompt", "3", "--guidance", "1e38", "--output", str(run), "--device", "cpu"])


def test_model_with_another_config_is_neither_loaded_nor_overwritten(run):
    with pytest.raises(CheckpointError, match="was trained with vae_epochs 15, not 9; delete it"):
        main(["--vae-epochs", "9", "--output", str(run), "--device", "cpu"])


@pytest.mark.parametrize("size", [0, 1000, 3_000_000])
def test_truncated_checkpoint_raises_checkpoint_error(run, tmp_path, size):
    shutil.copytree(run / "stable_diffusion", tmp_path / "stable_diffusion")
    path = tmp_path / "stable_diffusion" / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"cannot load {path.parent} .*; delete it"):
        main(["--prompt", "7", "--output", str(tmp_path)])
    assert path.stat().st_size == size


def test_missing_weights_raise_checkpoint_error(run, tmp_path):
    shutil.copy(run / "stable_diffusion" / CONFIG_FILE, tmp_path)
    with pytest.raises(CheckpointError, match=f"No such file.*{tmp_path / WEIGHTS_FILE}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ["--prompt", "10"],
        ["--guidance", "2"],
        ["--prompt", "1", "--guidance", "nan"],
        ["--prompt", "1", "--guidance", "-1"],
        ["--prompt", "1", "--inference-steps", "334"],
        ["--steps", "3"],
    ],
)
def test_wrong_options_are_usage_errors(options, capsys):
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2
    assert f"error: argument {options[-2]}: " in capsys.readouterr().err
