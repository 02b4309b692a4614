"""Read-outs: what is taken from labels and features once instances are known."""

from instembed.readout.detections import coco_results, detections
from instembed.readout.instance_pool import InstanceFeatures, instance_pool
from instembed.readout.label_statistics import LabelStatistics, label_statistics

__all__ = [
    "InstanceFeatures",
    "LabelStatistics",
    "coco_results",
    "detections",
    "instance_pool",
    "label_statistics",
]
