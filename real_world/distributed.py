"""The lesson's train(), unchanged, on as many processes as there are.

    torchrun --standalone --nproc-per-node 2 -m real_world.distributed
    python -m real_world.distributed                     the same, as one process
    torchrun ... -m real_world.distributed --fsdp save   a network divided over the processes
    python -m real_world.distributed --plan              what it would cost on 1 to 10,000

The article: "the explicit training loop ... used verbatim, just at a scale involving thousands of
A100 GPUs coordinated via torch.distributed". Every process has a part of the samples and a copy of
the network. DistributedDataParallel averages the gradients of all copies inside loss.backward(), so
each makes the same update, and the loop does not know (S. Li et al., "PyTorch Distributed", 2020).
The whole idea is `train_together`; what stands before it is how processes find each other.
Each has a number, its rank, from 0 to the world's size less one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lesson_code as lesson
from real_world import heading, number, parser, quiet, run, show, shown, whole_number
from real_world.digits import Digits, load_digits, untrained

criterion = nn.functional.cross_entropy


# %% Meeting the other processes


def refuse(sentence: str) -> NoReturn:
    """End this process for what all of them find: rank 0 raises CheckFailed, the others end."""
    if os.environ.get("RANK", "0") != "0":
        sys.exit(1)
    raise lesson.CheckFailed(sentence)


def end_with(parent: int) -> None:
    """End this process when its `parent`, torchrun's agent, is gone.

    An agent that was killed ends nobody; the next run would train beside the last one's processes,
    into the same checkpoint.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@dataclass(frozen=True)
class Group:
    """The processes that train together, and the place of this one among them."""

    rank: int
    world: int
    device: torch.device


