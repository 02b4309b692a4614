"""Tensors of one shape that lie in memory in different ways."""

from __future__ import annotations

import torch
from torch import Tensor


def layouts(channels: int, height: int, width: int) -> dict[str, Tensor]:
    """(2, channels, height, width) each."""
    base = torch.randn(2, channels, height, width)
    return {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "cropped": torch.randn(2, channels, height + 7, width + 13)[:, :, 3 : height + 3, 5 : width + 5],
        "strided": torch.randn(2, channels, height, 2 * width)[..., ::2],
        "transposed": torch.randn(2, channels, width, height).transpose(2, 3),
        "channel_slice": torch.randn(2, channels + 3, height, width)[:, 2 : channels + 2],
        "channel_step": torch.randn(2, 2 * channels, height, width)[:, ::2],
        "batch_slice": torch.randn(5, channels, height, width)[::3],
        "expanded": torch.randn(2, channels, height, 1).expand(base.shape),
    }
