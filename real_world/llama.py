"""Llama 3 in miniature: its decoder in plain torch, trained by the lesson's train(), unchanged.

    python -m real_world.llama                           all of the page; trains for a minute
    python -m real_world.llama --prompt "A class"        goes on from that text, with what it learnt
    python -m real_world.llama --weights FOLDER --prompt "A class"    a Llama from Hugging Face
    torchrun --standalone --nproc-per-node 2 -m real_world.llama      divided over two processes

The article: "Every production PyTorch model, from a two-layer classifier to a 70-billion-parameter
language model, follows this exact same pattern." Here is that language model: the architecture of
A. Grattafiori et al., "The Llama 3 Herd of Models", 2024, section 3.2. Only the numbers in its
LlamaConfig are smaller. Its parameters have Hugging Face's names, so weights move both ways.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec  # checks the types of a config.json
import torch
from torch import nn
from torch.nn import functional

import lesson_code as lesson
from real_world import (
    Batches,
    distributed,
    number,
    one_cycle,
    only_with,
    parser,
    quiet,
    run,
    shown,
    writable,
    write_tensors,
    write_whole,
)

if TYPE_CHECKING:
    import tokenizers

# %% The sizes


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


# %% Where a token stands: the rotary embedding


Rotation = tuple[torch.Tensor, torch.Tensor]
"""The cosines and the sines of the angles, each (length, head_size)."""


@functools.lru_cache(maxsize=8)
def frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Return by how much each pair of a head's numbers turns at every token, (head_size / 2,).

    J. Su et al., "RoFormer", 2021, section 3.2.2; the scaling is that of Llama 3.1: what turns more
    than high_freq_factor times in the original context stays, what turns fewer than low_freq_factor
    times is slowed down by `factor`, and in between the two blend.
    """
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    turns = 1.0 / config.rope_theta ** (pairs / config.head_size)
    if (scaling := config.rope_scaling) is None:
        return turns
    in_context = scaling.original_max_position_embeddings * turns / (2 * math.pi)
    between = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((in_context - scaling.low_freq_factor) / between).clamp(0, 1)
    return kept * turns + (1 - kept) * turns / scaling.factor


def rotation(config: LlamaConfig, start: int, length: int, like: torch.Tensor) -> Rotation:
    """Return the rotation of the tokens from `start` on, of the device and dtype of `like`."""
    positions = torch.arange(start, start + length, dtype=torch.float32, device=like.device)
    angles = torch.outer(positions, frequencies(config, like.device)).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + head_size / 2]) of `x`, (batch, heads, length, head_size)."""
    cosines, sines = by
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


# %% The decoder


class Cache:
    """The keys and values of one layer for the tokens so far, so that they are computed once."""

    def __init__(self, config: LlamaConfig, batch: int, limit: int, like: torch.Tensor) -> None:
        shape = (2, batch, config.num_key_value_heads, limit, config.head_size)
        self.kept = like.new_empty(shape)
        self.length = 0

    def extend(self, *new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new tokens; return those of all."""
        start, self.length = self.length, self.length + new[0].shape[2]
        for kept, added in zip(self.kept, new, strict=True):
            kept[:, :, start : self.length] = added
        keys, values = self.kept[:, :, :, : self.length]
        return keys, values


