"""Instance embedding for PyTorch: losses, groupings and read-outs as fused native ops."""

__version__ = "0.1.0"

from instembed import reference
from instembed._native import cuda_available, set_overflow_checks
from instembed.grouping import (
    Grouping,
    Poses,
    PosesWithDetails,
    RecurrentMeanShift,
    SeededGrouping,
    Seeds,
    group_keypoints,
    group_on_sphere,
    grow_seeds,
    mean_shift,
    recurrent_mean_shift,
    select_seeds,
)
from instembed.losses import (
    AssociativeEmbeddingLoss,
    AssociativeEmbeddingTerms,
    CosineMarginLoss,
    DiscriminativeLoss,
    DiscriminativeTerms,
    PairwiseSimilarityLoss,
    SampledPixels,
    SeedinessHead,
    associative_embedding_loss,
    associative_embedding_terms,
    cosine_margin_loss,
    discriminative_loss,
    discriminative_terms,
    pairwise_similarity_loss,
    sample_pixels,
    seed_mask_iou,
    seediness_loss,
    seediness_weight,
)
from instembed.readout import (
    InstanceFeatures,
    InstanceFeaturesWithIds,
    LabelStatistics,
    coco_results,
    detections,
    gather_at,
    instance_pool,
    label_statistics,
    location_read_points,
    read_location_maps,
)

__all__ = [
    "AssociativeEmbeddingLoss",
    "AssociativeEmbeddingTerms",
    "CosineMarginLoss",
    "DiscriminativeLoss",
    "DiscriminativeTerms",
    "Grouping",
    "InstanceFeatures",
    "InstanceFeaturesWithIds",
    "LabelStatistics",
    "MeanShift",
    "PairwiseSimilarityLoss",
    "Poses",
    "PosesWithDetails",
    "RecurrentMeanShift",
    "SampledPixels",
    "SeededGrouping",
    "SeedinessHead",
    "Seeds",
    "associative_embedding_loss",
    "associative_embedding_terms",
    "coco_results",
    "cosine_margin_loss",
    "cuda_available",
    "detections",
    "discriminative_loss",
    "discriminative_terms",
    "gather_at",
    "group_keypoints",
    "group_on_sphere",
    "grow_seeds",
    "instance_pool",
    "label_statistics",
    "location_read_points",
    "mean_shift",
    "pairwise_similarity_loss",
    "read_location_maps",
    "recurrent_mean_shift",
    "reference",
    "sample_pixels",
    "seed_mask_iou",
    "seediness_loss",
    "seediness_weight",
    "select_seeds",
    "set_overflow_checks",
]


def __getattr__(name: str) -> object:
    if name == "MeanShift":  # on first use: its base classes take a second to import
        from instembed.grouping.estimator import MeanShift

        return MeanShift
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
