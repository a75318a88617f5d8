"""The data: images for the VAE, noisy latents for the U-Net."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset

from real_world.digits.data import load_digits
from real_world.stable_diffusion.scheduler import NUM_TRAIN_TIMESTEPS, NoiseScheduler
from real_world.stable_diffusion.unet import NULL_CLASS, UNetInput


class ImageData(NamedTuple):
    """Images X, (n, 1, 8, 8) float32 from 0 to 1, and labels y, (n,) int64."""

    X_train: torch.Tensor
    y_train: torch.Tensor
    X_test: torch.Tensor
    y_test: torch.Tensor


def load_images(device: torch.device | str = "cpu") -> ImageData:
    """Return 1,437 digits for training and 360 for the test, the same ones for every --seed."""
    digits = load_digits(seed=0, device=device)
    # Nothing is chosen by a validation loss here: train on the validation data, too.
    X_train = torch.cat((digits.X_train, digits.X_validation)).view(-1, 1, 8, 8)
    y_train = torch.cat((digits.y_train, digits.y_validation))
    return ImageData(X_train, y_train, digits.X_test.view(-1, 1, 8, 8), digits.y_test)


@dataclass(eq=False)
class NoisyLatents(IterableDataset):
    """Mini-batches for the U-Net, (UNetInput, target), with new noise in each of them."""

    latents: torch.Tensor  # of the training images, scaled, (n, 2, 4, 4)
    labels: torch.Tensor  # (n,) int64
    scheduler: NoiseScheduler
    steps: int  # the number of mini-batches
    batch_size: int = 128
    # How often a prompt is dropped, so that the U-Net also learns to predict without one (J. Ho and
    # T. Salimans, "Classifier-Free Diffusion Guidance", 2022, algorithm 1).
    drop_cond: float = 0.1

    def __iter__(self) -> Iterator[tuple[UNetInput, torch.Tensor]]:
        """Yield `steps` mini-batches."""
        device = self.latents.device
        for _ in range(self.steps):
            indices = torch.randint(len(self.latents), (self.batch_size,), device=device)
            timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (self.batch_size,), device=device)
            dropped = torch.rand(self.batch_size, device=device) < self.drop_cond
            latents = self.latents[indices]  # (batch, 2, 4, 4)
            noise = torch.randn_like(latents)
            prompts = self.labels[indices].masked_fill(dropped, NULL_CLASS)  # (batch,)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            target = self.scheduler.get_target(latents, noise, timesteps)
            yield UNetInput(noisy, timesteps, prompts), target