class Attention(nn.Module):
    """Grouped-query attention: several heads of queries share one of keys and values.

    J. Ainslie et al., "GQA", 2023. What it saves is the cache, which has only the latter.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        queries = config.num_attention_heads * self.head_size
        shared = config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, by: Rotation, cache: Cache | None = None) -> torch.Tensor:
        """Let every token of `x`, (batch, length, hidden_size), look at itself and those before."""
        batch, length, _ = x.shape
        queries, keys, values = (
            project(x).view(batch, length, -1, self.head_size).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = rotate(queries, by), rotate(keys, by)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        causal = length > 1  # one token alone, the newest, may look at all there are
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU, a two-layer network with a gate (N. Shazeer, "GLU Variants", 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, hidden_size) for `x` of the same shape."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the MLP; each reads its normalized input and adds to it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, by: Rotation, cache: Cache | None = None) -> torch.Tensor:
        """Return (batch, length, hidden_size) for `x` of the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), by, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """From tokens to what the last layer makes of them: all of Llama but its output."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """Return (batch, length, hidden_size) for `tokens`, (batch, length) int64."""
        start = caches[0].length if caches else 0
        if start and tokens.shape[1] > 1:
            raise ValueError("after the prompt, tokens come one at a time")
        x = self.embed_tokens(tokens)
        by = rotation(self.config, start, tokens.shape[1], like=x)
        for layer, cache in zip(self.layers, caches or [None] * len(self.layers), strict=True):
            x = layer(x, by, cache)
        return self.norm(x)


class Llama(nn.Module):
    """Llama 3: tokens, (batch, length) int64, in; logits of the next, (..., vocab_size), out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def config(self) -> LlamaConfig:
        """The sizes of this network."""
        return self.model.config

    def tie(self) -> None:
        """Make the output's matrix the embedding's, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, caches: list[Cache] | None = None) -> torch.Tensor:
        """Return the logits of the token after each of `tokens`.

        With `caches`, `tokens` are those after the ones that the caches hold: a whole prompt into
        empty caches, then one token at a time; ValueError where it is more.
        """
        return self.lm_head(self.model(tokens, caches))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which Hugging Face reads; each whole or not."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict()
        if self.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        about |= {"bos_token_id": None} | msgspec.to_builtins(self.config)
        write_tensors(folder / "model.safetensors", weights)
        content = json.dumps(about, indent=2) + "\n"
        write_whole(folder / "config.json", lambda path: path.write_text(content))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Llama:
        """Read a Llama from a folder as Hugging Face writes it, in its file's dtype or `dtype`.

        The weights are read tensor by tensor into an empty network; on a CPU they stay in the file,
        which the system maps into memory. Raises CheckpointError where the folder holds something
        else, or not all of it; nothing in it is ever run.
        """
        folder = Path(folder)
        with torch.device("meta"):  # shapes alone
            model = cls(read_config(folder / "config.json"))
        expected = {name: weights.shape for name, weights in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del expected["lm_head.weight"]
        weights = {}
        for path, name, tensor in stored_tensors(folder, device):
            repeated = name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
            if repeated and name not in expected:
                continue  # older files have what follows from the others
            if name not in expected:
                refuse(path, f"holds {name}, which a Llama of this config.json does not have")
            if name in weights:
                refuse(path, f"holds {name}, which another file holds too")
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                kind = str(tensor.dtype).removeprefix("torch.")
                refuse(path, f"holds {name} in {kind}; float32, float16 and bfloat16 are read")
            if tensor.shape != expected[name]:
                wanted = f"{tuple(expected[name])} by config.json"
                refuse(path, f"holds {name} as {tuple(tensor.shape)}, which is {wanted}")
            weights[name] = tensor.to(dtype or tensor.dtype)
        if missing := expected.keys() - weights.keys():
            refuse(folder, f"lacks {len(missing)} tensors of its config.json: {min(missing)}, ...")
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
        if len(kinds) > 1:
            refuse(folder, f"mixes {' and '.join(kinds)}; name the dtype to load it in")
        model.load_state_dict(weights, strict=False, assign=True)  # tied, one is not there
        model.tie()
        return model


# %% Weights from a folder


def refuse(path: Path, reason: str) -> NoReturn:
    """Raise CheckpointError: `path` cannot be used, and why, in one line whatever it holds."""
    raise lesson.CheckpointError(f"{path} {' '.join(reason.split())[:300]}")


def read_config(path: Path) -> LlamaConfig:
    """Return the sizes in a config.json of Hugging Face's; raise CheckpointError if it has none."""
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=dict)
        if stored.get("model_type") != "llama":
            refuse(path, f"describes {stored.get('model_type', 'no type of model')}, not llama")
        # transformers 5 keeps both in rope_parameters, transformers 4 and Meta's own files do not.
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        rope = msgspec.convert(rope, dict)
        kind = rope.get("rope_type", rope.get("type", "default"))
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        plain["quantization_config"] = None
        for name, only in plain.items():
            if stored.get(name, only) != only:
                refuse(path, f"has {name} {stored[name]}; Llama 3 has {only}")
        if kind not in ("default", "llama3"):
            refuse(path, f"has a rotary embedding of type {kind}; Llama 3 has default or llama3")
        theta = rope.get("rope_theta", stored.get("rope_theta", 10_000.0))
        scaling = rope if kind == "llama3" else None
        config = msgspec.convert(
            {"rms_norm_eps": 1e-6} | stored | {"rope_theta": theta, "rope_scaling": scaling},
            LlamaConfig,
        )
    except FileNotFoundError:
        refuse(path, "does not exist; a Llama's folder has config.json and model.safetensors")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        refuse(path, f"is no configuration of a Llama: {error}")
    if (
        config.num_attention_heads % config.num_key_value_heads
        or config.head_size % 2
        or config.head_size == 0
    ):
        heads = f"{config.num_attention_heads} heads of {config.head_size}"
        refuse(path, f"divides {heads} over {config.num_key_value_heads}, which does not come out")
    return config


