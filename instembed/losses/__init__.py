"""Losses: one module each, with its function, its nn.Module and its op."""

from instembed.losses.associative_embedding import (
    AssociativeEmbeddingLoss,
    AssociativeEmbeddingTerms,
    associative_embedding_loss,
    associative_embedding_terms,
)
from instembed.losses.cosine_margin import CosineMarginLoss, cosine_margin_loss
from instembed.losses.discriminative import (
    DiscriminativeLoss,
    DiscriminativeTerms,
    discriminative_loss,
    discriminative_terms,
)
from instembed.losses.pairwise_similarity import PairwiseSimilarityLoss, pairwise_similarity_loss
from instembed.losses.sample_pixels import SampledPixels, sample_pixels
from instembed.losses.seediness import SeedinessHead, seed_mask_iou, seediness_loss, seediness_weight

__all__ = [
    "AssociativeEmbeddingLoss",
    "AssociativeEmbeddingTerms",
    "CosineMarginLoss",
    "DiscriminativeLoss",
    "DiscriminativeTerms",
    "PairwiseSimilarityLoss",
    "SampledPixels",
    "SeedinessHead",
    "associative_embedding_loss",
    "associative_embedding_terms",
    "cosine_margin_loss",
    "discriminative_loss",
    "discriminative_terms",
    "pairwise_similarity_loss",
    "sample_pixels",
    "seed_mask_iou",
    "seediness_loss",
    "seediness_weight",
]
