"""The parts of the distributed example that need no other process: shards, and the estimate."""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import matplotlib.image
import pytest
import torch
from torch import nn

from real_world.common import CheckFailed
from real_world.distributed import __main__ as distributed
from real_world.distributed import scaling
from real_world.distributed.process_group import scale_loss_by_shard, shard_slice
from real_world.distributed.scaling import StepCost, efficiency, ring_all_reduce_time

# Shards


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1257])
def test_shards_are_a_partition_of_nearly_equal_sizes(batch_size):
    for world_size in range(1, min(batch_size, 8) + 1):
        shards = [shard_slice(batch_size, rank, world_size) for rank in range(world_size)]
        samples = [sample for shard in shards for sample in range(batch_size)[shard]]
        assert samples == list(range(batch_size))
        sizes = [shard.stop - shard.start for shard in shards]
        assert max(sizes) - min(sizes) <= 1


def test_scaled_losses_of_unequal_shards_average_to_the_loss_of_the_batch():
    logits, y = torch.randn(10, 3), torch.randint(3, (10,))
    criterion = nn.CrossEntropyLoss()
    small = scale_loss_by_shard(criterion, 3, batch_size=10, world_size=2)(logits[:3], y[:3])
    large = scale_loss_by_shard(criterion, 7, batch_size=10, world_size=2)(logits[3:], y[3:])
    torch.testing.assert_close((small + large) / 2, criterion(logits, y))


def test_more_processes_than_samples():
    with pytest.raises(CheckFailed, match="a batch of 8 is too small for 9 processes"):
        shard_slice(8, rank=0, world_size=9)


# Scaling


def test_ring_all_reduce_sends_twice_the_gradients_at_most():
    assert ring_all_reduce_time(1e9, 1, bandwidth=1e9, latency=1) == 0
    assert ring_all_reduce_time(1e9, 2, bandwidth=1e9, latency=0) == pytest.approx(1)
    assert ring_all_reduce_time(1e9, 10_000, bandwidth=1e9, latency=0) == pytest.approx(2, rel=1e-3)
    assert ring_all_reduce_time(0, 10_000, bandwidth=1e9, latency=1e-6) == pytest.approx(0.019998)


def test_efficiency():
    cost = StepCost("model", step_time=1, gradient_bytes=10**9)
    assert efficiency(cost, 1, bandwidth=1e9, latency=0) == 1
    assert efficiency(cost, 2, bandwidth=1e9, latency=0) == pytest.approx(0.5)


def test_step_time_is_that_of_the_fastest_round(monkeypatch):
    times = iter([0, 12] * 6 + [0, 8] + [0, 12] * 3)  # start and end of ten rounds of four steps
    monkeypatch.setattr(scaling, "time", SimpleNamespace(perf_counter=times.__next__))
    criterion = Mock(wraps=nn.CrossEntropyLoss())
    X, y = torch.ones(5, 3), torch.zeros(5, dtype=torch.int64)
    cost = scaling.measure_step("linear", nn.Linear(3, 2), X, y, criterion)
    assert cost == StepCost("linear", step_time=2, gradient_bytes=4 * 8)
    assert criterion.call_count == 40


def test_scaling_estimate_and_figure(tmp_path, capsys):
    distributed.main(["--scaling", "--device", "cpu", "--output", str(tmp_path)])
    output = capsys.readouterr().out
    assert "at most 5 billion parameters" in output
    assert "17.5 GB each" in output
    steps = re.findall(r"([\d.]+) ms per step, ([\d,]+) bytes", output)
    assert [size for _, size in steps] == ["38,440", "3,281,408"], "4 * 9,610 and 4 * 820,352"
    row = re.search(r"^ +64 +([\d.]+) ms +(\d+)% +([\d.]+) ms +(\d+)%$", output, re.MULTILINE)
    # 126 messages of 5 us, and 126 / 64 of the gradients at 12.5 GB/s
    assert (row[1], row[3]) == ("0.64", "1.15")
    for (step_time, _), ring, percent in zip(steps, (0.636, 1.147), (row[2], row[4]), strict=True):
        computing = 100 * float(step_time) / (float(step_time) + ring)
        assert float(percent) == pytest.approx(computing, abs=1)
    assert matplotlib.image.imread(tmp_path / "distributed.png").shape == (480, 1200, 4)
