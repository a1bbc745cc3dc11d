# SPDX-License-Identifier: Apache-2.0

"""Gaussians of inverted noise: laws that are known are recovered, chosen, saved and loaded."""

import math

import pytest
import torch
from noise_correction.gaussians import low_rank_law, measure, spectral_law
from safetensors.torch import save_file
from scipy.fft import dctn
from scipy.stats import multivariate_normal

from trl_pgraft.noise_correction.correctors import GaussianCorrector, NoCorrector
from trl_pgraft.noise_correction.correctors.full import FullGaussian
from trl_pgraft.noise_correction.correctors.gaussian import FAMILIES, fit_gaussian
from trl_pgraft.noise_correction.correctors.low_rank import LowRankGaussian, spikes_of
from trl_pgraft.noise_correction.correctors.spectral import coefficients, root_of


CPU = torch.device("cpu")


def mixed(count, shape=(2, 3), seed=1):
    """Gaussian noise with a mean and correlations, and their exact values."""
    generator = torch.Generator().manual_seed(seed)
    elements = math.prod(shape)
    mixing = torch.eye(elements) + 0.3 * torch.randn(elements, elements, generator=generator)
    mean = torch.randn(elements, generator=generator)
    samples = mean + torch.randn(count, elements, generator=generator) @ mixing.T
    return samples.reshape(count, *shape), mean, mixing @ mixing.T


def full_law(shape):
    _, mean, covariance = mixed(1, shape)
    return FullGaussian(mean.reshape(shape), root_of(covariance.double()[None])[0].float())


LAWS = {"full": full_law, "spectral": spectral_law, "low_rank": low_rank_law}


def samples_of(law, count, shape, seed=5):
    return law.colour(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4, 2, 2), (9, 2), (6, 2), (7,)])
@pytest.mark.parametrize("family", LAWS)
def test_a_map_its_inverse_and_its_likelihood_are_those_of_one_law(family, shape):
    """The density is scipy's, of the covariance that the map itself gives."""
    law, elements = LAWS[family](shape), math.prod(shape)
    if family == "low_rank":
        law = LowRankGaussian(law.mean + 0.3, law.scale, law.factors, law.deviations + 1)
    z = torch.randn(20, *shape, generator=torch.Generator().manual_seed(0))
    x = law.colour(z)
    torch.testing.assert_close(law.whiten(x).float(), z, rtol=0, atol=1e-4)
    columns = law.colour(torch.eye(elements).reshape(elements, *shape)) - law.mean
    matrix = columns.reshape(elements, elements).double()
    expected = multivariate_normal(law.mean.flatten().double(), matrix.T @ matrix).logpdf(x.flatten(1).double())
    normal = multivariate_normal(cov=torch.eye(elements)).logpdf(x.flatten(1).double())
    found = elements * GaussianCorrector(law).nats_gained(x)
    torch.testing.assert_close(found, torch.as_tensor(expected - normal), rtol=1e-4, atol=1e-3)


def test_the_cosine_transform_is_scipys():
    x = torch.randn(2, 3, 5, 8)
    found = coefficients(x).mT.reshape(x.shape)
    torch.testing.assert_close(found, torch.as_tensor(dctn(x.numpy(), axes=(2, 3), norm="ortho")), rtol=0, atol=1e-5)
    packed = coefficients(x[:, :, :4, :4].flatten(2).mT)
    torch.testing.assert_close(packed, coefficients(x[:, :, :4, :4]), rtol=0, atol=1e-5)


def test_a_full_gaussian_has_the_mean_and_covariance_of_the_noise():
    samples, mean, covariance = mixed(100_000)
    corrector = GaussianCorrector(FullGaussian.fit(samples, CPU))
    noise = torch.randn(100_000, 2, 3, generator=torch.Generator().manual_seed(2))
    found = corrector.correct(noise, None, {}, 1).flatten(1)
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(found.T.cov(), covariance, rtol=0, atol=0.05)
    assert torch.equal(corrector.correct(noise, None, {}, 0), noise)


