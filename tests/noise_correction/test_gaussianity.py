# SPDX-License-Identifier: Apache-2.0

"""Statistics of noise: as expected on N(0, I), and each detects the departure that it is for."""

import pytest
import torch
from scipy import stats

from trl_pgraft.noise_correction.gaussianity import gaussianity


STATISTICS = ("mean", "std", "element_std", "skewness", "kurtosis", "neighbour_correlation", "radius", "accuracy")


def normal(count=2000, shape=(1, 6, 6), seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def off_center(x):
    return x + 0.3


def too_wide(x):
    return 1.1 * x


def of_uneven_width(x):
    return x * torch.linspace(0.8, 1.2, x.shape[-1])


def skewed(x):
    return (x + 0.2 * (x.square() - 1)) / (1 + 2 * 0.2**2) ** 0.5


def heavy_tailed(x):
    return x.pow(3) / 15**0.5


def correlated(x):
    moved = x.clone()
    moved[..., 1:] = 0.6 * x[..., :-1] + 0.8 * x[..., 1:]
    return moved


def on_a_sphere(x):
    return x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) * 6


@pytest.mark.parametrize("name", STATISTICS)
def test_normal_noise_has_the_statistics_of_normal_noise(name):
    found = gaussianity(normal())
    assert getattr(found, name) == pytest.approx(getattr(found, f"normal_{name}"), abs=0.04)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (off_center, {"mean": 0.3}),
        (too_wide, {"std": 1.1}),
        (of_uneven_width, {"element_std": 0.14}),
        (skewed, {"skewness": 1.15}),
        (heavy_tailed, {"kurtosis": 43.2}),
        (correlated, {"neighbour_correlation": (0.6 + 4 * 0.48) / 5}),
        (on_a_sphere, {"radius": 0.5}),
    ],
)
def test_each_departure_is_detected(change, expected):
    x = normal(4000)
    found = gaussianity(change(x))
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.1)
        assert abs(getattr(found, f"normal_{name}") - value) > 0.08


@pytest.mark.parametrize("change", [off_center, too_wide, of_uneven_width, correlated])
def test_the_classifier_detects_what_it_has_features_for(change):
    found = gaussianity(change(normal()))
    assert found.accuracy > 0.6 > found.normal_accuracy + 0.05


def test_radius_is_the_kolmogorov_smirnov_distance():
    x = 1.05 * normal(300, (7,))
    expected = stats.kstest(x.square().sum(1).double().numpy(), stats.chi2(7).cdf).statistic
    assert gaussianity(x).radius == pytest.approx(expected, abs=1e-6)


def test_it_is_readable():
    assert str(gaussianity(normal(100))).splitlines()[0].split() == ["samples", "N(0,", "I)"]


def test_too_few_or_broken_samples_are_refused():
    with pytest.raises(ValueError, match="at least 20 samples"):
        gaussianity(normal(5))
    with pytest.raises(ValueError, match="finite"):
        gaussianity(normal(30) / 0)
