"""The noise schedule: adds noise to latents, and removes it step by step."""

import math

import torch


def make_betas(schedule: str, start: float, end: float, num_timesteps: int) -> torch.Tensor:
    """Return the variance of the noise that each timestep adds, (num_timesteps,) float32.

    The schedules: "linear" (DDPM), "scaled_linear" (Stable Diffusion), and "squaredcos_cap_v2" (A.
    Nichol and P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021), which does
    not use `start` and `end`. The names are those of diffusers.
    """
    if schedule == "linear":
        return torch.linspace(start, end, num_timesteps)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_timesteps) ** 2
    if schedule == "squaredcos_cap_v2":
        times = [(t / num_timesteps + 0.008) / 1.008 for t in range(num_timesteps + 1)]
        alphas_cumprod = [math.cos(time * math.pi / 2) ** 2 for time in times]
        betas = [1 - alphas_cumprod[t + 1] / alphas_cumprod[t] for t in range(num_timesteps)]
        return torch.tensor(betas).clamp(max=0.999)
    raise ValueError(f"unknown beta_schedule {schedule!r}")


class NoiseScheduler:
    """The diffusion process of DDPM and the sampler of DDIM. The defaults are Stable Diffusion's.

    J. Ho et al., "Denoising Diffusion Probabilistic Models", 2020; J. Song et al., "Denoising
    Diffusion Implicit Models", 2021. The model predicts the noise, if `prediction_type` is
    "epsilon", or the velocity, if it is "v_prediction" (T. Salimans and J. Ho, "Progressive
    Distillation for Fast Sampling of Diffusion Models", 2022).
    """

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> None:
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"unknown prediction_type {prediction_type!r}")
        self.betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        self.alphas_cumprod = (1 - self.betas).cumprod(dim=0)  # the clean latents' part of variance
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type

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
        x0 = sqrt_alpha_prod * sample - sqrt_one_minus_alpha_prod * model_output
        return x0, sqrt_alpha_prod * model_output + sqrt_one_minus_alpha_prod * sample

    def ddim_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps to sample at, in descending order, spaced as in Stable Diffusion."""
        maximum = self.num_train_timesteps - 1  # timestep 0 is not used
        if not 1 <= num_inference_steps <= maximum:
            raise ValueError(f"num_inference_steps must be from 1 to {maximum}")
        step_ratio = self.num_train_timesteps // num_inference_steps
        return [step * step_ratio + 1 for step in reversed(range(num_inference_steps))]

    def ddim_step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        prev_timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the latents at `prev_timestep`, any number of timesteps before that of `sample`.

        Song et al., equations 12 and 16. DDIM has `eta` 0 and is deterministic; with 1, single
        timesteps and fresh `noise`, it is DDPM. A `prev_timestep` below 0 counts as 0.
        """
        if eta > 0 and noise is None:
            raise ValueError(f"a step with eta {eta} needs noise")
        x0, eps = self.predict_x0_and_eps(model_output, timestep, sample)
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.alphas_cumprod[max(prev_timestep, 0)]
        variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha_prod / alpha_prod_prev)
        sigma_t = eta * variance**0.5
        sample = alpha_prod_prev**0.5 * x0 + (1 - alpha_prod_prev - sigma_t**2) ** 0.5 * eps
        return sample if noise is None else sample + sigma_t * noise
