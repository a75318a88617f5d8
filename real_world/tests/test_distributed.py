"""Processes that really are several, really are killed, and really meet over a network."""

import contextlib
import functools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch import nn

import lesson_code as lesson
from real_world import distributed
from real_world.digits import load_digits
from real_world.tests import processes as started
from real_world.tests.processes import ROOT, TORCHRUN, Run

PAGE = ["-m", "real_world.distributed"]
torchrun = functools.partial(started.torchrun, program=PAGE)


def alive(pid: int) -> bool:
    """Tell whether a process is there, and not only its entry."""
    with contextlib.suppress(OSError):
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_until(holds: Callable[[], bool]) -> None:
    """Look again and again, for LIMIT seconds at the most."""
    end = time.monotonic() + started.LIMIT
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


# The same answer


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_losses_and_weights_are_those_of_one_process(processes, tmp_path):
    """1,437 samples divide by neither 2 nor 4."""
    status, said = torchrun(processes, "--output", tmp_path, "--epochs", 100)
    assert status == 0, said
    for what in ("loss", "weight"):
        found = re.search(rf"each {what}, against one process +differs by (\S+) +ok", said)
        assert float(found[1]) <= 1e-6
    kept = distributed.Checkpoint(*lesson.load_checkpoint(tmp_path / "distributed-0.pt"))
    digits = load_digits()
    alone = distributed.start_or_resume(tmp_path / "none", 0, 100, torch.device("cpu"))
    batch, criterion = (digits.X.double(), digits.y), nn.CrossEntropyLoss()
    losses = lesson.train(alone.model, [batch], criterion, alone.optimizer, 100)
    assert len(kept.losses) == 100
    assert kept.losses == pytest.approx(losses, abs=1e-6)
    for pair in zip(kept.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6)


def test_without_torchrun_it_is_one_process(tmp_path):
    with Run(sys.executable, *PAGE, "--output", tmp_path, "--epochs", 20) as running:
        status, said = running.end()
    assert status == 0
    assert "train() on 1 process\n" in said
    assert said.count(" ok\n") == 2


EQUAL_AVERAGING = """
import sys, torch
import real_world.distributed as page
page.weighted = lambda samples, own, world: page.criterion
sys.exit(page.main())
"""


def test_to_average_unequal_parts_equally_is_wrong(tmp_path):
    """What the weights are for: without them, 3 samples of one count as much as 2 of another."""
    script = tmp_path / "equal.py"
    script.write_text(EQUAL_AVERAGING)
    options = ("--output", tmp_path, "--samples", 5, "--epochs", 20)
    with_path = ["--no-python", sys.executable, str(script)]
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        status, said = torchrun(2, *options, program=with_path)
    finally:
        del os.environ["PYTHONPATH"]
    assert status != 0
    assert re.search(r"each loss, against one process +differs by 0\.\d+|FAILED", said)
    status, said = torchrun(2, *options, "--output", tmp_path / "weighted")
    assert status == 0, said


def test_every_sample_is_with_one_rank_and_ranks_differ_by_one_at_most():
    for samples in (1, 2, 7, 100, 1437):
        for world in range(1, min(samples, 9) + 1):
            parts = [distributed.share(samples, rank, world) for rank in range(world)]
            indices = [index for part in parts for index in range(samples)[part]]
            assert indices == list(range(samples))
            sizes = {part.stop - part.start for part in parts}
            assert max(sizes) - min(sizes) <= 1


def test_a_weighted_loss_is_the_ranks_share_of_the_mean_over_all():
    logits, y = torch.randn(10, 3), torch.randint(3, (10,))
    parts = [slice(0, 3), slice(3, 10)]
    total = sum(
        distributed.weighted(10, part.stop - part.start, 2)(logits[part], y[part]) for part in parts
    )
    torch.testing.assert_close(total / 2, torch.nn.functional.cross_entropy(logits, y))


# It survives


def epoch_of(path: Path) -> int:
    return len(lesson.load_checkpoint(path)[2]) if path.exists() else 0


