"""MAGVIT-v2, Show-o's image tokenizer: pixels to codes of 13 bits and back (arXiv 2310.05737).

The parameters have the names of upstream's checkpoint (showlab/magvitv2), so that its weights load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Geometry:
    """Sizes. The defaults are upstream's.

    channels: at full resolution, a multiple of 32. bits: of a code. widths: multiples of `channels`, from the finest level to
    the coarsest. blocks: residual blocks of each level, in the same order. Between two levels, the picture is halved.
    """

    channels: int = 128
    bits: int = 13
    encoder_widths: tuple[int, ...] = (1, 2, 2, 4, 4)
    encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
    decoder_widths: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)

    @property
    def patch(self) -> int:
        """Pixels along the side of a code."""
        return 2 ** (len(self.encoder_widths) - 1)


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class Block(nn.Module):
    """A residual block from `inputs` to `width` channels."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        if inputs != width:
            self.nin_shortcut = nn.Conv2d(inputs, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Attention with one head among all places of a picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(width, width), Attention(width), Block(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """Halve a picture with a strided convolution, or double it and convolve."""

    def __init__(self, width: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.conv = nn.Conv2d(width, width, 3, stride=2) if halve else nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.halve:
            return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and below only, as upstream
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next one if there is one."""

    def __init__(self, inputs: int, width: int, blocks: int, resample: str | None) -> None:
        super().__init__()
        widths = [inputs] + [width] * blocks
        self.block = nn.ModuleList(Block(one, other) for one, other in pairwise(widths))
        self.resample = resample
        if resample:
            self.add_module(resample, Resample(widths[-1], halve=resample == "downsample"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = block(x)
        return self.get_submodule(self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        levels = list(zip(geometry.encoder_widths, geometry.encoder_blocks, strict=True))
        width = geometry.channels
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (multiple, blocks) in enumerate(levels):
            wider = geometry.channels * multiple if blocks else width
            self.down.append(Level(width, wider, blocks, "downsample" if level < len(levels) - 1 else None))
            width = wider
        self.mid = Middle(width)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, geometry.bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(geometry.bits, geometry.bits, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        levels = list(zip(geometry.decoder_widths, geometry.decoder_blocks, strict=True))
        width = geometry.channels * geometry.decoder_widths[-1]
        self.post_quant_conv = nn.Conv2d(geometry.bits, geometry.bits, 1)
        self.conv_in = nn.Conv2d(geometry.bits, width, 3, padding=1)
        self.mid = Middle(width)
        up = []
        for level in reversed(range(len(levels))):
            multiple, blocks = levels[level]
            wider = geometry.channels * multiple if blocks else width
            up.append(Level(width, wider, blocks, "upsample" if level else None))
            width = wider
        self.up = nn.ModuleList(up[::-1])  # stored from the finest level, run from the coarsest
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(latents)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Magvit(nn.Module):
    """The tokenizer. A code has a bit for each channel of the latent, channel 0 the highest, set where that is positive."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.encoder, self.decoder = Encoder(geometry), Decoder(geometry)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the codes, int64 `[n, places]` in raster order, of pixels float32 `[n, 3, h, w]` in [-1, 1]."""
        return self.quantise(self.encoder(pixels)).flatten(1)

    def quantise(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the codes, int64 `[n, h, w]`, of latents `[n, bits, h, w]`.

        The sum is one of integers: in bfloat16, 8,191 would become 8,192.
        """
        shifts = torch.arange(self.geometry.bits - 1, -1, -1, device=latents.device)
        return ((latents > 0).long() << shifts[:, None, None]).sum(1)

    def latents(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the latents of codes int64 `[n, places]`, -1 or 1 for each bit, float32 `[n, bits, side, side]`."""
        side = int(codes.shape[1] ** 0.5)
        shifts = torch.arange(self.geometry.bits - 1, -1, -1, device=codes.device)
        bits = (codes.unflatten(1, (side, side))[:, None] >> shifts[:, None, None]) & 1
        return 2 * bits.to(self.decoder.conv_in.weight.dtype) - 1

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return pixels, float32 `[n, 3, h, w]` in about [-1, 1], of codes int64 `[n, places]`."""
        return self.decoder(self.latents(codes))