def stored_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder; raise CheckpointError where there are none."""
    index = folder / "model.safetensors.index.json"
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if not index.exists():
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pth"), *folder.glob("*.pt")]
        if pickles:
            refuse(pickles[0], "is a pickle, which may run code; only safetensors is read")
        refuse(folder, "holds no model.safetensors")
    try:
        names = msgspec.json.decode(index.read_bytes(), type=dict[str, object])["weight_map"]
        names = set(msgspec.convert(names, dict[str, str]).values())
    except (msgspec.MsgspecError, KeyError):
        refuse(index, "is no index of safetensors files")
    for name in sorted(names):
        if Path(name).name != name or not (folder / name).is_file():
            refuse(index, f"names {name}, which is no file beside it")
    return [folder / name for name in sorted(names)]


def stored_tensors(
    folder: Path, device: torch.device | str
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield every tensor of a folder, with the file it is in and its name."""
    from safetensors import SafetensorError, safe_open

    for path in stored_files(folder):
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    yield path, name, file.get_tensor(name)
        except SafetensorError as error:
            refuse(path, f"is torn, or no safetensors file ({error})")


# %% Generation


def narrowed(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float
) -> torch.Tensor:
    """Return the logits to draw from, (batch, vocab_size): what is not to be drawn is -inf.

    The `top_k` likeliest stay, and of these the fewest whose probabilities reach `top_p` together
    (A. Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).
    """
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        shares = ordered.softmax(dim=-1)
        beyond = shares.cumsum(dim=-1) - shares >= top_p
        beyond[:, 0] = False  # the likeliest always stays
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


@torch.no_grad()
def generate(
    model: Llama,
    prompt: torch.Tensor,
    count: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    cached: bool = True,
) -> Iterator[torch.Tensor]:
    """Yield `count` tokens, one after another, that go on from a prompt: each (batch,) int64.

    prompt: (batch, length) int64. Temperature 0 takes the likeliest; anything else draws by `seed`.
    Without a cache everything is computed again for every token: the same, and slower.
    """
    weights = model.lm_head.weight
    limit = prompt.shape[1] + count
    caches = None
    if cached:
        layers = range(model.config.num_hidden_layers)
        caches = [Cache(model.config, len(prompt), limit, weights) for _ in layers]
    generator = torch.Generator(prompt.device).manual_seed(seed)
    given = prompt
    for _ in range(count):
        logits = model.lm_head(model.model(given, caches)[:, -1])
        if not logits.isfinite().all():
            raise lesson.ClaimError(
                "the network answers with no numbers: its weights are not finite"
            )
        if temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            shares = narrowed(logits, temperature, top_k, top_p).softmax(dim=-1)
            token = torch.multinomial(shares, 1, generator=generator).squeeze(1)
        yield token
        given = token[:, None] if cached else torch.cat((given, token[:, None]), dim=1)


# %% A text, and what can be known of it without a network


