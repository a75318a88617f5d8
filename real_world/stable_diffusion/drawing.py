"""Drawing: from noise, by steps back."""

from __future__ import annotations

import itertools

import torch

from real_world.stable_diffusion.networks import EMPTY, Diffusion, Noisy, as_images


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
