"""Fréchet distance between two sets of features (FVD: Unterthiner et al. 2018, arXiv 1812.01717), in float64."""

from __future__ import annotations

import torch
from torch import Tensor


class Gaussian:
    """Running mean and covariance of features (Welford), in memory that does not grow with the number of clips.

    Features are added one by one: however they are batched, the sums are the same to the last bit.

    Attributes: count; mean (D,); scatter (D, D), the sum of outer products of deviations from the mean; float64.
    """

    def __init__(self, size: int):
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, features: Tensor):
        """Adds features (n, D).

        Raises:
            ValueError: if one of them is not finite, or they have another shape, before any is added.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"expected features (n, {len(self.mean)}), found {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features are not finite: look at the clips' pixels and at the detector's weights")
        for feature in features.detach().cpu().double():
            self.count += 1
            before = feature - self.mean
            self.mean += before / self.count
            self.scatter.addr_(before, feature - self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D).

        Raises:
            ValueError: below two clips.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 clips or more, found {self.count}")
        return self.scatter / (self.count - 1)

    def state(self) -> dict:
        return {"count": self.count, "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    @classmethod
    def from_state(cls, state: dict) -> Gaussian:
        gaussian = cls(len(state["mean"]))
        gaussian.count, gaussian.mean, gaussian.scatter = state["count"], state["mean"].clone(), state["scatter"].clone()
        return gaussian


def root(covariance: Tensor) -> Tensor:
    """Returns A with A A^T = covariance (D, D).

    The covariance may be singular: eigenvalues that rounding makes negative count as zero.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp_min(0).sqrt()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    The trace of the root is computed as the nuclear norm of A^T B, with S_a = A A^T and S_b = B B^T. This avoids the root of
    a product that is neither symmetric nor, with fewer clips than features, regular.
    """
    covariances = a.covariance, b.covariance
    overlap = torch.linalg.svdvals(root(covariances[0]).T @ root(covariances[1])).sum()
    traces = covariances[0].trace() + covariances[1].trace()
    distance = (a.mean - b.mean).square().sum() + traces - 2 * overlap
    return max(distance.item(), 0.0)  # rounding may make it slightly negative for equal sets


class Nested:
    """The Gaussians of the first quarter, the first half and all of `total` clips.

    A Fréchet distance falls with the number of clips it is estimated from, and these show how fast.
    """

    def __init__(self, total: int, size: int):
        self.total, self.all, self.parts = total, Gaussian(size), {}

    def add(self, features: Tensor):
        for feature in features:
            self.all.add(feature[None])
            if self.all.count in (self.total // 4, self.total // 2):
                self.parts[self.all.count] = Gaussian.from_state(self.all.state())

    def distances(self, other: Nested) -> dict[str, float]:
        """Fréchet distances at N/4, N/2 and N clips of each set; parts with fewer than two clips are left out."""
        pairs = {"N/4": (self._part(4), other._part(4)), "N/2": (self._part(2), other._part(2)), "N": (self.all, other.all)}
        return {name: frechet_distance(a, b) for name, (a, b) in pairs.items() if a and b and min(a.count, b.count) > 1}

    def _part(self, divisor: int) -> Gaussian | None:
        return self.parts.get(self.total // divisor)

    def state(self) -> dict:
        return {"total": self.total, "all": self.all.state(), "parts": {n: g.state() for n, g in self.parts.items()}}

    @classmethod
    def from_state(cls, state: dict) -> Nested:
        nested = cls(state["total"], len(state["all"]["mean"]))
        nested.all = Gaussian.from_state(state["all"])
        nested.parts = {n: Gaussian.from_state(s) for n, s in state["parts"].items()}
        return nested
