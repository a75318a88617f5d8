"""SmolLM2, a pretrained Llama, is fine-tuned on Python's language reference."""

import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from real_world.common import check, show
from real_world.llama.checkpoint import load_pretrained
from real_world.llama.data import load_corpus, train_val_split
from real_world.llama.generate import stream_generate
from real_world.llama.model import Llama
from real_world.llama.pretrained import download_smollm2
from real_world.llama.sampling import GREEDY
from real_world.llama.tokenizer import Tokenizer, load_tokenizer
from real_world.llama.train import TrainConfig, evaluate, next_token_loss, train_llama
from real_world.lora.adapter import save_adapter
from real_world.lora.config import LLAMA, FinetuneConfig
from real_world.lora.verify import add_adapter, check_adapter, count_parameters
from real_world.training import as_tested, save_config, show_config

CONTEXT_LENGTH = TrainConfig.context_length
TARGET_MODULES = ("q_proj", "v_proj")  # those of the paper's experiments (section 4.2)
EVAL_TOKENS = 4096
# The start of a page that the reference does not have: Python does not have this statement.
PROMPT = 'The "repeat" statement\n**********************\n\nThe "repeat" statement'
SAMPLE_LENGTH = 60


class LlamaResult(NamedTuple):
    """What the figure shows."""

    losses: list[float]  # of every step
    loss_before: float  # on the validation text
    loss_after: float
    sample_before: str
    sample_after: str


def print_sample(title: str, model: Llama, tokenizer: Tokenizer) -> str:
    """Print and return a text that starts with PROMPT, with its long lines wrapped."""
    tokens = tokenizer.encode(PROMPT)
    text = PROMPT + "".join(stream_generate(model, tokenizer, tokens, SAMPLE_LENGTH, GREEDY))
    print(f"\n  {title}")
    wrapped = []
    for line in text.splitlines():
        wrapped += textwrap.wrap(line, 76, subsequent_indent="    ") or [""]
    for line in wrapped:
        print(f"    | {line}".rstrip())
    return "\n".join(wrapped)


def print_costs(model: Llama, base_model: Llama) -> None:
    """Compare the costs of a training step with and without LoRA.

    The memory is that of weights, gradients and Adam's two averages, without activations.
    """
    print("\n  method               trainable    weights, gradients, Adam    GFLOPs per token")
    X = torch.zeros(1, CONTEXT_LENGTH, dtype=torch.int64, device=next(model.parameters()).device)
    for name, trained in (("full fine-tuning", base_model), ("LoRA", model)):
        # The counter does not know the CPU's fused attention: use the math backend.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            next_token_loss(trained(X), X).backward()
        trained.zero_grad()
        trainable = count_parameters(trained, trainable_only=True)
        megabytes = 4 * (count_parameters(trained) + 3 * trainable) / 1e6
        gflops = counter.get_total_flops() / CONTEXT_LENGTH / 1e9
        print(f"  {name:<17}{trainable:>13,}{megabytes:>25,.0f} MB{gflops:>20.2f}")
    print()


def finetune_llama(config: FinetuneConfig, output: Path, device: torch.device) -> LlamaResult:
    """Train an adapter, save it in `output`/lora/llama, and evaluate it on the validation text."""
    print("  Llama: SmolLM2-135M-Instruct on Python's language reference")
    folder = download_smollm2(output)
    model = load_pretrained(folder, device)
    tokenizer = load_tokenizer(folder, model.config.vocab_size)
    text = load_corpus().numpy().tobytes().decode()
    train_tokens, validation_tokens = train_val_split(torch.tensor(tokenizer.encode(text)))
    X = validation_tokens[None, :CONTEXT_LENGTH].to(device)  # (1, context_length)
    lora_config = add_adapter(model, TARGET_MODULES, config, X)
    show("training + validation", f"{len(train_tokens):,} + {len(validation_tokens):,} tokens")
    train_config = TrainConfig(
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        steps=config.steps,
        seed=config.seed,
    )
    loss_before = evaluate(model, validation_tokens[: EVAL_TOKENS + 1], train_config)
    sample_before = print_sample("Generated before training", model, tokenizer)

    print(f"\n  Training on {device}")
    show_config(config)
    adapter_folder = output / "lora" / "llama"
    losses = train_llama(model, train_tokens, train_config, adapter_folder)
    save_config(adapter_folder, config)
    save_adapter(model, lora_config, adapter_folder)
    loss_after = evaluate(model, validation_tokens[: EVAL_TOKENS + 1], train_config)
    sample_after = print_sample("Generated after training", model, tokenizer)

    print()
    value = f"{loss_before:.4f} -> {loss_after:.4f} nats per token"
    check("validation loss", value, loss_after < loss_before, as_tested(config, LLAMA))
    evaluated = tokenizer.decode(validation_tokens[1 : EVAL_TOKENS + 1].tolist())
    per_byte = EVAL_TOKENS / len(evaluated.encode())
    show("", f"{per_byte * loss_before:.4f} -> {per_byte * loss_after:.4f} nats per byte")
    base_model = load_pretrained(folder, device)
    print_costs(model, base_model)
    check_adapter(model, base_model, adapter_folder, X)
    return LlamaResult(losses, loss_before, loss_after, sample_before, sample_after)
