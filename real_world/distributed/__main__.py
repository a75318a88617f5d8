"""The lesson's train(), unchanged, on several processes.

    torchrun --standalone --nproc-per-node 2 -m real_world.distributed
    torchrun --standalone --nproc-per-node 2 -m real_world.distributed --fsdp
    python -m real_world.distributed --scaling

The first trains the lesson's model on the digits: every process has a copy of the model
(DistributedDataParallel). The second trains a Llama whose parameters are divided over the processes
(FSDP2). Both compare each loss and each weight with those of training on one process. The third
estimates how data parallel training scales to 10,000 workers.
"""

import argparse
import dataclasses
import functools
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import lesson_code as lesson
from real_world.common import (
    CheckFailed,
    bounded_int,
    check,
    make_parser,
    print_heading,
    run_cli,
    show,
)
from real_world.digits.data import load_digits
from real_world.distributed import ddp, fsdp
from real_world.distributed.process_group import (
    check_same_on_all_ranks,
    init_process_group,
    local_device,
    run_on_rank_0,
    shard_slice,
)
from real_world.training import check_config, save_config, show_config, with_options

QUOTE = "thousands of A100 GPUs coordinated via torch.distributed"
TOLERANCE = 1e-9  # in float64, errors are about 1e-14; without scale_loss_by_shard(), up to 6e-5


def check_equal(
    losses: list[float],
    expected_losses: list[float],
    weights: dict[str, torch.Tensor],
    expected_weights: dict[str, torch.Tensor],
) -> None:
    """Compare losses and weights with those of training on one process."""
    pairs = zip(losses, expected_losses, strict=True)
    loss_errors = [abs(loss - expected) for loss, expected in pairs]
    weight_errors = [
        (weights[name] - expected).abs().max().item() for name, expected in expected_weights.items()
    ]
    for label, errors in (("losses", loss_errors), ("weights", weight_errors)):
        error = torch.tensor(errors).max().item()  # Python's max() can miss a NaN
        value = f"largest difference {error:.1e}"
        check(f"{label}, against one process", value, error < TOLERANCE)


def run_ddp(config: ddp.TrainConfig, output: Path, device: torch.device) -> None:
    """Train a copy of the lesson's model on every process."""
    show_config(config)
    digits = load_digits(config.seed, device)
    X, y = digits.X_train.double(), digits.y_train
    world_size = dist.get_world_size()
    shards = [shard_slice(len(y), rank, world_size) for rank in range(world_size)]
    sizes = sorted({shard.stop - shard.start for shard in shards})
    show("samples per process", f"{' or '.join(map(str, sizes))}, of {len(y)}")
    scales = [f"{size * world_size / len(y):.4f}" for size in sizes]
    show("the loss is multiplied by", f"{' or '.join(scales)}")

    folder = output / "ddp"
    path = folder / "checkpoint.pt"
    model, optimizer, losses = ddp.build_or_load(path, config, device)
    check_same_on_all_ranks(resumed_from_epoch=len(losses))
    if losses:
        run_on_rank_0(check_config, folder, config, "epochs", "save_every")
        show("resumed from", f"{path}, epoch {len(losses)}")
    else:  # there may be a finished run's checkpoint, with another config
        run_on_rank_0(functools.partial(path.unlink, missing_ok=True))
    run_on_rank_0(save_config, folder, config)
    ddp.train_ddp(model, optimizer, losses, X, y, config, path)
    show(f"loss, epochs 1 and {config.epochs}", f"{losses[0]:.4f}, {losses[-1]:.4f}")
    expected_model, expected_losses = ddp.train_on_one_process(X, y, config)
    try:
        check_equal(losses, expected_losses, model.state_dict(), expected_model.state_dict())
    except CheckFailed:
        path.unlink(missing_ok=True)  # the next run must not resume from it
        raise
    show("checkpoint saved to", path)


def run_fsdp(config: fsdp.TrainConfig, output: Path, device: torch.device) -> None:
    """Train a Llama of which every process has a shard."""
    show_config(config)
    model = fsdp.build_llama(config.seed, device)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    show("parameters, in float64", f"{num_bytes:,} bytes")
    fsdp.shard_llama(model, device)
    shard_bytes = fsdp.shard_sizes(model)
    label = "shard of each process"
    check(label, ", ".join(f"{n:,}" for n in shard_bytes), sum(shard_bytes) == num_bytes)

    folder = output / "fsdp"
    optimizer = fsdp.make_optimizer(model, config)
    first_step = fsdp.latest_step(folder, before=config.steps)
    latest_step = fsdp.latest_step(folder, before=sys.maxsize)
    check_same_on_all_ranks(resumed_from_step=first_step, latest_step=latest_step)
    if latest_step > 0:  # all checkpoints in a folder have one config
        run_on_rank_0(check_config, folder, config, "steps")
    run_on_rank_0(save_config, folder, config)
    if first_step > 0:
        fsdp.load_sharded(folder / f"step-{first_step}", model, optimizer)
        show("resumed from", folder / f"step-{first_step}")
    losses = fsdp.train_fsdp(model, optimizer, config, first_step, folder)
    show(f"loss, steps {first_step + 1} and {config.steps}", f"{losses[0]:.4f}, {losses[-1]:.4f}")
    expected_model, expected_losses = fsdp.train_on_one_process(config, device)
    weights = {name: shards.full_tensor() for name, shards in model.state_dict().items()}
    check_equal(losses, expected_losses[first_step:], weights, expected_model.state_dict())
    fsdp.save_sharded(folder / f"step-{config.steps}", model, optimizer)
    show("checkpoint saved to", folder / f"step-{config.steps}")


