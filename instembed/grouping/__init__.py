"""Groupings: one module a method. Each returns a :class:`Grouping`."""

from instembed.grouping.mean_shift import Grouping, mean_shift

__all__ = ["Grouping", "mean_shift"]
