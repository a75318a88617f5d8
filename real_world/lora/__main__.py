"""LoRA: fine-tuning a pretrained model by training a few new parameters.

    python -m real_world.lora                            both models; trains for two minutes
    python -m real_world.lora --only stable_diffusion    one of them

The article names "Stability AI's Stable Diffusion fine-tuning pipelines". Here, the lesson's
train() fine-tunes two pretrained models: SmolLM2, which is a Llama, and the diffusion model of the
stable_diffusion example. Their weights stay as they are; an adapter is trained and saved.
"""

from real_world.common import make_parser, print_heading, run_cli, show
from real_world.lora.config import LLAMA, STABLE_DIFFUSION
from real_world.lora.llama import finetune_llama
from real_world.lora.stable_diffusion import finetune_stable_diffusion
from real_world.training import with_options


def main(argv: list[str] | None = None) -> None:
    about = "Fine-tuning of two pretrained models, Llama and Stable Diffusion, with LoRA."
    parser = make_parser("lora", about, LLAMA, STABLE_DIFFUSION)
    text = "fine-tune one model (default: both)"
    parser.add_argument("--only", choices=("llama", "stable_diffusion"), help=text)
    args = parser.parse_args(argv)
    print_heading(
        "LoRA: fine-tuning with few parameters",
        "Stability AI's Stable Diffusion fine-tuning pipelines",
    )
    llama = digits = None
    if args.only != "stable_diffusion":
        llama = finetune_llama(with_options(LLAMA, args), args.output, args.device)
        print()
    if args.only != "llama":
        config = with_options(STABLE_DIFFUSION, args)
        digits = finetune_stable_diffusion(config, args.output, args.device)
        print()
    if not args.no_figure:
        from real_world.lora.plot import plot_lora

        path = args.output / "lora.png"
        plot_lora(path, llama, digits)
        show("figure saved to", path)


if __name__ == "__main__":
    run_cli(main)
