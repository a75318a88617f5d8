"""Training both networks by the lesson's train()."""

from __future__ import annotations

import torch
from torch.nn import functional

import lesson_code as lesson
from real_world import Batches, one_cycle
from real_world.digits import Digits
from real_world.stable_diffusion.networks import (
    EMPTY,
    Autoencoder,
    Denoiser,
    Diffusion,
    Noisy,
    as_images,
    autoencoder_loss,
)
from real_world.stable_diffusion.schedule import NoiseSchedule

AUTOENCODER_STEPS, STEPS, BATCH = 600, 2500, 128


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
        [(batches.X, batches.y)],
        criterion=autoencoder_loss,
        optimizer=optimizer,
        epochs=steps,
        on_step=batches,
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
        [(batches.X, batches.y)],
        criterion=functional.mse_loss,
        optimizer=optimizer,
        epochs=steps,
        on_step=batches,
    )
    model.load_state_dict(average.module.state_dict())
    return losses


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
