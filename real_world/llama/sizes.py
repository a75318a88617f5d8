"""The numbers that make a Llama, those of the herd, and what follows from them: its costs."""

from __future__ import annotations

from typing import Annotated

import msgspec  # checks the types of a config.json

Count = Annotated[int, msgspec.Meta(ge=1, le=2**20)]  # products of three are then no overflow
Positive = Annotated[float, msgspec.Meta(gt=0)]


class RopeScaling(msgspec.Struct, frozen=True):
    """How Llama 3.1 stretches its rotary embedding to contexts beyond those it was trained on."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    rope_type: str = "llama3"


class LlamaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers that make a Llama, by their names in Hugging Face's config.json."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    num_attention_heads: Count
    num_key_value_heads: Count
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 500_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    head_dim: Count | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    @property
    def head_size(self) -> int:
        """The width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


MINIATURE = LlamaConfig(
    vocab_size=256,  # bytes
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
LLAMA_3_1_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
HERD = {  # table 3 of the paper, and the config.json of each
    name: LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        rope_scaling=LLAMA_3_1_SCALING,
    )
    for name, hidden, intermediate, layers, heads in (
        ("Llama 3.1 8B", 4096, 14_336, 32, 32),
        ("Llama 3.1 70B", 8192, 28_672, 80, 64),
        ("Llama 3.1 405B", 16_384, 53_248, 126, 128),
    )
}


def matrix_weights(config: LlamaConfig) -> int:
    """Return how many weights a token is multiplied with: all of the matrices, the output too."""
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * config.hidden_size * heads * config.head_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    output = config.vocab_size * config.hidden_size
    return config.num_hidden_layers * (attention + mlp) + output


def parameter_count(config: LlamaConfig) -> int:
    """Return the number of parameters: the matrices, the embedding, and two norms a layer."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return matrix_weights(config) + embedding + norms


def flops_a_token(config: LlamaConfig, context: int) -> int:
    """Return the floating point operations of a forward pass, a token, at a length of `context`.

    Two for every weight of a matrix, and four for every number of a query and every token that it
    looks at (A. Chowdhery et al., "PaLM", 2022, appendix B). Training takes three times as many.
    """
    width = config.num_attention_heads * config.head_size
    return 2 * matrix_weights(config) + 4 * config.num_hidden_layers * width * context
