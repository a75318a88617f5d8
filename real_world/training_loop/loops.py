"""The lesson's train(), changed in seven ways.

The five steps are those of train() in `lesson_code.py`. A line that ends in `# NEW` is changed or
added; `on_step` is left out. Every function trains a model in place and returns the loss of every
step, some of them with a second list.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import clip_grad_norm_

from real_world.training_loop.losses import focal_loss

Batches = Iterable[tuple[torch.Tensor, ...]]
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Optimizer = torch.optim.Optimizer


def to_floats(tensors: list[torch.Tensor]) -> list[float]:
    """Return the values of 0-d tensors, read from the device at once."""
    return torch.stack(tensors).tolist() if tensors else []


# %% The article's four: custom loss, gradient clipping, mixed precision, multi-task learning


def train_with_focal_loss(
    model: nn.Module, batches: Batches, optimizer: Optimizer, epochs: int
) -> list[float]:
    """Train with a custom loss function."""
    model.train()
    losses = []
    for _ in range(epochs):
        for X, y in batches:
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            outputs = model(X)  # 2. Forward pass
            loss = focal_loss(outputs, y)  # 3. Compute loss  # NEW
            loss.backward()  # 4. Backpropagation
            optimizer.step()  # 5. Update weights
            losses.append(loss.detach())
    return to_floats(losses)


def train_with_clipping(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    optimizer: Optimizer,
    epochs: int,
    max_norm: float = 1.0,
) -> tuple[list[float], list[float]]:
    """Train with gradients scaled down to `max_norm`; return losses, and norms before clipping.

    Raises RuntimeError if a gradient is NaN or infinite, before it reaches the weights; on a GPU,
    this check synchronizes at every step.

    Source: R. Pascanu et al., "On the difficulty of training recurrent neural networks", 2013,
    algorithm 1.
    """
    model.train()
    losses = []
    norms = []  # NEW
    for _ in range(epochs):
        for X, y in batches:
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            outputs = model(X)  # 2. Forward pass
            loss = criterion(outputs, y)  # 3. Compute loss
            loss.backward()  # 4. Backpropagation
            norm = clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True)  # NEW
            norms.append(norm)  # NEW
            optimizer.step()  # 5. Update weights
            losses.append(loss.detach())
    return to_floats(losses), to_floats(norms)  # NEW


def train_mixed_precision(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    optimizer: Optimizer,
    epochs: int,
    amp_dtype: torch.dtype = torch.bfloat16,
    max_norm: float = 1.0,
) -> tuple[list[float], list[float]]:
    """Train with the forward pass in 16 bits where that is safe, and with gradient clipping.

    In float16, small gradients would become 0: the scaler multiplies the loss, and divides the
    gradients before the update. It skips a step whose gradients are not finite, and then lowers
    its scale. bfloat16 has the range of float32 and needs no scaler.

    Source, for float16: P. Micikevicius et al., "Mixed Precision Training", 2018, section 3.2.
    """
    model.train()
    device_type = next(model.parameters()).device.type  # NEW
    scaler = torch.amp.GradScaler(device_type, enabled=amp_dtype == torch.float16)  # NEW
    losses = []
    norms = []  # NEW
    for _ in range(epochs):
        for X, y in batches:
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            with torch.autocast(device_type, amp_dtype):  # NEW
                outputs = model(X)  # 2. Forward pass
                loss = criterion(outputs, y)  # 3. Compute loss
            scaler.scale(loss).backward()  # 4. Backpropagation  # NEW
            scaler.unscale_(optimizer)  # max_norm is for the gradients without the scale  # NEW
            norms.append(clip_grad_norm_(model.parameters(), max_norm))  # NEW
            scaler.step(optimizer)  # 5. Update weights  # NEW
            scaler.update()  # NEW
            losses.append(loss.detach())
    return to_floats(losses), to_floats(norms)  # NEW


def train_multi_task(
    model: nn.Module, batches: Batches, optimizer: Optimizer, epochs: int
) -> tuple[list[float], list[float]]:
    """Train on the sum of two losses; return both. `batches` yields (X, y_digit, y_ink)."""
    model.train()
    losses_digit = []  # NEW
    losses_ink = []  # NEW
    for _ in range(epochs):
        for X, y_digit, y_ink in batches:  # NEW
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            logits, ink = model(X)  # 2. Forward pass  # NEW
            loss_digit = cross_entropy(logits, y_digit)  # NEW
            loss_ink = mse_loss(ink, y_ink)  # NEW
            loss = loss_digit + loss_ink  # 3. Compute loss  # NEW
            loss.backward()  # 4. Backpropagation
            optimizer.step()  # 5. Update weights
            losses_digit.append(loss_digit.detach())  # NEW
            losses_ink.append(loss_ink.detach())  # NEW
    return to_floats(losses_digit), to_floats(losses_ink)  # NEW


# %% Beyond the article: gradient accumulation, learning rate scheduler, early stopping


def train_with_accumulation(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    optimizer: Optimizer,
    epochs: int,
    micro_batch_size: int = 16,
) -> list[float]:
    """Train on batches that do not fit into memory, in parts: backward() adds to the gradients.

    A micro-batch is weighted by its share of the samples, because the last one can be smaller. This
    is the large batch if `criterion` is the mean over the samples: with class weights or an
    ignore_index it divides by another number, and with reduction="sum" it does not divide.
    """
    model.train()
    losses = []
    for _ in range(epochs):
        for X, y in batches:
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            micro_losses = []  # NEW
            parts = zip(X.split(micro_batch_size), y.split(micro_batch_size), strict=True)  # NEW
            for micro_X, micro_y in parts:  # NEW
                outputs = model(micro_X)  # 2. Forward pass  # NEW
                loss = criterion(outputs, micro_y) * len(micro_y) / len(y)  # 3. Compute loss  # NEW
                loss.backward()  # 4. Backpropagation
                micro_losses.append(loss.detach())  # NEW
            optimizer.step()  # 5. Update weights
            losses.append(torch.stack(micro_losses).sum())  # NEW
    return to_floats(losses)


def train_with_scheduler(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    optimizer: Optimizer,
    epochs: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> tuple[list[float], list[float]]:
    """Train with a learning rate that changes at every step; return losses and learning rates."""
    model.train()
    losses = []
    learning_rates = []  # NEW
    for _ in range(epochs):
        for X, y in batches:
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            outputs = model(X)  # 2. Forward pass
            loss = criterion(outputs, y)  # 3. Compute loss
            loss.backward()  # 4. Backpropagation
            optimizer.step()  # 5. Update weights
            learning_rates.append(optimizer.param_groups[0]["lr"])  # NEW
            scheduler.step()  # sets the learning rate of the next step  # NEW
            losses.append(loss.detach())
    return to_floats(losses), learning_rates  # NEW


def train_with_early_stopping(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    optimizer: Optimizer,
    epochs: int,
    X_validation: torch.Tensor,
    y_validation: torch.Tensor,
    patience: int = 10,
) -> tuple[list[float], list[float]]:
    """Train until the validation loss has not decreased for `patience` epochs; restore the best.

    Returns the loss of every step, and the validation loss of every epoch (L. Prechelt, "Early
    Stopping - But When?", 1998).
    """
    best_loss = float("inf")  # NEW
    best_epoch = 0  # NEW
    best_state = copy.deepcopy(model.state_dict())  # the tensors of state_dict() change  # NEW
    losses = []
    validation_losses = []  # NEW
    for epoch in range(epochs):
        model.train()  # model.eval() is below  # NEW
        for X, y in batches:
            optimizer.zero_grad()  # 1. Clear gradients from previous step
            outputs = model(X)  # 2. Forward pass
            loss = criterion(outputs, y)  # 3. Compute loss
            loss.backward()  # 4. Backpropagation
            optimizer.step()  # 5. Update weights
            losses.append(loss.detach())
        model.eval()  # NEW
        with torch.no_grad():  # NEW
            validation_loss = criterion(model(X_validation), y_validation).item()  # NEW
        validation_losses.append(validation_loss)  # NEW
        if validation_loss < best_loss:  # NEW
            best_loss = validation_loss  # NEW
            best_epoch = epoch  # NEW
            best_state = copy.deepcopy(model.state_dict())  # NEW
        elif epoch - best_epoch >= patience:  # NEW
            break  # NEW
    model.load_state_dict(best_state)  # NEW
    return to_floats(losses), validation_losses  # NEW
