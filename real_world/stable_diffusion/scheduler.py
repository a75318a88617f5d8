"""The noise schedule: how noise is added to latents, and removed from them step by step."""

import math

import torch


def make_betas(
    beta_schedule: str, beta_start: float, beta_end: float, num_train_timesteps: int
) -> torch.Tensor:
    """Return the variance of the noise that each timestep adds, (num_train_timesteps,) float32.

    Args:
        beta_schedule: "linear" (DDPM), "scaled_linear" (Stable Diffusion) or "squaredcos_cap_v2",
            the cosine schedule of A. Nichol and P. Dhariwal, "Improved Denoising Diffusion
            Probabilistic Models", 2021. The names are those of diffusers.
        beta_start: The first value; the cosine schedule does not use it.
        beta_end: The last value; the cosine schedule does not use it.
        num_train_timesteps: How many values.
    """
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
    if beta_schedule == "squaredcos_cap_v2":
        betas = []
        for timestep in range(num_train_timesteps):
            start = (timestep / num_train_timesteps + 0.008) / 1.008
            end = ((timestep + 1) / num_train_timesteps + 0.008) / 1.008
            alpha = math.cos(end * math.pi / 2) ** 2 / math.cos(start * math.pi / 2) ** 2
            betas.append(min(1 - alpha, 0.999))
        return torch.tensor(betas)
    raise ValueError(f"unknown beta_schedule {beta_schedule!r}")


class NoiseScheduler:
    """The diffusion process of DDPM, and the steps back of DDPM and DDIM.

    The defaults are Stable Diffusion's. `alphas_cumprod[t]` is the share of the clean latents in
    the variance of the noisy ones at timestep t (J. Ho et al., "Denoising Diffusion Probabilistic
    Models", 2020).

    Args:
        beta_schedule: See make_betas().
        beta_start: See make_betas().
        beta_end: See make_betas().
        num_train_timesteps: How many timesteps lead from an image to noise.
        prediction_type: What the model predicts: "epsilon", the noise, or "v_prediction", the
            velocity (T. Salimans and J. Ho, "Progressive Distillation for Fast Sampling of
            Diffusion Models", 2022).
    """

    def __init__(
        self,
        beta_schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> None:
        self.betas = make_betas(beta_schedule, beta_start, beta_end, num_train_timesteps)
        self.alphas_cumprod = (1 - self.betas).cumprod(dim=0)
        self.num_train_timesteps = num_train_timesteps
        self.prediction_type = prediction_type

    # %% Training

    def signal_and_noise_rates(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the clean latents and of the noise, (batch, 1, 1, 1) each."""
        alpha_prod = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_prod.sqrt(), (1 - alpha_prod).sqrt()

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the noisy latents at `timesteps`, (batch,) int64 (Ho et al., equation 4)."""
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.signal_and_noise_rates(timesteps)
        return sqrt_alpha_prod * latents + sqrt_one_minus_alpha_prod * noise

    def get_target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return what the model should predict: the noise or the velocity."""
        if self.prediction_type == "epsilon":
            return noise
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.signal_and_noise_rates(timesteps)
        return sqrt_alpha_prod * noise - sqrt_one_minus_alpha_prod * latents

    # %% Sampling

    def ddim_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps to sample at, in descending order, spaced as in Stable Diffusion."""
        step_ratio = self.num_train_timesteps // num_inference_steps
        return [step * step_ratio + 1 for step in reversed(range(num_inference_steps))]

    def predict_x0_and_eps(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the clean latents and the noise that `sample` consists of, as predicted."""
        timesteps = torch.tensor([timestep], device=sample.device)
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.signal_and_noise_rates(timesteps)
        if self.prediction_type == "epsilon":
            x0 = (sample - sqrt_one_minus_alpha_prod * model_output) / sqrt_alpha_prod
            return x0, model_output
        x0 = sqrt_alpha_prod * sample - sqrt_one_minus_alpha_prod * model_output
        return x0, sqrt_alpha_prod * model_output + sqrt_one_minus_alpha_prod * sample

    def ddpm_step(
        self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Sample the latents one timestep earlier (Ho et al., algorithm 2 and equation 7)."""
        x0, _ = self.predict_x0_and_eps(model_output, timestep, sample)
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.alphas_cumprod[timestep - 1] if timestep > 0 else torch.tensor(1.0)
        alpha = alpha_prod / alpha_prod_prev
        x0_coeff = alpha_prod_prev**0.5 * (1 - alpha) / (1 - alpha_prod)
        sample_coeff = alpha**0.5 * (1 - alpha_prod_prev) / (1 - alpha_prod)
        variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha)
        return x0_coeff * x0 + sample_coeff * sample + variance**0.5 * noise

    def sigma_t(self, timestep: int, prev_timestep: int, eta: float) -> torch.Tensor:
        """Return the standard deviation of a DDIM step's noise (Song et al., equation 16)."""
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.alphas_cumprod[max(prev_timestep, 0)]
        variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha_prod / alpha_prod_prev)
        return eta * variance**0.5

    def ddim_step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        prev_timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the latents at an earlier timestep, which may be many timesteps earlier.

        J. Song et al., "Denoising Diffusion Implicit Models", 2021, equation 12.

        Args:
            model_output: The model's prediction, (batch, channels, height, width).
            timestep: The timestep of `sample`.
            prev_timestep: The earlier timestep. A negative one counts as 0, as in Stable Diffusion.
            sample: The noisy latents, (batch, channels, height, width).
            eta: 0 for DDIM, which is deterministic; 1 for as much noise as DDPM's.
            noise: Standard normal noise, (batch, channels, height, width); required if `eta` > 0.
        """
        x0, eps = self.predict_x0_and_eps(model_output, timestep, sample)
        alpha_prod_prev = self.alphas_cumprod[max(prev_timestep, 0)]
        sigma_t = self.sigma_t(timestep, prev_timestep, eta)
        sample = alpha_prod_prev**0.5 * x0 + (1 - alpha_prod_prev - sigma_t**2) ** 0.5 * eps
        return sample if noise is None else sample + sigma_t * noise
