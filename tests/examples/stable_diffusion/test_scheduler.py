"""The noise scheduler of the Stable Diffusion example, compared with those of diffusers."""

import itertools

import pytest
import torch

from real_world.common import CheckFailed
from real_world.stable_diffusion import evaluate
from real_world.stable_diffusion.scheduler import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseScheduler,
)

# What the tests of diffusers sample from and with: tests/schedulers/test_schedulers.py
SAMPLE = torch.arange(768).view(3, 8, 8, 4).permute(3, 0, 1, 2) / 768  # (4, 3, 8, 8)
NOISE = torch.arange(767, -1, -1).view(3, 8, 8, 4).permute(3, 0, 1, 2) / 768  # (4, 3, 8, 8)


def dummy_model(sample, timestep):
    return sample * timestep / (timestep + 1)


def make_scheduler(**options):
    """Return a scheduler with the options of DDIMScheduler in the tests of diffusers."""
    defaults = {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "clip_sample": True,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    return NoiseScheduler(**(defaults | options))


def assert_sum_and_mean(sample, expected_sum, expected_mean, tolerance=0.01):
    """Compare as the tests of diffusers do."""
    assert sample.abs().sum().item() == pytest.approx(expected_sum, abs=tolerance)
    assert sample.abs().mean().item() == pytest.approx(expected_mean, abs=0.001)


# Sums and means that the tests of diffusers assert: tests/schedulers/test_scheduler_ddim.py and
# test_scheduler_ddpm.py


def ddim_loop(scheduler, sample, timesteps):
    for timestep, prev_timestep in itertools.pairwise([*timesteps, -1]):
        output = dummy_model(sample, timestep)
        sample = scheduler.ddim_step(output, timestep, prev_timestep, sample)
    return sample


@pytest.mark.parametrize(
    ("options", "expected_sum", "expected_mean"),
    [
        ({}, 172.0067, 0.223967),
        ({"prediction_type": "v_prediction"}, 52.5302, 0.0684),
        ({"beta_start": 0.01}, 149.8295, 0.1951),
        ({"beta_start": 0.01, "set_alpha_to_one": False}, 149.0784, 0.1941),
    ],
)
def test_ddim_loop(options, expected_sum, expected_mean):
    scheduler = make_scheduler(**options)
    sample = ddim_loop(scheduler, SAMPLE, scheduler.ddim_timesteps(10))
    assert_sum_and_mean(sample, expected_sum, expected_mean)


def test_ddim_loop_from_a_noisy_sample():
    scheduler = make_scheduler()
    timesteps = scheduler.ddim_timesteps(10)[8:]
    noisy = scheduler.add_noise(SAMPLE, NOISE, torch.tensor(timesteps[:1]))
    assert_sum_and_mean(ddim_loop(scheduler, noisy, timesteps), 354.5418, 0.4616)


def ddpm_loop(scheduler, sample, timesteps):
    generator = torch.Generator().manual_seed(0)
    for timestep in timesteps:
        noise = torch.randn(sample.shape, generator=generator)
        output = dummy_model(sample, timestep)
        sample = scheduler.ddim_step(
            output, timestep, timestep - 1, sample, 1.0, noise, use_clipped_model_output=True
        )
    return sample


@pytest.mark.parametrize(
    ("prediction_type", "expected_sum", "expected_mean"),
    [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)],
)
def test_ddpm_loop(prediction_type, expected_sum, expected_mean):
    scheduler = make_scheduler(prediction_type=prediction_type)
    sample = ddpm_loop(scheduler, SAMPLE, range(999, -1, -1))
    assert_sum_and_mean(sample, expected_sum, expected_mean)


def test_ddpm_loop_from_a_noisy_sample():
    scheduler = make_scheduler()
    noisy = scheduler.add_noise(SAMPLE, NOISE, torch.tensor([1]))
    # The sum has a rounding error: in float64, diffusers and this scheduler both get 387.9673.
    assert_sum_and_mean(ddpm_loop(scheduler, noisy, [1, 0]), 387.9466, 0.5051, tolerance=0.03)


# Parts of the process


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_schedulers_are_equal_to_those_of_diffusers(beta_schedule, prediction_type):
    assert evaluate.compare_with_diffusers(beta_schedule, prediction_type) == 0


def test_comparison_with_diffusers_finds_a_wrong_scheduler(monkeypatch):
    monkeypatch.setattr(NoiseScheduler, "ddim_timesteps", lambda *args: list(range(980, -1, -20)))
    with pytest.raises(CheckFailed, match="linear, epsilon"):
        evaluate.check_schedulers()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("clip_sample_range", [None, 0.5, 2.0])
