"""The pipeline: from noise and a prompt to latents, and to an image."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from lesson_code import CheckpointError
from real_world.common import atomic_write
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.scheduler_config import load_scheduler, save_scheduler
from real_world.stable_diffusion.unet import NULL_CLASS, UNet, UNetInput
from real_world.stable_diffusion.vae import VAE

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "scheduler_config.json"


class LatentDiffusion(nn.Module):
    """A VAE, a U-Net that works on its latents, and a noise scheduler.

    `scaling_factor` scales the latents to a standard deviation of 1, which the noise has (Rombach
    et al., appendix G).
    """

    scaling_factor: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vae = VAE()
        self.unet = UNet()
        self.scheduler = NoiseScheduler()
        self.register_buffer("scaling_factor", torch.ones(()))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scaled latents, (batch, 2, 4, 4), of images, (batch, 1, 8, 8)."""
        mean, _ = self.vae.encoder(images).chunk(2, dim=1)  # (batch, 2, 4, 4)
        return mean * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the images, (batch, 1, 8, 8) from 0 to 1, of scaled latents, (batch, 2, 4, 4)."""
        return self.vae.decoder(latents / self.scaling_factor).clamp(0, 1)

    @torch.no_grad()
    def generate(
        self,
        prompts: torch.Tensor,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        seed: int = 0,
        on_step_end: Callable[[torch.Tensor], object] | None = None,
    ) -> torch.Tensor:
        """Generate one image per prompt, (batch, 1, 8, 8) from 0 to 1.

        Args:
            prompts: The digits to generate, (batch,) int64.
            guidance_scale: How far to move from the prediction without a prompt to the one with it:
                0 ignores the prompt, 1 follows it, more exaggerates it. It is 1 + w in equation 6
                of Ho and Salimans, 2022.
            num_inference_steps: DDIM steps.
            seed: The seed of the initial noise.
            on_step_end: Called with the latents, (batch, 2, 4, 4), after every step.
        """
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        latents = torch.randn(len(prompts), 2, 4, 4, generator=generator).to(prompts.device)
        # One batch for both predictions, without a prompt and with it.
        prompts = torch.cat((torch.full_like(prompts, NULL_CLASS), prompts))  # (2 * batch,)
        timesteps = self.scheduler.ddim_timesteps(num_inference_steps)
        for timestep, prev_timestep in itertools.pairwise([*timesteps, -1]):
            latent_input = torch.cat((latents, latents))  # (2 * batch, 2, 4, 4)
            inputs = UNetInput(latent_input, torch.full_like(prompts, timestep), prompts)
            uncond, cond = self.unet(inputs).chunk(2)  # (batch, 2, 4, 4) each
            prediction = uncond + guidance_scale * (cond - uncond)
            latents = self.scheduler.ddim_step(prediction, timestep, prev_timestep, latents)
            if on_step_end is not None:
                on_step_end(latents)
        return self.decode(latents)


def save_model(folder: Path, model: LatentDiffusion) -> None:
    """Save a model and its schedule in a folder, which is created.

    Each file is written atomically, the weights last: if they exist, the schedule does too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_scheduler(folder / CONFIG_FILE, model.scheduler)
    atomic_write(folder / WEIGHTS_FILE, save(model.state_dict()))


def load_model(folder: Path, device: torch.device | str = "cpu") -> LatentDiffusion:
    """Return the model with its schedule.

    Raises CheckpointError if a file is missing or damaged, or holds another model or schedule.
    """
    model = LatentDiffusion()
    try:
        model.scheduler = load_scheduler(folder / CONFIG_FILE)
        model.load_state_dict(load((folder / WEIGHTS_FILE).read_bytes()))
    # RuntimeError: other weights
    except (CheckpointError, FileNotFoundError, SafetensorError, RuntimeError) as error:
        message = f"cannot load {folder} ({str(error).splitlines()[0]})"
        raise CheckpointError(f"{message}; delete it to train a new model") from error
    return model.to(device)
