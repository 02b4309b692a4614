"""What every method takes and gives."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

import instembed


class Batch(NamedTuple):
    image: Tensor  # (B, n, n)
    labels: Tensor  # (B, n, n), 0 = background
    depth: Tensor  # (B, n, n), 0 at the border of an instance to 1 at its deepest pixel
    valid: Tensor  # (B, n, n), 1 inside the image, 0 beyond its edge


class Maps(NamedTuple):
    """What the network gives for a batch, or for one image without the batch dimension."""

    embeddings: Tensor  # (B, D, H, W)
    foreground: Tensor  # (B, H, W) logits
    own: Tensor  # (B, E, H, W): what the method asked for


class Instances(NamedTuple):
    labels: Tensor  # (H, W) int64, 0 = none, 1..K
    scores: Tensor  # (K,): how sure the method is of each


@dataclass
class Method(ABC):
    """One way of embedding pixels: losses, the grouping that suits them, and their settings."""

    minutes: float  # of training
    channels: int  # of the embedding
    coordinate_unit: float | None  # pixels per unit of the first two channels; None: free channels only
    own_maps: int  # that the network is to give beside the embedding and the foreground

    @abstractmethod
    def losses(self, maps: Maps, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Scalars to add up. Progress is the elapsed fraction of the training time."""

    @abstractmethod
    def group(self, maps: Maps, mask: Tensor) -> Instances:
        """Instances of the pixels in the mask (H, W) of one image."""

    def shown(self, maps: Maps) -> list[Tensor]:
        """Maps (H, W) in 0..1 of one image, to draw beside its instances."""
        return []


def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Binary, the mean over the valid pixels."""
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (each * valid).sum() / valid.sum()


def mean_foreground(labels: Tensor, maps: Maps) -> Tensor:
    """(K,) scores of the instances 1..K of labels (H, W), for methods that have no better one."""
    return instembed.instance_pool(maps.foreground.sigmoid()[None, None], labels[None]).features[0, :, 0]
