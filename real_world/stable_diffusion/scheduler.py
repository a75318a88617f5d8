"""The noise schedule of Stable Diffusion: adds noise to latents, and removes it step by step.

J. Ho et al., "Denoising Diffusion Probabilistic Models", 2020; J. Song et al., "Denoising Diffusion
Implicit Models" (DDIM), 2021. The names are those of diffusers' DDIMScheduler.
"""

import torch

NUM_TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012
STEPS_OFFSET = 1
PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing")


class NoiseScheduler:
    """The diffusion process of DDPM and the sampler of DDIM.

    Args:
        prediction_type: What the model predicts: "epsilon" is the noise, "v_prediction" the
            velocity (T. Salimans and J. Ho, "Progressive Distillation for Fast Sampling of
            Diffusion Models", 2022).
        timestep_spacing: How timesteps to sample at are chosen; see `ddim_timesteps()`.
    """

    def __init__(self, prediction_type: str = "epsilon", timestep_spacing: str = "leading") -> None:
        assert prediction_type in PREDICTION_TYPES
        assert timestep_spacing in TIMESTEP_SPACINGS
        self.prediction_type = prediction_type
        self.timestep_spacing = timestep_spacing
        # The variance of the noise that each timestep adds: "scaled_linear" in diffusers.
        self.betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS) ** 2
        self.alphas_cumprod = (1 - self.betas).cumprod(dim=0)  # the signal's part of the variance

    def sqrt_alpha_prods(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the clean latents and of the noise, (batch, 1, 1, 1) each."""
        device, is_cuda = timesteps.device, timesteps.is_cuda
        alphas_cumprod = self.alphas_cumprod.to(device, non_blocking=is_cuda)
        alpha_prod = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return alpha_prod.sqrt(), (1 - alpha_prod).sqrt()

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the noisy latents at `timesteps`, (batch,) int64 (Ho et al., equation 4)."""
        # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.sqrt_alpha_prods(timesteps)
        return sqrt_alpha_prod * latents + sqrt_one_minus_alpha_prod * noise

    def get_target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return what the model should predict at `timesteps`, (batch,) int64.

        The shape is that of `latents` and `noise`. The velocity is that of Salimans and Ho,
        appendix D.
        """
        if self.prediction_type == "epsilon":
            return noise
        # v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0
        sqrt_alpha_prod, sqrt_one_minus_alpha_prod = self.sqrt_alpha_prods(timesteps)
        return sqrt_alpha_prod * noise - sqrt_one_minus_alpha_prod * latents

    def ddim_timesteps(self, num_inference_steps: int) -> list[int]:
        """Return the timesteps to sample at, in descending order and with equal distances.

        "leading" ends at timestep 1, "trailing" starts at the last one, 999 (S. Lin et al., "Common
        Diffusion Noise Schedules and Sample Steps are Flawed", 2023, table 2).
        """
        assert NUM_TRAIN_TIMESTEPS % num_inference_steps == 0
        assert num_inference_steps < NUM_TRAIN_TIMESTEPS  # "leading" would start at 1000
        step_ratio = NUM_TRAIN_TIMESTEPS // num_inference_steps
        first = NUM_TRAIN_TIMESTEPS - 1
        if self.timestep_spacing == "leading":
            first = NUM_TRAIN_TIMESTEPS - step_ratio + STEPS_OFFSET
        return list(range(first, -1, -step_ratio))

    def ddim_step(
        self, model_output: torch.Tensor, timestep: int, prev_timestep: int, sample: torch.Tensor
    ) -> torch.Tensor:
        """Return the less noisy latents at `prev_timestep`, from `sample` at `timestep`.

        Song et al., equation 12 with sigma 0, so the step is deterministic. All latents have the
        shape of `sample`. A `prev_timestep` below 0 ends the sampling, at timestep 0.
        """
        alpha_prod = self.alphas_cumprod[timestep]
        alpha_prod_prev = self.alphas_cumprod[max(prev_timestep, 0)]
        # add_noise() solved for the clean latents x0, and for the noise eps.
        if self.prediction_type == "epsilon":
            x0 = (sample - (1 - alpha_prod).sqrt() * model_output) / alpha_prod.sqrt()
            eps = model_output
        else:
            x0 = alpha_prod.sqrt() * sample - (1 - alpha_prod).sqrt() * model_output
            eps = alpha_prod.sqrt() * model_output + (1 - alpha_prod).sqrt() * sample
        return alpha_prod_prev.sqrt() * x0 + (1 - alpha_prod_prev).sqrt() * eps
