"""LoRA on twenty mirrored images of one digit, for the digits' diffusion model."""

import copy
from pathlib import Path
from typing import NamedTuple

import torch

import lesson_code as lesson
from real_world.common import check
from real_world.lora.adapter import save_adapter
from real_world.lora.config import STABLE_DIFFUSION, FinetuneConfig
from real_world.lora.verify import add_adapter, check_adapter
from real_world.stable_diffusion.data import load_images
from real_world.stable_diffusion.evaluate import nearest_distances, train_classifier
from real_world.stable_diffusion.pipeline import LatentDiffusion
from real_world.stable_diffusion.train import TrainConfig, saved_config, train_or_load, train_unet
from real_world.stable_diffusion.unet import UNetInput
from real_world.training import as_tested, save_config, show_config

TARGET_MODULES = ("to_q", "to_k", "to_v", "to_out")  # all linear layers of the attention
DIGIT = 7
NUM_IMAGES = 20
SAMPLES = 50  # generated per digit


class DigitsResult(NamedTuple):
    """What the figure shows. Images are (n, 1, 8, 8)."""

    losses: list[float]  # of every step
    train_images: torch.Tensor
    images_before: torch.Tensor  # SAMPLES per digit
    images_after: torch.Tensor


class Evaluation:
    """Compares generated digits with test images, which no model was trained on."""

    def __init__(self, model: LatentDiffusion) -> None:
        data = load_images(model.scaling_factor.device)
        test_images = data.X_test[data.y_test == DIGIT]
        # As the VAE reconstructs them, because generated images come from its decoder.
        self.originals = model.decode(model.encode(test_images))
        self.mirrored = model.decode(model.encode(test_images.flip(-1)))
        self.classifier = train_classifier(data)

    def __call__(self, images: torch.Tensor, prompts: torch.Tensor) -> tuple[float, float]:
        """Return the fractions of DIGIT that are mirrored, and of others classified as prompted.

        An image is mirrored if it is nearer to a mirrored test image than to the others.
        """
        adapted = prompts == DIGIT
        to_mirrored = nearest_distances(images[adapted], self.mirrored)  # (SAMPLES,)
        to_originals = nearest_distances(images[adapted], self.originals)
        others = images[~adapted].flatten(1)  # (n, 64)
        _, accuracy = lesson.evaluate(self.classifier, others, prompts[~adapted])
        return (to_mirrored < to_originals).float().mean().item(), accuracy


def finetune_stable_diffusion(
    config: FinetuneConfig, output: Path, device: torch.device
) -> DigitsResult:
    """Train an adapter on twenty images, save it, and compare generated digits.

    It is saved in `output`/lora/stable_diffusion; the base model is in `output`/stable_diffusion.
    """
    print(f"  Stable Diffusion: the prompt {DIGIT}, from {NUM_IMAGES} mirrored images")
    base_folder = output / "stable_diffusion"
    base_config = saved_config(base_folder)
    model = train_or_load(base_config, base_folder, device)
    data = load_images(device)
    train_images = data.X_train[data.y_train == DIGIT][:NUM_IMAGES].flip(-1)  # mirrored
    labels = torch.full((NUM_IMAGES,), DIGIT, device=device)
    prompts = torch.arange(10, device=device).repeat_interleave(SAMPLES)
    evaluate = Evaluation(model)
    images_before = model.generate(prompts, seed=config.seed)

    base_unet = copy.deepcopy(model.unet)
    timesteps = 100 * data.y_test  # any timesteps, for comparisons
    X = UNetInput(model.encode(data.X_test), timesteps, data.y_test)
    lora_config = add_adapter(model.unet, TARGET_MODULES, config, X)

    print(f"\n  Training on {device}")
    show_config(config)
    adapter_folder = output / "lora" / "stable_diffusion"
    latents = model.encode(train_images)
    train_config = TrainConfig(  # not its seed, which add_adapter() has set already
        learning_rate=config.learning_rate, batch_size=config.batch_size, steps=config.steps
    )
    log_path = adapter_folder / "losses.jsonl"
    losses = train_unet(model.unet, latents, labels, model.scheduler, train_config, log_path)
    save_config(adapter_folder, config)
    save_adapter(model.unet, lora_config, adapter_folder)
    images_after = model.generate(prompts, seed=config.seed)

    mirrored_before, accuracy_before = evaluate(images_before, prompts)
    mirrored, accuracy = evaluate(images_after, prompts)
    print()
    value = f"{mirrored_before:.0%} -> {mirrored:.0%} mirrored"
    others = f"{accuracy_before:.1%} -> {accuracy:.1%} as prompted"
    tested = as_tested(base_config, TrainConfig()) and as_tested(config, STABLE_DIFFUSION)
    check(f"prompt {DIGIT}", value, mirrored_before < 0.1 and mirrored > 0.9, tested)
    check("the other prompts", others, accuracy > accuracy_before - 0.05, tested)
    check_adapter(model.unet, base_unet, adapter_folder, X)
    return DigitsResult(losses, train_images, images_before, images_after)
