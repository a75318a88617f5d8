"""How the cost of a training step grows: with samples, width, length of the text, and processes."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch

import lesson_code as lesson
from real_world import llama
from real_world.benchmark import (
    BLUE,
    GREY,
    OTHERS,
    Entry,
    alternate,
    drawing,
    markdown,
    scaled,
)
from real_world.benchmark.scaling import seconds_of_a_step
from real_world.benchmark.step import Size, steps_by_way
from real_world.llama import training

WAYS = ("train()", "NumPy, by hand")
SAMPLES = (100, 1_000, 10_000, 100_000)
WIDTHS = (16, 64, 256, 1024, 4096)
LENGTHS = (64, 128, 256, 512, 1024, 2048)
PROCESSES = (1, 2, 4)

TITLES = {
    "samples": "The lesson's network",
    "hidden width": "1,000 samples of 64 features",
    "bytes of text": "The Llama, on one text",
    "processes": "A wide network on 4,096 samples",
}

Growth = dict[str, dict[str, dict[str, float]]]
"""By way, and by how much of the work there is: the seconds of a step, and their spread."""


def turned(results: dict[str, dict[str, Any]]) -> Growth:
    """Return results by size and way as results by way and size."""
    ways = next(iter(results.values()))
    return {way: {size: by[way] for size, by in results.items()} for way in ways}


def by_length(rounds: int, lengths: tuple[int, ...]) -> Growth:
    """Time a step of the Llama on one text of each length, by the lesson's train()."""
    torch.manual_seed(0)
    model = llama.Llama(llama.MINIATURE)
    optimizer = torch.optim.AdamW(model.parameters())

    def seconds(length: int) -> float:
        X, y = training.windows(llama.library_text(), 1, length, seed=0)()
        start = time.perf_counter()
        named = {"criterion": training.next_token_loss, "optimizer": optimizer, "epochs": 5}
        lesson.train(model, [(X, y)], **named)
        return (time.perf_counter() - start) / 5

    seconds(lengths[0])  # the first is slower
    ways = {str(length): lambda length=length: seconds(length) for length in lengths}
    return {"llama": alternate(ways, rounds, "growth, length")}


def by_processes(rounds: int, processes: tuple[int, ...]) -> Growth:
    """Time a step of a wide network on 4,096 samples, divided over processes, a thread each."""
    ways = {
        str(many): functools.partial(seconds_of_a_step, "wide", 4096, 2, many) for many in processes
    }
    return {"distributed": alternate(ways, rounds, "growth, processes")}


def measure(quick: bool) -> dict[str, Any]:
    """Time a step at every amount; if it is to be quick, at the two least of each."""
    rounds, few = (1, 2) if quick else (5, None)
    samples = {str(many): Size(many, 4, 16, 3) for many in SAMPLES[:few]}
    widths = {str(many): Size(1000, 64, many, 10) for many in WIDTHS[:few]}
    return {
        "samples": turned(steps_by_way(WAYS, samples, rounds, "growth, samples")),
        "hidden width": turned(steps_by_way(WAYS, widths, rounds, "growth, width")),
        "bytes of text": by_length(rounds, LENGTHS[:few]),
        "processes": by_processes(min(rounds, 3), PROCESSES[:few]),
    }


def times_as_long(by: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Return how many times as much work the most is as the least, and as long it takes."""
    (least, first), *_, (most, last) = by.items()
    return int(most) / int(least), last["median"] / first["median"]


def headline(results: dict[str, Any]) -> str:
    """Return what the README says."""
    (samples, for_samples), (width, for_width), (length, for_length) = (
        times_as_long(next(iter(results[what].values())))
        for what in ("samples", "hidden width", "bytes of text")
    )
    return (
        f"{samples:,.0f} times the samples take {for_samples:,.0f} times as long,"
        f" {width:,.0f} times the width {for_width:,.0f} times,"
        f" {length:.0f} times the text {for_length:.0f} times"
    )


def table(results: dict[str, Any]) -> str:
    """Return the README's table, a row for every amount."""
    rows = []
    for what, ways in results.items():
        base = next(iter(next(iter(ways.values())).values()))["median"]
        for way, by in ways.items():
            for much, measured in by.items():
                ratio = f"{measured['median'] / base:,.3g} x"
                rows.append(
                    (f"{what} {int(much):,}: {way}", scaled(measured, measured["median"]), ratio)
                )
    return markdown(("a step of", "takes", "against the first"), rows)


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw a step's time by how much work there is, beside what is in proportion, as a PNG."""
    with drawing(path, 14, 3.6, columns=4) as panels:
        for axes, (what, ways) in zip(panels, results.items(), strict=True):
            for number, (way, by) in enumerate(ways.items()):
                axes.plot(
                    [int(much) for much in by],
                    [measured["median"] * 1000 for measured in by.values()],
                    *("o-",),
                    label=way,
                    color=OTHERS[0] if number else BLUE,
                )
            by = next(iter(ways.values()))
            much = [int(amount) for amount in by]
            first, last = (list(by.values())[place]["median"] * 1000 for place in (0, -1))
            if what == "processes":  # which divide the work
                line = [first / amount for amount in much]
            elif what == "bytes of text":  # which costs more than in proportion
                line = [first * amount / much[0] for amount in much]
            else:  # which costs less at first
                line = [last * amount / much[-1] for amount in much]
            axes.plot(much, line, ":", color=GREY, label="in proportion", zorder=0)
            axes.set(title=TITLES[what], xlabel=what)
            if what == "processes":
                axes.set_ylim(0)
            else:
                axes.set(xscale="log", yscale="log")
                axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks(much, [f"{amount:,}" for amount in much])
            axes.minorticks_off()
            axes.legend(frameon=False)
        panels[0].set_ylabel("ms a step")


ENTRY = Entry("just at a scale involving thousands of A100 GPUs", measure, headline, table, chart)
