"""The data: images for the VAE, noisy latents for the U-Net."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset

from real_world.digits.data import load_digits
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.unet import NULL_CLASS, UNetInput


class ImageData(NamedTuple):
    """Images X, (n, 1, 8, 8) float32 from 0 to 1, and labels y, (n,) int64."""

    X_train: torch.Tensor
    y_train: torch.Tensor
    X_test: torch.Tensor
    y_test: torch.Tensor


def load_images(device: torch.device | str = "cpu") -> ImageData:
    """Return the digits as images: 1,437 for training, 360 for the test.

    The split does not depend on --seed: a saved model was trained on the same images.
    """
    digits = load_digits(seed=0, device=device)
    X_train = torch.cat((digits.X_train, digits.X_validation))  # no choice here needs validation
    y_train = torch.cat((digits.y_train, digits.y_validation))
    return ImageData(
        X_train.view(-1, 1, 8, 8), y_train, digits.X_test.view(-1, 1, 8, 8), digits.y_test
    )


class NoisyLatents(IterableDataset):
    """Random mini-batches for the U-Net: (UNetInput, target).

    Args:
        latents: The scaled latents of the training images, (n, 2, 4, 4).
        labels: Their digits, (n,) int64.
        scheduler: Adds the noise, and says what the target is.
        steps: How many mini-batches.
        batch_size: Samples per mini-batch.
        drop_cond: How often a prompt is replaced by NULL_CLASS, so that the U-Net also learns to
            predict without a prompt (J. Ho and T. Salimans, "Classifier-Free Diffusion Guidance",
            2022, algorithm 1).
    """

    def __init__(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor,
        scheduler: NoiseScheduler,
        steps: int,
        batch_size: int = 128,
        drop_cond: float = 0.1,
    ) -> None:
        self.latents = latents
        self.labels = labels
        self.scheduler = scheduler
        self.steps = steps
        self.batch_size = batch_size
        self.drop_cond = drop_cond

    def __iter__(self) -> Iterator[tuple[UNetInput, torch.Tensor]]:
        """Yield the mini-batches; every one has new noise."""
        device = self.latents.device
        for _ in range(self.steps):
            # Random numbers are from the CPU's generator: the same on every device.
            indices = torch.randint(len(self.latents), (self.batch_size,)).to(device)
            timesteps = torch.randint(self.scheduler.num_train_timesteps, (self.batch_size,))
            timesteps = timesteps.to(device)
            dropped = (torch.rand(self.batch_size) < self.drop_cond).to(device)
            noise = torch.randn(self.batch_size, *self.latents.shape[1:]).to(device)

            latents = self.latents[indices]  # (batch, 2, 4, 4)
            prompts = self.labels[indices].masked_fill(dropped, NULL_CLASS)  # (batch,)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            target = self.scheduler.get_target(latents, noise, timesteps)
            yield UNetInput(noisy, timesteps, prompts), target
