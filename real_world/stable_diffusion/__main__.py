"""Stable Diffusion in miniature: latent diffusion on digits, trained by the lesson's train().

    python -m real_world.stable_diffusion               train for two minutes, evaluate, plot
    python -m real_world.stable_diffusion --prompt 7    generate a seven with the trained model

The parts are those of R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models", 2022: a VAE makes images smaller, a U-Net, which reads the prompt by cross-attention,
learns to predict the noise in the small ones, and a scheduler removes it step by step. The prompt
is the digit to generate.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from real_world.common import bounded_int, make_parser, print_heading, run_cli, show
from real_world.stable_diffusion.data import load_images
from real_world.stable_diffusion.evaluate import check_schedulers, evaluate_generation
from real_world.stable_diffusion.pipeline import LatentDiffusion, load_model, save_model
from real_world.stable_diffusion.plot import plot_generation, save_images, to_text
from real_world.stable_diffusion.train import UNET_STEPS, train_unet, train_vae

Losses = dict[str, list[float]]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("stable_diffusion", "Latent diffusion on digits, trained by train().")
    add = parser.add_argument
    add("--prompt", metavar="DIGIT", type=int, choices=range(10), help="only generate this digit")
    add("--guidance", metavar="SCALE", type=float, help="guidance scale for --prompt (default: 3)")
    add(
        "--inference-steps",
        metavar="N",
        type=int,
        choices=(10, 20, 25, 50, 100, 200, 250, 500),  # divisors of the 1000 timesteps
        default=50,
        help="DDIM steps (default: 50)",
    )
    add(
        "--train-steps",
        metavar="N",
        type=bounded_int(20),
        help=f"train a new U-Net with N steps (default: load the saved model, or {UNET_STEPS})",
    )
    args = parser.parse_args(argv)
    if args.guidance is not None and args.prompt is None:
        parser.error("argument --guidance: requires --prompt")
    return args


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_or_train(path: Path, args: argparse.Namespace) -> tuple[LatentDiffusion, Losses]:
    """Load the saved model and the losses of its training; if there is none, train and save one."""
    if path.exists() and args.train_steps is None:
        show("model loaded from", path)
        return load_model(path, args.device)

    start = time.perf_counter()
    torch.manual_seed(args.seed)
    model = LatentDiffusion().to(args.device)
    data = load_images(args.device)
    print("\n  Train the VAE:")
    vae_losses = train_vae(model.vae, data.X_train)
    model.set_scaling_factor(data.X_train)
    print("\n  Train the U-Net on the VAE's latents:")
    latents = model.encode(data.X_train)
    steps = args.train_steps or UNET_STEPS
    unet_losses = train_unet(model.unet, latents, data.y_train, model.scheduler, steps)
    losses = {"vae": vae_losses, "unet": unet_losses}
    save_model(path, model, losses)
    print()
    show("training time", f"{time.perf_counter() - start:.0f} s on {args.device}")
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
    path = args.output / "stable_diffusion.safetensors"
    model, losses = load_or_train(path, args)
    if args.prompt is not None:
        generate_prompt(model, args)
        return

    show("VAE", f"{count_parameters(model.vae):,} parameters")
    show("U-Net", f"{count_parameters(model.unet):,} parameters")
    print("\n  The noise schedule, compared with diffusers' DDPMScheduler and DDIMScheduler:")
    check_schedulers()
    print("\n  500 generated digits per guidance scale, classified by the lesson's model:")
    evaluate_generation(model, load_images(args.device), args.inference_steps, args.seed)
    if not args.no_figure:
        figure_path = args.output / "stable_diffusion.png"
        plot_generation(figure_path, model, losses, args.seed)
        show("figure saved to", figure_path)


if __name__ == "__main__":
    run_cli(main)
