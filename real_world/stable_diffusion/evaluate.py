"""The checks: schedulers equal to diffusers'; images as prompted, and not copied."""

import itertools
import json
from pathlib import Path

import torch
from torch import nn

import lesson_code as lesson
from real_world.common import check
from real_world.digits.model import build_model
from real_world.stable_diffusion.data import ImageData
from real_world.stable_diffusion.pipeline import LatentDiffusion
from real_world.stable_diffusion.scheduler import NUM_TRAIN_TIMESTEPS
from real_world.stable_diffusion.scheduler_config import load_scheduler

# Noise schedules of models on the Hugging Face Hub, by the models' names: the fields that matter of
# scheduler/scheduler_config.json.
SCHEDULES = Path(__file__).parent / "schedules"
GUIDANCE_SCALES = (0.0, 1.0, 3.0, 8.0)


def compare_with_diffusers(path: Path, num_inference_steps: int = 50) -> float:
    """Return the largest absolute difference between NoiseScheduler and diffusers' DDIMScheduler.

    Both read the file, a scheduler_config.json. Compares betas, timesteps, noisy latents, targets,
    and the latents after every step.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # takes seconds

    ours = load_scheduler(path)
    theirs = DDIMScheduler.from_config(json.loads(path.read_text()))
    theirs.set_timesteps(num_inference_steps)
    timesteps = ours.ddim_timesteps(num_inference_steps)
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = torch.randn(3, 4, 2, 4, 4, generator=generator)
    t = torch.randint(NUM_TRAIN_TIMESTEPS, (4,), generator=generator)
    target = noise
    if ours.prediction_type == "v_prediction":
        target = theirs.get_velocity(latents, noise, t)
    pairs = [
        (ours.betas, theirs.betas),
        (ours.alphas_cumprod, theirs.alphas_cumprod),
        (torch.tensor(timesteps), theirs.timesteps),
        (ours.add_noise(latents, noise, t), theirs.add_noise(latents, noise, t)),
        (ours.get_target(latents, noise, t), target),
    ]
    for timestep, prev_timestep in itertools.pairwise([*timesteps, -1]):
        step = ours.ddim_step(prediction, timestep, prev_timestep, latents)
        pairs.append((step, theirs.step(prediction, timestep, latents).prev_sample))
    # Of tensors, max() returns NaN if there is one.
    return torch.stack([(a - b).abs().max().float() for a, b in pairs]).max().item()


def check_schedulers() -> None:
    """Compare with diffusers for every published schedule in schedules/."""
    for path in sorted(SCHEDULES.glob("*.json")):
        scheduler = load_scheduler(path)
        difference = compare_with_diffusers(path)
        value = f"{scheduler.prediction_type}, {scheduler.timestep_spacing}"
        check(path.stem, f"{value}: difference {difference:.0e}", difference < 1e-5)


def train_classifier(data: ImageData) -> nn.Module:
    """Train the digits example's model on the training images."""
    classifier = build_model(0, data.X_train.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=0.01)
    batches = [(data.X_train.flatten(1), data.y_train)]
    lesson.train(classifier, batches, nn.CrossEntropyLoss(), optimizer, epochs=200)
    return classifier


def nearest_distances(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return each image's Euclidean distance to the nearest reference, (n,)."""
    return torch.cdist(images.flatten(1), references.flatten(1)).min(dim=1).values


def evaluate_generation(
    model: LatentDiffusion,
    data: ImageData,
    num_inference_steps: int = 50,
    seed: int = 0,
    as_tested: bool = True,
) -> None:
    """Generate 500 digits per guidance scale; check that they are as prompted and not copies.

    Training and test images are compared as the VAE reconstructs them: a copy of a training image
    has the distance 0. If none are copied, the distances are about those of test images.
    """
    classifier = train_classifier(data)
    X_train = model.decode(model.encode(data.X_train))
    X_test = model.decode(model.encode(data.X_test))
    prompts = torch.arange(10, device=X_train.device).repeat_interleave(50)

    def print_row(label: str, images: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
        _, accuracy = lesson.evaluate(classifier, images.flatten(1), y)
        distances = nearest_distances(images, X_train)
        median, minimum = distances.median().item(), distances.min().item()
        print(f"  {label:<32} {accuracy:>8.1%}{median:>20.2f}{minimum:>10.2f}")
        return accuracy, median, minimum

    print(f"  {'':<32} {'accuracy':>8}{'distance: median':>20}{'minimum':>10}")
    rows = {}
    for scale in GUIDANCE_SCALES:
        images = model.generate(prompts, scale, num_inference_steps, seed)
        rows[scale] = print_row(f"guidance scale {scale:g}", images, prompts)
    _, test_median, test_minimum = print_row("test images", X_test, data.y_test)

    unguided, _, _ = rows[0]
    guided, median, minimum = rows[3]
    check(
        "scale 0 ignores the prompt", f"{unguided:.1%}, chance level 10%", unguided < 0.2, as_tested
    )
    check("scale 3 follows the prompt", f"{guided:.1%}", guided > 0.85, as_tested)
    ratios = median / test_median, minimum / test_minimum
    value = f"{ratios[0]:.0%}, {ratios[1]:.0%} of test images' distances"
    check("no copies of training images", value, min(ratios) > 0.5, as_tested)
