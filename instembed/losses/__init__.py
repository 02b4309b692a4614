"""Losses: one module each, with its function, its nn.Module and its op."""

from instembed.losses.discriminative import (
    DiscriminativeLoss,
    DiscriminativeTerms,
    discriminative_loss,
    discriminative_terms,
)

__all__ = ["DiscriminativeLoss", "DiscriminativeTerms", "discriminative_loss", "discriminative_terms"]
