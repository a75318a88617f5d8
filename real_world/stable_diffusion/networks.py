"""The autoencoder, and the U-Net that knows the time and reads the prompt."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from real_world.stable_diffusion.schedule import noise_schedule

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


# %% Both together


class Diffusion(nn.Module):
    """The two networks together, and what scales their latents to a deviation of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = Autoencoder()
        self.denoiser = Denoiser()
        self.register_buffer("scale", torch.ones(()))
        self.schedule = noise_schedule()


def as_images(X: torch.Tensor) -> torch.Tensor:
    """Return digits, (samples, 64), as images, (samples, 1, 8, 8)."""
    return X.view(-1, 1, 8, 8)
