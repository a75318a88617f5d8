"""The checks: equal to diffusers' schedulers; images as prompted, and not copied."""

import itertools

import torch
from torch import nn

import lesson_code as lesson
from real_world.digits.model import build_model
from real_world.stable_diffusion.data import ImageData
from real_world.stable_diffusion.pipeline import LatentDiffusion
from real_world.stable_diffusion.scheduler import NoiseScheduler

BETA_RANGES = {
    "linear": (0.0001, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "squaredcos_cap_v2": (0.0001, 0.02),  # not used
}
PREDICTION_TYPES = ("epsilon", "v_prediction")
GUIDANCE_SCALES = (0.0, 1.0, 3.0, 8.0)


def compare_with_diffusers(beta_schedule: str, prediction_type: str) -> float:
    """Return the largest absolute difference between our scheduler and those of diffusers.

    Compares the betas, the noisy latents, the targets, and the steps of DDPM, and of DDIM with and
    without noise, at 4 of 50 timesteps, on random latents and predictions.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # takes seconds
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    beta_start, beta_end = BETA_RANGES[beta_schedule]
    ours = NoiseScheduler(beta_schedule, beta_start, beta_end, prediction_type=prediction_type)
    ddpm = DDPMScheduler(
        beta_schedule=beta_schedule,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction_type=prediction_type,
        clip_sample=False,
    )
    ddim = DDIMScheduler.from_config(ddpm.config, set_alpha_to_one=False, steps_offset=1)
    ddim.set_timesteps(50)

    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = torch.randn(3, 4, 2, 4, 4, generator=generator)
    timesteps = torch.randint(1000, (4,), generator=generator)
    pairs = [
        (ours.betas, ddpm.betas),
        (torch.tensor(ours.ddim_timesteps(50)), ddim.timesteps),
        (ours.add_noise(latents, noise, timesteps), ddpm.add_noise(latents, noise, timesteps)),
    ]
    if prediction_type == "v_prediction":
        velocity = ddpm.get_velocity(latents, noise, timesteps)
        pairs.append((ours.get_target(latents, noise, timesteps), velocity))
    for t in (981, 501, 21, 1):
        # DDPMScheduler.step() has no argument for the noise: draw the same from its generator.
        noise = torch.randn(4, 2, 4, 4, generator=generator.manual_seed(t))
        step = ddpm.step(prediction, t, latents, generator=generator.manual_seed(t))
        pairs.append((ours.ddpm_step(prediction, t, latents, noise), step.prev_sample))
        step = ddim.step(prediction, t, latents)
        pairs.append((ours.ddim_step(prediction, t, t - 20, latents), step.prev_sample))
        step = ddim.step(prediction, t, latents, eta=1.0, variance_noise=noise)
        pairs.append((ours.ddim_step(prediction, t, t - 20, latents, 1.0, noise), step.prev_sample))
    return max((a - b).abs().max().item() for a, b in pairs)


def check_schedulers() -> None:
    """Print and check how far our scheduler is from diffusers', for every kind of it."""
    for beta_schedule, prediction_type in itertools.product(BETA_RANGES, PREDICTION_TYPES):
        difference = compare_with_diffusers(beta_schedule, prediction_type)
        label = f"{beta_schedule}, {prediction_type}"
        lesson.check(label, f"max. difference {difference:.0e}", difference < 1e-5)


def train_classifier(data: ImageData) -> nn.Module:
    """Return the lesson's classifier, trained by the lesson's train() on the training images."""
    classifier, optimizer = build_model(0, data.X_train.device)
    batches = [(data.X_train.flatten(1), data.y_train)]
    lesson.train(classifier, batches, nn.CrossEntropyLoss(), optimizer, epochs=200)
    return classifier


def nearest_distances(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return each image's Euclidean distance to the nearest reference, (n,)."""
    return torch.cdist(images.flatten(1), references.flatten(1)).min(dim=1).values


def evaluate_generation(
    model: LatentDiffusion, data: ImageData, num_inference_steps: int = 50, seed: int = 0
) -> None:
    """Generate 500 digits per guidance scale; check that they are as prompted and not copies.

    All images are decoded latents: a copy of a training image would have a distance of 0 to what
    the VAE makes of it. Digits that are not copied are as far from it as test images are.
    """
    classifier = train_classifier(data)
    X_train = model.decode(model.encode(data.X_train))
    X_test = model.decode(model.encode(data.X_test))
    prompts = torch.arange(10, device=X_train.device).repeat_interleave(50)

    print(f"  {'':<32}{'':>12}distance to the nearest training image")
    print(f"  {'':<32}{'accuracy':>12}{'median':>12}{'minimum':>12}")

    def print_row(label: str, accuracy: float, distances: torch.Tensor) -> None:
        median, minimum = distances.median(), distances.min()
        print(f"  {label:<32}{accuracy:>12.1%}{median:>12.2f}{minimum:>12.2f}")

    accuracies, distances = {}, {}
    for guidance_scale in GUIDANCE_SCALES:
        images = model.generate(prompts, guidance_scale, num_inference_steps, seed)
        _, accuracy = lesson.evaluate(classifier, images.flatten(1), prompts)
        accuracies[guidance_scale] = accuracy
        distances[guidance_scale] = nearest_distances(images, X_train)
        print_row(f"guidance scale {guidance_scale:g}", accuracy, distances[guidance_scale])
    _, test_accuracy = lesson.evaluate(classifier, X_test.flatten(1), data.y_test)
    test_distances = nearest_distances(X_test, X_train)
    print_row("test images", test_accuracy, test_distances)

    lesson.check("guidance scale 3", f"{accuracies[3]:.1%} as prompted", accuracies[3] >= 0.85)
    lesson.check("guidance scale 0", f"{accuracies[0]:.1%}, chance level 10%", accuracies[0] < 0.2)
    median_ratio = (distances[3].median() / test_distances.median()).item()
    minimum_ratio = (distances[3].min() / test_distances.min()).item()
    lesson.check(
        "no copies of training images",
        f"distances {median_ratio:.0%}, {minimum_ratio:.0%} of test images'",
        min(median_ratio, minimum_ratio) > 0.5,
    )
