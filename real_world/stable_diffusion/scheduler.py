"""The noise schedule: adds noise to latents, and removes it step by step."""

import math

import numpy as np
import torch

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def make_betas(schedule: str, start: float, end: float, num_timesteps: int) -> torch.Tensor:
    """Return the variance of the noise that each timestep adds, (num_timesteps,) float32.

    The schedules: "linear" (DDPM), "scaled_linear" (Stable Diffusion), and "squaredcos_cap_v2" (A.
    Nichol and P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021), which does
    not use `start` and `end`. The names are those of diffusers.
    """
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"unknown beta_schedule {schedule!r}")
    if schedule == "squaredcos_cap_v2":
        times = [(t / num_timesteps + 0.008) / 1.008 for t in range(num_timesteps + 1)]
        alphas_cumprod = [math.cos(time * math.pi / 2) ** 2 for time in times]
        betas = [1 - alphas_cumprod[t + 1] / alphas_cumprod[t] for t in range(num_timesteps)]
        return torch.tensor(betas).clamp(max=0.999)
    if not 0 < start < end < 1:
        message = "must satisfy 0 < beta_start < beta_end < 1"
        raise ValueError(f"beta_start {start} and beta_end {end} {message}")
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps) ** 2
    return torch.linspace(start, end, num_timesteps)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Return betas whose last timestep is noise only: its signal-to-noise ratio (SNR) is 0.

    S. Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023,
    algorithm 1.
    """
    sqrt_alphas_cumprod = (1 - betas).cumprod(dim=0).sqrt()
    first, last = sqrt_alphas_cumprod[0], sqrt_alphas_cumprod[-1]
    # Shift the last value to 0; scale so that the first one does not change.
    alphas_cumprod = ((sqrt_alphas_cumprod - last) * (first / (first - last))) ** 2
    alphas = torch.cat((alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]))
    return 1 - alphas


class NoiseScheduler:
    """The diffusion process of DDPM and the sampler of DDIM. The defaults are Stable Diffusion's.

    J. Ho et al., "Denoising Diffusion Probabilistic Models", 2020; J. Song et al., "Denoising
    Diffusion Implicit Models", 2021. The names are those of diffusers' DDIMScheduler.

    Args:
        beta_schedule: How the noise increases with the timestep; see `make_betas()`.
        beta_start: The first beta.
        beta_end: The last beta.
        num_train_timesteps: The number of timesteps, at which the model is trained.
        prediction_type: What the model predicts: "epsilon" is the noise, "sample" the clean
            latents, "v_prediction" the velocity (T. Salimans and J. Ho, "Progressive Distillation
            for Fast Sampling of Diffusion Models", 2022).
        clip_sample: Whether a step clips the predicted clean latents; for models of images.
        clip_sample_range: The largest absolute value, if they are clipped.
        set_alpha_to_one: Whether the last step ends at the clean latents, or at timestep 0.
        steps_offset: Added to the timesteps, if their spacing is "leading".
        timestep_spacing: How timesteps to sample at are chosen; see `ddim_timesteps()`.
        rescale_betas_zero_snr: Whether the last timestep is noise only. Then "epsilon" is not
            possible: the noise in it does not tell what the latents are.
    """

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        *,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = False,
        steps_offset: int = 1,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction_type {prediction_type!r}")
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise ValueError(f"unknown timestep_spacing {timestep_spacing!r}")
        if rescale_betas_zero_snr and prediction_type == "epsilon":  # a step would divide by 0
            message = "requires prediction_type 'v_prediction' or 'sample', got 'epsilon'"
            raise ValueError(f"rescale_betas_zero_snr {message}")
        self.betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        if rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas_cumprod = (1 - self.betas).cumprod(dim=0)  # the signal's part of the variance
        self.final_alpha_cumprod = torch.ones(()) if set_alpha_to_one else self.alphas_cumprod[0]
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type
        self.clip_sample = clip_sample
        self.clip_sample_range = clip_sample_range
        self.steps_offset = steps_offset
        self.timestep_spacing = timestep_spacing

    def sqrt_alpha_prods(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the clean latents and of the noise, (batch, 1, 1, 1) each."""
        alpha_prod = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_prod.sqrt(), (1 - alpha_prod).sqrt()

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the noisy latents at `timesteps`, (batch,) int64 (Ho et al., equation 4)."""
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.sqrt_alpha_prods(timesteps)
        return sqrt_alpha_prod * latents + sqrt_one_minus_alpha_prod * noise

    def get_target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return what the model should predict."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.sqrt_alpha_prods(timesteps)
        return sqrt_alpha_prod * noise - sqrt_one_minus_alpha_prod * latents

    def predict_x0_and_eps(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean latents and the noise that `sample` consists of, as predicted."""
        timesteps = torch.tensor([timestep], device=sample.device)
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.sqrt_alpha_prods(timesteps)
        if self.prediction_type == "epsilon":
            x0 = (sample - sqrt_one_minus_alpha_prod * model_output) / sqrt_alpha_prod
            return x0, model_output
        if self.prediction_type == "sample":
            eps = (sample - sqrt_alpha_prod * model_output) / sqrt_one_minus_alpha_prod
            return model_output, eps
        x0 = sqrt_alpha_prod * sample - sqrt_one_minus_alpha_prod * model_output
        return x0, sqrt_alpha_prod * model_output + sqrt_one_minus_alpha_prod * sample

    def ddim_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps to sample at, in descending order (Lin et al., table 2).

        "leading", Stable Diffusion's spacing, usually starts below the last timestep; "trailing"
        starts at the last one; "linspace" also ends at timestep 0.
        """
        total = self.num_train_timesteps
        minimum = 2 if self.timestep_spacing == "linspace" else 1  # it has both ends
        if not minimum <= num_inference_steps <= total:
            message = f"num_inference_steps must be from {minimum} to {total}"
            raise ValueError(f"{message}, got {num_inference_steps}")
        timesteps: np.ndarray
        if self.timestep_spacing == "leading":
            step_ratio = total // num_inference_steps
            timesteps = np.arange(num_inference_steps)[::-1] * step_ratio + self.steps_offset
        elif self.timestep_spacing == "trailing":
            timesteps = np.arange(total, 0, -total / num_inference_steps).round() - 1
            timesteps = timesteps[:num_inference_steps]  # rounding errors may add one
        else:
            timesteps = np.linspace(0, total - 1, num_inference_steps).round()[::-1]
        if timesteps[0] >= total:
            message = f"timestep {timesteps[0]} does not exist, with steps_offset"
            steps = f"num_inference_steps {num_inference_steps}"
            raise ValueError(f"{message} {self.steps_offset} and {steps}")
        return timesteps.astype(int).tolist()

    def ddim_step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        prev_timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
        use_clipped_model_output: bool = False,
    ) -> torch.Tensor:
        """Return the latents at `prev_timestep`, any number of timesteps before that of `sample`.

        Song et al., equations 12 and 16. DDIM has `eta` 0 and is deterministic; with 1, single
        timesteps and fresh `noise`, it is DDPM. A `prev_timestep` below 0 ends the sampling; see
        `set_alpha_to_one`. With `use_clipped_model_output`, the noise is what is left of `sample`
        without the clipped latents, as in DDPM; otherwise it is as predicted.
        """
        if not 0 <= timestep < self.num_train_timesteps:
            maximum = self.num_train_timesteps - 1
            raise ValueError(f"timestep must be from 0 to {maximum}, got {timestep}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {eta}")
        if eta > 0 and noise is None:
            raise ValueError(f"a step with eta {eta} needs noise")
        x0, eps = self.predict_x0_and_eps(model_output, timestep, sample)
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.final_alpha_cumprod
        if prev_timestep >= 0:
            alpha_prod_prev = self.alphas_cumprod[prev_timestep]
        if self.clip_sample:
            x0 = x0.clamp(-self.clip_sample_range, self.clip_sample_range)
            if use_clipped_model_output:
                eps = (sample - alpha_prod**0.5 * x0) / (1 - alpha_prod) ** 0.5
        variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha_prod / alpha_prod_prev)
        sigma_t = eta * variance**0.5
        eps_variance = (1 - alpha_prod_prev - sigma_t**2).clamp(min=0)  # rounding errors
        sample = alpha_prod_prev**0.5 * x0 + eps_variance**0.5 * eps
        return sample if noise is None else sample + sigma_t * noise
