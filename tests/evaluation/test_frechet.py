"""Fréchet distance: against an independent library, by hand, and for any order and grouping of the clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from kit.evaluation.frechet import Gaussian, Nested, frechet_distance, root


def features(clips: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Returns random features (clips, size), correlated as a detector's are."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99)) / size**0.5
    return torch.randn(clips, size, generator=rng) @ mix * (1 + shift) + shift


def gaussian(values: torch.Tensor) -> Gaussian:
    result = Gaussian(values.shape[1])
    result.add(values)
    return result


class Given(nn.Module):
    """A feature extractor for torchmetrics that returns its input: features given as pictures."""

    def __init__(self, size: int):
        super().__init__()
        self.num_features = size

    def forward(self, pictures):
        return pictures.flatten(1)


@pytest.mark.parametrize(("clips", "size"), [(300, 40), (60, 100), (500, 400)])
def test_equals_torchmetrics(clips, size):
    """It also does with fewer clips than features, where covariances are singular."""
    a, b = features(clips, size, 0), features(clips, size, 1, shift=0.1)
    library = FrechetInceptionDistance(Given(size), normalize=True).set_dtype(torch.float64)
    library.update(a.double()[:, :, None, None], real=True)
    library.update(b.double()[:, :, None, None], real=False)
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(library.compute().item(), rel=1e-3)


def test_by_hand_in_one_dimension():
    """With means m, n and standard deviations s, t the distance is (m - n)^2 + (s - t)^2."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [9.0]])
    expected = (1 - 6) ** 2 + (2**0.5 - 18**0.5) ** 2
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("clips", [30, 300])
def test_a_set_is_at_no_distance_from_itself(clips):
    """Nor below, where rounding would make it slightly negative."""
    a = gaussian(features(clips, 64, 3) * 100)
    assert 0 <= frechet_distance(a, a) < 1e-8 * a.covariance.trace()


def test_root_of_a_singular_covariance():
    covariance = gaussian(features(5, 20, 0)).covariance
    assert torch.allclose(root(covariance) @ root(covariance).T, covariance, atol=1e-12)


def test_mean_and_covariance_are_numpys_however_the_clips_come():
    values = features(50, 8, 0) + 1000  # far from zero, where a sum of squares would lose digits
    whole, parts = gaussian(values), Gaussian(8)
    for part in values.split(7):
        parts.add(part)
    assert torch.equal(whole.mean, parts.mean) and torch.equal(whole.scatter, parts.scatter)
    assert np.allclose(whole.mean, values.double().numpy().mean(0), rtol=1e-13)
    assert np.allclose(whole.covariance, np.cov(values.double().numpy().T), rtol=1e-9)


def test_parts_are_the_first_clips():
    a, b = features(42, 6, 0), features(80, 6, 1, shift=0.2)
    real, made = Nested(42, 6), Nested(80, 6)
    for part in a.split(5):
        real.add(part)
    made.add(b)
    found = made.distances(real)
    assert list(found) == ["N/4", "N/2", "N"]
    for name, n, m in (("N/4", 10, 20), ("N/2", 21, 40), ("N", 42, 80)):
        assert found[name] == frechet_distance(gaussian(b[:m]), gaussian(a[:n]))


def test_a_distance_from_fewer_clips_is_larger():
    a, b = Nested(400, 30), Nested(400, 30)
    a.add(features(400, 30, 0))
    b.add(features(400, 30, 1))
    found = a.distances(b)
    assert found["N/4"] > found["N/2"] > found["N"] > 0


def test_state_goes_on_to_the_last_bit(tmp_path):
    values = features(20, 6, 0)
    whole, first = Nested(20, 6), Nested(20, 6)
    whole.add(values)
    first.add(values[:8])
    torch.save(first.state(), tmp_path / "state.pt")
    rest = Nested.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    rest.add(values[8:])
    assert torch.equal(rest.all.scatter, whole.all.scatter)
    assert rest.parts.keys() == whole.parts.keys() == {5, 10}
    assert torch.equal(rest.parts[10].mean, whole.parts[10].mean)


def test_bad_features():
    with pytest.raises(ValueError, match="not finite"):
        Gaussian(2).add(torch.tensor([[0.0, float("nan")]]))
    for features in (torch.zeros(2), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"expected features \(n, 2\), found"):
            Gaussian(2).add(features)
    one = Gaussian(2)
    one.add(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="needs 2 clips or more, found 1"):
        frechet_distance(one, one)
