"""Groupings: one module a method."""

from instembed.grouping.group_keypoints import Poses, group_keypoints
from instembed.grouping.mean_shift import Grouping, mean_shift

__all__ = ["Grouping", "Poses", "group_keypoints", "mean_shift"]
