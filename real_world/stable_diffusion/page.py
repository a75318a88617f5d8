"""The page: what it keeps, what is printed, and its options."""

from __future__ import annotations

import argparse
import functools
import itertools
import time as clock
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

import lesson_code as lesson
from real_world import (
    heading,
    number,
    only_with,
    parser,
    quiet,
    run,
    show,
    shown,
    whole_number,
    writable,
    write_tensors,
)
from real_world.digits import Digits, load_digits, untrained
from real_world.stable_diffusion.drawing import decode, draw, draw_latents, through
from real_world.stable_diffusion.networks import Autoencoder, Denoiser, Diffusion
from real_world.stable_diffusion.schedule import noise_schedule
from real_world.stable_diffusion.training import STEPS, learn

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# %% What it keeps


def keep(path: Path, diffusion: Diffusion, losses: dict[str, list[float]]) -> None:
    """Write both networks and the losses of their training to `path`, whole or not at all."""
    curves = {f"losses.{name}": torch.tensor(values) for name, values in losses.items()}
    write_tensors(path, diffusion.state_dict() | curves)


def kept(path: Path, device: torch.device) -> tuple[Diffusion, dict[str, list[float]]]:
    """Return what `keep` wrote; raise CheckpointError where it is something else, or not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path)
        names = [f"losses.{name}" for name in ("autoencoder", "denoiser")]
        curves = {name: content.pop(name, torch.zeros(0)) for name in names}
        diffusion = Diffusion()
        diffusion.load_state_dict(content)
        finite = all(w.is_floating_point() and w.isfinite().all() for w in content.values())
        known = all(curve.ndim == 1 and len(curve) for curve in curves.values())
        if not finite or diffusion.scale <= 0 or not known:
            raise ValueError("weights that are no numbers, or no losses")
        losses = {name.removeprefix("losses."): curve.tolist() for name, curve in curves.items()}
    except OSError as error:  # safetensors' names no file
        raise lesson.CheckpointError(f"{shown(path)} cannot be read: {error}") from None
    except (SafetensorError, RuntimeError, ValueError):  # load_state_dict's, for other weights
        reason = "is torn, or holds another network; delete it, and the next run trains one"
        raise lesson.CheckpointError(f"{shown(path)} {reason}") from None
    return diffusion.to(device), losses


def network(chosen: argparse.Namespace) -> tuple[Diffusion, dict[str, list[float]]]:
    """Return what an earlier run left, or train it and leave it; with the losses of its training.

    Raises CheckpointError where there is none and none is to be trained.
    """
    path = chosen.output / "stable_diffusion.safetensors"
    if chosen.train or (chosen.train is None and not path.exists()):
        writable(path.parent)
        digits, start = load_digits(device=chosen.device), clock.perf_counter()
        diffusion, losses = learn(digits, chosen.steps or STEPS, chosen.seed)
        keep(path, diffusion, losses)
        show("trained in", f"{clock.perf_counter() - start:.0f} s on {chosen.device}")
        show("saved", shown(path))
        return diffusion, losses
    if not path.exists():
        lacks = "does not exist; without --no-train it is trained"
        raise lesson.CheckpointError(f"{shown(path)} {lacks}")
    if chosen.steps:
        holds = "is there already; with --steps goes --train, for another"
        raise lesson.CheckpointError(f"{shown(path)} {holds}")
    show("kept; --train trains another", shown(path))
    return kept(path, chosen.device)


# %% The page


def compare_with_diffusers() -> None:
    """Hold noise, targets and steps of every schedule against those of diffusers' schedulers."""
    with quiet():
        from diffusers import DDIMScheduler, DDPMScheduler

    print("\n  Against diffusers' schedulers, on random latents:")
    generator = torch.Generator().manual_seed(0)
    names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    starts = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (0.0001, 0.02)}
    for kind, predicts in itertools.product(names, ("epsilon", "v_prediction")):
        schedule = noise_schedule(kind, 1000, predicts)
        start, end = starts[kind]
        same = {"beta_schedule": names[kind], "beta_start": start, "beta_end": end}
        same |= {"prediction_type": predicts, "clip_sample": False}
        ddpm = DDPMScheduler(**same)
        ddim = DDIMScheduler(**same, set_alpha_to_one=False, steps_offset=1)
        ddim.set_timesteps(50)
        latents, noise, prediction = torch.randn(3, 4, 2, 4, 4, generator=generator)
        times = torch.randint(1000, (4,), generator=generator)
        pairs = [
            (schedule.add_noise(latents, noise, times), ddpm.add_noise(latents, noise, times)),
        ]
        if predicts == "v_prediction":
            theirs = ddpm.get_velocity(latents, noise, times)
            pairs.append((schedule.target(latents, noise, times), theirs))
        for time in (981, 501, 21, 1):
            drawn = torch.Generator().manual_seed(time)
            fresh = torch.randn(4, 2, 4, 4, generator=drawn)
            drawn.manual_seed(time)
            theirs = ddpm.step(prediction, time, latents, generator=drawn).prev_sample
            pairs.append((schedule.ddpm_step(prediction, time, latents, fresh), theirs))
            theirs = ddim.step(prediction, time, latents).prev_sample
            pairs.append((schedule.ddim_step(prediction, time, time - 20, latents), theirs))
        apart = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
        lesson.check(
            f"  {kind}, {predicts}", f"noise and steps differ by {apart:.0e}", apart <= 1e-5
        )


