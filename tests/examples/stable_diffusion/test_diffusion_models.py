"""The parts of the diffusion model, and their training."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from real_world.stable_diffusion.data import NoisyLatents
from real_world.stable_diffusion.scheduler import NoiseScheduler
from real_world.stable_diffusion.train import TrainConfig, saved_config, train_unet
from real_world.stable_diffusion.unet import (
    NULL_CLASS,
    Attention,
    UNet,
    UNetInput,
    timestep_embedding,
)
from real_world.stable_diffusion.vae import VAE, VAEOutput, vae_loss
from real_world.training import save_config

# Models


def test_vae_samples_latents_with_the_encoded_mean_and_variance():
    torch.manual_seed(0)
    vae = VAE()
    nn.init.constant_(vae.encoder[-1].bias[2:], -3)  # of logvar
    latents = []
    vae.decoder.register_forward_pre_hook(lambda module, args: latents.append(args[0]))
    with torch.no_grad():
        output = vae(torch.rand(1, 1, 8, 8).expand(4000, 1, 8, 8))
    assert output.images.shape == (4000, 1, 8, 8)
    torch.testing.assert_close(latents[0].mean(dim=0), output.mean[0], rtol=0, atol=0.1)
    std = (output.logvar[0] / 2).exp()
    torch.testing.assert_close(latents[0].std(dim=0), std, rtol=0.1, atol=0)


def test_vae_loss_is_the_squared_error_and_the_kl_divergence():
    images = torch.rand(5, 1, 8, 8)
    mean, logvar = torch.randn(2, 5, 2, 4, 4)
    encoded = torch.distributions.Normal(mean, (logvar / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(encoded, standard).mean()
    loss = vae_loss(VAEOutput(images + 0.1, mean, logvar), images)
    torch.testing.assert_close(loss, 0.01 + 0.0005 * kl)


def test_timestep_embedding_is_that_of_diffusers():
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0, 1, 37, 999])
    theirs = get_timestep_embedding(timesteps, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 64), theirs, atol=1e-5, rtol=0)


def test_attention_is_that_of_pytorch():
    attn = Attention(channels=16, context_dim=12)
    theirs = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)
    projections = (attn.to_q, attn.to_k, attn.to_v)
    weights = {f"{name}_proj_weight": p.weight for name, p in zip("qkv", projections, strict=True)}
    weights["in_proj_bias"] = torch.cat([projection.bias for projection in projections])
    weights |= {f"out_proj.{name}": value for name, value in attn.to_out.state_dict().items()}
    theirs.load_state_dict(weights)
    x, context = torch.randn(3, 5, 16), torch.randn(3, 7, 12)
    torch.testing.assert_close(attn(x, context), theirs(x, context, context)[0])


def test_unet_depends_on_its_inputs_and_uses_all_its_parameters():
    torch.manual_seed(0)
    unet = UNet()
    inputs = UNetInput(torch.randn(2, 2, 4, 4), torch.tensor([1, 500]), torch.tensor([3, 5]))
    output = unet(inputs)
    assert output.shape == (2, 2, 4, 4)
    assert not output.allclose(unet(inputs._replace(timesteps=inputs.timesteps + 1)))
    assert not output.allclose(unet(inputs._replace(prompts=inputs.prompts + 1)))
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    used = unet.prompt_embedding.weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert used.tolist() == [3, 5]


# Training


def test_noisy_latents_consist_of_latents_target_and_prompt():
    latents = torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 2, 4, 4) / 10
    scheduler = NoiseScheduler()
    torch.manual_seed(0)
    batches = list(NoisyLatents(latents, torch.arange(100) % 10, scheduler, steps=40))
    assert len(batches) == 40
    noisy = torch.cat([inputs.latents for inputs, _ in batches])
    timesteps = torch.cat([inputs.timesteps for inputs, _ in batches])
    prompts = torch.cat([inputs.prompts for inputs, _ in batches])
    noise = torch.cat([target for _, target in batches])

    signal_rate, noise_rate = scheduler.sqrt_alpha_prods(timesteps)
    indices = (10 * (noisy - noise_rate * noise) / signal_rate).mean(dim=(1, 2, 3)).round().long()
    conditional = prompts != NULL_CLASS
    assert (indices[conditional] % 10).equal(prompts[conditional])
    assert conditional.float().mean().item() == pytest.approx(0.9, abs=0.02)
    assert indices.unique().equal(torch.arange(100))
    assert (timesteps.min(), timesteps.max()) == (0, 999)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_config_without_a_model_has_no_effect(tmp_path):
    save_config(tmp_path, TrainConfig(steps=20))
    assert saved_config(tmp_path) == TrainConfig()
    (tmp_path / "model.safetensors").touch()
    assert saved_config(tmp_path) == TrainConfig(steps=20)


def test_unet_ends_with_the_moving_average_of_its_weights(tmp_path):
    torch.manual_seed(0)
    unet = UNet(channels=8, embed_dim=8)
    history = []
    hook = register_optimizer_step_post_hook(
        lambda *args: history.append(nn.utils.parameters_to_vector(unet.parameters()).detach())
    )
    config, log_path = TrainConfig(steps=20), tmp_path / "losses.jsonl"
    latents, labels = torch.randn(50, 2, 4, 4), torch.arange(50) % 10
    train_unet(unet, latents, labels, NoiseScheduler(), config, log_path)
    hook.remove()
    ema = history[0]
    for weights in history[1:]:
        ema = 0.99 * ema + 0.01 * weights
    trained = nn.utils.parameters_to_vector(unet.parameters())
    torch.testing.assert_close(trained, ema)
    assert not trained.allclose(history[-1])
