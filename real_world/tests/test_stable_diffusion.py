"""Noise that is everybody's noise, and networks that draw what they are asked for."""

import itertools
import os
import re

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lesson_code as lesson
from real_world import stable_diffusion as sd
from real_world.digits import load_digits
from real_world.stable_diffusion import drawing, networks, page, training

KINDS = {
    "linear": ("linear", 0.0001, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 0.0001, 0.02),
}


# The schedule


@pytest.mark.parametrize(
    ("kind", "predicts"), list(itertools.product(KINDS, ("epsilon", "v_prediction")))
)
def test_noise_and_steps_are_those_of_diffusers(kind, predicts):
    from diffusers import DDIMScheduler, DDPMScheduler

    name, start, end = KINDS[kind]
    same = {"beta_schedule": name, "beta_start": start, "beta_end": end, "clip_sample": False}
    same |= {"prediction_type": predicts}
    ddpm = DDPMScheduler(**same)
    ddim = DDIMScheduler(**same, set_alpha_to_one=False, steps_offset=1)
    schedule = sd.noise_schedule(kind, predicts=predicts)
    generator = torch.Generator().manual_seed(1)
    images, noise, prediction, fresh = torch.randn(4, 6, 2, 4, 4, generator=generator)
    times = torch.randint(1000, (6,), generator=generator)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(
        schedule.add_noise(images, noise, times), ddpm.add_noise(images, noise, times), **close
    )
    if predicts == "v_prediction":
        theirs = ddpm.get_velocity(images, noise, times)
        torch.testing.assert_close(schedule.target(images, noise, times), theirs, **close)
    for steps in (10, 50, 250):
        ddim.set_timesteps(steps)
        assert drawing.times_back(steps, 1000) == ddim.timesteps.tolist()
        for time in ddim.timesteps.tolist()[:: max(1, steps // 10)]:
            for eta, drawn in ((0.0, None), (1.0, fresh)):
                theirs = ddim.step(prediction, time, images, eta=eta, variance_noise=drawn)
                earlier = time - 1000 // steps
                ours = schedule.ddim_step(prediction, time, earlier, images, eta, drawn)
                torch.testing.assert_close(ours, theirs.prev_sample, **close)
    for time in (999, 500, 2, 1, 0):
        drawn = torch.Generator().manual_seed(time)
        fresh = torch.randn(6, 2, 4, 4, generator=drawn)
        theirs = ddpm.step(prediction, time, images, generator=drawn.manual_seed(time))
        ours = schedule.ddpm_step(prediction, time, images, fresh)
        torch.testing.assert_close(ours, theirs.prev_sample, **close)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_right_prediction_leads_back_to_the_image(predicts):
    schedule = sd.noise_schedule(predicts=predicts)
    images, noise = torch.randn(2, 5, 2, 4, 4, dtype=torch.float64)
    for time in (3, 300, 900):
        times = torch.full((5,), time)
        noisy = schedule.add_noise(images, noise, times)
        target = schedule.target(images, noise, times)
        for found, truth in zip(schedule.split(target, time, noisy), (images, noise), strict=True):
            torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)


def test_an_unknown_schedule_gets_a_sentence():
    with pytest.raises(ValueError, match="there is no schedule 'sine'; there is linear, scaled"):
        sd.noise_schedule("sine")


# The networks


def test_shapes_and_what_the_denoiser_listens_to():
    diffusion = sd.Diffusion()
    images = torch.rand(3, 1, 8, 8)
    back, mean, log_variance = diffusion.autoencoder(images)
    assert back.shape == images.shape
    assert mean.shape == log_variance.shape == (3, 2, 4, 4)
    noisy = sd.Noisy(torch.randn(3, 2, 4, 4), torch.tensor([1, 500, 999]), torch.tensor([0, 5, 10]))
    prediction = diffusion.denoiser(noisy)
    assert prediction.shape == (3, 2, 4, 4)
    for change in ({"times": noisy.times - 1}, {"prompts": (noisy.prompts + 1) % 11}):
        assert not torch.allclose(prediction, diffusion.denoiser(noisy._replace(**change)))
    prediction.sum().backward()
    unused = [name for name, w in diffusion.denoiser.named_parameters() if w.grad is None]
    assert not unused


def test_the_denoiser_hears_every_word_and_sees_across_the_u():
    model, seen = sd.Denoiser(), {}
    for name in ("down", "grow", "up"):
        model.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: seen.update({name: (x[0], y)})
        )
    noisy = sd.Noisy(torch.randn(2, 2, 4, 4), torch.tensor([1, 500]), torch.tensor([3, 5]))
    model(noisy).square().sum().backward()
    words = model.words.weight.grad.view(sd.EMPTY + 1, networks.WORDS, -1)
    assert (words[[3, 5]].abs().amax(dim=2) > 0).all()
    assert (words[[0, 1, 2]] == 0).all()
    across = torch.cat((seen["down"][1], seen["grow"][1]), dim=1)
    assert seen["up"][0].equal(across)


