"""Focal loss. A loss is any function that returns a scalar tensor; autograd differentiates it."""

import torch
from torch.nn.functional import cross_entropy


def focal_loss(
    logits: torch.Tensor, y: torch.Tensor, gamma: float = 2.0, reduction: str = "mean"
) -> torch.Tensor:
    """Return the focal loss, which down-weights easy examples; at gamma 0 it is cross-entropy.

    T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 4.

    Args:
        logits: (batch, num_classes).
        y: Labels, (batch,) int64. As in cross_entropy(), samples with label -100 are ignored.
        gamma: 0, or at least 1. In between, the gradient is not finite where p is 1.
        reduction: "mean", or "none" for the loss of every sample, (batch,).
    """
    per_sample_loss = cross_entropy(logits, y, reduction="none")  # (batch,)
    p = torch.exp(-per_sample_loss)  # the probability of the correct class
    per_sample_loss = (1 - p) ** gamma * per_sample_loss
    return per_sample_loss[y != -100].mean() if reduction == "mean" else per_sample_loss


def cumulative_share(per_sample_loss: torch.Tensor) -> list[float]:
    """Return the share of the total loss that the hardest 1, 2, 3, ... samples have."""
    cumulative = per_sample_loss.sort(descending=True).values.cumsum(dim=0)
    return (cumulative / cumulative[-1]).tolist()