def meet(seconds: float) -> tuple[dist.Store, int, int]:
    """Return the store through which the processes find each other, this one's rank, and the world.

    torchrun says in the environment where the store is; without it there is one process.
    Raises CheckFailed, which says what to do, where the store cannot be had within `seconds`.
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = datetime.timedelta(seconds=seconds)
    try:
        with quiet():  # it would say the same in fifty lines
            store = dist.TCPStore(
                host, port, is_master=hosts, wait_for_workers=False, timeout=timeout
            )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            reason = f"port {port} of {host} is taken; choose another MASTER_PORT"
        else:
            reason = f"rank 0 did not answer at {host} port {port} within {seconds:.0f} s"
        raise lesson.CheckFailed(reason) from None
    return own_part(store, rank, world, seconds), rank, world


def own_part(store: dist.Store, rank: int, world: int, seconds: float) -> dist.Store:
    """Return the part of `store` that belongs to this start of the processes alone.

    The agents share one store over all restarts, and each counts restarts by itself, so nothing in
    the environment names a start for all ranks: rank 0 draws a name, and the others answer to it.
    """
    if rank == 0:
        name = secrets.token_hex(4)
        own = dist.PrefixStore(name, store)
        own.set("here/0", "")
        store.set("start", name)
        wait_for(own, "here", world, seconds)
        store.delete_key("start")  # first: who reads the name of an old start is not told to go
        own.set("go", "")
        return own
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(dist.DistStoreError), quiet():
            store.wait(["start"], datetime.timedelta(seconds=1))
            own = dist.PrefixStore(store.get("start").decode(), store)
            own.set(f"here/{rank}", "")
            own.wait(["go"], datetime.timedelta(seconds=1))
            return own
    raise lesson.CheckFailed(late(0, world, seconds))


def late(rank: int, world: int, seconds: float) -> str:
    """Return what to say of a rank that does not come."""
    what = f"rank {rank} of {world} did not come within {seconds:.0f} s"
    return f"{what}; see what it says where it runs"


def wait_for(store: dist.Store, what: str, world: int, seconds: float) -> None:
    """Wait until every rank has set `what`; raise CheckFailed, which names one that is late."""
    end = time.monotonic() + seconds
    for rank in range(world):
        left = max(end - time.monotonic(), 0.001)
        try:
            with quiet():
                store.wait([f"{what}/{rank}"], datetime.timedelta(seconds=left))
        except dist.DistStoreError:
            raise lesson.CheckFailed(late(rank, world, seconds)) from None


def call_roll(store: dist.Store, rank: int, world: int, facts: dict, seconds: float) -> None:
    """Tell the others `facts`, and compare theirs, which must be the same.

    Raises CheckFailed, which names the rank, where one does not come within `seconds`, or differs.
    """
    store.set(f"facts/{rank}", json.dumps(facts))
    wait_for(store, "facts", world, seconds)
    first, *others = (json.loads(store.get(f"facts/{other}")) for other in range(world))
    store.set(f"read/{rank}", "")
    if rank == 0:  # the store may be this process's, and the others still need it
        wait_for(store, "read", world, seconds)
    for other, theirs in enumerate(others, start=1):
        for fact, value in theirs.items():
            if value != first[fact]:
                differs = f"rank {other} has {fact} {value}, rank 0 has {first[fact]}"
                raise lesson.CheckFailed(f"{differs}; all must have the same")


def join(facts: dict, backend: str, device: torch.device, seconds: float) -> Group:
    """Meet the other processes, and make torch.distributed's default group of them.

    Raises CheckFailed, one sentence, where that cannot be.
    """
    if device.type == "cuda" and device.index is None:  # each process of a machine has its own GPU
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    if backend == "nccl" and device.type != "cuda":
        refuse("nccl joins CUDA devices, and there is none here; --backend gloo joins CPUs")
    if device.type == "cuda":
        if device.index >= (count := torch.cuda.device_count()):
            many = (
                f"process {device.index} of this machine has no GPU of its own: there are {count}"
            )
            raise lesson.CheckFailed(f"{many}; start as many, or --device cpu")
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    store, rank, world = meet(seconds)
    if rank > 0:
        sys.stdout = None  # print() then does nothing: one transcript is enough
    facts = {"torch": torch.__version__, "backend": backend, **facts}
    call_roll(store, rank, world, facts, seconds)
    timeout = datetime.timedelta(seconds=seconds)
    bound = device if backend == "nccl" else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound
    )
    return Group(rank, world, device)


@contextlib.contextmanager
def together(facts: dict, backend: str, device: torch.device, seconds: float) -> Iterator[Group]:
    """Join the other processes for a block, at whose end all of them meet once more.

    Raises CheckFailed, one sentence, where they cannot be joined, or where one of them is lost.
    """
    group = join(facts, backend, device, seconds)
    try:
        yield group
        dist.barrier()  # rank 0 may keep the store, which the others need to the end
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost = f"rank {group.rank} lost another, which ended or was silent for {seconds:.0f} s"
        raise lesson.CheckFailed(f"{lost}; the first to fail says why") from None
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process at once.

    gloo's threads may call into a Python that is on its way out, which now and then aborts it.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
    os._exit(status)


def mean(values: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the mean over all ranks of `values`, of any shape."""
    values = values.to(group.device, copy=True)
    dist.all_reduce(values)
    return values / group.world


def gather(number: int, group: Group) -> list[int]:
    """Return the `number` of every rank."""
    numbers = [torch.zeros((), dtype=torch.int64, device=group.device) for _ in range(group.world)]
    dist.all_gather(numbers, torch.tensor(number, device=group.device))
    return [each.item() for each in numbers]


# %% Data parallel: the same answer


def share(samples: int, rank: int, world: int) -> slice:
    """Return which of `samples` a rank has: all but a few have equally many."""
    return slice(rank * samples // world, (rank + 1) * samples // world)


Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weighted(samples: int, own: int, world: int, criterion: Criterion = criterion) -> Criterion:
    """Return the criterion of a rank that has `own` of all `samples`.

    Gradients are averaged as if all ranks had equally many samples. So each multiplies its mean by
    own * world / samples: of 718 and 719, by 0.9993 and 1.0007. The average is then that of all.
    """
    return lambda outputs, y: criterion(outputs, y) * (own * world / samples)


@dataclass
class Checkpoint:
    """A network, its optimizer, and the loss of every epoch behind it."""

    model: lesson.SimpleClassifier
    optimizer: torch.optim.Optimizer
    losses: list[float]


@dataclass
class Recorder:
    """on_step of train(): keeps the losses of this rank, and writes a checkpoint now and then.

    The checkpoint has the mean loss of all ranks, so all take part; rank 0 writes the file.
    """

    checkpoint: Checkpoint
    path: Path
    every: int
    group: Group
    recent: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, epoch: int, loss: torch.Tensor) -> None:
        """Note the loss of an epoch."""
        self.recent.append(loss)
        if len(self.recent) == self.every:
            self.save()

    def save(self) -> None:
        """Add the losses since the last time to the checkpoint, and write it."""
        if self.recent:
            self.checkpoint.losses += mean(torch.stack(self.recent), self.group).tolist()
            self.recent.clear()
        if self.group.rank == 0:
            kept = self.checkpoint
            lesson.save_checkpoint(self.path, kept.model, kept.optimizer, kept.losses)


