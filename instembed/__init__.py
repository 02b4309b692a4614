"""Instance embedding for PyTorch: losses, groupings and read-outs as fused native ops."""

__version__ = "0.1.0"

from instembed import reference
from instembed.grouping import Grouping, mean_shift
from instembed.losses import (
    DiscriminativeLoss,
    DiscriminativeTerms,
    discriminative_loss,
    discriminative_terms,
)
from instembed.readout import (
    InstanceFeatures,
    LabelStatistics,
    coco_results,
    detections,
    instance_pool,
    label_statistics,
)

__all__ = [
    "DiscriminativeLoss",
    "DiscriminativeTerms",
    "Grouping",
    "InstanceFeatures",
    "LabelStatistics",
    "MeanShift",
    "coco_results",
    "detections",
    "discriminative_loss",
    "discriminative_terms",
    "instance_pool",
    "label_statistics",
    "mean_shift",
    "reference",
]


def __getattr__(name: str) -> object:
    if name == "MeanShift":  # on first use: its base classes take a second to import
        from instembed.grouping.estimator import MeanShift

        return MeanShift
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