GUIDANCES = (0.0, 1.0, 3.0, 8.0)


def compare_guidance(diffusion: Diffusion, digits: Digits, seed: int) -> None:
    """Draw 500 digits at each guidance, let the lesson's classifier read them, look for copies."""
    device = digits.X.device
    reader, optimizer = untrained(0, device)
    lesson.train(reader, [(digits.X, digits.y)], nn.CrossEntropyLoss(), optimizer, 200)
    prompts = torch.arange(10, device=device).repeat_interleave(50)

    known = through(diffusion, digits.X)

    def nearest(images: torch.Tensor) -> torch.Tensor:
        return torch.cdist(images, known).min(dim=1).values

    print("\n  500 drawn, read by the lesson's classifier, which was trained on real ones;")
    print("  and how far from the nearest trained on, as the autoencoder gives that back:")
    print(f"  {'':<32}{'read as prompted':>18}{'distance':>12}{'least':>9}")

    def row(name: str, right: float, far: torch.Tensor) -> None:
        print(f"  {name:<32}{right:>18.1%}{far.median():>12.2f}{far.min():>9.2f}")

    for guidance in GUIDANCES:
        images = draw(diffusion, prompts, guidance=guidance, seed=seed)
        right, far = lesson.evaluate(reader, images, prompts)[1], nearest(images)
        row(f"guidance {guidance:g}", right, far)
        if guidance == 3:
            guided, drawn = right, far
    unseen = through(diffusion, digits.unseen_X)
    far = nearest(unseen)
    row("real ones, held out", lesson.evaluate(reader, unseen, digits.unseen_y)[1], far)
    measured = f"{guided:.1%} at guidance 3, at least 85 %"
    lesson.check("what is asked for is drawn", measured, guided >= 0.85)
    ratios = drawn.median() / far.median(), drawn.min() / far.min()
    measured = f"{ratios[0]:.0%} as far as real ones, nearest {ratios[1]:.0%}"
    lesson.check("and not copied", measured, min(ratios) > 0.5)


def in_characters(images: torch.Tensor) -> str:
    """Return `images`, (samples, 64) from 0 to 1, side by side in characters."""
    shades = " .:-=+*#%@"
    levels = (images * 9.99).int().clamp(0, 9).view(-1, 8, 8)
    rows = (
        "   ".join("".join(2 * shades[level] for level in line) for line in row)
        for row in levels.transpose(0, 1).tolist()
    )
    return "\n".join(f"    {row}".rstrip() for row in rows)


