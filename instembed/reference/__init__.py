"""Every op in plain, differentiable PyTorch: what the kernels are tested against. Slow, readable, right."""

from instembed.reference.discriminative import discriminative_loss, discriminative_terms
from instembed.reference.instance_pool import instance_pool
from instembed.reference.label_statistics import label_statistics
from instembed.reference.mean_shift import mean_shift

__all__ = ["discriminative_loss", "discriminative_terms", "instance_pool", "label_statistics", "mean_shift"]
