"""A text, what can be known of it without a network, and training by the lesson's train()."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

import lesson_code as lesson
from real_world import Batches, distributed, one_cycle, show
from real_world.llama.model import Llama
from real_world.llama.sizes import MINIATURE

# %% A text


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


def encoded(text: str) -> torch.Tensor:
    """Return the bytes of `text` as tokens, (1, length) int64."""
    return torch.tensor([list(text.encode())])


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
        [(batches.X, batches.y)],
        criterion=criterion,
        optimizer=optimizer,
        epochs=epochs,
        on_step=batches,
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

    Raises CheckFailed where, after STEPS or more, it does not know that better.
    """
    _, rest = parts(library_text())
    loss, (_, bigram) = held_out_loss(model, rest), entropies(rest)
    show("entropy of what is held out", f"{bigram:.4f} nats after the byte before")
    measured = f"{loss:.4f} nats a byte"
    if steps >= STEPS:
        lesson.check("held out, well below a bigram", measured, loss < 0.75 * bigram)
    else:
        show(f"held out, after {steps} steps", measured)
