from __future__ import annotations

import torch

from tests.cases.common import BadInput


def _location_maps_cases() -> list[BadInput]:
    maps, keypoints = torch.zeros(2, 45, 4, 5), torch.zeros(2, 7, 15, 2)
    valid = torch.ones(2, 7, 15, dtype=torch.int64)
    good, other = (maps, keypoints, valid), (maps[:, :12], keypoints[:, :, :4], valid[:, :, :4])
    return [
        BadInput("no tensor", TypeError, "maps", ([1.0], keypoints, valid), shows="list"),
        BadInput("integer maps", TypeError, "maps", (maps.int(), keypoints, valid), shows="torch.int32"),
        BadInput("maps rank", ValueError, "maps", (maps[0], keypoints, valid), shows="(45, 4, 5)"),
        BadInput("maps channels", ValueError, "maps", (maps[:, :44], keypoints, valid), shows="(2, 44,"),
        BadInput("maps batch", ValueError, "maps", (maps[:1], keypoints, valid), shows="(1, 45, 4, 5)"),
        BadInput("maps device", ValueError, "keypoints", (maps.to("meta"), keypoints, valid), shows="meta"),
        BadInput("no keypoint tensor", TypeError, "keypoints", (maps, None, valid)),
        BadInput("bool keypoints", TypeError, "keypoints", (maps, keypoints.bool(), valid)),
        BadInput("keypoints rank", ValueError, "keypoints", (maps, keypoints[0], valid)),
        BadInput("keypoints axes", ValueError, "keypoints", (maps, torch.zeros(2, 7, 15, 3), valid)),
        BadInput("no joint", ValueError, "keypoints", (maps, keypoints[:, :, :0], valid[:, :, :0])),
        BadInput("float valid", TypeError, "valid", (maps, keypoints, valid.float())),
        BadInput("valid shape", ValueError, "valid", (maps, keypoints, valid[:, :6]), shows="(2, 6"),
        BadInput("unknown limbs", ValueError, "limbs", other, {"root": [0]}, "4 joints"),
        BadInput("unknown root", ValueError, "root", other, {"limbs": [[0]]}, "4 joints"),
        BadInput("limbs as text", TypeError, "limbs", good, {"limbs": "arm"}, "str"),
        BadInput("a limb as number", TypeError, "limbs", good, {"limbs": [1, 2]}, "int"),
        BadInput("float in a limb", TypeError, "limbs", good, {"limbs": [[1.0]]}, "float"),
        BadInput("limb too high", ValueError, "limbs", good, {"limbs": [[3, 15]]}, "15"),
        BadInput("negative root", ValueError, "root", good, {"root": [-1]}, "-1"),
        BadInput("root as number", TypeError, "root", good, {"root": 1}, "int"),
        BadInput("no way to read", ValueError, "root", good, {"root": [], "limbs": [[0, 1]]}, "joint 2"),
    ]


def _read_points_cases() -> list[BadInput]:
    keypoints, valid = torch.zeros(2, 7, 15, 2), torch.ones(2, 7, 15, dtype=torch.int64)
    return [
        BadInput("size as number", TypeError, "size", (keypoints, valid, 5), shows="int"),
        BadInput("size of three", ValueError, "size", (keypoints, valid, (4, 5, 6)), shows="6"),
        BadInput("negative size", ValueError, "size", (keypoints, valid, (4, -5)), shows="-5"),
        BadInput("float size", TypeError, "size", (keypoints, valid, (4.0, 5)), shows="float"),
    ]


BAD_INPUT = {
    "read_location_maps": _location_maps_cases(),
    "location_read_points": _read_points_cases(),
}
