"""Llama 3 in miniature: its decoder in plain torch, trained by the lesson's train(), unchanged.

    python -m real_world.llama                           all of the page; trains for a minute
    python -m real_world.llama --prompt "A class"        goes on from that text, with what it learnt
    python -m real_world.llama --weights FOLDER --prompt "A class"    a Llama from Hugging Face
    torchrun --standalone --nproc-per-node 2 -m real_world.llama      divided over two processes

The article: "Every production PyTorch model, from a two-layer classifier to a 70-billion-parameter
language model, follows this exact same pattern." Here is that language model: the architecture of
A. Grattafiori et al., "The Llama 3 Herd of Models", 2024, section 3.2. Only the numbers in its
LlamaConfig are smaller. Its parameters have Hugging Face's names, so weights move both ways.

To read in this order: sizes, model, weights, generation, training; then proofs and page, which only
show and measure.
"""

from real_world.llama.generation import generate, narrowed
from real_world.llama.model import Cache, Llama
from real_world.llama.sizes import HERD, MINIATURE, LlamaConfig, RopeScaling
from real_world.llama.training import library_text, train_llama

__all__ = [
    "HERD",
    "MINIATURE",
    "Cache",
    "Llama",
    "LlamaConfig",
    "RopeScaling",
    "generate",
    "library_text",
    "narrowed",
    "train_llama",
]
