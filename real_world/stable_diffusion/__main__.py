"""Stable Diffusion in miniature: latent diffusion on digits, trained by the lesson's train().

    python -m real_world.stable_diffusion               train for two minutes, evaluate, plot
    python -m real_world.stable_diffusion --prompt 7    generate sevens with the trained model

The parts are those of R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models", 2022: a VAE compresses images to latents; a U-Net, which reads the prompt by
cross-attention, learns to predict the noise in noisy latents; a scheduler removes it step by step.
The prompt is the digit to generate.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from real_world.common import bounded_int, make_parser, print_heading, run_cli, show
from real_world.stable_diffusion.data import load_images
from real_world.stable_diffusion.evaluate import check_schedulers, evaluate_generation
from real_world.stable_diffusion.pipeline import LatentDiffusion, load_model, save_model
from real_world.stable_diffusion.plot import plot_example, save_images, to_text
from real_world.stable_diffusion.train import UNET_STEPS, VAE_EPOCHS, train_unet, train_vae


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("stable_diffusion", "Latent diffusion on digits, trained by train().")
    add = parser.add_argument
    add("--prompt", metavar="DIGIT", type=int, choices=range(10), help="only generate this digit")
    add("--guidance", metavar="SCALE", type=float, help="guidance scale for --prompt (default: 3)")
    divisors = (10, 20, 25, 40, 50, 100, 125, 200, 250, 500)
    text = "DDIM steps, a divisor of 1000 from 10 to 500 (default: 50)"
    add("--inference-steps", metavar="N", type=int, choices=divisors, default=50, help=text)
    text = f"train a new model for N steps (default: {UNET_STEPS}, if no model is saved yet)"
    add("--train-steps", metavar="N", type=bounded_int(20), help=text)
    args = parser.parse_args(argv)
    if args.guidance is not None and args.prompt is None:
        parser.error("argument --guidance: requires --prompt")
    if args.guidance is not None and not 0 <= args.guidance < math.inf:
        parser.error("argument --guidance: must be a finite number, at least 0")
    return args


def train_model(args: argparse.Namespace) -> tuple[LatentDiffusion, dict[str, list[float]]]:
    """Train the VAE, then the U-Net on its latents; return the model and the losses of both."""
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    model = LatentDiffusion().to(args.device)
    data = load_images(args.device)
    print(f"  VAE, {sum(p.numel() for p in model.vae.parameters()):,} parameters:")
    vae_losses = train_vae(model.vae, data.X_train, VAE_EPOCHS)
    model.scaling_factor = 1 / model.encode(data.X_train).std()
    latents = model.encode(data.X_train)
    print(f"\n  U-Net, {sum(p.numel() for p in model.unet.parameters()):,} parameters:")
    steps = args.train_steps or UNET_STEPS
    unet_losses = train_unet(model.unet, latents, data.y_train, model.scheduler, steps)
    print()
    show("training time", f"{time.perf_counter() - start:.0f} s on {args.device}")
    return model, {"vae": vae_losses, "unet": unet_losses}


def load_or_train(args: argparse.Namespace) -> tuple[LatentDiffusion, dict[str, list[float]]]:
    """Return the saved model and its losses; train and save one if there is none."""
    path: Path = args.output / "stable_diffusion.safetensors"
    if path.exists() and args.train_steps is None:
        model, losses = load_model(path, args.device)
        show("model loaded from", path)
    else:
        model, losses = train_model(args)
        save_model(path, model, losses)
        show("model saved to", path)
    return model, losses


def generate_prompt(model: LatentDiffusion, args: argparse.Namespace) -> None:
    """Generate a digit four times; print the images as text, and save them as a PNG."""
    prompts = torch.full((4,), args.prompt, device=args.device)
    guidance_scale = 3.0 if args.guidance is None else args.guidance
    images = model.generate(prompts, guidance_scale, args.inference_steps, args.seed)
    print(f"\n{to_text(images)}\n")
    if not args.no_figure:
        path = args.output / f"stable_diffusion-{args.prompt}.png"
        save_images(path, images)
        show("images saved to", path)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print_heading(
        "Stable Diffusion in miniature", "Stability AI's Stable Diffusion fine-tuning pipelines"
    )
    args.output.mkdir(parents=True, exist_ok=True)
    model, losses = load_or_train(args)
    if args.prompt is not None:
        generate_prompt(model, args)
        return

    print("\n  The noise scheduler, compared with diffusers' DDIMScheduler:")
    check_schedulers()
    print("\n  500 generated digits per guidance scale, classified by a model trained on digits,")
    print("  and their distances to the nearest training image:")
    evaluate_generation(model, load_images(args.device), args.inference_steps, args.seed)
    if not args.no_figure:
        figure_path = args.output / "stable_diffusion.png"
        plot_example(figure_path, model, losses, args.seed)
        show("figure saved to", figure_path)


if __name__ == "__main__":
    run_cli(main)
