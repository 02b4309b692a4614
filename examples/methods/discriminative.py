"""Discriminative loss and mean shift (De Brabandere, Neven and Van Gool 2017)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import instembed
from methods.common import Batch, Instances, Maps, Method, cross_entropy, mean_foreground


@dataclass
class Discriminative(Method):
    """Beside the embedding the network learns how deep in its instance a pixel lies.

    ``instembed.mean_shift`` clusters the deep pixels, deepest first: pixels on a border between two instances
    cannot seed a spurious instance. Every other foreground pixel then joins the nearest centre.
    """

    minutes: float = 4.5
    channels: int = 4
    # Centres are pushed 2 * delta_dist = 3 units = 12 pixels apart, about the diameter of a small nucleus.
    coordinate_unit: float | None = 4.0
    own_maps: int = 1  # depth
    core: float = 0.4  # least depth of a pixel that takes part in the clustering
    bandwidth: float = 1.7  # centres are trained to be at least 3 apart, pixels within 0.5 of theirs
    min_core: int = 5  # least number of core pixels of an instance

    def losses(self, maps: Maps, batch: Batch, progress: float) -> dict[str, Tensor]:
        return {
            # beta: coordinates already separate most pairs of instances, so the few that touch need more
            # weight. gamma: coordinates are not meant to be near the origin.
            "embedding": instembed.discriminative_loss(maps.embeddings, batch.labels, beta=3.0, gamma=0.0),
            "depth": 2 * cross_entropy(maps.own[:, 0], batch.depth, batch.valid),
        }

    def group(self, maps: Maps, mask: Tensor) -> Instances:
        depth = maps.own[0].sigmoid().flatten()
        pixels = mask.flatten().nonzero()[:, 0]
        pixels = pixels[depth[pixels].argsort(descending=True, stable=True)]
        points, core = maps.embeddings.flatten(1)[:, pixels], depth[pixels] > self.core
        labels = torch.zeros_like(depth, dtype=torch.int64)
        if core.any():
            labels[pixels] = self._cluster(points, core)
        labels = labels.view(mask.shape)
        return Instances(labels, mean_foreground(labels, maps))

    def _cluster(self, points: Tensor, core: Tensor) -> Tensor:
        """Points (D, N), the best seeds first, and which of them are core (N,), to labels (N,), 0 = none."""
        grouping = instembed.mean_shift(
            points[None], self.bandwidth, mask=core[None], min_size=self.min_core, leftovers="nearest"
        )
        labels = grouping.labels[0]
        count = int(grouping.num_instances[0])
        if count:
            rest = labels == 0
            labels[rest] = 1 + torch.cdist(points[:, rest].t(), grouping.centers[0, :count]).argmin(dim=1)
        return labels
