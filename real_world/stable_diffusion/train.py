"""Training both models with the lesson's train()."""

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import lesson_code as lesson
from real_world.common import train_progress
from real_world.stable_diffusion.data import NoisyLatents
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.unet import UNet
from real_world.stable_diffusion.vae import VAE, vae_loss

BATCH_SIZE = 128
VAE_EPOCHS = 50
UNET_STEPS = 2500


def train_vae(vae: VAE, images: torch.Tensor, epochs: int) -> list[float]:
    """Train a VAE in place on images, (n, 1, 8, 8); return the loss of every step."""
    loader = DataLoader(TensorDataset(images, images), BATCH_SIZE, shuffle=True)
    steps = epochs * len(loader)
    optimizer = torch.optim.Adam(vae.parameters())
    lr_scheduler = OneCycleLR(optimizer, 0.003, steps, pct_start=0.1, cycle_momentum=False)
    show_progress = train_progress("VAE", steps)

    def on_step(step: int, loss: torch.Tensor) -> None:
        lr_scheduler.step()
        show_progress(step, loss)

    # train() expects a model that returns a tensor; this one returns a VAEOutput.
    return lesson.train(vae, loader, vae_loss, optimizer, epochs, on_step)  # type: ignore[arg-type]


def train_unet(
    unet: UNet,
    latents: torch.Tensor,
    labels: torch.Tensor,
    scheduler: NoiseScheduler,
    steps: int,
) -> list[float]:
    """Train a U-Net in place on scaled latents, (n, 2, 4, 4), and labels, (n,) int64.

    Returns the loss of every step. The final weights are an exponential moving average (EMA).
    """
    dataset = NoisyLatents(latents, labels, scheduler, steps, BATCH_SIZE)
    loader = DataLoader(dataset, batch_size=None)  # the dataset yields whole mini-batches
    optimizer = torch.optim.Adam(unet.parameters())
    lr_scheduler = OneCycleLR(optimizer, 0.002, steps, pct_start=0.1, cycle_momentum=False)
    ema_model = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    show_progress = train_progress("U-Net", steps)

    def on_step(step: int, loss: torch.Tensor) -> None:
        lr_scheduler.step()
        ema_model.update_parameters(unet)
        show_progress(step, loss)

    losses = lesson.train(
        unet, loader, nn.functional.mse_loss, optimizer, epochs=1, on_step=on_step
    )
    unet.load_state_dict(ema_model.module.state_dict())
    return losses
