"""The noise scheduler of the Stable Diffusion example and its files, compared with diffusers'."""

import inspect
import json
import re

import pytest
import torch

from lesson_code import CheckpointError
from real_world.common import CheckFailed
from real_world.stable_diffusion import evaluate
from real_world.stable_diffusion.pipeline import LatentDiffusion, load_model, save_model
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.scheduler_config import FIELDS, load_scheduler

PUBLISHED = sorted(evaluate.SCHEDULES.glob("*.json"))
STABLE_DIFFUSION_1 = json.loads((evaluate.SCHEDULES / "stable-diffusion-v1-5.json").read_text())
# Other samplers' options, and options of thresholding and clipping, which are refused.
NO_EFFECT = """
    clip_sample_range dynamic_thresholding_ratio final_sigmas_type interpolation_type
    sample_max_value sigma_max sigma_min skip_prk_steps use_beta_sigmas use_exponential_sigmas
    use_karras_sigmas
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scheduler_config.json"


# The published schedules


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize("num_inference_steps", [1, 4, 20, 125, 500])
def test_published_schedules_are_those_of_diffusers(published, num_inference_steps):
    assert evaluate.compare_with_diffusers(published, num_inference_steps) == 0


@pytest.mark.parametrize("name", ["add_noise", "get_target", "ddim_timesteps", "ddim_step"])
def test_comparison_finds_a_wrong_scheduler(name, monkeypatch):
    correct = getattr(NoiseScheduler, name)

    def wrong(scheduler, *args):
        result = correct(scheduler, *args)
        return [*result[:-1], result[-1] - 1] if name == "ddim_timesteps" else 1.001 * result

    monkeypatch.setattr(NoiseScheduler, name, wrong)
    with pytest.raises(CheckFailed, match="sdxl-turbo"):
        evaluate.check_schedulers()


# Files


def test_saved_model_generates_with_its_schedule(tmp_path):
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    model = LatentDiffusion()
    model.scheduler = NoiseScheduler("v_prediction", "trailing")
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    prompts = torch.tensor([3, 8])
    images = model.generate(prompts, num_inference_steps=4)
    assert loaded.generate(prompts, num_inference_steps=4).equal(images)
    for options in [("epsilon", "trailing"), ("v_prediction", "leading")]:
        loaded.scheduler = NoiseScheduler(*options)
        assert not loaded.generate(prompts, num_inference_steps=4).equal(images)
    theirs = DDIMScheduler.from_pretrained(tmp_path / "model")
    theirs.set_timesteps(4)
    assert theirs.alphas_cumprod.equal(model.scheduler.alphas_cumprod)
    assert theirs.timesteps.tolist() == [999, 749, 499, 249]
    assert (theirs.config.prediction_type, theirs.config.clip_sample) == ("v_prediction", False)


@pytest.mark.parametrize("content", [None, b"", b"<html>", b"\xff", b"[]"])
def test_damaged_or_missing_schedule_raises_checkpoint_error(content, tmp_path, path):
    save_model(tmp_path, LatentDiffusion())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^cannot load {tmp_path} \(.*{path}.*; delete it"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),  # Stable Diffusion 3
        ("beta_end", 0.02),
        ("beta_schedule", "squaredcos_cap_v2"),
        ("beta_start", "0.00085"),
        ("clip_sample", True),
        ("num_train_timesteps", 200),
        ("prediction_type", "sample"),
        ("rescale_betas_zero_snr", True),
        ("set_alpha_to_one", True),
        ("steps_offset", None),
        ("thresholding", True),
        ("timestep_spacing", "linspace"),
        ("timestep_type", "continuous"),  # Stable Video Diffusion
        ("trained_betas", [0.1, 0.2]),
    ],
)
def test_values_that_are_not_supported_are_refused_by_name(field, value, path):
    path.write_text(json.dumps(STABLE_DIFFUSION_1 | {field: value}))
    message = re.escape(f"{path} is not supported: {field} is {json.dumps(value)}")
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        load_scheduler(path)


def test_absent_fields_have_the_defaults_of_diffusers(path):
    path.write_text('{"_class_name": "DDIMScheduler", "skip_prk_steps": true}')
    named = (
        'beta_end is 0.02, beta_schedule is "linear", beta_start is 0.0001, clip_sample is true, '
        "set_alpha_to_one is true, steps_offset is 0"
    )
    with pytest.raises(CheckpointError, match=f"not supported: {named}$"):
        load_scheduler(path)


def test_all_fields_of_diffusers_are_handled():
    import diffusers

    for name in FIELDS["_class_name"][1]:
        parameters = inspect.signature(getattr(diffusers, name)).parameters
        assert set(parameters) <= {*FIELDS, *NO_EFFECT.split()}, name
        if name == "DDIMScheduler":
            for field in set(FIELDS) & set(parameters):
                assert FIELDS[field][0] == parameters[field].default, field
