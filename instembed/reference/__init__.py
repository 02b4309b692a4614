"""Every op in plain, differentiable PyTorch: what the kernels are tested against. Slow, readable, right."""

from instembed.reference.associative_embedding import associative_embedding_loss, associative_embedding_terms
from instembed.reference.cosine_margin import cosine_margin_loss
from instembed.reference.discriminative import discriminative_loss, discriminative_terms
from instembed.reference.gather_at import gather_at
from instembed.reference.group_keypoints import group_keypoints
from instembed.reference.group_on_sphere import group_on_sphere
from instembed.reference.grow_seeds import grow_seeds, select_seeds
from instembed.reference.instance_pool import instance_pool
from instembed.reference.label_statistics import label_statistics
from instembed.reference.location_maps import read_location_maps
from instembed.reference.mean_shift import mean_shift
from instembed.reference.pairwise_similarity import pairwise_similarity_loss
from instembed.reference.recurrent_mean_shift import recurrent_mean_shift
from instembed.reference.sample_pixels import sample_pixels
from instembed.reference.seediness import seed_mask_iou, seediness_loss

__all__ = [
    "associative_embedding_loss",
    "associative_embedding_terms",
    "cosine_margin_loss",
    "discriminative_loss",
    "discriminative_terms",
    "gather_at",
    "group_keypoints",
    "group_on_sphere",
    "grow_seeds",
    "instance_pool",
    "label_statistics",
    "mean_shift",
    "pairwise_similarity_loss",
    "read_location_maps",
    "recurrent_mean_shift",
    "sample_pixels",
    "seed_mask_iou",
    "seediness_loss",
    "select_seeds",
]
