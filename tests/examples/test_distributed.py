"""The distributed example, with real processes: several, killed, and on two nodes."""

import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import children, finish, free_port, is_running, start, wait_until
from readmes import assert_transcript
from torch import nn

import lesson_code as lesson
from real_world.common import CheckFailed
from real_world.digits.data import load_digits
from real_world.digits.model import build_model
from real_world.distributed import __main__ as distributed
from real_world.distributed import ddp, fsdp
from real_world.distributed.fsdp import shard_llama
from real_world.distributed.process_group import Criterion
from real_world.llama.model import Llama
from real_world.training import read_losses

ENDLESS = ["--epochs", 10**9, "--save-every", 10]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
EXAMPLE = ["-m", "real_world.distributed", "--device", "cpu"]


def torchrun(processes, *options):
    launch = ["--standalone", "--nproc-per-node", processes]
    with start(*TORCHRUN, *launch, *EXAMPLE, *options) as agent:
        return finish(agent)


def assert_same_as_one_process(path):
    """Compare a checkpoint with as many epochs without torch.distributed."""
    model, _, losses = lesson.load_checkpoint(path)
    digits = load_digits()
    expected = build_model(0).double()
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    batches = [(digits.X_train.double(), digits.y_train)]
    criterion = nn.CrossEntropyLoss()
    expected_losses = lesson.train(expected, batches, criterion, optimizer, len(losses))
    assert losses == pytest.approx(expected_losses, rel=0, abs=1e-9)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=1e-9)
    logged = read_losses(path.with_name("losses.jsonl"))[: len(losses)]
    assert logged == pytest.approx(losses, rel=0, abs=1e-9)


def saved_epochs(path: Path) -> int:
    return len(lesson.load_checkpoint(path)[2]) if path.exists() else 0


# Data parallel


def test_losses_are_written_before_each_checkpoint(tmp_path, monkeypatch):
    options = ["--device", "cpu", "--output", str(tmp_path), "--epochs", "42"]
    distributed.main(options)
    saved = []

    def save(function, path, model, optimizer, losses):
        assert not path.exists(), "the next run would resume a run with another learning rate"
        assert read_losses(path.with_name("losses.jsonl")) == pytest.approx(losses, abs=1e-9)
        saved.append(len(losses))

    monkeypatch.setattr(ddp, "run_on_rank_0", save)
    distributed.main([*options, "--save-every", "15", "--learning-rate", "0.1"])
    assert saved == [15, 30, 42]


def test_ddp_equals_one_process(tmp_path):
    status, output = torchrun(2, "--output", tmp_path)
    assert status == 0, output
    printed = output[output.index("Distributed:") :]  # after warnings of torchrun and gloo
    assert_transcript("distributed", printed, "largest difference")
    path = tmp_path / "ddp" / "checkpoint.pt"
    assert saved_epochs(path) == 200
    assert_same_as_one_process(path)


def test_two_nodes_resume_after_killed_workers(tmp_path):
    path = tmp_path / "ddp" / "checkpoint.pt"
    launch = [*TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 3]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launch += ["--rdzv-id", "test", "--local-addr", "127.0.0.1", "--rdzv-conf"]
    options = [*EXAMPLE, *ENDLESS, "--output", tmp_path]
    restarts = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (
        start(*launch, "is_host=1", *options, **restarts) as node0,
        start(*launch, "is_host=0", *options, **restarts) as node1,
    ):
        wait_until(lambda: saved_epochs(path) > 0)
        for node in (node1, node0):
            worker = children(node)[-1]
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda pid=worker: not is_running(pid))
            before = saved_epochs(path)  # the other worker may save once more
            wait_until(lambda epochs=before: saved_epochs(path) > epochs + 10)
        node0.kill()
        node1.kill()
        output = finish(node0)[1] + finish(node1)[1]
    assert output.count("resumed from") == 2
    assert_same_as_one_process(path)


