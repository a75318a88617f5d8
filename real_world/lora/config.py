"""What can be changed about fine-tuning. Every field is an option of the command line."""

from dataclasses import dataclass

from real_world.training import option


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The two models have other defaults, which are below."""

    learning_rate: float = option(0.003, "after the warm-up")
    steps: int = option(30, "training steps", minimum=20)
    batch_size: int = option(8, "windows of tokens, or noisy latents, per step")
    rank: int = option(8, "of the update of a weight")
    seed: int = option(0, "of the adapter, the batches and the images", minimum=0)


LLAMA = FinetuneConfig()
STABLE_DIFFUSION = FinetuneConfig(learning_rate=0.002, steps=300, batch_size=128)
