"""Mean-shift grouping with scikit-learn's interface (``pip install instembed[sklearn]``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from instembed.grouping.mean_shift import _checked_groups

try:
    from sklearn.base import BaseEstimator, ClusterMixin
    from sklearn.cluster import estimate_bandwidth
    from sklearn.metrics import pairwise_distances_argmin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    _missing: ImportError | None = error
    if not TYPE_CHECKING:

        class BaseEstimator:
            pass

        class ClusterMixin:
            pass

else:
    _missing = None


class MeanShift(ClusterMixin, BaseEstimator):
    """Mean-shift clustering of (n_samples, n_features) points; see :func:`instembed.mean_shift`.

    Args:
        bandwidth: radius in units of the features. None: ``sklearn.cluster.estimate_bandwidth``, which takes
            time and memory quadratic in the number of samples.
        seeding: "peel" (default), or "all", which is ``sklearn.cluster.MeanShift(cluster_all=False)``.
        min_size: a cluster of fewer samples is none, and its samples become leftovers.
        leftovers: "noise" labels samples of no cluster -1; "nearest" gives them to the nearest centre.
        max_iter, tol: as in :func:`instembed.mean_shift` (300 and 1e-3, scikit-learn's).

    Attributes:
        cluster_centers_: (n_clusters, n_features).
        labels_: (n_samples,) int64, -1 for noise.
        n_iter_: shifts of the longest trajectory.
        bandwidth_: the bandwidth that was used.

    Raises:
        ImportError: on construction, if scikit-learn (1.6 or later) is missing.
        TypeError, ValueError: from :meth:`fit`, for wrong parameters or data.
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        *,
        seeding: str = "peel",
        min_size: int = 1,
        leftovers: str = "noise",
        max_iter: int = 300,
        tol: float = 1e-3,
    ) -> None:
        if _missing is not None:
            raise ImportError(
                "instembed.MeanShift needs scikit-learn 1.6 or later: pip install 'instembed[sklearn]'. "
                "instembed.mean_shift works without it."
            ) from _missing
        self.bandwidth = bandwidth
        self.seeding = seeding
        self.min_size = min_size
        self.leftovers = leftovers
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any = None) -> MeanShift:  # noqa: N803
        """Clusters (n_samples, n_features) points; ``y`` is ignored."""
        points = validate_data(self, X, dtype=[np.float64, np.float32])
        bandwidth = self.bandwidth
        if bandwidth is None:
            # Identical samples are 0 apart, which is no radius: any positive one groups them.
            bandwidth = float(estimate_bandwidth(points)) or 1.0
        labels, centers, _, _, iterations = _checked_groups(
            torch.from_numpy(np.require(points, requirements=["C", "A", "W"])),
            float(bandwidth) if isinstance(bandwidth, np.number) else bandwidth,
            seeding=self.seeding,
            min_size=self.min_size,
            leftovers=self.leftovers,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        self.bandwidth_ = bandwidth
        self.labels_ = labels.numpy() - 1
        self.cluster_centers_ = centers[0].numpy()
        self.n_iter_ = int(iterations[0])
        return self

    def predict(self, X: Any) -> Any:  # noqa: N803
        """(n_samples,) index of the nearest centre, whatever its distance; -1 if there is no centre."""
        check_is_fitted(self)
        points = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        if len(self.cluster_centers_) == 0:
            return np.full(len(points), -1)
        return pairwise_distances_argmin(points, self.cluster_centers_.astype(points.dtype))
