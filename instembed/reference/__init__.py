"""Every op in plain, differentiable PyTorch: what the kernels are tested against. Slow, readable, right."""

from instembed.reference.discriminative import discriminative_loss, discriminative_terms

__all__ = ["discriminative_loss", "discriminative_terms"]
