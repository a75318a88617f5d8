"""The U-Net: predicts the noise in latents, given the timestep and the prompt."""

import math
from typing import NamedTuple

import torch
from torch import nn

NULL_CLASS = 10  # the empty prompt, for classifier-free guidance; the prompts are 0 to 9
NUM_TOKENS = 4  # embedding vectors per prompt


class UNetInput(NamedTuple):
    """What the U-Net gets, in one argument, because train() calls model(X)."""

    latents: torch.Tensor  # (batch, 2, 4, 4) float32
    timesteps: torch.Tensor  # (batch,) int64
    prompts: torch.Tensor  # (batch,) int64, a digit or NULL_CLASS


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Return sinusoidal embeddings, (batch, dim) (A. Vaswani et al., 2017, section 3.5)."""
    exponents = torch.arange(dim // 2, device=timesteps.device) / (dim // 2)
    angles = timesteps[:, None] * torch.exp(-math.log(10_000) * exponents)  # (batch, dim / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)  # (batch, dim)


def norm_act_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a group norm, an activation and a convolution."""
    return nn.Sequential(
        nn.GroupNorm(8, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
    )


class Attention(nn.Module):
    """Attention with several heads. Each projection is a linear layer, with the name in diffusers.

    nn.MultiheadAttention has parameters instead of these layers, which LoRA could not adapt.
    """

    def __init__(self, channels: int, context_dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(context_dim, channels)
        self.to_v = nn.Linear(context_dim, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return what each of x, (batch, length, channels), reads in the context, as x."""
        heads = (self.num_heads, -1)  # each of q, k, v: (batch, heads, length, head_dim)
        q = self.to_q(x).unflatten(-1, heads).transpose(1, 2)
        k = self.to_k(context).unflatten(-1, heads).transpose(1, 2)
        v = self.to_v(context).unflatten(-1, heads).transpose(1, 2)
        attn_out = nn.functional.scaled_dot_product_attention(q, k, v)  # as q
        return self.to_out(attn_out.transpose(1, 2).flatten(2))  # (batch, length, channels)


class UNetBlock(nn.Module):
    """A residual block with the timestep embedding; self-attention; cross-attention to the prompt.

    As in R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022,
    section 3.3: the queries are pixels of the latents, the keys and values tokens of the prompt.
    """

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = norm_act_conv(in_channels, out_channels)
        self.time_proj = nn.Linear(embed_dim, out_channels)
        self.conv2 = norm_act_conv(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.norm1 = nn.LayerNorm(out_channels)
        self.norm2 = nn.LayerNorm(out_channels)
        self.self_attn = Attention(out_channels, out_channels)
        self.cross_attn = Attention(out_channels, embed_dim)

    def forward(
        self, x: torch.Tensor, time_emb: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return (batch, out_channels, height, width)."""
        h = self.conv1(x)  # (batch, out_channels, height, width)
        h = h + self.time_proj(time_emb)[:, :, None, None]
        x = self.conv_shortcut(x) + self.conv2(h)

        h = x.flatten(2).transpose(1, 2)  # (batch, height * width, out_channels)
        normed = self.norm1(h)
        h = h + self.self_attn(normed, normed)
        h = h + self.cross_attn(self.norm2(h), tokens)
        return h.transpose(1, 2).reshape(x.shape)  # (batch, out_channels, height, width)


class UNet(nn.Module):
    """Down from 4 x 4 to 2 x 2, and up again, with a skip connection."""

    def __init__(self, channels: int = 64, embed_dim: int = 128) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.time_mlp = nn.Sequential(
            nn.Linear(embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        # Stable Diffusion has CLIP's text encoder here. Eleven prompts need only a table.
        self.prompt_embedding = nn.Embedding(NULL_CLASS + 1, NUM_TOKENS * embed_dim)
        self.conv_in = nn.Conv2d(2, channels, 3, padding=1)
        self.down_block = UNetBlock(channels, channels, embed_dim)
        self.downsample = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.mid_block = UNetBlock(channels, 2 * channels, embed_dim)
        self.upsample = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * channels, channels, 3, padding=1)
        )
        self.up_block = UNetBlock(2 * channels, channels, embed_dim)
        self.conv_out = norm_act_conv(channels, 2)

    def forward(self, inputs: UNetInput) -> torch.Tensor:
        """Return the predicted noise, or velocity, as the scheduler's prediction_type says."""
        time_emb = timestep_embedding(inputs.timesteps, self.embed_dim)  # (batch, embed_dim)
        time_emb = self.time_mlp(time_emb)
        tokens = self.prompt_embedding(inputs.prompts)  # (batch, NUM_TOKENS * embed_dim)
        tokens = tokens.view(-1, NUM_TOKENS, self.embed_dim)  # (batch, NUM_TOKENS, embed_dim)

        x = self.conv_in(inputs.latents)  # (batch, channels, 4, 4)
        skip = self.down_block(x, time_emb, tokens)
        mid = self.downsample(skip)  # (batch, channels, 2, 2)
        mid = self.mid_block(mid, time_emb, tokens)  # (batch, 2 * channels, 2, 2)
        x = self.upsample(mid)  # (batch, channels, 4, 4)
        x = torch.cat((skip, x), dim=1)  # (batch, 2 * channels, 4, 4)
        x = self.up_block(x, time_emb, tokens)  # (batch, channels, 4, 4)
        return self.conv_out(x)  # (batch, 2, 4, 4)