def test_workers_killed_at_random_epochs_are_restarted_and_end_as_if_nothing_had_been(tmp_path):
    """The page itself compares the end with one process that was never interrupted."""
    path = tmp_path / "distributed-0.pt"
    together = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 3]
    options = ["--output", tmp_path, "--epochs", 4000, "--save-every", 50]
    with Run(*TORCHRUN, *together, *PAGE, *options) as running:
        resumed = []
        pids = running.until(r"processes +(\d+), (\d+)").groups()
        for _ in range(3):
            until_epoch = epoch_of(path) + random.randint(50, 1000)
            while epoch_of(path) < until_epoch:
                assert running.process.poll() is None
                time.sleep(0.005)
            os.kill(int(random.choice(pids)), signal.SIGKILL)
            pids = running.until(r"processes +(\d+), (\d+)").groups()
            resumed.append(int(running.until(r"goes on from .*, epoch (\d+)")[1]))
        status, said = running.end()
    assert status == 0, said
    assert resumed == sorted(set(resumed))
    assert all(epoch % 50 == 0 and epoch > 0 for epoch in resumed)
    assert said.count(" ok\n") == 2
    assert epoch_of(path) == 4000


def test_a_killed_agent_takes_its_workers_along_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "distributed-0.pt"
    together = ["--standalone", "--nproc-per-node", 2]
    options = ["--output", tmp_path, "--epochs", 8000, "--save-every", 50]
    with Run(*TORCHRUN, *together, *PAGE, *options) as running:
        pids = map(int, running.until(r"processes +(\d+), (\d+)").groups())
        while epoch_of(path) == 0:
            assert running.process.poll() is None
            time.sleep(0.005)
        running.process.kill()
        running.process.wait()
        running.end()  # the pipe ends with the last that holds it
        wait_until(lambda: not any(map(alive, pids)))
    reached = epoch_of(path)
    assert 0 < reached < 8000
    status, said = torchrun(2, "--output", tmp_path, "--epochs", reached + 500)
    assert status == 0, said
    assert f"goes on from          {path}, epoch {reached}".split() == next(
        line.split() for line in said.splitlines() if "goes on from" in line
    )
    assert said.count(" ok\n") == 2


# Several machines