def checkpoint_path(output: Path, seed: int, samples: int | None) -> Path:
    """Return where a run keeps its checkpoint: what it trains on is in the name."""
    part = "" if samples is None else f"-of-{samples}"
    return output / f"distributed-{seed}{part}.pt"


def fingerprint(path: Path) -> str:
    """Return what tells the content of `path` from another's: hosts may share no file system."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "none"


def start_or_resume(path: Path, seed: int, epochs: int, device: torch.device) -> Checkpoint:
    """Return what `path` holds of this run, or an untrained network, in float64.

    Raises CheckpointError where `path` holds something else, or more epochs than are asked for.
    """
    model, _ = untrained(seed, device)
    # In float32 the order of a sum is visible in its last digit, and Adam makes much of that.
    optimizer = torch.optim.Adam(model.double().parameters(), lr=0.01)
    fresh = Checkpoint(model, optimizer, [])
    if not path.exists():
        return fresh
    try:
        found = Checkpoint(*lesson.load_checkpoint(path, device))
    except lesson.CheckpointError as error:
        reason = str(error).rpartition(";")[0]
        raise lesson.CheckpointError(f"{reason}; delete it to start from epoch 1") from None
    there, ours = (
        [(weights.shape, weights.dtype) for weights in each.model.parameters()]
        for each in (found, fresh)
    )
    if there != ours:
        other = f"{path} holds another network than this page trains"
        raise lesson.CheckpointError(f"{other}; move it away, or name another --output")
    if len(found.losses) > epochs:
        more = f"{path} is at epoch {len(found.losses)}, beyond {epochs}"
        raise lesson.CheckpointError(f"{more}; ask for more --epochs, or delete it to start anew")
    return found


def train_together(
    checkpoint: Checkpoint, digits: Digits, epochs: int, recorder: Recorder, group: Group
) -> None:
    """Train a copy of the network on this rank's part of the digits, by the lesson's train()."""
    samples = len(digits.y)
    own = share(samples, group.rank, group.world)
    X, y = digits.X[own].double(), digits.y[own]
    lesson.train(
        DistributedDataParallel(checkpoint.model),  # it wraps the model, whose weights are trained
        [(X, y)],
        criterion=weighted(samples, len(y), group.world),
        optimizer=checkpoint.optimizer,
        epochs=epochs - len(checkpoint.losses),
        on_step=recorder,
    )
    recorder.save()


def compare_with_one(
    checkpoint: Checkpoint, digits: Digits, seed: int, epochs: int, group: Group
) -> None:
    """Train once more, on each process alone, and hold losses and weights against those of all."""
    model, _ = untrained(seed, group.device)
    optimizer = torch.optim.Adam(model.double().parameters(), lr=0.01)
    losses = lesson.train(model, [(digits.X.double(), digits.y)], criterion, optimizer, epochs)
    apart = max(abs(a - b) for a, b in zip(losses, checkpoint.losses, strict=True))
    lesson.check("each loss, against one process", f"differs by {apart:.1e}", apart <= 1e-6)
    pairs = zip(model.parameters(), checkpoint.model.parameters(), strict=True)
    apart = max((a - b).abs().max().item() for a, b in pairs)
    lesson.check("each weight, against one process", f"differs by {apart:.1e}", apart <= 1e-6)


def data_parallel(
    group: Group, digits: Digits, seed: int, epochs: int, every: int, path: Path
) -> None:
    """Train on all processes, from the last checkpoint if there is one, and compare with one."""
    checkpoint = start_or_resume(path, seed, epochs, group.device)
    sizes = [
        part.stop - part.start
        for part in (share(len(digits.y), rank, group.world) for rank in range(group.world))
    ]
    numbers = " or ".join(f"{size:,}" for size in sorted(set(sizes)))
    show("samples of a process", f"{numbers}, of {len(digits.y):,}")
    weights = ", ".join(f"{size * group.world / len(digits.y):.4f}" for size in sorted(set(sizes)))
    show("its loss is multiplied by", f"{weights}, for its share of the samples")
    if checkpoint.losses:
        show("goes on from", f"{shown(path)}, epoch {len(checkpoint.losses)}")
    recorder = Recorder(checkpoint, path, every, group)
    train_together(checkpoint, digits, epochs, recorder, group)
    fell = f"{checkpoint.losses[0]:.4f} to {checkpoint.losses[-1]:.4f}"
    show(f"loss, epoch 1 to {epochs}", fell)
    compare_with_one(checkpoint, digits, seed, epochs, group)
    show("saved", shown(path))


# %% Fully sharded: a network that no process has whole


def wide_network(seed: int) -> nn.Sequential:
    """Return a network of 1.1 million parameters: (samples, 64) float32 in, (samples, 10) out."""
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return nn.Sequential(*layers)


def divide(model: nn.Module, layers: Iterable[nn.Module], group: Group) -> nn.Module:
    """Divide the parameters of each of `layers`, then the model's others, over the processes.

    In place, by rows. A layer is put together when its turn comes, forward and backward, and taken
    apart again; its gradients are averaged as those of DistributedDataParallel are (Y. Zhao et al.,
    "PyTorch FSDP", 2023; fully_shard is its second version).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_sharded(
    group: Group, digits: Digits, seed: int, epochs: int, output: Path, task: str
) -> None:
    """Train a divided network and save it in parts, or load the parts on any number of processes.

    Saved by torch.distributed.checkpoint as safetensors: its own format is read by pickle.
    """
    import torch.distributed.checkpoint as dcp

    folder = output / "distributed-parts"
    model = wide_network(seed).to(group.device)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    divide(model, (layer for layer in model if isinstance(layer, nn.Linear)), group)
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    rows = [(math.ceil(len(p) / group.world), p[0].numel() * 4) for p in model.parameters()]
    parts = gather(held, group)
    show("bytes of the parameters", f"{whole:,}")
    by_rank = ", ".join(f"{part:,}" for part in parts)
    fair = (max(parts), sum(parts)) == (sum(many * size for many, size in rows), whole)
    lesson.check("of which the processes hold", by_rank, fair)

    examples = digits.unseen_X[:8]
    logits = torch.empty(len(examples), 10)
    state = {**model.state_dict(), "examples": examples.cpu(), "logits": logits}
    state["parts"] = torch.tensor(group.world)
    if task == "save":
        own = share(len(digits.y), group.rank, group.world)
        X, y = digits.X[own], digits.y[own]
        optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
        loss = weighted(len(digits.y), len(y), group.world)
        losses = lesson.train(model, [(X, y)], loss, optimizer, epochs)
        losses = mean(torch.tensor(losses), group)
        fell = f"{losses[0]:.4f} to {losses[-1]:.4f}"
        falls = epochs == 1 or bool(losses[-1] < losses[0])
        lesson.check(f"loss, epoch 1 to {epochs}", fell, falls)
        with torch.no_grad():
            state["logits"] = model(examples).cpu()
        if group.rank == 0 and folder.exists():
            shutil.rmtree(folder)
        dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
        try:
            with quiet():
                dcp.save(state, storage_writer=writer)
        except (Exception, dcp.CheckpointException):  # of any rank, of any kind
            raise OSError(f"{shown(folder)} cannot be written") from None
        show("saved", f"{shown(folder)}, a file for each of {group.world}")
    else:
        try:
            with quiet():  # into the tensors of the model, in place
                dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(path=str(folder)))
            there, count = len(list(folder.glob("*.safetensors"))), int(state["parts"])
            if there != count:
                raise ValueError(f"{there} of {count} parts are there")
        except (Exception, dcp.CheckpointException):  # what is torn or foreign can provoke any
            refuse(f"{shown(folder)} holds no network, or not all of it; '--fsdp save' makes one")
        with torch.no_grad():
            logits = model(state["examples"].to(group.device)).cpu()
        apart = (logits - state["logits"]).abs().max().item()
        claim = f"saved by {count}, loaded by {group.world}: logits"
        lesson.check(claim, f"differ by {apart:.1e}", apart <= 1e-5)


