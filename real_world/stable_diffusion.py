"""Stable Diffusion in miniature: latent diffusion on the scanned digits, trained by train().

    python -m real_world.stable_diffusion               all of the page; trains for two minutes
    python -m real_world.stable_diffusion --prompt 7    draws a seven with what it has learnt

The article: "Stability AI's Stable Diffusion fine-tuning pipelines ... all run on PyTorch. The
explicit training loop, autograd, and nn.Module pattern you practiced today are used verbatim." Here
is what they tune, in miniature and trained from nothing, its parts as R. Rombach et al. have them
("High-Resolution Image Synthesis with Latent Diffusion Models", 2022): an autoencoder makes an
image small, a U-Net that reads the prompt by cross-attention learns to remove noise from what is
small, and noise, removed step by step, is a new image. The prompt is the digit to draw.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time as clock
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

import lesson_code as lesson
from real_world import (
    Batches,
    number,
    one_cycle,
    only_with,
    parser,
    quiet,
    run,
    shown,
    writable,
    write_tensors,
)
from real_world.digits import Digits, load_digits, untrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# %% The schedule: how an image becomes noise, and noise an image


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of an image is left after t of its steps, and how to go back.

    kept: (steps,) float32, the share of the image in the variance (J. Ho et al., "Denoising
    Diffusion Probabilistic Models", 2020, where it is called alpha bar).
    predicts: "epsilon", the noise, or "v_prediction", noise and image in one (T. Salimans and J.
    Ho, "Progressive Distillation", 2022).
    """

    kept: torch.Tensor
    predicts: str = "epsilon"

    def shares(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return by what image and noise are multiplied at `times`, (batch, 1, 1, 1) each."""
        kept = self.kept.to(times.device)[times].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(
        self, images: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Return `images`, (batch, channels, height, width), as they are at `times`, (batch,)."""
        image_share, noise_share = self.shares(times)
        return image_share * images + noise_share * noise

    def target(
        self, images: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        """Return what a network should predict."""
        if self.predicts == "epsilon":
            return noise
        image_share, noise_share = self.shares(times)
        return image_share * noise - noise_share * images

    def split(
        self, prediction: torch.Tensor, time: int, noisy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image and the noise that `noisy` is made of, if `prediction` is right."""
        image_share, noise_share = self.shares(torch.tensor([time], device=noisy.device))
        if self.predicts == "epsilon":
            return (noisy - noise_share * prediction) / image_share, prediction
        image = image_share * noisy - noise_share * prediction
        return image, image_share * prediction + noise_share * noisy

    def kept_at(self, time: int, at_the_end: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Return `kept` at a time, and before the first `at_the_end`, as a 0-d tensor."""
        return self.kept[time] if time >= 0 else torch.as_tensor(at_the_end)

    def ddpm_step(
        self, prediction: torch.Tensor, time: int, noisy: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Go back by one step, with fresh `noise` (Ho et al., algorithm 2 and equation 7)."""
        image, _ = self.split(prediction, time, noisy)
        now, before = self.kept_at(time), self.kept_at(time - 1)
        lost = 1 - now / before
        mean = before**0.5 * lost / (1 - now) * image
        mean = mean + (now / before) ** 0.5 * (1 - before) / (1 - now) * noisy
        return mean + ((1 - before) / (1 - now) * lost) ** 0.5 * noise

    def ddim_step(
        self,
        prediction: torch.Tensor,
        time: int,
        earlier: int,
        noisy: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Go back from `time` to `earlier`, by as many steps as you like.

        At `eta` 0 nothing is drawn anew (J. Song et al., "Denoising Diffusion Implicit Models",
        2021, equations 12 and 16). What comes before the first step is taken for the first, as in
        Stable Diffusion.
        """
        image, predicted = self.split(prediction, time, noisy)
        now, before = self.kept_at(time), self.kept_at(earlier, at_the_end=self.kept_at(0))
        deviation = eta * ((1 - before) / (1 - now) * (1 - now / before)) ** 0.5
        step = before**0.5 * image + (1 - before - deviation**2) ** 0.5 * predicted
        return step if noise is None else step + deviation * noise


def noise_schedule(
    kind: str = "scaled_linear", steps: int = 1000, predicts: str = "epsilon"
) -> NoiseSchedule:
    """Return the schedule of DDPM ("linear"), Stable Diffusion, or A. Nichol and P. Dhariwal.

    The last, "cosine", is that of "Improved Denoising Diffusion Probabilistic Models", 2021.
    """
    if kind == "linear":
        lost = torch.linspace(0.0001, 0.02, steps)
    elif kind == "scaled_linear":
        lost = torch.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2
    elif kind == "cosine":
        angles = ((step / steps + 0.008) / 1.008 * math.pi / 2 for step in range(steps + 1))
        kept = (math.cos(angle) ** 2 for angle in angles)
        lost = torch.tensor(
            [min(1 - after / now, 0.999) for now, after in itertools.pairwise(kept)]
        )
    else:
        raise ValueError(f"there is no schedule {kind!r}; there is linear, scaled_linear, cosine")
    return NoiseSchedule((1 - lost).cumprod(dim=0), predicts)


# %% The autoencoder: from pixels to a latent half as large, and back


class Autoencoder(nn.Module):
    """Images, (batch, 1, 8, 8) from 0 to 1, to latents, (batch, 2, 4, 4), and back.

    A latent is drawn from a normal distribution, whose mean and spread the encoder gives: what lies
    between two latents then is an image too (D. Kingma and M. Welling, "Auto-Encoding Variational
    Bayes", 2014).
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 4, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of the latents of `images`, and the logarithm of their variance."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `images` through a drawn latent and back, and its mean and log variance."""
        mean, log_variance = self.encode(images)
        latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        return self.decoder(latents), mean, log_variance


def autoencoder_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], images: torch.Tensor
) -> torch.Tensor:
    """Return the squared error of a pixel, and a little for latents far from standard normal."""
    back, mean, log_variance = outputs
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
    return functional.mse_loss(back, images) + 0.0005 * divergence


# %% The denoiser: a U-Net that knows the time and reads the prompt


EMPTY = 10  # the prompt that says nothing
WORDS = 4  # vectors that a prompt becomes


class Noisy(NamedTuple):
    """What the denoiser sees.

    latents: (batch, 2, 4, 4) float32, times: (batch,) int64, prompts: (batch,) int64, 0 to EMPTY.
    """

    latents: torch.Tensor
    times: torch.Tensor
    prompts: torch.Tensor


def time_embedding(times: torch.Tensor, width: int) -> torch.Tensor:
    """Return (batch, width) float32: `times` as waves (A. Vaswani et al., 2017, section 3.5)."""
    waves = torch.arange(width // 2, device=times.device) / (width // 2)
    angles = times[:, None] * torch.exp(-math.log(10_000) * waves)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class Residual(nn.Module):
    """Two convolutions, with the time between them, added to what came in."""

    def __init__(self, channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.time = nn.Linear(width, out_channels)
        self.second = nn.Sequential(
            nn.GroupNorm(8, out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Return (batch, out_channels, height, width)."""
        return self.skip(x) + self.second(self.first(x) + self.time(time)[:, :, None, None])


class Attention(nn.Module):
    """Every place of an image looks at the others, then at the words of the prompt."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.to_itself = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.to_words = nn.MultiheadAttention(channels, 4, kdim=width, vdim=width, batch_first=True)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return `x`, (batch, channels, height, width), changed; words: (batch, WORDS, width)."""
        places = x.flatten(2).transpose(1, 2)
        seen = self.norms[0](places)
        places = places + self.to_itself(seen, seen, seen, need_weights=False)[0]
        seen = self.norms[1](places)
        places = places + self.to_words(seen, words, words, need_weights=False)[0]
        return places.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """What stands at every level of the U: convolutions, then attention."""

    def __init__(self, channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.residual = Residual(channels, out_channels, width)
        self.attention = Attention(out_channels, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Return (batch, out_channels, height, width)."""
        return self.attention(self.residual(x, time), words)


class Denoiser(nn.Module):
    """The U-Net: down to 2 x 2, up again, and across to what was there on the way down."""

    def __init__(self, channels: int = 64, width: int = 128) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.words = nn.Embedding(EMPTY + 1, WORDS * width)
        self.enter = nn.Conv2d(2, channels, 3, padding=1)
        self.down = Block(channels, channels, width)
        self.shrink = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.bottom = Block(channels, 2 * channels, width)
        self.grow = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * channels, channels, 3, padding=1)
        )
        self.up = Block(2 * channels, channels, width)
        self.leave = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 2, 3, padding=1)
        )

    def forward(self, noisy: Noisy) -> torch.Tensor:
        """Return the prediction, (batch, 2, 4, 4): the noise, or whatever the schedule predicts."""
        time = self.time(time_embedding(noisy.times, self.width))
        words = self.words(noisy.prompts).view(-1, WORDS, self.width)
        across = self.down(self.enter(noisy.latents), time, words)
        below = self.bottom(self.shrink(across), time, words)
        return self.leave(self.up(torch.cat((across, self.grow(below)), dim=1), time, words))


# %% Training both, by the lesson's train()


class Diffusion(nn.Module):
    """The two networks together, and what scales their latents to a deviation of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = Autoencoder()
        self.denoiser = Denoiser()
        self.register_buffer("scale", torch.ones(()))
        self.schedule = noise_schedule()


AUTOENCODER_STEPS, STEPS, BATCH = 600, 2500, 128


def as_images(X: torch.Tensor) -> torch.Tensor:
    """Return digits, (samples, 64), as images, (samples, 1, 8, 8)."""
    return X.view(-1, 1, 8, 8)


def train_autoencoder(model: Autoencoder, X: torch.Tensor, steps: int) -> list[float]:
    """Train an autoencoder in place by the lesson's train(); return the loss of every step."""
    images = as_images(X)
    optimizer = torch.optim.Adam(model.parameters())

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        batch = images[torch.randint(len(images), (BATCH,)).to(images.device)]
        return batch, batch

    batches = Batches("autoencoder", draw, steps, one_cycle(optimizer, 0.003, steps).step)
    return lesson.train(
        model,
        batches.X,
        batches.y,
        criterion=autoencoder_loss,
        optimizer=optimizer,
        epochs=steps,
        on_epoch=batches,
    )


def train_denoiser(
    model: Denoiser, latents: torch.Tensor, y: torch.Tensor, schedule: NoiseSchedule, steps: int
) -> list[float]:
    """Train a denoiser in place by the lesson's train(); return the loss of every step.

    latents: (samples, 2, 4, 4), y: (samples,) int64. One prompt in ten is empty, so that it also
    learns what there is without one (J. Ho and T. Salimans, "Classifier-Free Diffusion Guidance",
    2022). What it ends with is the mean of its last weights.
    """
    optimizer = torch.optim.Adam(model.parameters())
    mean_of = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=mean_of)

    def draw() -> tuple[Noisy, torch.Tensor]:
        rows = torch.randint(len(latents), (BATCH,))
        times = torch.randint(len(schedule.kept), (BATCH,))
        silent = torch.rand(BATCH) < 0.1
        noise = torch.randn(BATCH, *latents.shape[1:]).to(latents.device)
        rows, times, silent = (each.to(latents.device) for each in (rows, times, silent))
        prompts = y[rows].masked_fill(silent, EMPTY)
        noisy = schedule.add_noise(latents[rows], noise, times)
        return Noisy(noisy, times, prompts), schedule.target(latents[rows], noise, times)

    after = (one_cycle(optimizer, 0.002, steps).step, lambda: average.update_parameters(model))
    batches = Batches("denoiser", draw, steps, *after)
    losses = lesson.train(
        model,
        batches.X,
        batches.y,
        criterion=functional.mse_loss,
        optimizer=optimizer,
        epochs=steps,
        on_epoch=batches,
    )
    model.load_state_dict(average.module.state_dict())
    return losses


# %% Drawing: from noise, by steps back


def times_back(steps: int, total: int) -> list[int]:
    """Return the times of `steps` steps back, last one first, spaced as in Stable Diffusion.

    Where `steps` is no divisor of `total`, or hardly any, they start below it: at no pure noise.
    """
    return [step * (total // steps) + 1 for step in reversed(range(steps))]


@torch.no_grad()
def draw_latents(
    diffusion: Diffusion,
    prompts: torch.Tensor,
    *,
    guidance: float = 3.0,
    steps: int = 50,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return the latents, (batch, 2, 4, 4), at the start and after each step: the last is drawn.

    prompts: (batch,) int64. The prediction without a prompt is moved towards that with it,
    `guidance` times as far: at 0 the prompt is not heard, at 1 it is, beyond that it is exaggerated
    (Ho and Salimans, 2022; counted as Stable Diffusion does).
    """
    schedule, device = diffusion.schedule, prompts.device
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(prompts), 2, 4, 4, generator=generator).to(device)
    both = torch.cat((torch.full_like(prompts, EMPTY), prompts))
    back = times_back(steps, len(schedule.kept))
    drawn = [latents]
    for time, earlier in itertools.pairwise([*back, -1]):
        times = torch.full_like(both, time)
        noisy = Noisy(torch.cat((latents, latents)), times, both)
        without, with_prompt = diffusion.denoiser(noisy).chunk(2)
        prediction = without + guidance * (with_prompt - without)
        latents = schedule.ddim_step(prediction, time, earlier, latents)
        drawn.append(latents)
    return drawn


@torch.no_grad()
def decode(diffusion: Diffusion, latents: torch.Tensor) -> torch.Tensor:
    """Return the images, (batch, 64) from 0 to 1, of `latents`."""
    return diffusion.autoencoder.decoder(latents / diffusion.scale).flatten(1).clamp(0, 1)


@torch.no_grad()
def through(diffusion: Diffusion, X: torch.Tensor) -> torch.Tensor:
    """Return what the autoencoder makes of images, (samples, 64): all that a drawing can be."""
    mean, _ = diffusion.autoencoder.encode(as_images(X))
    return decode(diffusion, mean * diffusion.scale)


def draw(diffusion: Diffusion, prompts: torch.Tensor, **how: float) -> torch.Tensor:
    """Return an image, (64,) from 0 to 1, for each of `prompts`; see draw_latents."""
    return decode(diffusion, draw_latents(diffusion, prompts, **how)[-1])


# %% What it keeps


def keep(path: Path, diffusion: Diffusion, losses: dict[str, list[float]]) -> None:
    """Write both networks and the losses of their training to `path`, whole or not at all."""
    curves = {f"losses.{name}": torch.tensor(values) for name, values in losses.items()}
    write_tensors(path, diffusion.state_dict() | curves)


def kept(path: Path, device: torch.device) -> tuple[Diffusion, dict[str, list[float]]]:
    """Return what `keep` wrote; raise CheckpointError where it is something else, or not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path)
        names = [f"losses.{name}" for name in ("autoencoder", "denoiser")]
        curves = {name: content.pop(name, torch.zeros(0)) for name in names}
        diffusion = Diffusion()
        diffusion.load_state_dict(content)
        finite = all(w.is_floating_point() and w.isfinite().all() for w in content.values())
        known = all(curve.ndim == 1 and len(curve) for curve in curves.values())
        if not finite or diffusion.scale <= 0 or not known:
            raise ValueError("weights that are no numbers, or no losses")
        losses = {name.removeprefix("losses."): curve.tolist() for name, curve in curves.items()}
    except OSError as error:  # safetensors' names no file
        raise lesson.CheckpointError(f"{shown(path)} cannot be read: {error}") from None
    except (SafetensorError, RuntimeError, ValueError):  # load_state_dict's, for other weights
        reason = "is torn, or holds another network; delete it, and the next run trains one"
        raise lesson.CheckpointError(f"{shown(path)} {reason}") from None
    return diffusion.to(device), losses


def learn(digits: Digits, steps: int, seed: int) -> tuple[Diffusion, dict[str, list[float]]]:
    """Train the autoencoder, then the denoiser on its latents; return both and their losses."""
    torch.manual_seed(seed)
    diffusion = Diffusion().to(digits.X.device)
    print(f"\n  The lesson's train(), first for the autoencoder, {AUTOENCODER_STEPS} steps:")
    losses = {"autoencoder": train_autoencoder(diffusion.autoencoder, digits.X, AUTOENCODER_STEPS)}
    with torch.no_grad():
        latents, _ = diffusion.autoencoder.encode(as_images(digits.X))
        diffusion.scale.copy_(1 / latents.std())
    print(f"\n  then for the denoiser, {steps} steps:")
    losses["denoiser"] = train_denoiser(
        diffusion.denoiser, latents * diffusion.scale, digits.y, diffusion.schedule, steps
    )
    return diffusion, losses


def network(chosen: argparse.Namespace) -> tuple[Diffusion, dict[str, list[float]]]:
    """Return what an earlier run left, or train it and leave it; with the losses of its training.

    Raises CheckpointError where there is none and none is to be trained.
    """
    path = chosen.output / "stable_diffusion.safetensors"
    if chosen.train or (chosen.train is None and not path.exists()):
        writable(path.parent)
        digits, start = load_digits(device=chosen.device), clock.perf_counter()
        diffusion, losses = learn(digits, chosen.steps or STEPS, chosen.seed)
        keep(path, diffusion, losses)
        lesson.show("trained in", f"{clock.perf_counter() - start:.0f} s on {chosen.device}")
        lesson.show("saved", shown(path))
        return diffusion, losses
    if not path.exists():
        lacks = "does not exist; without --no-train it is trained"
        raise lesson.CheckpointError(f"{shown(path)} {lacks}")
    if chosen.steps:
        holds = "is there already; with --steps goes --train, for another"
        raise lesson.CheckpointError(f"{shown(path)} {holds}")
    lesson.show("kept; --train trains another", shown(path))
    return kept(path, chosen.device)


# %% The page


def compare_with_diffusers() -> None:
    """Hold noise, targets and steps of every schedule against those of diffusers' schedulers."""
    with quiet():
        from diffusers import DDIMScheduler, DDPMScheduler

    print("\n  Against diffusers' schedulers, on random latents:")
    generator = torch.Generator().manual_seed(0)
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    starts = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (0.0001, 0.02)}
    for kind, predicts in itertools.product(names, ("epsilon", "v_prediction")):
        schedule = noise_schedule(kind, 1000, predicts)
        start, end = starts[kind]
        same = {"beta_schedule": names[kind], "beta_start": start, "beta_end": end}
        same |= {"prediction_type": predicts, "clip_sample": False}
        ddpm = DDPMScheduler(**same)
        ddim = DDIMScheduler(**same, set_alpha_to_one=False, steps_offset=1)
        ddim.set_timesteps(50)
        latents, noise, prediction = torch.randn(3, 4, 2, 4, 4, generator=generator)
        times = torch.randint(1000, (4,), generator=generator)
        pairs = [
            (schedule.add_noise(latents, noise, times), ddpm.add_noise(latents, noise, times)),
        ]
        if predicts == "v_prediction":
            theirs = ddpm.get_velocity(latents, noise, times)
            pairs.append((schedule.target(latents, noise, times), theirs))
        for time in (981, 501, 21, 1):
            drawn = torch.Generator().manual_seed(time)
            fresh = torch.randn(4, 2, 4, 4, generator=drawn)
            drawn.manual_seed(time)
            theirs = ddpm.step(prediction, time, latents, generator=drawn).prev_sample
            pairs.append((schedule.ddpm_step(prediction, time, latents, fresh), theirs))
            theirs = ddim.step(prediction, time, latents).prev_sample
            pairs.append((schedule.ddim_step(prediction, time, time - 20, latents), theirs))
        apart = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        lesson.check(
            f"  {kind}, {predicts}", f"noise and steps differ by {apart:.0e}", apart <= 1e-5
        )


GUIDANCES = (0.0, 1.0, 3.0, 8.0)


def compare_guidance(diffusion: Diffusion, digits: Digits, seed: int) -> None:
    """Draw 500 digits at each guidance, let the lesson's classifier read them, look for copies."""
    device = digits.X.device
    reader, optimizer = untrained(0, device)
    lesson.train(reader, digits.X, digits.y, optimizer=optimizer, epochs=200)
    prompts = torch.arange(10, device=device).repeat_interleave(50)

    known = through(diffusion, digits.X)

    def nearest(images: torch.Tensor) -> torch.Tensor:
        return torch.cdist(images, known).min(dim=1).values

    print("\n  500 drawn, read by the lesson's classifier, which was trained on real ones;")
    print("  and how far from the nearest trained on, as the autoencoder gives that back:")
    print(f"  {'':<32}{'read as prompted':>18}{'distance':>12}{'least':>9}")

    def row(name: str, right: float, far: torch.Tensor) -> None:
        print(f"  {name:<32}{right:>18.1%}{far.median():>12.2f}{far.min():>9.2f}")

    for guidance in GUIDANCES:
        images = draw(diffusion, prompts, guidance=guidance, seed=seed)
        right, far = lesson.accuracy(reader, images, prompts), nearest(images)
        row(f"guidance {guidance:g}", right, far)
        if guidance == 3:
            guided, drawn = right, far
    unseen = through(diffusion, digits.unseen_X)
    far = nearest(unseen)
    row("real ones, held out", lesson.accuracy(reader, unseen, digits.unseen_y), far)
    measured = f"{guided:.1%} at guidance 3, at least 85 %"
    lesson.check("what is asked for is drawn", measured, guided >= 0.85)
    ratios = drawn.median() / far.median(), drawn.min() / far.min()
    measured = f"{ratios[0]:.0%} as far as real ones, nearest {ratios[1]:.0%}"
    lesson.check("and not copied", measured, min(ratios) > 0.5)


def in_characters(images: torch.Tensor) -> str:
    """Return `images`, (samples, 64) from 0 to 1, side by side in characters."""
    shades = " .:-=+*#%@"
    levels = (images * 9.99).int().clamp(0, 9).view(-1, 8, 8)
    rows = (
        "   ".join("".join(2 * shades[level] for level in line) for line in row)
        for row in levels.transpose(0, 1).tolist()
    )
    return "\n".join(f"    {row}".rstrip() for row in rows)


def paint(path: Path, diffusion: Diffusion, losses: dict[str, list[float]], seed: int) -> None:
    """Draw the ten prompts, the way from noise to a digit, a sweep of guidance, and the losses."""
    from matplotlib.figure import Figure

    device = diffusion.scale.device
    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    grid, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    strip, sweep, curves = right.subfigures(3, 1, height_ratios=(0.55, 1.4, 1.3))

    def show(axes: Axes, image: torch.Tensor) -> None:
        axes.imshow(image.view(8, 8).tolist(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    grid.suptitle("Ten prompts, ten drawings each, guidance 3")
    prompts = torch.arange(10, device=device).repeat_interleave(10)
    images = draw(diffusion, prompts, seed=seed)
    for axes, image in zip(grid.subplots(10, 10).flat, images, strict=True):
        show(axes, image)

    strip.suptitle("A seven, from noise, by 50 steps back")
    way = draw_latents(diffusion, torch.tensor([7], device=device), seed=seed)
    chosen = [0, 10, 20, 25, 30, 35, 40, 45, 50]
    for axes, step in zip(strip.subplots(1, len(chosen)), chosen, strict=True):
        show(axes, decode(diffusion, way[step]))
        axes.set_xlabel(step)

    sweep.suptitle("The same noise at more and more guidance: 2, 5, 8")
    guidances = (0, 0.5, 1, 2, 3, 5, 8, 12, 20)
    rows, prompts = sweep.subplots(3, len(guidances)), torch.tensor([2, 5, 8], device=device)
    for column, guidance in enumerate(guidances):
        images = draw(diffusion, prompts, guidance=guidance, seed=seed + 1)
        for axes, image in zip(rows[:, column], images, strict=True):
            show(axes, image)
        rows[-1, column].set_xlabel(f"{guidance:g}")

    axes = curves.subplots()
    axes.set(title="Loss of training", xlabel="step", yscale="log")
    for (name, values), color in zip(losses.items(), ("#cf222e", "#0969da"), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=color, lw=0.6, label=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def page(chosen: argparse.Namespace) -> None:
    """Show that the schedules are everybody's, train, and measure what is drawn."""
    quote = "Stability AI's Stable Diffusion fine-tuning pipelines"
    lesson.heading("Stable Diffusion in miniature", quote)
    count = {
        name: sum(weights.numel() for weights in network.parameters())
        for name, network in (("autoencoder", Autoencoder()), ("denoiser", Denoiser()))
    }
    lesson.show("parameters", ", ".join(f"{name} {many:,}" for name, many in count.items()))
    compare_with_diffusers()
    diffusion, losses = network(chosen)
    compare_guidance(diffusion, load_digits(device=chosen.device), chosen.seed)
    if not chosen.no_figure:
        path = chosen.output / "stable_diffusion.png"
        paint(path, diffusion, losses, chosen.seed)
        print()
        lesson.show("drawn", shown(path))


def draw_one(chosen: argparse.Namespace) -> None:
    """Draw the prompt four times, on the terminal and as a PNG."""
    diffusion, _ = network(chosen)
    how = {"guidance": chosen.guidance, "steps": chosen.sampling_steps, "seed": chosen.seed}
    images = draw(diffusion, torch.full((4,), chosen.prompt, device=chosen.device), **how)
    print(f"\n{in_characters(images)}\n")
    if not chosen.no_figure:
        from matplotlib.image import imsave

        path = chosen.output / f"stable_diffusion-{chosen.prompt}.png"
        row = torch.cat(images.view(4, 8, 8).unbind(), dim=1)
        large = row.repeat_interleave(16, dim=0).repeat_interleave(16, dim=1)
        imsave(path, large.tolist(), cmap="gray_r", vmin=0, vmax=1)
        lesson.show("drawn", shown(path))


# %% Running it


DIVISORS = (10, 20, 25, 40, 50, 100, 125, 200, 250, 500)  # of 1000, as times_back wants


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "Latent diffusion on the digits, trained by train(). Without --prompt, all of the page."
    made = parser("stable_diffusion", about, "--device", "--seed", "--output", "--no-figure")
    add = made.add_argument
    digit = functools.partial(lesson.whole_number, most=9)
    steps = functools.partial(lesson.whole_number, least=20)
    strength = functools.partial(number, least=0, most=100)
    add("--prompt", metavar="D", type=digit, help="the digit to draw, 0 to 9, and nothing else")
    add("--guidance", metavar="G", type=strength, help="how far towards the prompt (3)")
    add("--sampling-steps", metavar="N", type=int, choices=DIVISORS, help="back from noise (50)")
    add("--steps", metavar="N", type=steps, help=f"of training ({STEPS})")
    anew = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--train", help="anew, or never (if there is no network yet)", **anew)
    chosen = made.parse_args(argv)
    only_with(made, chosen, "prompt", guidance=3.0, sampling_steps=50)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    whole = chosen.prompt is None
    return run("stable_diffusion", lambda: (page if whole else draw_one)(chosen))


if __name__ == "__main__":
    sys.exit(main())
