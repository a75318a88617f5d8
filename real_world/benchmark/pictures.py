"""Diffusion against the same U-Net driven by diffusers' scheduler."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

import lesson_code as lesson
from real_world import stable_diffusion
from real_world.benchmark import Entry, alternate, plain_table, times


def measure(quick: bool) -> dict[str, Any]:
    """Time an image of the denoiser, drawn by the page and by diffusers' DDIM scheduler."""
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    diffusion, prompts = stable_diffusion.Diffusion(), torch.arange(100) % 10
    same = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**same, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(50)
    both = torch.cat((torch.full_like(prompts, stable_diffusion.EMPTY), prompts))

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(len(prompts), 2, 4, 4, generator=generator)
        for moment in scheduler.timesteps:
            times = moment.expand(len(both))
            noisy = stable_diffusion.Noisy(torch.cat((latents, latents)), times, both)
            without, with_prompt = diffusion.denoiser(noisy).chunk(2)
            prediction = without + 3.0 * (with_prompt - without)
            latents = scheduler.step(prediction, moment, latents).prev_sample
        return stable_diffusion.decode(diffusion, latents)

    def ours() -> torch.Tensor:
        return stable_diffusion.draw(diffusion, prompts)

    apart = (ours() - theirs()).abs().max().item()
    lesson.check("the same images", f"differ by {apart:.0e}", apart <= 1e-4)

    def seconds(way: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        way()
        return (time.perf_counter() - start) / len(prompts)

    ways = {"stable_diffusion": ours, "diffusers' scheduler": theirs}
    timed = {name: functools.partial(seconds, way) for name, way in ways.items()}
    return {"an image, 50 steps": alternate(timed, 1 if quick else 7, "pictures")}


def headline(results: dict[str, Any]) -> str:
    """Return what the README says."""
    ((ours, theirs),) = (ways.values() for ways in results.values())
    return f"with `diffusers`' scheduler it takes {times(theirs, ours)} as long"


ENTRY = Entry(
    "Stability AI's Stable Diffusion fine-tuning pipelines",
    measure,
    headline,
    functools.partial(plain_table, unit="images"),
)
