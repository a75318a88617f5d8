"""Llama's configuration, with the names of Hugging Face's config.json (but eos_token_ids)."""

from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class LinearRopeScaling:
    """Position interpolation (S. Chen et al., 2023): all frequencies are divided by `factor`."""

    rope_type: ClassVar[str] = "linear"
    factor: float


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 extends its rotary embedding to longer contexts than it was trained on."""

    rope_type: ClassVar[str] = "llama3"
    factor: float  # by which low frequencies are divided
    low_freq_factor: float  # fewer rotations than this in the original context: divided by factor
    high_freq_factor: float  # more rotations than this: not changed
    original_max_position_embeddings: int  # length of the original context


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Architecture hyperparameters of a model of the Llama family."""

    vocab_size: int  # number of different tokens
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the MLP
    num_hidden_layers: int  # number of decoder layers
    num_attention_heads: int  # number of query heads
    num_key_value_heads: int  # number of key and value heads; each serves several query heads
    head_dim: int  # width of a head, usually hidden_size / num_attention_heads
    max_position_embeddings: int = 8192  # longest sequence, prompt and answer together
    rms_norm_eps: float = 1e-5  # added to the mean square, against division by zero
    rope_theta: float = 500_000.0  # base of the rotary embedding's frequencies
    rope_scaling: RopeScaling | LinearRopeScaling | None = None  # None: frequencies as they are
    tie_word_embeddings: bool = False  # True: lm_head shares the weights of the embedding
    eos_token_ids: tuple[int, ...] = ()  # generation stops after any of these tokens


LLAMA_TINY = LlamaConfig(  # trains in a minute on a CPU
    vocab_size=256,  # a token is a byte
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=True,
)

# A. Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 3, and each model's config.json.
LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rope_scaling=RopeScaling(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)
LLAMA_3_2_1B = replace(
    LLAMA_3_1_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    head_dim=64,
    rope_scaling=RopeScaling(
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    tie_word_embeddings=True,
)
LLAMA_CONFIGS = {
    "Llama 3.1 8B": LLAMA_3_1_8B,
    "Llama 3.1 70B": replace(
        LLAMA_3_1_8B,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
    ),
    "Llama 3.1 405B": replace(
        LLAMA_3_1_8B,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_hidden_layers=126,
        num_attention_heads=128,
    ),
}
