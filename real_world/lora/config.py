"""What can be changed about fine-tuning."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FinetuneConfig:
    """Every field is an option of the command line."""

    learning_rate: float  # the largest of the schedule
    steps: int = field(metadata={"minimum": 20})
    batch_size: int  # windows of tokens, or noisy latents, per step
    rank: int = field(default=8, metadata={"maximum": 64})  # of the update of a weight
    seed: int = field(default=0, metadata={"minimum": 0})  # of the adapter, and of the batches
