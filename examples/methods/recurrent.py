"""Recurrent pixel embedding (Kong and Fowlkes 2018): trained through the mean shift that groups it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import instembed
from methods.common import Batch, Instances, Maps, Method, mean_foreground


@dataclass
class Recurrent(Method):
    """The network says by how much to move each pixel; where it lands is a direction on the sphere.

    Where pixels land becomes a direction by waves along many axes: two of them are at a cosine of about
    ``exp(-distance^2 / 2)``, in units of ``coordinate_unit``. So places a few units apart are orthogonal, as
    the loss wants instances to be, and mean shift on the sphere is mean shift of places.
    The loss is taken before the shift and after each iteration, and gradients go through all of them.
    """

    minutes: float = 8.0
    channels: int = 2
    coordinate_unit: float | None = 5.0
    own_maps: int = 0
    waves: int = 12  # half the dimensions of the sphere's space
    iterations: int = 3  # in training
    group_iterations: int = 3
    bandwidth: float = 0.3  # on the sphere: 1.5 pixels
    margin: float = 0.6  # a little wider than orthogonal: waves are not exactly so
    weight: float = 3.0
    stride: int = 3  # every third row and column takes part in training
    threshold: float = 0.9  # least cosine of neighbours that have converged
    min_points: int = 12  # least number of pixels that converge together

    def losses(self, maps: Maps, batch: Batch, progress: float) -> dict[str, Tensor]:
        every = slice(None, None, self.stride)
        labels = batch.labels[:, every, every]
        iterates = instembed.recurrent_mean_shift(
            self._directions(maps.embeddings[:, :, every, every]),
            self.bandwidth,
            iterations=self.iterations,
            mask=labels,
            tolerance=1e-4,
            return_all=True,
        )
        # The loss is a mean over instances or pairs of them, of which most are too far apart to matter: it
        # falls with their number.
        instances = torch.tensor([len(ids.unique()) for ids in labels])
        each = [
            instembed.cosine_margin_loss(
                points, labels, margin=self.margin, normalize=False, reduction="none"
            )
            for points in iterates
        ]
        return {"embedding": self.weight * (torch.stack(each) * instances).mean()}

    def group(self, maps: Maps, mask: Tensor) -> Instances:
        points = instembed.recurrent_mean_shift(
            self._directions(maps.embeddings[None]),
            self.bandwidth,
            iterations=self.group_iterations,
            mask=mask[None],
            tolerance=1e-4,
        )
        grouping = instembed.group_on_sphere(
            points,
            threshold=self.threshold,
            min_size=self.min_points,
            mask=mask[None],
            leftovers="nearest",
        )
        return Instances(grouping.labels[0], mean_foreground(grouping.labels[0], maps))

    def _directions(self, places: Tensor) -> Tensor:
        """(B, 2, H, W) places to unit vectors (B, 2 waves, H, W).

        Wave vectors are spread evenly over a normal distribution: a golden-angle spiral.
        """
        numbers = torch.arange(self.waves) + 0.5
        lengths = (-2 * (1 - numbers / self.waves).log()).sqrt()
        angles = numbers * math.pi * (3 - math.sqrt(5))
        vectors = lengths * torch.stack([angles.cos(), angles.sin()])
        phases = torch.einsum("bdyx,dk->bkyx", places, vectors)
        return torch.cat([phases.cos(), phases.sin()], dim=1) / math.sqrt(self.waves)