# %% On paper: from one process to ten thousand


def ring_all_reduce(size: float, workers: int, bandwidth: float, latency: float) -> float:
    """Return the seconds in which `workers` in a ring add up `size` bytes of gradients.

    Each sends 2 (workers - 1) messages of size / workers bytes, one after the other, at `bandwidth`
    bytes a second, each with `latency` seconds of its own (P. Patarasuk and X. Yuan, "Bandwidth
    optimal all-reduce algorithms", 2009).
    """
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


def seconds_a_step(model: nn.Module, X: torch.Tensor, y: torch.Tensor, steps: int) -> float:
    """Return the time of one of the lesson's training steps, the mean of `steps`, in seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    lesson.train(model, [(X, y)], criterion, optimizer, 2)
    start = time.perf_counter()
    lesson.train(model, [(X, y)], criterion, optimizer, steps)
    return (time.perf_counter() - start) / steps


def draw_plan(
    path: Path, steps: dict[str, tuple[float, int]], bandwidth: float, latency: float
) -> None:
    """Draw the time of a step and the efficiency from 1 to 10,000 workers, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    times, efficiency = figure.subplots(1, 2)
    workers = sorted({round(10 ** (tenth / 10)) for tenth in range(41)})
    for (name, (step, size)), color in zip(steps.items(), ("#cf222e", "#0969da"), strict=True):
        ring = [ring_all_reduce(size, count, bandwidth, latency) for count in workers]
        times.axhline(step * 1000, color=color, ls=":", label=f"{name}: computing")
        times.plot(
            workers[1:], [s * 1000 for s in ring[1:]], color=color, label=f"{name}: adding up"
        )
        efficiency.plot(workers, [100 * step / (step + s) for s in ring], color=color, label=name)
    times.set(title="A step, computed and communicated", ylabel="ms", yscale="log")
    efficiency.set(title="What is left of each worker", ylabel="% of its time computes", ylim=0)
    for axes in (times, efficiency):
        axes.set(xlabel="workers", xscale="log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)


def plan(device: torch.device, bandwidth: float, latency: float, output: Path) -> None:
    """Work out what data parallelism costs at scale, from a step measured here.

    bandwidth: bytes a second, latency: seconds. Nothing overlaps, which is the worst case.
    """
    digits = load_digits(device=device)
    narrow, _ = untrained(0, device)
    wide = wide_network(0).to(device)
    networks = {"the lesson's network": narrow, "a wide one": wide}
    steps = {
        name: (
            seconds_a_step(model, digits.X, digits.y, 20),
            sum(p.numel() * p.element_size() for p in model.parameters()),
        )
        for name, model in networks.items()
    }
    for name, (step, size) in steps.items():
        show(name, f"{step * 1000:.2f} ms a step, {size:,} bytes of gradients")
    show("measured with", f"{len(digits.y):,} samples, on one thread of this {device}")
    link = f"{bandwidth * 8 / 1e9:g} Gb/s, {latency * 1e6:g} us a message"
    show("between neighbours in the ring", link)
    print("\n  Every worker computes as long as this one, on samples of its own; then they add up")
    print("  their gradients. A faster worker would compute for less of its time.")
    print(f"\n  {'workers':>9}" + "".join(f"{name:>32}" for name in steps))
    for workers in (1, 2, 8, 64, 512, 1000, 4096, 10_000):
        cells = []
        for step, size in steps.values():
            ring = ring_all_reduce(size, workers, bandwidth, latency)
            cells.append(f"{ring * 1000:.2f} ms, computing {step / (step + ring):>4.0%}")
        print(f"  {workers:>9,}" + "".join(f"{cell:>32}" for cell in cells))

    print("\n  Where copies end:")
    memory = 80e9 / 16  # float32 weights, gradients, and Adam's two averages
    show("parameters in 80 GB, at 16 bytes", f"{memory / 1e9:.0f} billion, on 1 GPU or 10,000")
    parameters = 70e9
    show("70 billion, divided over 64 GPUs", f"{parameters * 16 / 64 / 1e9:.1f} GB each")
    output.mkdir(parents=True, exist_ok=True)
    draw_plan(output / "distributed.png", steps, bandwidth, latency)
    print()
    show("drawn", shown(output / "distributed.png"))


# %% Running it


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "The lesson's train() on many processes: torchrun starts them, as in --standalone \
        --nproc-per-node 2 -m real_world.distributed. Without torchrun there is one."
    made = parser("distributed", about, "--device", "--seed", "--output")
    add = made.add_argument
    positive = functools.partial(whole_number, least=1)
    add("--epochs", metavar="N", type=positive, default=200, help="default: 200")
    add("--save-every", metavar="N", type=positive, default=20, help="epochs (default: 20)")
    add("--samples", metavar="N", type=positive, help="train on so many of the digits alone")
    add("--backend", choices=("auto", "gloo", "nccl"), default="auto", help="default: auto")
    add(
        "--timeout", metavar="S", type=positive, default=60, help="to wait for others (default: 60)"
    )
    add("--fsdp", choices=("save", "load"), help="divide a network, and save or load its parts")
    add("--plan", action="store_true", help="work out 1 to 10,000 workers from one process")
    link = functools.partial(number, least=0.001, most=1e6)
    gigabits = "for --plan: gigabits a second between two (default: 100)"
    add("--bandwidth", metavar="GBIT", type=link, default=100, help=gigabits)
    add("--latency", metavar="US", type=link, default=5, help="microseconds a message (default: 5)")
    chosen = made.parse_args(argv)
    if chosen.device.type == "mps":
        made.error("argument --device: mps has no float64, in which the page compares; use cpu")
    return chosen


def work(chosen: argparse.Namespace) -> None:
    """Do what was chosen, together with the other processes."""
    if chosen.plan:
        if os.environ.get("RANK", "0") != "0":
            return
        heading("Distributed, on paper", "thousands of A100 GPUs coordinated via torch.distributed")
        torch.set_num_threads(1)
        plan(chosen.device, chosen.bandwidth * 1e9 / 8, chosen.latency / 1e6, chosen.output)
        return
    torch.set_num_threads(1)  # the processes share the cores
    path = checkpoint_path(chosen.output, chosen.seed, chosen.samples)
    facts = {"seed": chosen.seed, "epochs": chosen.epochs, "samples": chosen.samples}
    facts |= {"save-every": chosen.save_every, "fsdp": chosen.fsdp}
    facts["checkpoint"] = fingerprint(path)
    with together(facts, chosen.backend, chosen.device, chosen.timeout) as group:
        chosen.output.mkdir(parents=True, exist_ok=True)
        digits = load_digits(chosen.seed, group.device)
        digits = digits._replace(X=digits.X[: chosen.samples], y=digits.y[: chosen.samples])
        quote = "used verbatim ... coordinated via torch.distributed"
        processes = "1 process" if group.world == 1 else f"{group.world} processes"
        what = "a network divided over" if chosen.fsdp else "train() on"
        heading(f"Distributed: {what} {processes}", quote)
        if group.world > len(digits.y):
            few = f"{group.world} processes for {len(digits.y)} samples"
            refuse(f"{few}: each needs one at least, so start fewer")
        show("joined by", f"{dist.get_backend()}, on {group.device}")
        show("processes", ", ".join(map(str, gather(os.getpid(), group))))
        if chosen.fsdp:
            fully_sharded(group, digits, chosen.seed, chosen.epochs, chosen.output, chosen.fsdp)
        else:
            data_parallel(group, digits, chosen.seed, chosen.epochs, chosen.save_every, path)


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    return run("distributed", lambda: work(chosen))


if __name__ == "__main__":
    leave(main())
