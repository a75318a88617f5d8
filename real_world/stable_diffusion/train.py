"""Training both models with the lesson's train()."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import lesson_code as lesson
from real_world.common import show
from real_world.stable_diffusion.data import NoisyLatents, load_images
from real_world.stable_diffusion.pipeline import (
    WEIGHTS_FILE,
    LatentDiffusion,
    load_model,
    save_model,
)
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.unet import UNet
from real_world.stable_diffusion.vae import VAE, vae_loss
from real_world.training import (
    check_config,
    load_config,
    one_cycle,
    option,
    save_config,
    show_config,
)


@dataclass(frozen=True)
class TrainConfig:
    """What can be changed about the training. Every field is an option of the command line."""

    vae_learning_rate: float = option(0.003, "of the VAE, after the warm-up")
    vae_epochs: int = option(50, "passes of the VAE over the training images", minimum=5)
    learning_rate: float = option(0.002, "of the U-Net, after the warm-up")
    steps: int = option(2500, "training steps of the U-Net", minimum=20)
    batch_size: int = option(128, "images or noisy latents per step")
    seed: int = option(0, "of the training; of the images, if a model is saved already", minimum=0)


def train_vae(vae: VAE, images: torch.Tensor, config: TrainConfig, log_path: Path) -> None:
    """Train a VAE in place on images, (n, 1, 8, 8).

    The losses are written to `log_path`, a .jsonl file, while it trains.
    """
    loader = DataLoader(TensorDataset(images, images), config.batch_size, shuffle=True)
    optimizer = torch.optim.Adam(vae.parameters(), config.vae_learning_rate)
    with one_cycle("VAE", optimizer, config.vae_epochs * len(loader), log_path) as on_step:
        # train() expects a model that returns a tensor; this one returns a VAEOutput.
        lesson.train(vae, loader, vae_loss, optimizer, config.vae_epochs, on_step)  # type: ignore[arg-type]


def train_unet(
    unet: UNet,
    latents: torch.Tensor,
    labels: torch.Tensor,
    scheduler: NoiseScheduler,
    config: TrainConfig,
    log_path: Path,
) -> list[float]:
    """Train a U-Net in place on scaled latents, (n, 2, 4, 4), and labels, (n,) int64.

    Returns the loss of every step, which is also written to `log_path`, a .jsonl file, while it
    trains. The final weights are an exponential moving average (EMA).
    """
    dataset = NoisyLatents(latents, labels, scheduler, config.steps, config.batch_size)
    loader = DataLoader(dataset, batch_size=None)  # the dataset yields whole mini-batches
    optimizer = torch.optim.Adam(unet.parameters(), config.learning_rate)
    # The weights of the last step depend on its noise: average those of about the last 100 (J. Ho
    # et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B).
    ema_model = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer.register_step_post_hook(lambda *_: ema_model.update_parameters(unet))
    with one_cycle("U-Net", optimizer, config.steps, log_path) as on_step:
        losses = lesson.train(unet, loader, nn.functional.mse_loss, optimizer, 1, on_step)
    unet.load_state_dict(ema_model.module.state_dict())
    return losses


def saved_config(folder: Path) -> TrainConfig:
    """Return the config with which the model in a folder was trained; without one, the default."""
    if (folder / WEIGHTS_FILE).exists():
        return load_config(folder, TrainConfig())
    return TrainConfig()


def train_or_load(config: TrainConfig, folder: Path, device: torch.device) -> LatentDiffusion:
    """Return the model in a folder; if there is none, train and save one.

    Raises CheckpointError if the model was trained with another config, or if it is damaged.
    """
    if (folder / WEIGHTS_FILE).exists():
        check_config(folder, config, "seed")  # which may differ: it is that of the images
        model = load_model(folder, device)
        show("model loaded from", folder)
        return model
    show_config(config)
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    model = LatentDiffusion().to(device)
    data = load_images(device)
    print(f"\n  VAE, {sum(p.numel() for p in model.vae.parameters()):,} parameters:")
    train_vae(model.vae, data.X_train, config, folder / "vae_losses.jsonl")
    model.scaling_factor = 1 / model.encode(data.X_train).std()
    latents = model.encode(data.X_train)
    print(f"\n  U-Net, {sum(p.numel() for p in model.unet.parameters()):,} parameters:")
    log_path = folder / "losses.jsonl"
    train_unet(model.unet, latents, data.y_train, model.scheduler, config, log_path)
    print()
    show("training time", f"{time.perf_counter() - start:.0f} s on {device}")
    save_config(folder, config)
    save_model(folder, model)
    show("model saved to", folder)
    return model
