"""Stable Diffusion in miniature: latent diffusion on digits, trained by the lesson's train().

    python -m real_world.stable_diffusion               train for two minutes, evaluate, plot
    python -m real_world.stable_diffusion --prompt 7    generate sevens with the trained model

The parts are those of R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models", 2022: a VAE compresses images to latents; a U-Net, which reads the prompt by
cross-attention, learns to predict the noise in noisy latents; a scheduler removes it step by step.
The prompt is the digit to generate.
"""

import argparse

import torch

from real_world.common import (
    CheckFailed,
    make_parser,
    nonnegative_float,
    print_heading,
    run_cli,
    show,
)
from real_world.stable_diffusion.data import load_images
from real_world.stable_diffusion.evaluate import check_schedulers, evaluate_generation
from real_world.stable_diffusion.pipeline import LatentDiffusion
from real_world.stable_diffusion.plot import plot_example, save_images, to_text
from real_world.stable_diffusion.train import TrainConfig, saved_config, train_or_load
from real_world.training import as_tested, read_losses, with_options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Latent diffusion on digits, trained by train()."
    parser = make_parser("stable_diffusion", about, TrainConfig())
    add = parser.add_argument
    add("--prompt", metavar="DIGIT", type=int, choices=range(10), help="only generate this digit")
    text = "guidance scale for --prompt (default: 3)"
    add("--guidance", metavar="SCALE", type=nonnegative_float, help=text)
    divisors = (10, 20, 25, 40, 50, 100, 125, 200, 250, 500)
    text = "DDIM steps, a divisor of 1000 from 10 to 500 (default: 50)"
    add("--inference-steps", metavar="N", type=int, choices=divisors, default=50, help=text)
    args = parser.parse_args(argv)
    if args.guidance is not None and args.prompt is None:
        parser.error("argument --guidance: requires --prompt")
    return args


def generate_prompt(model: LatentDiffusion, args: argparse.Namespace, seed: int) -> None:
    """Generate a digit four times; print the images as text, and save them as a PNG."""
    prompts = torch.full((4,), args.prompt, device=args.device)
    guidance_scale = 3.0 if args.guidance is None else args.guidance
    images = model.generate(prompts, guidance_scale, args.inference_steps, seed)
    if not images.isfinite().all():
        raise CheckFailed(f"--guidance {guidance_scale:g} is too large: the pixels are not finite")
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
    folder = args.output / "stable_diffusion"
    config = with_options(saved_config(folder), args)
    seed = with_options(TrainConfig(), args).seed  # of the images
    model = train_or_load(config, folder, args.device)
    if args.prompt is not None:
        generate_prompt(model, args, seed)
        return

    print("\n  The noise scheduler, compared with diffusers' DDIMScheduler:")
    check_schedulers()
    print("\n  500 generated digits per guidance scale, classified by a model trained on digits,")
    print("  and their distances to the nearest training image:")
    tested = as_tested(config, TrainConfig())
    evaluate_generation(model, load_images(args.device), args.inference_steps, seed, tested)
    if not args.no_figure:
        figure_path = args.output / "stable_diffusion.png"
        losses = {
            "VAE": read_losses(folder / "vae_losses.jsonl"),
            "U-Net": read_losses(folder / "losses.jsonl"),
        }
        plot_example(figure_path, model, losses, seed)
        show("figure saved to", figure_path)


if __name__ == "__main__":
    run_cli(main)
