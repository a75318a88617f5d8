"""1,797 scanned digits, from scikit-learn's copy.

Handwritten by 13 people, scanned at 32 x 32 pixels and reduced to 8 x 8, where each value counts
the black pixels of a 4 x 4 block, 0 to 16 (E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", 1998: its test set).
"""

from typing import NamedTuple

import torch

VALIDATION_SIZE = 180
TEST_SIZE = 360


class Digits(NamedTuple):
    """Images X, (n, 64) float32 from 0 to 1, and labels y, (n,) int64, in three disjoint parts."""

    X_train: torch.Tensor
    y_train: torch.Tensor
    X_validation: torch.Tensor
    y_validation: torch.Tensor
    X_test: torch.Tensor
    y_test: torch.Tensor


def load_digits(seed: int = 0, device: torch.device | str = "cpu") -> Digits:
    """Return the digits, split at random: 1,257 for training, 180 to validate, 360 to test."""
    from sklearn import datasets  # imported only here: it takes a second

    bunch = datasets.load_digits()
    # Shuffled before the split: consecutive images are by the same person.
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    X = (torch.tensor(bunch.data, dtype=torch.float32) / 16)[order].to(device)  # (1797, 64)
    y = torch.tensor(bunch.target, dtype=torch.int64)[order].to(device)  # (1797,)
    sizes = (len(y) - VALIDATION_SIZE - TEST_SIZE, VALIDATION_SIZE, TEST_SIZE)
    X_train, X_validation, X_test = X.split(sizes)
    y_train, y_validation, y_test = y.split(sizes)
    return Digits(X_train, y_train, X_validation, y_validation, X_test, y_test)
