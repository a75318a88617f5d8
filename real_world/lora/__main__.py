"""LoRA: fine-tuning a pretrained model by training a few new parameters.

    python -m real_world.lora                            both models; trains for two minutes
    python -m real_world.lora --only stable_diffusion    one of them

The article names "Stability AI's Stable Diffusion fine-tuning pipelines". Here, the lesson's
train() fine-tunes two pretrained models: SmolLM2, which is a Llama, and the diffusion model of the
stable_diffusion example. Their weights stay as they are; an adapter is trained and saved.
"""

import argparse

from real_world.common import bounded_int, make_parser, print_heading, run_cli, show
from real_world.lora.llama import finetune_llama
from real_world.lora.stable_diffusion import finetune_stable_diffusion


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("lora", "Fine-tuning of two pretrained models with LoRA.")
    add = parser.add_argument
    add("--only", choices=("llama", "stable_diffusion"), help="fine-tune one model (default: both)")
    steps = "training steps, at least 20 (default: 30 for llama, 300 for stable_diffusion)"
    add("--steps", metavar="N", type=bounded_int(20), help=steps)
    add("--rank", metavar="R", type=bounded_int(1, 64), default=8, help="default: 8")
    parser.set_defaults(train_steps=None)  # for the base model, stable_diffusion's own default
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    print_heading(
        "LoRA: fine-tuning with few parameters",
        "Stability AI's Stable Diffusion fine-tuning pipelines",
    )
    args.output.mkdir(parents=True, exist_ok=True)
    llama = digits = None
    if args.only != "stable_diffusion":
        llama = finetune_llama(args)
        print()
    if args.only != "llama":
        digits = finetune_stable_diffusion(args)
        print()
    if not args.no_figure:
        from real_world.lora.plot import plot_lora

        path = args.output / "lora.png"
        plot_lora(path, llama, digits)
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