@functools.cache
def library_text() -> torch.Tensor:
    """Return the reference of the Python language, which every Python has, in bytes (uint8).

    Its topics repeat each other's paragraphs. Each stays once, where it stands first: else what is
    held out would have been trained on.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = "\n\n".join(dict.fromkeys(text.split("\n\n")))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def entropies(text: torch.Tensor) -> tuple[float, float]:
    """Return the entropy of a byte of `text`, alone and after the one before it, in nats.

    No model that looks at no byte, or at one, can have a smaller loss on that text (C. Shannon,
    "Prediction and Entropy of Printed English", 1951).
    """

    def entropy(symbols: torch.Tensor) -> float:
        counts = symbols.bincount().double()
        shares = counts[counts > 0] / counts.sum()
        return -(shares * shares.log()).sum().item()

    symbols = text.long()
    first, second = symbols[:-1], symbols[1:]
    return entropy(symbols), entropy(256 * first + second) - entropy(first)


def windows(
    text: torch.Tensor, batch: int, length: int, seed: int, device: torch.device | str = "cpu"
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return what draws a batch: bytes, (batch, length) int64, and for each the one after it."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(length + 1)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        rows = text[starts + offsets].long().to(device)
        return rows[:, :-1], rows[:, 1:]

    return draw


def next_token_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats; logits: (batch, length, vocab_size)."""
    return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


# %% The same network as everybody's


PROOFS = {  # what the random networks that are compared have
    "6 heads, 2 of keys": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "tied, 4 heads of each": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "3.1's scaling, 1 of keys": {
        "num_key_value_heads": 1,
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 16),
    },
}


def proof_config(**changes: object) -> LlamaConfig:
    """Return the sizes of a small network to compare, with `changes`."""
    sizes = {"vocab_size": 97, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaConfig(**(sizes | heads | changes))


def hugging_face_twin(model: Llama) -> nn.Module:
    """Return transformers' LlamaForCausalLM of the same sizes, with the same weights."""
    with quiet():  # its import warns of packages that it does not need
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

    sizes = msgspec.to_builtins(model.config)
    scaling = sizes.pop("rope_scaling") or {"rope_type": "default"}
    rope = scaling | {"rope_theta": sizes.pop("rope_theta")}
    ours = TheirConfig(**sizes, rope_parameters=rope, bos_token_id=None)
    twin = LlamaForCausalLM(ours).to(model.lm_head.weight)
    twin.load_state_dict(model.state_dict())
    return twin


def differences(model: Llama, twin: nn.Module, tokens: torch.Tensor) -> tuple[float, float]:
    """Return by how much two networks differ: their logits, and their gradients, at the most."""
    logits, theirs = model(tokens), twin(tokens).logits
    for each in (logits, theirs):
        next_token_loss(each[:, :-1], tokens[:, 1:]).backward()
    found = {name: weights.grad for name, weights in twin.named_parameters()}
    apart = [(weights.grad - found[name]).abs().max() for name, weights in model.named_parameters()]
    return (logits - theirs).abs().max().item(), max(apart).item()


def compare_with_transformers() -> None:
    """Hold random networks against transformers' with the same weights."""
    print("\n  Against transformers' LlamaForCausalLM, with the same random weights:")
    for seed, (name, changes) in enumerate(PROOFS.items()):
        torch.manual_seed(seed)
        model = Llama(proof_config(**changes))
        tokens = torch.randint(97, (2, 50))
        twin = hugging_face_twin(model)
        logits, gradients = differences(model, twin, tokens)
        measured = f"logits differ by {logits:.0e}, gradients {gradients:.0e}"
        lesson.check(name, measured, max(logits, gradients) <= 1e-5)
        ours = torch.stack(list(generate(model, tokens[:, :10], 30)), dim=1)
        theirs = twin.generate(tokens[:, :10], max_new_tokens=30, do_sample=False)[:, 10:]
        lesson.check("  greedy generation", "the same 30 tokens", torch.equal(ours, theirs))


# %% Training


STEPS, BATCH, CONTEXT = 1000, 8, 128
HELD_OUT = 10  # a part in so many of the text is not trained on


def train_llama(
    model: Llama,
    text: torch.Tensor,
    steps: int,
    seed: int,
    group: distributed.Group | None = None,
    first: int | None = None,
) -> list[float]:
    """Train `model` in place by the lesson's train(), on other windows of `text` at every step.

    Returns the loss of every step, in nats a byte. The processes of a `group` share each batch.
    With `first`, it ends after so many of the steps.
    """
    draw = windows(text, BATCH, CONTEXT, seed, model.lm_head.weight.device)
    criterion, mean = next_token_loss, None
    if group:
        own = distributed.share(BATCH, group.rank, group.world)
        whole = draw
        draw = lambda: tuple(rows[own] for rows in whole())  # noqa: E731 - a def would hide draw
        part = own.stop - own.start
        criterion = distributed.weighted(BATCH, part, group.world, next_token_loss)
        mean = functools.partial(distributed.mean, group=group)
    lr = 0.003
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.1)
    epochs = min(first or steps, steps)
    batches = Batches(
        "" if first else "llama", draw, epochs, one_cycle(optimizer, lr, steps).step, mean=mean
    )
    losses = lesson.train(
        model,
        batches.X,
        batches.y,
        criterion=criterion,
        optimizer=optimizer,
        epochs=epochs,
        on_epoch=batches,
    )
    return mean(torch.tensor(losses)).tolist() if mean else losses