@pytest.fixture
def hosts() -> Iterator[list[tuple[list[str], str, str]]]:
    """Return two hosts: what runs a command there, the host's address, its network interface.

    Network namespaces with a cable between them, where the machine lets us make some; else the
    loopback twice.
    """
    names = [f"lesson-{os.getpid()}-{number}" for number in (0, 1)]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1",
           "netns", names[1])  # fmt: skip
        for number, (name, address) in enumerate(zip(names, addresses, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        made = [
            (["ip", "netns", "exec", name], address, f"cable{number}")
            for number, (name, address) in enumerate(zip(names, addresses, strict=True))
        ]
    except (OSError, subprocess.CalledProcessError):
        made = [([], "127.0.0.1", "lo")] * 2
    yield made
    for name in names:
        with contextlib.suppress(OSError):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def agents(hosts: list, processes: int, *options: object) -> Iterator[list[Run]]:
    """Run the page on two hosts, with so many processes each."""
    endpoint = f"{hosts[0][1]}:{free_port()}"
    with contextlib.ExitStack() as stack:
        runs = []
        for number, (prefix, address, interface) in enumerate(hosts):
            meeting = ["--nnodes", 2, "--nproc-per-node", processes, "--rdzv-id", "lesson"]
            meeting += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--max-restarts", 3]
            meeting += ["--rdzv-conf", f"is_host={number == 0}", "--local-addr", address]
            command = [*prefix, *TORCHRUN, *meeting, *PAGE, *options]
            runs.append(stack.enter_context(Run(*command, GLOO_SOCKET_IFNAME=interface)))
        yield runs


def test_two_agents_on_two_hosts_train_one_network(hosts, tmp_path):
    with agents(hosts, 2, "--output", tmp_path, "--epochs", 50) as runs:
        ends = [run.end() for run in runs]
    assert [status for status, _ in ends] == [0, 0], ends
    said = "".join(said for _, said in ends)
    assert "train() on 4 processes" in said
    assert said.count(" ok\n") == 2, "one transcript, of rank 0"


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_on_one_of_two_hosts_is_restarted_with_the_other(which, hosts, tmp_path):
    """Each agent counts its own restarts, so nothing that they tell their workers is the same."""
    path = tmp_path / "distributed-0.pt"
    options = ["--output", tmp_path, "--epochs", 4000, "--save-every", 50, "--timeout", 30]
    with agents(hosts, 1, *options) as runs:
        for _ in range(2):
            reached = epoch_of(path)
            wait_until(lambda before=reached: epoch_of(path) > before)
            agent = runs[which].process.pid
            children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
        ends = [run.end() for run in runs]
    said = "".join(said for _, said in ends)
    assert [status for status, _ in ends] == [0, 0], said
    assert said.count("goes on from") == 2
    assert "must have the same" not in said


# Divided


def test_parts_saved_by_two_are_loaded_by_one_and_by_four(tmp_path):
    status, said = torchrun(2, "--fsdp", "save", "--epochs", 10, "--output", tmp_path)
    assert status == 0, said
    whole = 4 * (65 * 1024 + 1025 * 1024 + 1025 * 10)
    assert re.search(rf"bytes of the parameters +{whole:,}\n", said)
    assert re.search(rf"hold +{whole // 2:,}, {whole // 2:,} +ok", said)
    assert len(list((tmp_path / "distributed-parts").glob("*.safetensors"))) == 2
    for processes in (1, 4):
        status, said = torchrun(processes, "--fsdp", "load", "--output", tmp_path)
        assert status == 0, said
        assert re.search(rf"saved by 2, loaded by {processes}: logits +differ by \S+ +ok", said)
    held = [int(n.replace(",", "")) for n in re.search(r"hold +(.+?) +ok", said)[1].split(", ")]
    assert (len(held), sum(held)) == (4, whole)
    assert max(held) < whole * 0.26


def test_parts_of_an_earlier_save_do_not_stay(tmp_path):
    for processes in (2, 1):
        status, said = torchrun(processes, "--fsdp", "save", "--epochs", 1, "--output", tmp_path)
        assert status == 0, said
    status, said = ends_with(tmp_path, "--fsdp", "load", "--seed", 5)
    assert status == 0, said
    assert "saved by 1, loaded by 1" in said


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 1000)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_part_that_is_gone_or_torn_gets_a_sentence(damage, which, tmp_path):
    status, said = torchrun(2, "--fsdp", "save", "--epochs", 1, "--output", tmp_path)
    assert status == 0, said
    folder = tmp_path / "distributed-parts"
    damage(sorted(folder.iterdir())[which])
    with Run(sys.executable, *PAGE, "--fsdp", "load", "--output", tmp_path) as running:
        status, said = running.end()
    assert status == 1, said
    lacks = f"{folder} holds no network, or not all of it; '--fsdp save' makes one"
    assert said.endswith(f"distributed: {lacks}\n")


def test_a_divided_network_trains_as_a_whole_one_does(tmp_path):
    losses = []
    for processes in (1, 2):
        status, said = torchrun(processes, "--fsdp", "save", "--epochs", 10, "--output", tmp_path)
        assert status == 0, said
        losses.append(re.search(r"loss, epoch 1 to 10 +(\S+) to (\S+)", said).groups())
    assert losses[0] == losses[1]


# Bad input


def by_hand(*ranks: tuple[int, list], world: int = 2, port: int = 0) -> list[tuple[int, str]]:
    """Start ranks without torchrun; return the exit status of each, and what it said."""
    port = port or free_port()
    where = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        started = (
            Run(sys.executable, *command, RANK=str(rank), **where) for rank, command in ranks
        )
        runs = [stack.enter_context(run) for run in started]
        return [run.end() for run in runs]


def test_a_rank_that_never_comes_is_named(tmp_path):
    options = [*PAGE, "--timeout", "2", "--output", tmp_path]
    ((status, said),) = by_hand((0, options), world=3)
    assert status == 1
    assert said == (
        "distributed: rank 1 of 3 did not come within 2 s; see what it says where it runs\n"
    )
    port = free_port()
    ((status, said),) = by_hand((1, options), port=port)
    assert status == 1
    assert said == f"distributed: rank 0 did not answer at 127.0.0.1 port {port} within 2 s\n"


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (["--seed", "7"], "rank 1 has seed 7, rank 0 has 0; all must have the same"),
        (["--epochs", "9"], "rank 1 has epochs 9, rank 0 has 200; all must have the same"),
        (["--output", "/dev"], "rank 1 has checkpoint none, rank 0 has "),
        (["--save-every", "9"], "rank 1 has save-every 9, rank 0 has 20; all must have the same"),
        (["--fsdp", "save"], "rank 1 has fsdp save, rank 0 has None; all must have the same"),
    ],
)
def test_a_rank_that_differs_is_named(other, sentence, tmp_path):
    (tmp_path / "distributed-0.pt").write_bytes(b"something")
    (tmp_path / "distributed-7.pt").write_bytes(b"something")
    first = [*PAGE, "--output", tmp_path]
    for status, said in by_hand((0, first), (1, [*first, *other])):
        assert status == 1
        assert said.startswith(f"distributed: {sentence}")
        assert said.count("\n") == 1