def test_killed_agent_ends_its_workers_and_the_next_run_resumes(tmp_path, capsys):
    path = tmp_path / "ddp" / "checkpoint.pt"
    launch = ["--standalone", "--nproc-per-node", 2]
    with start(*TORCHRUN, *launch, *EXAMPLE, *ENDLESS, "--output", tmp_path) as agent:
        wait_until(lambda: saved_epochs(path) > 0)
        workers = children(agent)
        agent.kill()
        wait_until(lambda: not any(is_running(worker) for worker in workers))
    reached = saved_epochs(path)
    options = ["--device", "cpu", "--output", str(tmp_path), "--epochs"]
    distributed.main([*options, str(reached + 15)])
    assert re.search(rf"resumed from +{path}, epoch {reached}\n", capsys.readouterr().out)
    assert_same_as_one_process(path)
    message = f"{path.parent} was trained with learning_rate 0.01, not 0.1; delete it"
    with pytest.raises(lesson.CheckpointError, match=message):
        distributed.main([*options, str(reached + 16), "--learning-rate", "0.1"])


@pytest.mark.parametrize(
    ("options", "of_rank_1", "message"),
    [
        ([], ["--epochs", 6], "epochs is 6 on rank 1, but 200 on rank 0"),
        ([], [], "resumed_from_epoch is 0 on rank 1, but 2 on rank 0"),
        (["--fsdp"], [], "resumed_from_step is 0 on rank 1, but 2 on rank 0"),
        (["--fsdp", "--steps", 2], [], "latest_step is 0 on rank 1, but 2 on rank 0"),
    ],
)
def test_ranks_that_differ_are_reported(options, of_rank_1, message, tmp_path):
    """In an option, or because only one of two machines has a checkpoint."""
    (tmp_path / "0" / "ddp").mkdir(parents=True)
    training = ddp.build(ddp.TrainConfig(), torch.device("cpu"))
    lesson.save_checkpoint(tmp_path / "0" / "ddp" / "checkpoint.pt", *training, [1.0, 1.0])
    (tmp_path / "0" / "fsdp" / "step-2").mkdir(parents=True)
    (tmp_path / "0" / "fsdp" / "step-2" / ".metadata").touch()
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *EXAMPLE, *options]
    with (
        start(*command, "--output", tmp_path / "0", RANK="0", **rendezvous) as rank0,
        start(*command, *of_rank_1, "--output", tmp_path / "1", RANK="1", **rendezvous) as rank1,
    ):
        for rank in (rank0, rank1):
            status, output = finish(rank)
            assert (status, "Traceback" in output) == (1, False)
            assert f"error: {message}\n" in output


def test_missing_rank_ends_the_others(tmp_path):
    rendezvous = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, *EXAMPLE, "--timeout", 4, "--output", tmp_path]
    with (
        start(*command, RANK="0", **rendezvous) as rank0,
        start(*command, RANK="1", **rendezvous) as rank1,
    ):
        status, output = finish(rank0)
        assert (status, "Traceback" in output) == (1, False)
        error = r"^error: rank 0 could not join the others: .*[12]/3 clients joined"
        assert re.search(error, output, re.MULTILINE), output
        status, output = finish(rank1)
        assert (status, "Traceback" in output) == (1, False)


