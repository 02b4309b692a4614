"""Ways of embedding pixels: what each trains, and how it groups. A new one is a module and a name below."""

from collections.abc import Callable

from methods.common import Batch, Instances, Maps, Method
from methods.deep_metric import DeepMetric
from methods.discriminative import Discriminative
from methods.recurrent import Recurrent

METHODS: dict[str, Callable[..., Method]] = {
    "deep-metric": DeepMetric,
    "discriminative": Discriminative,
    "recurrent": Recurrent,
}

__all__ = ["METHODS", "Batch", "Instances", "Maps", "Method"]
