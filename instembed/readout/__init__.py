"""Read-outs: what is taken from labels and features once instances are known."""

from instembed.readout.detections import coco_results, detections
from instembed.readout.gather_at import gather_at
from instembed.readout.instance_pool import InstanceFeatures, InstanceFeaturesWithIds, instance_pool
from instembed.readout.label_statistics import LabelStatistics, label_statistics
from instembed.readout.location_maps import (
    BODY_15,
    COCO_17,
    Skeleton,
    location_read_points,
    read_location_maps,
)

__all__ = [
    "BODY_15",
    "COCO_17",
    "InstanceFeatures",
    "InstanceFeaturesWithIds",
    "LabelStatistics",
    "Skeleton",
    "coco_results",
    "detections",
    "gather_at",
    "instance_pool",
    "label_statistics",
    "location_read_points",
    "read_location_maps",
]