@pytest.mark.parametrize(("name", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_missing_variable_is_named(name, missing, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "1")
    with pytest.raises(CheckFailed, match=f"{missing} expected, but not set"):
        distributed.main(["--device", "cpu", "--output", str(tmp_path)])


# Fully sharded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_fsdp_equals_one_process_on_any_number_of_processes(tmp_path):
    """A run on 2 processes is continued on 4, with other shards, and then on 1."""
    options = ["--fsdp", "--output", tmp_path]
    for processes, steps in ((2, 1), (4, 2)):
        status, output = torchrun(processes, *options, "--steps", steps)
        assert status == 0, output
        size = f"{6_562_816 // processes:,}"
        assert re.search(rf"each process +{', '.join([size] * processes)} +ok", output)
    assert f"{tmp_path}/fsdp/step-1\n" in output
    distributed.main(["--device", "cpu", "--fsdp", "--output", str(tmp_path), "--steps", "3"])

    expected_model, losses = fsdp.train_on_one_process(
        fsdp.TrainConfig(steps=3), torch.device("cpu")
    )
    assert read_losses(tmp_path / "fsdp" / "losses.jsonl") == pytest.approx(losses, rel=0, abs=1e-9)
    model = fsdp.build_llama(seed=1, device=torch.device("cpu"))
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "fsdp" / "step-3", no_dist=True)
    for name, expected in expected_model.state_dict().items():
        torch.testing.assert_close(state["model"][name], expected, rtol=0, atol=1e-9)


def test_incomplete_checkpoint_is_not_loaded(tmp_path):
    for step in (3, 5, 8):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-5 (copy)").mkdir()
    for name in ("step-3", "step-8", "step-5 (copy)"):
        (tmp_path / name / ".metadata").touch()
    assert fsdp.latest_step(tmp_path, before=8) == 3
    assert fsdp.latest_step(tmp_path, before=3) == 0


def test_failed_save_is_incomplete_and_damaged_shards_get_one_line(tmp_path):
    """A folder in the place of a file stands in for a full disk."""
    options = ["--device", "cpu", "--fsdp", "--output", str(tmp_path), "--steps"]
    distributed.main([*options, "2"])
    folder = tmp_path / "fsdp" / "step-2"
    message = "fsdp was trained with learning_rate 0.001, not 0.1; delete it"
    for steps in ("1", "3"):
        with pytest.raises(lesson.CheckpointError, match=message):
            distributed.main([*options, steps, "--learning-rate", "0.1"])
    (shard,) = folder.glob("*.distcp")
    for damage in (lambda: shard.write_bytes(shard.read_bytes()[:1000]), shard.unlink):
        damage()
        with pytest.raises(lesson.CheckpointError, match=r"step-2 \(.*\)$") as error:
            distributed.main([*options, "3"])
        assert "\n" not in str(error.value)
    shard.mkdir()
    with pytest.raises(lesson.CheckpointError, match="step-2"):
        distributed.main([*options, "2"])
    assert fsdp.latest_step(folder.parent, before=3) == 0


def double_loss(criterion: Criterion, *sizes: int) -> Criterion:
    return lambda outputs, y: 2 * criterion(outputs, y)


@pytest.mark.parametrize(
    ("module", "options"), [(ddp, ["--epochs", "2"]), (fsdp, ["--fsdp", "--steps", "2"])]
)
def test_weights_that_fail_the_check_are_not_kept(module, options, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "scale_loss_by_shard", double_loss)
    with pytest.raises(CheckFailed, match="losses, against one process"):
        distributed.main(["--device", "cpu", "--output", str(tmp_path), *options])
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"train_config.json", "losses.jsonl"}


@pytest.mark.parametrize("error", [2e-9, -2e-9, math.nan])
def test_check_finds_one_different_loss_or_weight(error):
    weights = {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.zeros(3)}
    other = {"weight": weights["weight"], "bias": torch.tensor([0, error, 0])}
    distributed.check_equal([1.0, 1.0], [1.0, 1.0 + 5e-10], weights, weights)
    with pytest.raises(CheckFailed, match="losses, against one process"):
        distributed.check_equal([1.0, 1.0], [1.0, 1.0 + error], weights, weights)
    with pytest.raises(CheckFailed, match="weights, against one process"):
        distributed.check_equal([1.0], [1.0], other, weights)


def test_missing_shard_fails_its_check(tmp_path, monkeypatch):
    def shard_without_a_layer(model: Llama, device: torch.device) -> None:
        shard_llama(model, device)
        model.model.layers.pop(-1)

    monkeypatch.setattr(fsdp, "shard_llama", shard_without_a_layer)
    with pytest.raises(CheckFailed, match="shard of each process"):
        distributed.main(["--device", "cpu", "--fsdp", "--output", str(tmp_path)])


def test_full_disk_is_one_line_per_rank(tmp_path):
    """A limit on the size of files, of 8 KiB, stands in for the disk."""
    launch = [*TORCHRUN, "--standalone", "--nproc-per-node", 2, *EXAMPLE, "--output", tmp_path]
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *launch]
    with start(*limited) as agent:
        status, output = finish(agent)
    assert status == 1
    lines = re.findall(r"^error: .*File too large.*$", output, re.MULTILINE)
    assert 1 <= len(lines) <= 2, output  # torchrun may end a rank before its line
    assert output.count("Traceback") == 1, "torchrun's own"