def run_scaling(args: argparse.Namespace, seed: int) -> None:
    """Estimate the efficiency of data parallel training from a step measured here."""
    from real_world.distributed.plot import plot_scaling
    from real_world.distributed.scaling import efficiency, measure_steps, ring_all_reduce_time

    bandwidth, latency = args.bandwidth * 1e9 / 8, args.latency / 1e6
    costs = measure_steps(seed, args.device)
    for cost in costs:
        time = f"{1000 * cost.step_time:.2f} ms per step"
        show(cost.name, f"{time}, {cost.gradient_bytes:,} bytes of gradients")
    show("measured with", f"one process on {args.device}, one thread")
    show("network", f"{args.bandwidth} Gb/s, {args.latency} us per message")
    print("\n  Time to average the gradients of N workers, and the fraction of time they compute:")
    print(f"  {'workers':>9}" + "".join(f"{cost.name:>26}" for cost in costs))
    for workers in (1, 2, 8, 64, 512, 1000, 4096, 10_000):
        row = f"  {workers:>9,}"
        for cost in costs:
            ring = ring_all_reduce_time(cost.gradient_bytes, workers, bandwidth, latency)
            computing = efficiency(cost, workers, bandwidth, latency)
            row += f"{1000 * ring:>16.2f} ms {computing:>6.0%}"
        print(row)
    print("\n  Memory, with 16 bytes per parameter (weight, gradient, and Adam's two averages):")
    show("a copy on each GPU of 80 GB", f"at most {80e9 / 16 / 1e9:.0f} billion parameters")
    show("70 billion, sharded over 64 GPUs", f"{70e9 * 16 / 64 / 1e9:.1f} GB each")
    if not args.no_figure:
        path = args.output / "distributed.png"
        plot_scaling(path, costs, bandwidth, latency)
        show("figure saved to", path)


def main(argv: list[str] | None = None) -> None:
    about = "The lesson's train() on several processes."
    parser = make_parser("distributed", about, ddp.TrainConfig(), fsdp.TrainConfig())
    add = parser.add_argument
    number = bounded_int(1)
    add("--fsdp", action="store_true", help="shard a Llama instead")
    text = "seconds to wait for other processes (default: 60)"
    add("--timeout", metavar="S", type=number, default=60, help=text)
    add("--scaling", action="store_true", help="estimate how data parallel training scales")
    add("--bandwidth", metavar="GBIT", type=number, default=100, help="Gb/s (default: 100)")
    add("--latency", metavar="US", type=number, default=5, help="us per message (default: 5)")
    args = parser.parse_args(argv)
    for name in ("epochs", "save_every") if args.fsdp else ("steps",):
        if getattr(args, name) is not None:
            which = "with" if args.fsdp else "without"
            parser.error(f"argument --{name.replace('_', '-')}: has no effect {which} --fsdp")
    ddp_config = with_options(ddp.TrainConfig(), args)
    fsdp_config = with_options(fsdp.TrainConfig(), args)
    config = fsdp_config if args.fsdp else ddp_config
    torch.set_num_threads(1)  # several processes share the cores
    args.output.mkdir(parents=True, exist_ok=True)
    if args.scaling:
        print_heading("Distributed: an estimate of scaling", QUOTE)
        run_scaling(args, config.seed)
        return

    if args.device.type == "mps":
        parser.error("argument --device: mps has no float64, in which results are compared")
    try:
        device = local_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    init_process_group(device, args.timeout)
    if dist.get_rank() > 0:
        sys.stdout = io.StringIO()  # only rank 0 prints
    training = "Llama with FSDP2" if args.fsdp else "the digits with DDP"
    processes = "1 process" if dist.get_world_size() == 1 else f"{dist.get_world_size()} processes"
    print_heading(f"Distributed: {training}, on {processes}", QUOTE)
    show("backend", f"{dist.get_backend()}, on {device}")
    try:
        values = {"torch": torch.__version__, "fsdp": args.fsdp, **dataclasses.asdict(config)}
        check_same_on_all_ranks(**values)
        if args.fsdp:
            run_fsdp(fsdp_config, args.output, device)
        else:
            run_ddp(ddp_config, args.output, device)
        dist.barrier()
    except (CheckFailed, lesson.CheckpointError):
        dist.destroy_process_group()  # otherwise, its threads may abort the process at its exit
        raise
    dist.destroy_process_group()


if __name__ == "__main__":
    run_cli(main)
