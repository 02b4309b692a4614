from __future__ import annotations

from typing import Any

import torch

from tests.cases.common import BadInput, OpCases, random_embeddings


def _keypoints(
    shape: tuple[int, ...], dims: int = 1, dtype: torch.dtype = torch.float32, nms: int = 3
) -> tuple[Any, ...]:
    images, joints, *size = shape
    heatmaps = torch.rand(shape).to(dtype)
    tags = random_embeddings(images, joints * dims, *size, dtype=dtype)
    return (heatmaps, tags, 4, 0.1, 1.0, nms, list(reversed(range(joints))), True, True)


OPCHECK: OpCases = {
    "instembed::group_keypoints": [
        lambda: _keypoints((2, 3, 8, 9)),
        lambda: _keypoints((2, 3, 8, 9), dims=2, dtype=torch.float64, nms=1),
        lambda: _keypoints((1, 1, 5, 4), dtype=torch.float16),
        lambda: (
            torch.rand(2, 3, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_(),
            *_keypoints((2, 3, 8, 9))[1:],
        ),
        lambda: _keypoints((0, 3, 8, 9)),
    ],
}


def _group_keypoints_cases() -> list[BadInput]:
    maps = torch.zeros(2, 3, 4, 5)
    good = (maps, maps)
    cases = [
        BadInput("no tensor", TypeError, "heatmaps", ([1.0], maps), shows="list"),
        BadInput("no tag tensor", TypeError, "tags", (maps, None), shows="NoneType"),
        BadInput("integer heatmaps", TypeError, "heatmaps", (maps.int(), maps), shows="torch.int32"),
        BadInput("bool tags", TypeError, "tags", (maps, maps.bool()), shows="torch.bool"),
        BadInput("sparse heatmaps", TypeError, "heatmaps", (maps.to_sparse(), maps)),
        BadInput("heatmaps rank 3", ValueError, "heatmaps", (maps[0], maps), shows="(3, 4, 5)"),
        BadInput("tags rank 5", ValueError, "tags", (maps, maps[..., None]), shows="(2, 3, 4, 5, 1)"),
        BadInput("no joint", ValueError, "heatmaps", (maps[:, :0], maps), shows="(2, 0, 4, 5)"),
        BadInput("no tag dimension", ValueError, "tags", (maps, maps[:, :0]), shows="(2, 0, 4, 5)"),
        BadInput("tags of two joints", ValueError, "tags", (maps, maps[:, :2]), shows="(2, 2, 4, 5)"),
        BadInput("tags of another size", ValueError, "tags", (maps, maps[..., :4]), shows="(2, 3, 4, 4)"),
        BadInput("tags batch", ValueError, "tags", (maps, maps[:1]), shows="(1, 3, 4, 5)"),
        BadInput("tags device", ValueError, "tags", (maps, maps.to("meta")), shows="meta"),
        BadInput("no people", ValueError, "max_people", good, {"max_people": 0}, "0"),
        BadInput("too many people", ValueError, "max_people", good, {"max_people": 2**40}, str(2**40)),
        BadInput("float people", TypeError, "max_people", good, {"max_people": 3.0}, "float"),
        BadInput("even window", ValueError, "nms", good, {"nms": 4}, "4"),
        BadInput("no window", ValueError, "nms", good, {"nms": -1}, "-1"),
        BadInput("adjust as a number", TypeError, "adjust", good, {"adjust": 1}, "int"),
        BadInput("refine as text", TypeError, "refine", good, {"refine": "yes"}, "str"),
        BadInput("order beyond the joints", ValueError, "joint_order", good, {"joint_order": [0, 1, 3]}, "3"),
        BadInput("order as text", TypeError, "joint_order", good, {"joint_order": "012"}, "str"),
        BadInput("order of floats", TypeError, "joint_order", good, {"joint_order": [0.0, 1, 2]}, "float"),
        BadInput("short order", ValueError, "joint_order", good, {"joint_order": [0, 1]}, "[0, 1]"),
        BadInput("order repeats", ValueError, "joint_order", good, {"joint_order": [0, 1, 1]}, "[0, 1, 1]"),
    ]
    for name in ("peak_threshold", "tag_threshold"):
        cases += [
            BadInput(f"negative {name}", ValueError, name, good, {name: -0.1}, "-0.1"),
            BadInput(f"NaN {name}", ValueError, name, good, {name: float("nan")}, "nan"),
            BadInput(f"{name} as text", TypeError, name, good, {name: "1"}, "str"),
        ]
    return cases


BAD_INPUT = {
    "group_keypoints": _group_keypoints_cases(),
}
