"""Deep metric learning, and instances that grow from seeds (Fathi et al. 2017)."""

from dataclasses import dataclass

import torch
from torch import Tensor

import instembed
from methods.common import Batch, Instances, Maps, Method

THRESHOLDS = (0.25, 0.5, 0.75, 0.9)  # similarities at which masks grow


@dataclass
class DeepMetric(Method):
    """Beside the embedding the network learns which pixels make good seeds, and at which similarity.

    ``instembed.grow_seeds`` picks seeds and grows a mask from each; the seediness of a seed is the confidence
    in its instance. Foreground pixels in no mask join the most similar seed.
    """

    minutes: float = 7.5
    channels: int = 6
    # Instances end up at least 1.4 units = 6 pixels apart, where the similarity is below the least threshold.
    coordinate_unit: float | None = 4.0
    own_maps: int = 2 * len(THRESHOLDS)  # logits of background and nucleus at each
    samples: int = 24  # pixels of an instance in the loss of the embedding
    seed_samples: int = 8  # and in the loss of the seediness
    ramp: float = 0.3  # of the training, until the weight of seediness is full
    num_seeds: int = 256
    min_seediness: float = 0.3
    overlap: float = 0.15  # masks of one nucleus at several thresholds, and halves of a large one
    min_mask: int = 16  # pixels

    def losses(self, maps: Maps, batch: Batch, progress: float) -> dict[str, Tensor]:
        embedding = instembed.pairwise_similarity_loss(
            maps.embeddings, batch.labels, samples=self.samples, reduction="none"
        )
        # The loss is a mean over pairs of instances, of which only neighbours have something to learn: times
        # the number of instances it is a mean over instances.
        counts = torch.tensor([len(labels.unique()) for labels in batch.labels])
        # Masks grow within the foreground: the background, whose embeddings mean nothing, counts in none.
        seediness = instembed.seediness_loss(
            self._logits(maps.own),
            maps.embeddings,
            batch.labels,
            samples=self.seed_samples,
            background_samples=0,
            thresholds=THRESHOLDS,
            background=None,
            ignore_index=0,
        )
        weight = instembed.seediness_weight(round(1000 * progress), round(1000 * self.ramp))
        return {"embedding": (embedding * counts).mean(), "seediness": weight * seediness}

    def group(self, maps: Maps, mask: Tensor) -> Instances:
        grown = instembed.grow_seeds(
            maps.embeddings[None],
            self._logits(maps.own[None]).softmax(2),
            thresholds=THRESHOLDS,
            num_seeds=self.num_seeds,
            min_seediness=self.min_seediness,
            min_size=self.min_mask,
            overlap=self.overlap,
            mask=mask[None],
        )
        labels, count = grown.labels[0], int(grown.num_instances[0])
        rest = mask & (labels == 0)
        if count:
            points = maps.embeddings[:, rest].t()
            labels[rest] = 1 + torch.cdist(points, grown.centers[0, :count]).argmin(dim=1)
        return Instances(labels, grown.scores[0, :count])

    def shown(self, maps: Maps) -> list[Tensor]:
        """The seediness of each pixel, the largest over the thresholds, where there is foreground."""
        seediness = self._logits(maps.own[None]).softmax(2)[0, :, 1].amax(0)
        return [seediness * maps.foreground.sigmoid()]

    @staticmethod
    def _logits(own: Tensor) -> Tensor:
        """(B, T, 2, H, W). The head of the network is a convolution of size 1, as SeedinessHead is."""
        return own.unflatten(1, (len(THRESHOLDS), 2))
