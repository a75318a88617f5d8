"""The variational autoencoder (VAE): from images to smaller latents, and back."""

from typing import NamedTuple

import torch
from torch import nn

KL_WEIGHT = 0.0005  # small, as in Stable Diffusion: images that are sharp matter more


class VAEOutput(NamedTuple):
    """Images, (batch, 1, 8, 8), and the distribution of their latents, (batch, 2, 4, 4) each."""

    images: torch.Tensor
    mean: torch.Tensor
    logvar: torch.Tensor


class VAE(nn.Module):
    """Encodes images as normal distributions of latents, and decodes latents to images.

    D. Kingma and M. Welling, "Auto-Encoding Variational Bayes", 2014. It is trained on random
    samples of the latents, so that it can also decode latents between those of training images.
    """

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),  # (batch, channels, 8, 8)
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),  # (batch, channels, 4, 4)
            nn.SiLU(),
            nn.Conv2d(channels, 4, 3, padding=1),  # (batch, 4, 4, 4): mean and logvar
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(2, channels, 3, padding=1),  # (batch, channels, 4, 4)
            nn.SiLU(),
            nn.Upsample(scale_factor=2),  # (batch, channels, 8, 8)
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 1, 3, padding=1),  # (batch, 1, 8, 8)
        )

    def forward(self, images: torch.Tensor) -> VAEOutput:
        """Encode images, (batch, 1, 8, 8) from 0 to 1, sample their latents, and decode those."""
        mean, logvar = self.encoder(images).chunk(2, dim=1)  # (batch, 2, 4, 4) each
        latents = mean + (logvar / 2).exp() * torch.randn_like(mean)  # reparameterization trick
        return VAEOutput(self.decoder(latents), mean, logvar)  # images: (batch, 1, 8, 8)


def vae_loss(output: VAEOutput, images: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction error plus the weighted KL divergence from a standard normal.

    Both are means over pixels and latents (Kingma and Welling, appendix B, has sums).
    """
    # (mean^2 + variance - 1 - log variance) / 2
    kl = (output.mean**2 + output.logvar.exp() - 1 - output.logvar).mean() / 2
    return nn.functional.mse_loss(output.images, images) + KL_WEIGHT * kl
