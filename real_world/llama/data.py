"""The text: Python's language reference, as bytes. A token is a byte."""

import functools
from collections.abc import Iterator

import torch
from torch.utils.data import IterableDataset

VALIDATION_FRACTION = 0.1


@functools.cache
def load_corpus() -> torch.Tensor:
    """Return Python's language reference, which is part of Python, as bytes, (length,) uint8.

    Its topics repeat paragraphs of other topics. Duplicates are removed: otherwise, paragraphs of
    the validation text would occur in the training text.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = dict.fromkeys(text.split("\n\n"))  # without duplicates, in order
    return torch.frombuffer(bytearray("\n\n".join(paragraphs).encode()), dtype=torch.uint8)


def train_val_split(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training text and the validation text, which is the last tenth."""
    size = len(text) - int(VALIDATION_FRACTION * len(text))
    return text[:size], text[size:]


class RandomWindows(IterableDataset):
    """Batches of random windows X of a text, and the same windows y, one byte later.

    X and y are (batch_size, context_length) int64, on the device of the text. An epoch has `steps`
    batches. To be loaded with DataLoader(dataset, batch_size=None).
    """

    def __init__(
        self, text: torch.Tensor, batch_size: int, context_length: int, steps: int, seed: int
    ) -> None:
        self.text = text
        self.batch_size = batch_size
        self.context_length = context_length
        self.steps = steps
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield `steps` batches."""
        offsets = torch.arange(self.context_length + 1)
        num_starts = len(self.text) - self.context_length
        for _ in range(self.steps):
            starts = torch.randint(num_starts, (self.batch_size, 1), generator=self.generator)
            # Without waiting for CUDA, as indexing by a tensor of the CPU would.
            indices = (starts + offsets).to(self.text.device, non_blocking=self.text.is_cuda)
            windows = self.text[indices].long()  # (batch_size, context_length + 1)
            yield windows[:, :-1], windows[:, 1:]


def entropy(symbols: torch.Tensor) -> float:
    """Return the entropy of the distribution of symbols, in nats."""
    counts = symbols.bincount().double()
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log()).sum().item()


def byte_entropies(text: torch.Tensor) -> tuple[float, float]:
    """Return the unigram and the bigram entropy of a text, in nats per byte.

    They are the lowest possible losses of models that predict a byte from nothing, and from the
    previous byte (C. Shannon, "Prediction and Entropy of Printed English", 1951).
    """
    symbols = text.long()
    previous, following = symbols[:-1], symbols[1:]
    return entropy(symbols), entropy(256 * previous + following) - entropy(previous)