def paint(path: Path, diffusion: Diffusion, losses: dict[str, list[float]], seed: int) -> None:
    """Draw the ten prompts, the way from noise to a digit, a sweep of guidance, and the losses."""
    from matplotlib.figure import Figure

    device = diffusion.scale.device
    figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
    grid, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    strip, sweep, curves = right.subfigures(3, 1, height_ratios=(0.55, 1.4, 1.3))

    def show(axes: Axes, image: torch.Tensor) -> None:
        axes.imshow(image.view(8, 8).tolist(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)

    grid.suptitle("Ten prompts, ten drawings each, guidance 3")
    prompts = torch.arange(10, device=device).repeat_interleave(10)
    images = draw(diffusion, prompts, seed=seed)
    for axes, image in zip(grid.subplots(10, 10).flat, images, strict=True):
        show(axes, image)

    strip.suptitle("A seven, from noise, by 50 steps back")
    way = draw_latents(diffusion, torch.tensor([7], device=device), seed=seed)
    chosen = [0, 10, 20, 25, 30, 35, 40, 45, 50]
    for axes, step in zip(strip.subplots(1, len(chosen)), chosen, strict=True):
        show(axes, decode(diffusion, way[step]))
        axes.set_xlabel(step)

    sweep.suptitle("The same noise at more and more guidance: 2, 5, 8")
    guidances = (0, 0.5, 1, 2, 3, 5, 8, 12, 20)
    rows, prompts = sweep.subplots(3, len(guidances)), torch.tensor([2, 5, 8], device=device)
    for column, guidance in enumerate(guidances):
        images = draw(diffusion, prompts, guidance=guidance, seed=seed + 1)
        for axes, image in zip(rows[:, column], images, strict=True):
            show(axes, image)
        rows[-1, column].set_xlabel(f"{guidance:g}")

    axes = curves.subplots()
    axes.set(title="Loss of training", xlabel="step", yscale="log")
    for (name, values), color in zip(losses.items(), ("#cf222e", "#0969da"), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=color, lw=0.6, label=name)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def page(chosen: argparse.Namespace) -> None:
    """Show that the schedules are everybody's, train, and measure what is drawn."""
    quote = "Stability AI's Stable Diffusion fine-tuning pipelines"
    heading("Stable Diffusion in miniature", quote)
    count = {
        name: sum(weights.numel() for weights in network.parameters())
        for name, network in (("autoencoder", Autoencoder()), ("denoiser", Denoiser()))
    }
    show("parameters", ", ".join(f"{name} {many:,}" for name, many in count.items()))
    compare_with_diffusers()
    diffusion, losses = network(chosen)
    compare_guidance(diffusion, load_digits(device=chosen.device), chosen.seed)
    if not chosen.no_figure:
        path = chosen.output / "stable_diffusion.png"
        paint(path, diffusion, losses, chosen.seed)
        print()
        show("drawn", shown(path))


def draw_one(chosen: argparse.Namespace) -> None:
    """Draw the prompt four times, on the terminal and as a PNG."""
    diffusion, _ = network(chosen)
    how = {"guidance": chosen.guidance, "steps": chosen.sampling_steps, "seed": chosen.seed}
    images = draw(diffusion, torch.full((4,), chosen.prompt, device=chosen.device), **how)
    print(f"\n{in_characters(images)}\n")
    if not chosen.no_figure:
        from matplotlib.image import imsave

        path = chosen.output / f"stable_diffusion-{chosen.prompt}.png"
        row = torch.cat(images.view(4, 8, 8).unbind(), dim=1)
        large = row.repeat_interleave(16, dim=0).repeat_interleave(16, dim=1)
        imsave(path, large.tolist(), cmap="gray_r", vmin=0, vmax=1)
        show("drawn", shown(path))


# %% Running it


DIVISORS = (10, 20, 25, 40, 50, 100, 125, 200, 250, 500)  # of 1000, as times_back wants


def options(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; exit with status 2, after one sentence, where one is wrong."""
    about = "Latent diffusion on the digits, trained by train(). Without --prompt, all of the page."
    made = parser("stable_diffusion", about, "--device", "--seed", "--output", "--no-figure")
    add = made.add_argument
    digit = functools.partial(whole_number, most=9)
    steps = functools.partial(whole_number, least=20)
    strength = functools.partial(number, least=0, most=100)
    add("--prompt", metavar="D", type=digit, help="the digit to draw, 0 to 9, and nothing else")
    add("--guidance", metavar="G", type=strength, help="how far towards the prompt (3)")
    add("--sampling-steps", metavar="N", type=int, choices=DIVISORS, help="back from noise (50)")
    add("--steps", metavar="N", type=steps, help=f"of training ({STEPS})")
    anew = {"action": argparse.BooleanOptionalAction, "default": None}
    add("--train", help="anew, or never (if there is no network yet)", **anew)
    chosen = made.parse_args(argv)
    only_with(made, chosen, "prompt", guidance=3.0, sampling_steps=50)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the page; return its exit status."""
    chosen = options(argv)
    whole = chosen.prompt is None
    return run("stable_diffusion", lambda: (page if whole else draw_one)(chosen))
