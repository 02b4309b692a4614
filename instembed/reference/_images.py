"""One shape for the definitions: the points of each image."""

from __future__ import annotations

from torch import Tensor


def split_images(values: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """The (N, D) points of each image, from (B, D, *spatial), or (N, D) with the offsets of ragged images."""
    if values.dim() != 2:
        return [image.flatten(1).T for image in values]
    if offsets is None:
        return [values]
    return list(values.split(offsets.diff().tolist()))
