"""How an image becomes noise by steps, and noise an image."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch


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