@pytest.mark.parametrize("timestep", [999, 500, 100, 0])
def test_ddim_step_with_eta_1_is_a_step_of_ddpm(prediction_type, clip_sample_range, timestep):
    from diffusers import DDPMScheduler

    clip = {"clip_sample": clip_sample_range is not None, "clip_sample_range": clip_sample_range}
    ours = make_scheduler(prediction_type=prediction_type, **clip)
    theirs = DDPMScheduler(prediction_type=prediction_type, **clip)
    generator = torch.Generator()
    noise = torch.randn(6, 2, 4, 4, generator=generator.manual_seed(0))
    latents, output = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    step = ours.ddim_step(
        output, timestep, timestep - 1, latents, 1.0, noise, use_clipped_model_output=True
    )
    expected = theirs.step(output, timestep, latents, generator=generator.manual_seed(0))
    torch.testing.assert_close(step, expected.prev_sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize("timestep_spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_timesteps_are_those_of_diffusers(timestep_spacing, steps_offset):
    from diffusers import DDIMScheduler

    options = {"timestep_spacing": timestep_spacing, "steps_offset": steps_offset}
    ours, theirs = NoiseScheduler(**options), DDIMScheduler(**options)
    for num_inference_steps in range(2, 1000):
        timesteps = ours.ddim_timesteps(num_inference_steps)
        theirs.set_timesteps(num_inference_steps)
        # With "trailing", rounding gives diffusers another timestep, -1, for some numbers of steps.
        assert timesteps == [t for t in theirs.timesteps.tolist() if t >= 0]
        assert len(timesteps) == num_inference_steps


def test_zero_terminal_snr_changes_the_betas_as_in_diffusers():
    from diffusers import DDIMScheduler

    for beta_schedule in BETA_SCHEDULES:
        options = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
        ours = make_scheduler(prediction_type="v_prediction", **options)
        assert ours.alphas_cumprod.equal(DDIMScheduler(**options).alphas_cumprod)
        assert ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("timestep_spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_inference_steps", [2, 7, 50, 300])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_ends_at_the_latents_that_the_model_predicts(
    timestep_spacing, prediction_type, num_inference_steps, eta
):
    scheduler = NoiseScheduler(
        prediction_type=prediction_type,
        timestep_spacing=timestep_spacing,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=prediction_type != "epsilon",
    )
    generator = torch.Generator().manual_seed(0)
    latents, sample = torch.randn(2, 1, 2, 4, 4, generator=generator)
    timesteps = scheduler.ddim_timesteps(num_inference_steps)
    for timestep, prev_timestep in itertools.pairwise([*timesteps, -1]):
        t = torch.tensor([timestep])
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = scheduler.sqrt_alpha_prods(t)
        eps = (sample - sqrt_alpha_prod * latents) / sqrt_one_minus_alpha_prod
        output = scheduler.get_target(latents, eps, t)
        noise = torch.randn(sample.shape, generator=generator)
        sample = scheduler.ddim_step(output, timestep, prev_timestep, sample, eta, noise)
    torch.testing.assert_close(sample, latents, atol=1e-4, rtol=0)


# Wrong values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'"),
        ({"prediction_type": "v-prediction"}, "unknown prediction_type 'v-prediction'"),
        ({"prediction_type": ""}, "unknown prediction_type ''"),
        ({"timestep_spacing": "trail"}, "unknown timestep_spacing 'trail'"),
        ({"beta_start": 0.0}, "beta_start 0.0 and beta_end 0.012 must satisfy"),
        ({"beta_end": 12}, "beta_start 0.00085 and beta_end 12 must satisfy"),
        ({"beta_end": 0.0001}, "beta_start 0.00085 and beta_end 0.0001 must satisfy"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr .* got 'epsilon'"),
    ],
)
def test_wrong_options_raise_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseScheduler(**options)


@pytest.mark.parametrize(
    ("timestep_spacing", "steps_offset", "minimum", "maximum"),
    [
        ("leading", 0, 1, 1000),
        ("leading", 1, 1, 999),
        ("trailing", 0, 1, 1000),
        ("linspace", 0, 2, 1000),
    ],
)
def test_number_of_inference_steps_is_limited(timestep_spacing, steps_offset, minimum, maximum):
    options = {"timestep_spacing": timestep_spacing, "steps_offset": steps_offset}
    scheduler = NoiseScheduler(**options)
    for num_inference_steps in (minimum, maximum):
        assert len(scheduler.ddim_timesteps(num_inference_steps)) == num_inference_steps
    for num_inference_steps in (-1, 0, minimum - 1, maximum + 1, 2000):
        with pytest.raises(ValueError, match=rf"num_inference_steps.* {num_inference_steps}\b"):
            scheduler.ddim_timesteps(num_inference_steps)


@pytest.mark.parametrize("eta", [-0.5, 1.5, float("nan")])
def test_eta_is_limited(eta):
    latents = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=f"eta must be from 0 to 1, got {eta}"):
        NoiseScheduler().ddim_step(latents, 500, 480, latents, eta, latents)


def test_ddim_step_with_eta_needs_noise():
    latents = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="eta 1 needs noise"):
        NoiseScheduler().ddim_step(latents, 500, 480, latents, eta=1)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_timestep_is_limited(timestep):
    latents = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=f"timestep must be from 0 to 999, got {timestep}"):
        NoiseScheduler().ddim_step(latents, timestep, timestep - 20, latents)
