"""Groupings: one module a method."""

from instembed.grouping.group_keypoints import Poses, PosesWithDetails, group_keypoints
from instembed.grouping.group_on_sphere import group_on_sphere
from instembed.grouping.grow_seeds import SeededGrouping, grow_seeds
from instembed.grouping.mean_shift import Grouping, mean_shift
from instembed.grouping.recurrent_mean_shift import RecurrentMeanShift, recurrent_mean_shift
from instembed.grouping.select_seeds import Seeds, select_seeds

__all__ = [
    "Grouping",
    "Poses",
    "PosesWithDetails",
    "RecurrentMeanShift",
    "SeededGrouping",
    "Seeds",
    "group_keypoints",
    "group_on_sphere",
    "grow_seeds",
    "mean_shift",
    "recurrent_mean_shift",
    "select_seeds",
]