def test_a_gaussian_gains_the_divergence_of_the_noise_from_the_standard_normal():
    samples, mean, covariance = mixed(200_000)
    held_out = mixed(200_000, seed=1)[0][100_000:]
    divergence = (covariance.trace() + mean @ mean - 6 - torch.logdet(covariance)) / 2
    gained = GaussianCorrector(FullGaussian.fit(samples[:100_000], CPU)).nats_gained(held_out).mean()
    assert gained.item() == pytest.approx(divergence.item() / 6, abs=0.01)


def test_a_full_gaussian_does_not_take_chance_for_covariance():
    """With 5 samples an element, on noise that was held out; the gain of the samples' own covariance is negative."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.ones(100)
    deviations[:3] = torch.tensor([3.0, 2.0, 0.5])
    samples, held_out = (deviations * torch.randn(count, 100, generator=generator) for count in (500, 5000))
    own = FullGaussian(samples.mean(0), root_of(samples.T.cov().double()[None])[0].float())
    ours = FullGaussian.fit(samples, CPU)
    gained = [GaussianCorrector(law).nats_gained(held_out).mean() for law in (own, ours)]
    assert gained[0] < 0 < gained[1]
    wrong = [(law.root - deviations.diag()).norm() for law in (ours, own)]
    assert wrong[0] < wrong[1] / 2


def test_spikes_are_corrected_for_the_number_of_elements():
    """The variance along a sample eigenvector is that of a fresh sample, far below the sample eigenvalue."""
    law, count = low_rank_law((4, 16, 16), strength=0.7), 100
    flat = (samples_of(law, count, (4, 16, 16)).flatten(1) / law.scale).double()
    centred = flat - flat.mean(0)
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(centred @ centred.T / (count - 1)))
    found, level = spikes_of(values, flat.shape[1], count - 1)
    directions = vectors[:, : len(found)].T @ centred
    fresh = (samples_of(law, 4000, (4, 16, 16), seed=9).flatten(1) / law.scale).double()
    along = (fresh @ (directions / directions.norm(dim=1, keepdim=True)).T).var(0)
    assert 3 <= len(found) <= 6 and level == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(found * level, along, rtol=0.2, atol=0)
    assert (values[: len(found)] > 1.2 * along).all()


@pytest.mark.parametrize(
    ("family", "shape", "least"),
    [("spectral", (4, 16, 16), 0.94), ("spectral", (256, 4), 0.94), ("low_rank", (4, 16, 16), 0.885)],
)
def test_the_right_gaussian_is_chosen_and_nearly_as_likely_as_the_truth(family, shape, least):
    truth = LAWS[family](shape)
    noise = samples_of(truth, 300, shape)
    corrector, gained = fit_gaussian(noise[:250], noise[250:], "gaussian", CPU)
    of_truth = GaussianCorrector(truth).nats_gained(noise[250:]).mean().item()
    assert corrector.family == family and "full" not in gained
    assert gained[family] == max(gained.values())
    assert least * of_truth < gained[family] < of_truth
    named, _ = fit_gaussian(noise[:250], noise[250:], "gaussian_low_rank", CPU)
    assert named.family == "low_rank"


def test_a_full_covariance_is_chosen_where_nothing_simpler_is_as_likely():
    samples, *_ = mixed(3000, (2, 8))
    corrector, gained = fit_gaussian(samples[:2500], samples[2500:], "gaussian", CPU)
    assert corrector.family == "full" and set(gained) == set(FAMILIES)


@pytest.mark.parametrize("seed", range(4))
def test_standard_normal_noise_is_not_corrected(seed):
    noise = torch.randn(200, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    corrector, gained = fit_gaussian(noise[:150], noise[150:], "gaussian", CPU)
    assert isinstance(corrector, NoCorrector)
    assert max(gained.values()) < 1e-3
    assert torch.equal(corrector.correct(noise, None, {}, 1), noise)


def test_a_gaussian_that_is_shrunk_to_standard_normal_noise_is_none():
    """It differs by rounding, always to one side."""
    seeds, kinds = range(40), []
    for seed in seeds:
        noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(seed))
        kinds.append(fit_gaussian(noise[:450], noise[450:], "gaussian", CPU)[0].kind)
    assert kinds.count("none") >= len(seeds) - 2


@pytest.mark.parametrize("same", [(slice(None), 1), (slice(None), slice(None), 0, 0), (...,)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("choice", ["gaussian", *(f"gaussian_{family}" for family in LAWS)])
def test_elements_that_are_the_same_in_all_samples_have_a_small_variance(choice, same, value):
    noise = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    noise[same] = value
    corrector, gained = fit_gaussian(noise[:150], noise[150:], choice, CPU)
    assert all(math.isfinite(value) for value in gained.values())
    z = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    corrected = corrector.correct(z, None, {}, 1)
    # The others take one element of a channel for chance.
    if corrector.family == "full" or same != (slice(None), slice(None), 0, 0):
        assert (corrected[same] - value).abs().max() < 0.2
    torch.testing.assert_close(corrector.gaussian.whiten(corrected).float(), z, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", LAWS)
def test_another_size_is_refused(family):
    shape = (1, 4, 4)
    with pytest.raises(ValueError, match=r"latents of shape \(1, 4, 4\), and this call starts from \(1, 2, 8\)"):
        GaussianCorrector(LAWS[family](shape)).correct(torch.zeros(1, 1, 2, 8), None, {}, 1)


def test_a_file_of_an_earlier_version_is_loaded(tmp_path):
    """It has a flat mean and no family."""
    mean, root = torch.linspace(-1, 1, 8), 0.9 * torch.eye(8)
    save_file({"mean": mean, "root": root}, tmp_path / "gaussian.safetensors")
    corrector = GaussianCorrector.load(tmp_path, None)
    noise = torch.randn(3, 2, 2, 2)
    assert corrector.family == "full"
    torch.testing.assert_close(corrector.correct(noise, None, {}, 1), 0.9 * noise + mean.reshape(2, 2, 2))
    with pytest.raises(ValueError, match="fitted to latents of shape"):
        corrector.correct(torch.randn(3, 2, 2, 4), None, {}, 1)


@pytest.mark.parametrize("family", LAWS)
def test_each_is_saved_and_loaded(family, tmp_path):
    corrector, noise = GaussianCorrector(LAWS[family]((2, 3, 4))), torch.randn(2, 2, 3, 4)
    corrector.save(tmp_path)
    loaded = GaussianCorrector.load(tmp_path, None)
    assert loaded.family == family
    assert torch.equal(loaded.correct(noise, None, {}, 1), corrector.correct(noise, None, {}, 1))


def test_a_family_of_a_later_version_is_refused(tmp_path):
    save_file({"mean": torch.zeros(2)}, tmp_path / "gaussian.safetensors", {"family": "cubic"})
    with pytest.raises(ValueError, match="family 'cubic'; this version .* supports full, spectral, low_rank"):
        GaussianCorrector.load(tmp_path, None)


def test_too_few_samples_or_too_many_elements_for_a_named_gaussian_are_refused():
    for shape in ((5, 6), (10, 9000)):
        with pytest.raises(ValueError, match=f"'gaussian_full': .* {shape[0]} samples of {shape[1]} elements"):
            fit_gaussian(torch.zeros(shape), torch.zeros(shape), "gaussian_full", CPU)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cost"), [("spectral", 0.001), ("low_rank", 0.0075), ("none", 0)])
def test_large_latents_are_fitted_from_500_samples(family, cost):
    """
    16 x 128 x 128, within 4 GiB; examples/noise_correction/gaussians.py measures the time.

    Six loadings of each element that are estimated from 500 samples cost 6 / (2 * 500) = 0.006 nats.
    """
    found = measure(family if family != "none" else "normal", (16, 128, 128), 500, 25)
    assert found["chosen"] == family
    assert found["GiB at most"] < 4
    if family != "none":
        assert 0.04 < found["of the truth"] - cost < found[family] < found["of the truth"]