def test_a_rank_with_another_torch_is_named(tmp_path):
    script = textwrap.dedent(
        """
        import sys, torch
        torch.__version__ = "2.12.0"
        from real_world import distributed
        sys.exit(distributed.main())
        """
    )
    options = ["--output", tmp_path]
    ends = by_hand((0, [*PAGE, *options]), (1, ["-c", script, *options]))
    for status, said in ends:
        assert status == 1
        expected = (
            f"rank 1 has torch 2.12.0, rank 0 has {torch.__version__}; all must have the same"
        )
        assert said == f"distributed: {expected}\n"


def test_a_taken_port_gets_a_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ((status, said),) = by_hand((0, [*PAGE, "--output", tmp_path]), port=port)
    assert status == 1
    assert said == (f"distributed: port {port} of 127.0.0.1 is taken; choose another MASTER_PORT\n")


def test_more_processes_than_samples_get_one_sentence(tmp_path):
    status, said = torchrun(4, "--samples", 3, "--output", tmp_path)
    assert status == 1
    sentence = "distributed: 4 processes for 3 samples: each needs one at least, so start fewer\n"
    assert said.count(sentence) == said.count("distributed: ") == 1


def test_nccl_without_cuda_and_parts_that_are_not_there_get_a_sentence(tmp_path, capsys):
    assert distributed.main(["--backend", "nccl", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == (
        "distributed: nccl joins CUDA devices, and there is none here; --backend gloo joins CPUs\n"
    )
    with Run(sys.executable, *PAGE, "--fsdp", "load", "--output", tmp_path) as running:
        status, said = running.end()
    assert status == 1
    assert said.endswith("holds no network, or not all of it; '--fsdp save' makes one\n")


def test_a_torn_checkpoint_gets_a_sentence_and_is_left_there(tmp_path):
    path = tmp_path / "distributed-0.pt"
    path.write_bytes(b"PK\x03\x04 and no more")
    with Run(sys.executable, *PAGE, "--output", tmp_path) as running:
        status, said = running.end()
    assert status == 1
    reason = f"cannot load {path} (BadZipFile: File is not a zip file)"
    assert said.endswith(f"distributed: {reason}; delete it to start from epoch 1\n")
    assert path.exists()


def ends_with(tmp_path: Path, *options: object) -> tuple[int, str]:
    with Run(sys.executable, *PAGE, "--output", tmp_path, *options) as running:
        return running.end()


def test_what_another_run_has_left_is_gone_on_from_or_refused_and_never_lost(tmp_path):
    path = tmp_path / "distributed-0.pt"
    status, said = ends_with(tmp_path, "--epochs", 30)
    assert status == 0, said
    assert epoch_of(path) == 30, "saved every 20, and at the end"
    status, said = ends_with(tmp_path, "--epochs", 30)
    assert status == 0, said
    assert re.search(r"goes on from .*, epoch 30\n", said)
    status, said = ends_with(tmp_path, "--epochs", 20)
    assert status == 1
    more = f"{path} is at epoch 30, beyond 20; ask for more --epochs, or delete it to start anew"
    assert said.endswith(f"distributed: {more}\n")
    assert epoch_of(path) == 30

    model, optimizer = lesson.build_model(0, torch.device("cpu"))
    batch, criterion = lesson.make_synthetic_data(seed=0), nn.CrossEntropyLoss()
    losses = lesson.train(model, [batch], criterion, optimizer, 3)
    lesson.save_checkpoint(path, model, optimizer, losses)
    kept = path.read_bytes()
    status, said = ends_with(tmp_path)
    assert status == 1
    other = "holds another network than this page trains; move it away, or name another --output"
    assert said.endswith(f"distributed: {path} {other}\n")
    assert path.read_bytes() == kept


def test_a_silent_rank_is_waited_for_no_longer_than_asked(tmp_path):
    options = ["--output", tmp_path, "--epochs", 100_000, "--timeout", 4]
    with Run(*TORCHRUN, "--standalone", "--nproc-per-node", 2, *PAGE, *options) as running:
        pids = running.until(r"processes +(\d+), (\d+)").groups()
        wait_until((tmp_path / "distributed-0.pt").exists)
        os.kill(int(pids[1]), signal.SIGSTOP)
        running.until(r"rank 0 lost another, which ended or was silent for 4 s; the first to fail")
        os.kill(int(pids[1]), signal.SIGCONT)
        status, _ = running.end()
    assert status == 1


def test_a_run_on_fewer_samples_is_not_gone_on_from_with_all(tmp_path):
    for options in (["--samples", 50, "--epochs", 3], ["--epochs", 6]):
        with Run(sys.executable, *PAGE, "--output", tmp_path, *options) as running:
            status, said = running.end()
        assert status == 0, said
        assert "goes on from" not in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "distributed-0.pt",
        "distributed-0-of-50.pt",
    }


# On paper


def test_a_ring_moves_twice_the_gradients_whatever_the_number_of_workers():
    assert distributed.ring_all_reduce(1e9, 1, 1e9, 1) == 0
    assert distributed.ring_all_reduce(1e9, 2, 1e9, 0) == pytest.approx(1)
    assert distributed.ring_all_reduce(1e9, 10_000, 1e9, 0) == pytest.approx(2, rel=1e-3)
    assert distributed.ring_all_reduce(0, 10_000, 1e9, 1e-6) == pytest.approx(0.019998)


def test_the_plan_is_printed_and_drawn(tmp_path, capsys):
    assert distributed.main(["--plan", "--device", "cpu", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"the lesson's network +\S+ ms a step, 38,440 bytes of gradients", printed)
    rows = [line.split() for line in printed.splitlines() if line.count("computing") == 2]
    for row in rows:  # workers, ms, "ms,", "computing", share; twice
        step = float(re.search(r"the lesson's network +(\S+) ms a step", printed)[1])
        share = step / (step + float(row[1]))
        assert float(row[4].rstrip("%")) == pytest.approx(100 * share, abs=3)
    assert "5 billion" in printed
    assert [row[0] for row in rows] == ["1", "2", "8", "64", "512", "1,000", "4,096", "10,000"]
    assert float(rows[-1][1]) == pytest.approx(100.0, abs=0.01), "19,998 messages of 5 us"
    drawn = matplotlib.image.imread(tmp_path / "distributed.png")
    assert drawn.shape == (480, 1440, 4)
