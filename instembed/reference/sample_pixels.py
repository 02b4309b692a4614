"""Random pixels of each instance in plain PyTorch: the definition that the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_pixels(
    labels: Tensor,
    samples: int,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_instances: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`instembed.sample_pixels`: the pixels with the smallest keys."""
    images = images_of(labels, offsets)
    words = torch.randint(-(2**63), 2**63 - 1, (len(images),), generator=generator, device=labels.device)
    rows: list[list[Tensor]] = []
    first = 0
    for ids, word in zip(images, words, strict=True):
        pixels = torch.arange(len(ids), device=ids.device)
        keys = pixel_keys(word, pixels)
        rows.append([])
        for id_ in ids.unique().tolist():
            if id_ not in (background, ignore_index):
                own = pixels[ids == id_]
                chosen = own[keys[own].argsort(stable=True)[:samples]]
                rows[-1].append(first + chosen.sort().values)
        first += len(ids) if labels.dim() == 1 else 0
    capacity = max([len(row) for row in rows], default=0) if max_instances is None else max_instances
    indices = torch.full((len(images), capacity, samples), -1, device=labels.device)
    for b, row in enumerate(rows):
        for c, chosen in enumerate(row):
            indices[b, c, : len(chosen)] = chosen
    return indices, indices >= 0


def pixel_keys(word: Tensor, pixels: Tensor) -> Tensor:
    """SplitMix64 of each pixel, counted within its image, in the order of unsigned integers."""
    x = word + (pixels + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return (x ^ _shifted(x, 31)) ^ _signed(1 << 63)


def images_of(labels: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """The flat ids of each image."""
    if labels.dim() != 1:
        return list(labels.flatten(1).to(torch.int64))
    ids = labels.to(torch.int64)
    return [ids] if offsets is None else list(ids.split(offsets.diff().tolist()))


def _signed(number: int) -> int:
    """The int64 of the same bits."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
