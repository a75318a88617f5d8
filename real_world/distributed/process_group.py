"""Joining the processes that torchrun has started, and dividing a batch between them.

torchrun sets environment variables in each process: RANK (its number), WORLD_SIZE (how many there
are), LOCAL_RANK (its number on this machine), MASTER_ADDR and MASTER_PORT (the rendezvous).
Other launchers can set them too.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

import lesson_code as lesson
from real_world.common import CheckFailed

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: with torchrun, each has its own GPU. Raises ValueError."""
    if device.type != "cuda":
        return device
    return lesson.select_device(f"cuda:{os.environ.get('LOCAL_RANK', device.index or 0)}")


def init_process_group(device: torch.device, timeout: int) -> None:
    """Join the process group. Without a launcher's variables, it has this process only.

    Raises CheckFailed if a variable is missing or wrong, or if a rank does not join within
    `timeout` seconds.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = dist.get_default_backend_for_device(device)  # nccl for GPUs, gloo for CPUs
    device_id = device if device.type == "cuda" else None
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if dist.is_torchelastic_launched():  # by torchrun
        threading.Thread(target=exit_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), device_id=device_id)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        rank = os.environ.get("RANK", "?")
        raise CheckFailed(f"rank {rank} could not join the others: {reason}") from None


def exit_with_parent(parent: int) -> None:
    """Exit if torchrun is killed; otherwise this process would continue beside the next run."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def check_same_on_all_ranks(**values: object) -> None:
    """Raise CheckFailed if ranks have different values; every machine has its own command line."""
    gathered: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    for rank, other in enumerate(gathered):
        for name, value in other.items():
            if value != gathered[0][name]:
                message = f"{name} is {value} on rank {rank}, but {gathered[0][name]} on rank 0"
                raise CheckFailed(message)


def run_on_rank_0(function: Callable[..., object], *arguments: object) -> None:
    """Call a function that uses files, on rank 0; if it fails, all raise CheckpointError."""
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            function(*arguments)
        except (OSError, lesson.CheckpointError) as error:
            message = [str(error)]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise lesson.CheckpointError(message[0])


def shard_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """Return which samples of a batch a rank trains on. Shards differ by one sample at most."""
    if world_size > batch_size:
        message = f"a batch of {batch_size} is too small for {world_size} processes"
        raise CheckFailed(message)
    return slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def scale_loss_by_shard(
    criterion: Criterion, shard_size: int, batch_size: int, world_size: int
) -> Criterion:
    """Return a criterion for a rank whose shard has `shard_size` of the `batch_size` samples.

    DistributedDataParallel and FSDP average the gradients of all ranks, with equal weights. But the
    mean over a smaller shard must count for less: without this factor, the average would not be
    the gradient of the mean over the batch. The criterion has to be the mean over the samples; with
    class weights or an ignore_index it is not.
    """
    scale = shard_size * world_size / batch_size

    def scaled_criterion(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scale * criterion(outputs, y)

    return scaled_criterion


def mean_over_ranks(losses: list[float], device: torch.device) -> list[float]:
    """Return the mean over all ranks of each loss: with `scale_loss_by_shard()`, the batch's."""
    total = torch.tensor(losses, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()
