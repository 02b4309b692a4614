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


LAYOUTS = {
    "planar": lambda maps: maps,
    "channels_last": lambda maps: maps.contiguous(memory_format=torch.channels_last),
    "cropped": lambda maps: maps[:, :, 1:, 3:],
    "transposed": lambda maps: maps.transpose(2, 3),
}
"""Embeddings (B, D, H, W) in the layouts that CUDA kernels tell apart."""


def labels_of_blocks(*shape: int, ids: int = 6, size: int = 4) -> Tensor:
    """Of that shape: blocks of one id, the same in each image but for a tenth of the pixels."""
    coarse = torch.randint(0, ids, [(n + size - 1) // size for n in shape[1:]])
    for axis in range(coarse.dim()):
        coarse = coarse.repeat_interleave(size, axis)
    coarse = coarse[tuple(slice(n) for n in shape[1:])]
    return torch.where(torch.rand(shape) < 0.1, torch.randint(0, ids, shape), coarse)
