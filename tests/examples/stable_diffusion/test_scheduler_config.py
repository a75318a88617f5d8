"""Reading scheduler_config.json, compared with diffusers' DDIMScheduler.from_config()."""

import inspect
import itertools
import json
import re

import pytest
import torch
from readmes import REAL_WORLD

from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.scheduler_config import (
    COMPATIBLE_SCHEDULERS,
    SUPPORTED_VALUES,
    load_scheduler,
)

# What the published files of Stable Diffusion 1, 2 and XL have in common.
STABLE_DIFFUSION = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
# Published files, by the models' names on the Hugging Face Hub.
PUBLISHED = {
    "stable-diffusion-v1-5": {
        **STABLE_DIFFUSION,
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
    },
    "stable-diffusion-2-1": {
        **STABLE_DIFFUSION,
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.8.0",
        "prediction_type": "v_prediction",
    },
    "stable-diffusion-xl-base-1.0": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerDiscreteScheduler",
        "_diffusers_version": "0.19.0.dev0",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "sdxl-turbo": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": "0.24.0.dev0",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",
    },
    "hunyuan3d-paint-v2-1": {  # zero terminal SNR
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "timestep_spacing": "trailing",
        "trained_betas": None,
    },
}
# Not published: DDIMScheduler's defaults, and the values that no file above has.
OTHERS = {
    "no fields": {},
    "other values": {
        "_class_name": "FlaxDDIMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample_range": 2.0,
        "num_train_timesteps": 200,
        "prediction_type": "sample",
    },
}


@pytest.fixture
def config_path(tmp_path):
    return tmp_path / "scheduler_config.json"


@pytest.mark.parametrize("num_inference_steps", [1, 4, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", [*PUBLISHED, *OTHERS])
def test_schedule_and_samples_are_those_of_diffusers(name, eta, num_inference_steps, config_path):
    from diffusers import DDIMScheduler

    config = (PUBLISHED | OTHERS)[name]
    config_path.write_text(json.dumps(config))
    ours, theirs = load_scheduler(config_path), DDIMScheduler.from_config(config)
    assert ours.alphas_cumprod.equal(theirs.alphas_cumprod)
    theirs.set_timesteps(num_inference_steps)
    timesteps = ours.ddim_timesteps(num_inference_steps)
    assert timesteps == theirs.timesteps.tolist()

    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Conv2d(2, 2, 3, padding=1).requires_grad_(False)
    sample = torch.randn(4, 2, 4, 4, generator=generator)
    for timestep, prev_timestep in itertools.pairwise([*timesteps, -1]):
        output = model(sample)
        noise = torch.randn(sample.shape, generator=generator)
        expected = theirs.step(output, timestep, sample, eta, variance_noise=noise).prev_sample
        sample = ours.ddim_step(output, timestep, prev_timestep, sample, eta, noise)
        assert sample.isfinite().all()
        # With eta 1, nothing is left of the predicted noise after the first step from pure noise:
        # 1 - alphas_cumprod[prev_timestep] - sigma_t**2 is 0. On some processors it rounds below 0,
        # and diffusers takes its square root: its step is NaN there.
        if eta == 1 and ours.alphas_cumprod[timestep] == 0 and expected.isnan().all():
            continue
        torch.testing.assert_close(sample, expected)


def test_readme_snippet(tmp_path, monkeypatch, capsys):
    readme = (REAL_WORLD / "stable_diffusion" / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / "stable-diffusion-2-1" / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(PUBLISHED["stable-diffusion-2-1"]))
    monkeypatch.chdir(tmp_path)
    exec(snippet[1], {})
    assert capsys.readouterr().out == snippet[2]


# Not supported


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),  # Stable Diffusion 3
        ("_class_name", "CogVideoXDDIMScheduler"),  # with snr_shift_scale
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("thresholding", True),  # DeepFloyd IF
        ("timestep_spacing", "karras"),
        ("timestep_type", "continuous"),  # Stable Video Diffusion
        ("trained_betas", [0.1, 0.2]),
        ("use_flow_sigmas", True),
        ("variance_type", "learned_range"),  # DeepFloyd IF
    ],
)
def test_fields_that_are_not_supported_are_named(field, value, config_path):
    config_path.write_text(json.dumps(STABLE_DIFFUSION | {field: value}))
    with pytest.raises(ValueError, match=re.escape(f": {field} {json.dumps(value)}")) as error:
        load_scheduler(config_path)
    assert str(config_path) in str(error.value)


def test_all_fields_that_are_not_supported_are_named_at_once(config_path):
    config_path.write_text('{"thresholding": true, "variance_type": "learned_range"}')
    with pytest.raises(ValueError, match=r': thresholding true, variance_type "learned_range"$'):
        load_scheduler(config_path)


def test_wrong_values_are_reported_with_the_path(config_path):
    config_path.write_text('{"rescale_betas_zero_snr": true}')
    with pytest.raises(ValueError, match=f"{config_path}: rescale_betas_zero_snr"):
        load_scheduler(config_path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff", b"[]"])
def test_file_must_be_a_json_object(content, config_path):
    config_path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{config_path} is not a JSON object"):
        load_scheduler(config_path)


# Options of samplers other than DDIM, and of thresholding; args and kwargs are those of the
# placeholder that diffusers has for DPMSolverSDEScheduler if torchsde is not installed.
NO_EFFECT = """
    algorithm_type args disable_corrector dynamic_thresholding_ratio euler_at_final
    final_sigmas_type flow_shift interpolation_type kwargs lambda_min_clipped lower_order_final
    noise_sampler_seed predict_x0 sample_max_value shift_terminal sigma_max sigma_min skip_prk_steps
    solver_order solver_p solver_type time_shift_type use_beta_sigmas use_dynamic_shifting
    use_exponential_sigmas use_karras_sigmas use_lu_lambdas
"""


def test_all_fields_of_diffusers_are_handled():
    import diffusers

    known = {*inspect.signature(NoiseScheduler).parameters, *SUPPORTED_VALUES, *NO_EFFECT.split()}
    for name in COMPATIBLE_SCHEDULERS:
        fields = set(inspect.signature(getattr(diffusers, name)).parameters)
        assert fields <= known, name
