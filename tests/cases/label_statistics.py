from __future__ import annotations

import torch

from tests.cases.common import GOOD, BadInput, OpCases, random_labels

OPCHECK: OpCases = {
    "instembed::label_statistics": [
        lambda: (random_labels(2, 5, 6), 0, None, 8),
        lambda: (random_labels(2, 5, 6), None, 3, None),
        lambda: (random_labels(2, 6, 5).to(torch.uint8).transpose(1, 2), 0, 255, None),
        lambda: (random_labels(1, 3, 4, 5).int(), 0, None, 8),
        lambda: (random_labels(2, 7), 0, None, None),
        lambda: (random_labels(0, 5, 6), 0, None, None),
    ],
}


def _label_statistics_cases() -> list[BadInput]:
    labels = GOOD[1]
    full = torch.arange(6).reshape(1, 2, 3)
    return [
        BadInput("no tensor", TypeError, "labels", ([[[1]]],), shows="list"),
        BadInput("float labels", TypeError, "labels", (labels.float(),), shows="torch.float32"),
        BadInput("bool labels", TypeError, "labels", (labels.bool(),), shows="torch.bool"),
        BadInput("sparse labels", TypeError, "labels", (labels.to_sparse(),)),
        BadInput("labels rank 0", ValueError, "labels", (labels[0, 0, 0],), shows="()"),
        BadInput("labels rank 1", ValueError, "labels", (labels[0, 0],), shows="(5,)"),
        BadInput("labels rank 5", ValueError, "labels", (labels[None, None],), shows="(1, 1, 2, 4, 5)"),
        BadInput("large background", ValueError, "background", (labels,), {"background": 2**63}, str(2**63)),
        BadInput("float background", TypeError, "background", (labels,), {"background": 0.5}, "float"),
        BadInput(
            "ignore_index as text", TypeError, "ignore_index", (labels,), {"ignore_index": "255"}, "str"
        ),
        BadInput("no capacity", ValueError, "max_instances", (labels,), {"max_instances": 0}, "0"),
        BadInput("float capacity", TypeError, "max_instances", (labels,), {"max_instances": 5.0}, "float"),
        BadInput("capacity", ValueError, "max_instances=4", (full,), {"max_instances": 4}, "5 instances"),
    ]


BAD_INPUT = {
    "label_statistics": _label_statistics_cases(),
}
