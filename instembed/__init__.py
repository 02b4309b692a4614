"""Instance embedding for PyTorch: losses, groupings and read-outs as fused native ops."""

__version__ = "0.1.0"

from instembed.losses import DiscriminativeLoss, DiscriminativeTerms, discriminative_loss, discriminative_terms

__all__ = [
    "DiscriminativeLoss",
    "DiscriminativeTerms",
    "discriminative_loss",
    "discriminative_terms",
]
