"""Stable Diffusion in miniature: latent diffusion on the scanned digits, trained by train().

    python -m real_world.stable_diffusion               all of the page; trains for two minutes
    python -m real_world.stable_diffusion --prompt 7    draws a seven with what it has learnt

The article: "Stability AI's Stable Diffusion fine-tuning pipelines ... all run on PyTorch. The
explicit training loop, autograd, and nn.Module pattern you practiced today are used verbatim." Here
is what they tune, in miniature and trained from nothing, its parts as R. Rombach et al. have them
("High-Resolution Image Synthesis with Latent Diffusion Models", 2022): an autoencoder makes an
image small, a U-Net that reads the prompt by cross-attention learns to remove noise from what is
small, and noise, removed step by step, is a new image. The prompt is the digit to draw.

To read in this order: schedule, networks, training, drawing; then page, which shows and measures.
"""

from real_world.stable_diffusion.drawing import decode, draw, draw_latents
from real_world.stable_diffusion.networks import EMPTY, Autoencoder, Denoiser, Diffusion, Noisy
from real_world.stable_diffusion.schedule import NoiseSchedule, noise_schedule
from real_world.stable_diffusion.training import STEPS, train_autoencoder, train_denoiser

__all__ = [
    "EMPTY",
    "STEPS",
    "Autoencoder",
    "Denoiser",
    "Diffusion",
    "NoiseSchedule",
    "Noisy",
    "decode",
    "draw",
    "draw_latents",
    "noise_schedule",
    "train_autoencoder",
    "train_denoiser",
]
