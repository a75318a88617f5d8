"""The U-Net: predicts the noise in latents, given the timestep and the prompt."""

import math
from typing import NamedTuple

import torch
from torch import nn

NULL_CLASS = 10  # the empty prompt, for classifier-free guidance; the prompts are 0 to 9
NUM_TOKENS = 4  # embedding vectors per prompt


class UNetInput(NamedTuple):
    """What the U-Net gets, in one argument, because train() calls model(X).

    latents: (batch, 2, 4, 4) float32; timesteps: (batch,) int64; prompts: (batch,) int64, a digit
    or NULL_CLASS.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompts: torch.Tensor


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Return sinusoidal embeddings, (batch, dim) (A. Vaswani et al., 2017, section 3.5)."""
    exponents = torch.arange(dim // 2, device=timesteps.device) / (dim // 2)
    angles = timesteps[:, None] * torch.exp(-math.log(10_000) * exponents)  # (batch, dim / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)  # (batch, dim)


class ResnetBlock(nn.Module):
    """Two convolutions with a residual connection; the timestep is added between them."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.GroupNorm(8, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.time_proj = nn.Linear(embed_dim, out_channels)
        self.conv2 = nn.Sequential(
            nn.GroupNorm(8, out_channels),
            nn.SiLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, time_emb: torch.Tensor) -> torch.Tensor:
        """Return (batch, out_channels, height, width); time_emb: (batch, embed_dim)."""
        h = self.conv1(x)  # (batch, out_channels, height, width)
        h = h + self.time_proj(time_emb)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(h)


class TransformerBlock(nn.Module):
    """Self-attention over the positions of the latents, then cross-attention to the prompt.

    R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, section
    3.3: queries are from the latents, keys and values from the prompt.
    """

    def __init__(self, channels: int, embed_dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.self_attn = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(
            channels, num_heads, kdim=embed_dim, vdim=embed_dim, batch_first=True
        )

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return x, updated; tokens: (batch, NUM_TOKENS, embed_dim)."""
        h = x.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        query = self.norm1(h)
        h = h + self.self_attn(query, query, query, need_weights=False)[0]
        query = self.norm2(h)
        h = h + self.cross_attn(query, tokens, tokens, need_weights=False)[0]
        return h.transpose(1, 2).reshape(x.shape)  # (batch, channels, height, width)


class UNetBlock(nn.Module):
    """A ResnetBlock, then a TransformerBlock."""

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.resnet = ResnetBlock(in_channels, out_channels, embed_dim)
        self.transformer = TransformerBlock(out_channels, embed_dim)

    def forward(
        self, x: torch.Tensor, time_emb: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return (batch, out_channels, height, width)."""
        x = self.resnet(x, time_emb)  # (batch, out_channels, height, width)
        return self.transformer(x, tokens)


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
        self.conv_out = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, 2, 3, padding=1)
        )

    def forward(self, inputs: UNetInput) -> torch.Tensor:
        """Return the prediction: the noise or the velocity, as the scheduler's prediction_type."""
        time_emb = self.time_mlp(timestep_embedding(inputs.timesteps, self.embed_dim))
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