@torch.no_grad()
def held_out_loss(model: Llama, text: torch.Tensor, length: int = CONTEXT) -> float:
    """Return the mean loss, in nats a byte, on all of `text`, in windows of `length`."""
    device = model.lm_head.weight.device
    whole = (len(text) - 1) // length * length
    X, y = (text[start : start + whole].view(-1, length).long().to(device) for start in (0, 1))
    return next_token_loss(model(X), y).item()


def gathered(model: Llama) -> Llama:
    """Return a whole network with the weights of a divided one; all processes take part."""
    whole = Llama(model.config).to(model.lm_head.weight.device)
    whole.load_state_dict({name: w.full_tensor() for name, w in model.state_dict().items()})
    return whole


def parts(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is trained on, and the rest, which is held out."""
    cut = len(text) - len(text) // HELD_OUT
    return text[:cut], text[cut:]


def learn(
    steps: int, seed: int, device: torch.device, group: distributed.Group | None
) -> tuple[Llama, list[float]]:
    """Train the miniature on all but the last part of the text; return it and its losses."""
    torch.manual_seed(seed)
    model = Llama(MINIATURE).to(device)
    print(f"\n  The lesson's train(), {steps} steps of {BATCH} x {CONTEXT} bytes on {device}:")
    if group:
        distributed.divide(model, model.model.layers, group)
    known, _ = parts(library_text())
    losses = train_llama(model, known, steps, seed, group)
    return gathered(model) if group else model, losses


def judge(model: Llama, steps: int) -> None:
    """Print how well `model` knows the text that was held out, and how well a bigram could.

    Raises ClaimError where, after STEPS or more, it does not know that better.
    """
    _, rest = parts(library_text())
    loss, (_, bigram) = held_out_loss(model, rest), entropies(rest)
    lesson.show("entropy of what is held out", f"{bigram:.4f} nats after the byte before")
    measured = f"{loss:.4f} nats a byte"
    if steps >= STEPS:
        lesson.check("held out, well below a bigram", measured, loss < 0.75 * bigram)
    else:
        lesson.show(f"held out, after {steps} steps", measured)


# %% What the cache saves, and what a Llama costs


LENGTHS = (64, 256, 1024, 4096)


def seconds_a_token(model: Llama, length: int, cached: bool) -> float:
    """Return the time of the token after `length` others, the median of five, in seconds."""
    prompt = torch.zeros(1, length, dtype=torch.int64, device=model.lm_head.weight.device)
    tokens = generate(model, prompt, 6, cached=cached)
    next(tokens).item()  # with a cache, it takes in the whole prompt
    times = []
    for _ in range(5):
        start = time.perf_counter()
        next(tokens).item()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare_cache(model: Llama) -> dict[str, list[float]]:
    """Generate with and without a cache; return the seconds a token, by LENGTHS, of both."""
    print("\n  Generation, with the keys and values of earlier tokens kept, and without:")
    prompt = encoded("The ").to(model.lm_head.weight.device)
    kept, again = (
        torch.cat(list(generate(model, prompt, 200, temperature=0.8, cached=cached)))
        for cached in (True, False)
    )
    lesson.check("200 tokens, drawn", "the same ones", torch.equal(kept, again))
    seconds_a_token(model, 64, cached=True)  # the first is slower
    times = {
        name: [seconds_a_token(model, length, cached) for length in LENGTHS]
        for name, cached in (("cached", True), ("computed again", False))
    }
    print(f"  {'ms for the token after':<32}" + "".join(f"{length:>10,}" for length in LENGTHS))
    for name, seconds in times.items():
        print(f"    {name:<30}" + "".join(f"{each * 1000:>10.2f}" for each in seconds))
    return times


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


def compare_sizes(model: Llama) -> None:
    """Print what this network costs, and what the herd does, from their configurations alone."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    print("\n  What a Llama costs, by its configuration; context 8,192, this one's 128:")
    for line in (
        ("", "parameters", "GFLOPs", "weights", "training", "cache a token"),
        ("", "", "a token", "bfloat16", "16 bytes", "bfloat16"),
    ):
        print("  {:<14}{:>17}{:>9}{:>11}{:>11}{:>15}".format(*line))
    for name, config in {"this one": MINIATURE, **HERD}.items():
        parameters = parameter_count(config)
        flops = flops_a_token(config, 8192 if name in HERD else CONTEXT) / 1e9
        cache = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_size
        unit, power = ("GB", 1e9) if name in HERD else ("MB", 1e6)
        weights, training = (f"{parameters * size / power:,.1f} {unit}" for size in (2, 16))
        row = f"{flops:>9,.3g}{weights:>11}{training:>11}{cache:>13,} B"
        print(f"  {name:<14}{parameters:>17,}{row}")

    real = sum(weights.numel() for weights in model.parameters())
    lesson.check(
        "this one's, counted: parameters", f"{real:,}", real == parameter_count(model.config)
    )
    tokens = torch.zeros(1, CONTEXT, dtype=torch.int64, device=model.lm_head.weight.device)
    plainly = sdpa_kernel(SDPBackend.MATH)  # the counter does not know a CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plainly:
        model(tokens)
    flops = counter.get_total_flops()
    same = flops == CONTEXT * flops_a_token(model.config, CONTEXT)
    lesson.check(f"operations for {CONTEXT} tokens", f"{flops:,}", same)


def draw(
    path: Path, text: torch.Tensor, losses: list[float], times: dict[str, list[float]]
) -> None:
    """Draw the loss beside the text's entropies, and the time a token with and without a cache."""
    from matplotlib.figure import Figure

    blue, red, grey = "#0969da", "#cf222e", "#6e7781"
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    curve, growth = figure.subplots(1, 2)
    curve.set(title="Training on Python's language reference", xlabel="step", ylabel="nats a byte")
    curve.plot(range(1, len(losses) + 1), losses, color=blue, lw=0.8)
    for entropy, name in zip(
        entropies(text), ("a byte", "a byte, after the one before"), strict=True
    ):
        curve.axhline(entropy, color=grey, ls=":")
        curve.text(len(losses), entropy, f"entropy of {name}", color=grey, ha="right", va="bottom")
    curve.set_ylim(0)
    growth.set(title="One more token", xlabel="tokens before it", ylabel="ms")
    growth.set(xscale="log", yscale="log")
    for (name, seconds), color in zip(times.items(), (blue, red), strict=True):
        growth.plot(LENGTHS, [each * 1000 for each in seconds], "o-", color=color, label=name)
    growth.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    growth.yaxis.set_major_formatter("{x:g}")
    growth.minorticks_off()
    growth.legend(frameon=False)
    for axes in (curve, growth):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# %% Running it


def encoded(text: str) -> torch.Tensor:
    """Return the bytes of `text` as tokens, (1, length) int64."""
    return torch.tensor([list(text.encode())])


def printable(text: str) -> str:
    """Return `text` with a dot for what would steer a terminal."""
    return "".join(each if each in "\n\t" or each.isprintable() else "." for each in text)


def write_on(
    model: Llama, tokenizer: tokenizers.Tokenizer | None, chosen: argparse.Namespace
) -> None:
    """Print the prompt and what `model` makes of it, as it comes; without a tokenizer, in bytes."""
    prompt = torch.tensor([tokenizer.encode(chosen.prompt).ids]) if tokenizer else None
    prompt = encoded(chosen.prompt) if prompt is None else prompt
    ends = model.config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    sampling = {name: getattr(chosen, name) for name in ("temperature", "top_k", "top_p", "seed")}
    device = model.lm_head.weight.device
    if prompt.numel() == 0 or prompt.max() >= model.config.vocab_size:
        raise lesson.ClaimError("the prompt has no token, or one that the network does not know")
    tokens = prompt[0].tolist()
    text = said = chosen.prompt if tokenizer is None else tokenizer.decode(tokens)
    print(printable(said), end="", flush=True)
    try:
        for token in generate(model, prompt.to(device), chosen.tokens, **sampling):
            if token.item() in ends:
                break
            tokens.append(token.item())
            text = tokenizer.decode(tokens) if tokenizer else bytes(tokens).decode(errors="replace")
            if not text.endswith("\ufffd"):  # the rest of a character is still to come
                print(printable(text[len(said) :]), end="", flush=True)
                said = text
    finally:
        print(printable(text[len(said) :]))


def of_hugging_face(
    folder: Path, device: torch.device
) -> tuple[Llama, tokenizers.Tokenizer | None]:
    """Return the network and the tokenizer of a folder; None where its tokens are bytes."""
    model = Llama.from_pretrained(folder, device)
    path = folder / "tokenizer.json"
    if path.exists():
        from tokenizers import Tokenizer

        try:
            return model, Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower one
            refuse(path, f"is no tokenizer that can be read ({error})")
    if model.config.vocab_size != 256:
        refuse(folder, "has no tokenizer.json, and its tokens are not bytes")
    return model, None


def sample(model: Llama, seed: int) -> None:
    """Print what `model` writes after "The "."""
    prompt = encoded("The ").to(model.lm_head.weight.device)
    tokens = generate(model, prompt, 240, temperature=0.8, seed=seed)
    text = bytes(token.item() for token in tokens).decode("ascii", errors="replace")
    text = printable(f"The {text}").translate({0xFFFD: ".", ord("\t"): "."})
    for line in text.split("\n"):
        for start in range(0, max(1, len(line)), 72):
            print(f"    | {line[start : start + 72]}")


def network(
    chosen: argparse.Namespace, group: distributed.Group | None = None
) -> tuple[Llama, list[float]]:
    """Return the network that an earlier run left, or train it and leave it; and its losses.

    Raises CheckpointError where there is none and none is to be trained.
    """
    folder = chosen.output / ("llama-divided" if group else "llama")
    kept, steps = (folder / "config.json").exists(), chosen.steps or STEPS
    if group or chosen.train or (chosen.train is None and not kept):
        writable(folder)
        start = time.perf_counter()
        model, losses = learn(steps, chosen.seed, group.device if group else chosen.device, group)
        seconds = time.perf_counter() - start
        if group is None or group.rank == 0:
            model.save_pretrained(folder)
            write_whole(folder / "losses.json", lambda path: path.write_text(json.dumps(losses)))
        rate = f"{steps * BATCH * CONTEXT / seconds:,.0f} bytes a second"
        lesson.show("trained in", f"{seconds:.0f} s, {rate}")
        lesson.show("saved, as Hugging Face does", f"{shown(folder)}/")
        return model, losses
    if not kept:
        refuse(shown(folder), "holds no network; without --no-train one is trained there")
    if chosen.steps:
        refuse(shown(folder), "holds a network already; with --steps goes --train, for another")
    lesson.show("kept; --train trains another", f"{shown(folder)}/")
    model = Llama.from_pretrained(folder, chosen.device, torch.float32)
    if model.config.vocab_size != 256:
        refuse(shown(folder), "holds a network whose tokens are not bytes; --train trains another")
    path = folder / "losses.json"
    try:
        losses = msgspec.json.decode(path.read_bytes(), type=list[float])
    except FileNotFoundError:  # it came from elsewhere
        losses = []
    except msgspec.MsgspecError:
        refuse(shown(path), "is no list of losses; delete it")
    return model, losses


QUOTE = "from a two-layer classifier to a 70-billion-parameter language model"


def introduce(title: str) -> None:
    """Print the heading, and how large the network is."""
    lesson.heading(title, QUOTE)
    count = f"{parameter_count(MINIATURE):,} parameters, {MINIATURE.num_hidden_layers} layers"
    lesson.show("this one", count)


def page(chosen: argparse.Namespace) -> None:
    """Show that the network is Llama's, train it, and measure what it does and costs."""
    introduce("Llama 3 in miniature")
    compare_with_transformers()
    text = library_text()
    alone, after_one = entropies(text)
    print("\n  The text, Python's language reference, and what is known without a network:")
    lesson.show("bytes, a tenth of them held out", f"{len(text):,}")
    lesson.show("entropy of a byte", f"{alone:.4f} nats, after the one before {after_one:.4f}")
    print("\n  Before training it writes:")
    torch.manual_seed(chosen.seed)
    sample(Llama(MINIATURE).to(chosen.device), chosen.seed)
    model, losses = network(chosen)
    judge(model, chosen.steps or STEPS)
    print("\n  And then:")
    sample(model, chosen.seed)
    times = compare_cache(model)
    compare_sizes(model)
    if not chosen.no_figure:
        path = chosen.output / "llama.png"
        draw(path, text, losses, times)
        print()
        lesson.show("drawn", shown(path))


FIRST = 20


def divided_page(chosen: argparse.Namespace) -> None:
    """Train on all the processes of torchrun, each with a part of every weight and every batch."""
    torch.set_num_threads(1)  # the processes share the cores
    steps = chosen.steps or STEPS
    facts = {"seed": chosen.seed, "steps": steps}
    with distributed.together(facts, "auto", chosen.device, seconds=60) as group:
        introduce(f"Llama 3 in miniature, divided over {group.world}")
        model, losses = network(chosen, group)
        if group.rank == 0:
            judge(model, steps)
            torch.manual_seed(chosen.seed)
            alone, (known, _) = Llama(MINIATURE).to(group.device), parts(library_text())
            one = train_llama(alone, known, steps, chosen.seed, first=FIRST)
            apart = max(abs(a - b) for a, b in zip(losses, one, strict=False))
            claim = f"first {len(one)} losses, one process"
            lesson.check(claim, f"differ by {apart:.0e}", apart <= 1e-4)


def work(chosen: argparse.Namespace) -> None:
    """Do what was chosen: all of the page, or what goes on from a prompt."""
    if chosen.weights:
        write_on(*of_hugging_face(chosen.weights, chosen.device), chosen)
    elif chosen.prompt is not None:
        write_on(network(chosen)[0], None, chosen)
    else:
        (divided_page if "RANK" in os.environ else page)(chosen)


def some_text(text: str) -> str:
    """Convert an option's text; raise ArgumentTypeError where there is none."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; a prompt has one character at least")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("is not UTF-8") from None
    return text


def heat(text: str) -> float:
    """Convert a temperature: 0, or what logits can be divided by."""
    value = number(text, least=0, most=100)
    return value if value == 0 else max(value, 0.001)


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "Llama 3 in miniature, trained by the lesson's train(). Without --prompt, all of it."
    made = parser("llama", about, "--device", "--seed", "--output", "--no-figure")
    add = made.add_argument
    positive = functools.partial(lesson.whole_number, least=1)
    many = functools.partial(lesson.whole_number, least=1, most=1_000_000)
    steps = functools.partial(lesson.whole_number, least=20)
    add("--prompt", metavar="TEXT", type=some_text, help="go on from this text, and nothing else")
    add("--tokens", metavar="N", type=many, help="how many to write (300)")
    add("--temperature", metavar="T", type=heat, help="0 always takes the likeliest (0.8)")
    add("--top-k", metavar="K", type=positive, help="draw from the K likeliest (all)")
    share = functools.partial(number, least=0, most=1)
    add("--top-p", metavar="P", type=share, help="draw from the likeliest that make up P (1)")
    add("--weights", metavar="DIR", type=Path, help="go on with a Llama of Hugging Face's instead")
    add("--steps", metavar="N", type=steps, help=f"of training ({STEPS})")
    kept = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--train", help="anew, or never (if there is no network yet)", **kept)
    chosen = made.parse_args(argv)
    only_with(made, chosen, "prompt", tokens=300, temperature=0.8, top_k=None, top_p=1.0)
    only_with(made, chosen, "prompt", weights=None)
    if "RANK" in os.environ:
        alone = {"--prompt": chosen.prompt is not None, "--no-train": chosen.train is False}
        for name in (name for name, given in alone.items() if given):
            made.error(f"argument {name}: torchrun is for training")
        if int(os.environ["WORLD_SIZE"]) > BATCH:
            made.error(f"torchrun: {BATCH} processes at the most, for a batch has {BATCH} rows")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("llama", lambda: work(chosen))


if __name__ == "__main__":
    status = main()
    (distributed.leave if "RANK" in os.environ else sys.exit)(status)