def test_times_are_waves_as_in_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    times = torch.tensor([0, 1, 37, 999])
    theirs = get_timestep_embedding(times, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(networks.time_embedding(times, 64), theirs, atol=1e-5, rtol=0)


def test_the_latent_is_drawn_with_the_spread_that_the_encoder_gives():
    model = sd.Autoencoder()
    images = torch.rand(1, 1, 8, 8).expand(4000, 1, 8, 8)
    latents = []
    model.decoder.register_forward_pre_hook(lambda module, x: latents.append(x[0]))
    with torch.no_grad():
        _, mean, log_variance = model(images)
    spread = latents[0].std(dim=0)
    torch.testing.assert_close(spread, (log_variance[0] / 2).exp(), rtol=0.1, atol=0)
    torch.testing.assert_close(latents[0].mean(dim=0), mean[0], rtol=0, atol=0.1)


def test_the_autoencoders_loss_is_the_error_and_the_divergence_from_a_standard_normal():
    images = torch.rand(5, 1, 8, 8)
    mean, log_variance = torch.randn(2, 5, 2, 4, 4)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    divergence = torch.distributions.kl_divergence(normal, standard).mean()
    expected = 0.01 + 0.0005 * divergence
    torch.testing.assert_close(
        networks.autoencoder_loss((images + 0.1, mean, log_variance), images), expected
    )


# Training and drawing


class Oracle(nn.Module):
    """Predicts the noise that leads to one image with a prompt, and to another without."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.images, self.schedule = images, sd.noise_schedule()

    def forward(self, noisy: sd.Noisy) -> torch.Tensor:
        image_share, noise_share = self.schedule.shares(noisy.times)
        return (noisy.latents - image_share * self.images[noisy.prompts]) / noise_share


@pytest.mark.parametrize(("guidance", "share"), [(0, 0), (0.5, 0.5), (1, 1), (3, 3)])
def test_guidance_moves_from_what_there_is_without_a_prompt_to_what_there_is_with_it(
    guidance, share
):
    images = torch.randn(11, 2, 4, 4)
    diffusion = sd.Diffusion()
    diffusion.denoiser = Oracle(images)
    prompts = torch.tensor([3, 3, 8])
    way = sd.draw_latents(diffusion, prompts, guidance=guidance, steps=20)
    empty = images[sd.EMPTY]
    expected = empty + share * (images[prompts] - empty)
    torch.testing.assert_close(way[-1], expected, atol=0.15, rtol=0)
    assert len(way) == 21


def test_one_that_draws_training_images_again_is_called_a_copy(capsys):
    digits = load_digits()
    torch.manual_seed(0)
    diffusion = sd.Diffusion()
    sd.train_autoencoder(diffusion.autoencoder, digits.X, 300)
    with torch.no_grad():
        latents, _ = diffusion.autoencoder.encode(networks.as_images(digits.X))
    diffusion.scale.copy_(1 / latents.std())
    latents = latents * diffusion.scale
    firsts = [int((digits.y == digit).nonzero()[0]) for digit in range(10)]
    empty = latents.mean(dim=0, keepdim=True)
    at_guidance_3 = (latents[firsts] + 2 * empty) / 3
    diffusion.denoiser = Oracle(torch.cat((at_guidance_3, empty)))
    with pytest.raises(lesson.CheckFailed, match="and not copied"):
        page.compare_guidance(diffusion, digits, seed=0)
    assert re.search(
        r"and not copied +\S+ as far as real ones, nearest \S+ +FAILED", capsys.readouterr().out
    )


def test_a_short_training_falls_and_draws_are_of_a_seed(tmp_path):
    digits = load_digits()
    torch.manual_seed(0)
    diffusion = sd.Diffusion()
    first = sd.train_autoencoder(diffusion.autoencoder, digits.X, 60)
    assert first[-1] < first[0] / 3
    with torch.no_grad():
        latents, _ = diffusion.autoencoder.encode(networks.as_images(digits.X))
    latents = latents / latents.std()
    before = [weights.detach().clone() for weights in diffusion.denoiser.parameters()]
    losses = sd.train_denoiser(diffusion.denoiser, latents, digits.y, diffusion.schedule, 60)
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    pairs = zip(before, diffusion.denoiser.parameters(), strict=True)
    assert all(not old.equal(new) for old, new in pairs)

    prompts = torch.tensor([0, 1, 2])
    one, same, other = (sd.draw(diffusion, prompts, steps=5, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (3, 64)
    assert one.equal(same)
    assert not one.equal(other)
    assert (one.min() >= 0, one.max() <= 1) == (True, True)

    path = tmp_path / "kept.safetensors"
    page.keep(path, diffusion, {"autoencoder": first, "denoiser": losses})
    again, found = page.kept(path, torch.device("cpu"))
    assert sd.draw(again, prompts, steps=5, seed=1).equal(one)
    assert found["denoiser"] == pytest.approx(losses)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.safetensors"]


def test_the_target_is_the_noise_that_was_added_and_the_prompt_is_the_label(monkeypatch):
    """What train() gets first, taken apart again."""
    given = []

    def train(model: nn.Module, batches: list, **named: object) -> list[float]:
        ((X, y),) = batches
        given.append((sd.Noisy(*(each.clone() for each in X)), y.clone()))
        return original(model, batches, **named)

    original = lesson.train
    monkeypatch.setattr(lesson, "train", train)
    latents = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 2, 4, 4).contiguous() / 10
    schedule = sd.noise_schedule()
    sd.train_denoiser(sd.Denoiser(8, 8), latents, torch.arange(100) % 10, schedule, 20)
    ((noisy, y),) = given
    image_share, noise_share = schedule.shares(noisy.times)
    found = (noisy.latents - noise_share * y) / image_share
    spoken = (noisy.prompts != sd.EMPTY) & (noisy.times < 500)
    rows = (found.mean(dim=(1, 2, 3)) * 10).round().long()
    assert spoken.sum() > 20
    assert (rows[spoken] % 10).equal(noisy.prompts[spoken])


def test_what_is_kept_is_the_mean_of_the_last_weights_and_scales_there_and_back(monkeypatch):
    digits = load_digits()
    averages = []
    original = torch.optim.swa_utils.AveragedModel

    def averaged(*arguments: object, **named: object) -> nn.Module:
        averages.append(original(*arguments, **named))
        return averages[-1]

    monkeypatch.setattr(torch.optim.swa_utils, "AveragedModel", averaged)
    monkeypatch.setattr(training, "AUTOENCODER_STEPS", 60)
    given, train = [], training.train_denoiser
    monkeypatch.setattr(training, "train_denoiser", lambda *a: given.append(a[1]) or train(*a))
    diffusion, _ = training.learn(digits, 20, seed=0)
    assert given[0].std().item() == pytest.approx(1, abs=1e-3)
    for ours, theirs in zip(
        diffusion.denoiser.parameters(), averages[0].module.parameters(), strict=True
    ):
        assert ours.equal(theirs)
    with torch.no_grad():
        latents, _ = diffusion.autoencoder.encode(networks.as_images(digits.X))
    scaled = latents * diffusion.scale
    assert scaled.std().item() == pytest.approx(1, abs=1e-3)
    plain = diffusion.autoencoder.decoder(latents).flatten(1).clamp(0, 1)
    torch.testing.assert_close(sd.decode(diffusion, scaled), plain)


def test_one_prompt_in_ten_is_empty():
    """Every batch that train() gets, seen through a model that only looks."""
    latents, y = torch.randn(100, 2, 4, 4), torch.arange(100) % 10
    schedule, seen = sd.noise_schedule(), []

    class Watching(sd.Denoiser):
        def forward(self, noisy: sd.Noisy) -> torch.Tensor:
            seen.append(sd.Noisy(*(each.clone() for each in noisy)))
            return super().forward(noisy)

    model = Watching(channels=8, width=8)
    sd.train_denoiser(model, latents, y, schedule, 40)
    prompts = torch.cat([noisy.prompts for noisy in seen])
    times = torch.cat([noisy.times for noisy in seen])
    assert (prompts == sd.EMPTY).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert set(prompts.tolist()) == set(range(11))
    assert (times.min() < 10, times.max() > 990) == (True, True)
    assert not seen[0].latents.equal(seen[1].latents)


# The page


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """Return a folder with a network that has hardly been trained."""
    folder = tmp_path_factory.mktemp("little")
    options = ["--device", "cpu", "--steps", "20", "--prompt", "7", "--output", str(folder)]
    assert page.main(options) == 0
    return folder


def test_a_second_run_draws_at_once(little, capsys):
    kept = (little / "stable_diffusion.safetensors").read_bytes()
    assert page.main(["--prompt", "7", "--output", str(little), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "kept; --train trains another" in printed
    assert "loss" not in printed
    drawing = [line for line in printed.splitlines() if re.fullmatch(r" {4}[ .:=+*#%@-]+", line)]
    assert 4 <= len(drawing) <= 8
    assert matplotlib.image.imread(little / "stable_diffusion-7.png").shape == (128, 512, 4)
    assert (little / "stable_diffusion.safetensors").read_bytes() == kept


def test_what_is_drawn_is_what_is_asked_for(little, capsys):
    """The PNG holds the four drawings of that prompt, guidance, number of steps and seed."""
    asked = {"guidance": 2.0, "steps": 20, "seed": 5}
    options = ["--prompt", "3", "--guidance", "2", "--sampling-steps", "20", "--seed", "5"]
    assert page.main([*options, "--output", str(little), "--device", "cpu"]) == 0
    diffusion, _ = page.kept(little / "stable_diffusion.safetensors", torch.device("cpu"))
    expected = sd.draw(diffusion, torch.full((4,), 3), **asked).view(4, 8, 8)
    found = matplotlib.image.imread(little / "stable_diffusion-3.png")[::16, ::16, 0]
    ink = 1 - torch.tensor(found).view(8, 4, 8).transpose(0, 1)
    torch.testing.assert_close(ink, expected, atol=0.01, rtol=0)
    lines = (line for line in capsys.readouterr().out.splitlines() if str(little) not in line)
    assert max(map(len, lines)) <= 80


def test_the_page_refuses_a_network_that_does_not_draw_what_it_is_asked(little, capsys):
    assert page.main(["--no-train", "--output", str(little), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("noise and steps differ by") == 6
    lines = (line for line in printed.out.splitlines() if str(little) not in line)
    assert not [line for line in lines if len(line.removesuffix("FAILED")) > 80]
    assert re.search(
        r"what is asked for is drawn +\S+ at guidance 3, at least 85 % +FAILED", printed.out
    )
    assert printed.err.startswith("stable_diffusion: check failed: what is asked")


def test_the_picture_is_drawn(little, tmp_path):
    diffusion, losses = page.kept(little / "stable_diffusion.safetensors", torch.device("cpu"))
    page.paint(tmp_path / "x.png", diffusion, losses, seed=0)
    assert matplotlib.image.imread(tmp_path / "x.png").shape == (960, 1440, 4)


def test_a_digit_in_characters():
    image = torch.zeros(8, 8)
    image[:, 3] = 1
    image[0, 0] = 0.5
    lines = page.in_characters(image.view(1, 64)).splitlines()
    assert lines[0] == "    ==    @@"
    assert lines[1:] == ["          @@"] * 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, 1000),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"PK\x03\x04" * 100),
        lambda path: save_file({"x": torch.ones(1)}, path),
        lambda path: save_file(load_file(path) | {"scale": torch.tensor(torch.nan)}, path),
        lambda path: save_file(load_file(path) | {"scale": torch.tensor(0.0)}, path),
        lambda path: save_file(
            {name: w for name, w in load_file(path).items() if "losses" not in name}, path
        ),
        lambda path: save_file(load_file(path) | {"scale": torch.ones(3)}, path),
        lambda path: save_file(load_file(path) | {"losses.denoiser": torch.tensor(1.0)}, path),
        lambda path: save_file(load_file(path) | {"losses.denoiser": torch.zeros(0)}, path),
    ],
)
def test_a_torn_or_foreign_checkpoint_gets_a_sentence_and_stays(damage, little, tmp_path, capsys):
    path = tmp_path / "stable_diffusion.safetensors"
    path.write_bytes((little / path.name).read_bytes())
    damage(path)
    left = path.read_bytes()
    assert page.main(["--prompt", "7", "--output", str(tmp_path)]) == 1
    reason = "is torn, or holds another network; delete it, and the next run trains one"
    assert capsys.readouterr().err == f"stable_diffusion: {path} {reason}\n"
    assert path.read_bytes() == left


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--prompt", "11"], "argument --prompt: '11' is not a whole number from 0 to 9"),
        (["--prompt", "seven"], "argument --prompt: 'seven' is not a whole number from 0 to 9"),
        (["--guidance", "-1"], "argument --guidance: '-1' is not a number from 0 to 100"),
        (["--guidance", "2"], "argument --guidance: belongs to --prompt"),
        (["--steps", "3"], "argument --steps: '3' is not a whole number from 20 to 4294967295"),
    ],
)
def test_a_wrong_option_gets_a_sentence(options, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        page.main(options)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"stable_diffusion: {sentence}\n"


def test_steps_back_divide_the_thousand(capsys):
    with pytest.raises(SystemExit):
        page.main(["--prompt", "1", "--sampling-steps", "334"])
    assert "argument --sampling-steps: invalid choice: 334 (choose from 10, 20, " in (
        capsys.readouterr().err
    )
    assert all(1000 % steps == 0 for steps in page.DIVISORS)


def test_a_network_that_is_kept_is_not_trained_over_for_its_steps(little, capsys):
    kept = (little / "stable_diffusion.safetensors").read_bytes()
    assert page.main(["--prompt", "1", "--steps", "30", "--output", str(little)]) == 1
    holds = "is there already; with --steps goes --train, for another"
    path = little / "stable_diffusion.safetensors"
    assert capsys.readouterr().err == f"stable_diffusion: {path} {holds}\n"
    assert path.read_bytes() == kept


def test_a_folder_where_the_network_should_be_gets_a_sentence(tmp_path, capsys):
    (tmp_path / "stable_diffusion.safetensors").mkdir()
    assert page.main(["--prompt", "1", "--output", str(tmp_path)]) == 1
    assert "stable_diffusion.safetensors cannot be read: " in capsys.readouterr().err


def test_no_checkpoint_and_no_training_gets_a_sentence(tmp_path, capsys):
    assert page.main(["--no-train", "--prompt", "1", "--output", str(tmp_path)]) == 1
    lacks = "stable_diffusion.safetensors does not exist; without --no-train it is trained"
    assert capsys.readouterr().err == f"stable_diffusion: {tmp_path}/{lacks}\n"


def test_train_is_the_lessons(monkeypatch):
    calls = []
    original = lesson.train
    monkeypatch.setattr(lesson, "train", lambda *a, **k: calls.append(a[0]) or original(*a, **k))
    diffusion, digits = sd.Diffusion(), load_digits()
    sd.train_autoencoder(diffusion.autoencoder, digits.X[:200], 20)
    sd.train_denoiser(
        diffusion.denoiser, torch.randn(9, 2, 4, 4), digits.y[:9], diffusion.schedule, 20
    )
    assert calls == [diffusion.autoencoder, diffusion.denoiser]
