# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from trl_pgraft.core.losses import corrected_target, guided, weighted_mse


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weighted_mse_is_per_sample():
    prediction, target, weight = random(3, 3, 2, 2), random(3, 3, 2, 2, seed=1), torch.tensor([0.0, 1.0, 0.5])
    loss = weighted_mse(prediction, target, weight)
    expected = torch.stack([w * ((p - t) ** 2).mean() for p, t, w in zip(prediction, target, weight, strict=True)])
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, expected)


def test_weighted_mse_computes_in_float32():
    prediction = torch.full((1, 4), 300.0, dtype=torch.float16, requires_grad=True)
    loss = weighted_mse(prediction, torch.zeros(1, 4, dtype=torch.float16), torch.ones(1, dtype=torch.float16))
    assert loss.dtype == torch.float32 and loss.item() == 90000  # float16 ends at 65504
    loss.sum().backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize(
    ("target", "weight"), [((2, 1), (2,)), ((1, 4), (2,)), ((2, 4), (2, 1)), ((2, 4), ()), ((2, 4), (4,))]
)
def test_weighted_mse_refuses_to_broadcast(target, weight):
    with pytest.raises(ValueError, match="one shape"):
        weighted_mse(torch.zeros(2, 4), torch.zeros(target), torch.zeros(weight))


def test_guided():
    unconditional, conditional = random(2, 3), random(2, 3, seed=1)
    torch.testing.assert_close(guided(unconditional, conditional, 1.0), conditional)
    assert torch.equal(guided(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(guided(unconditional, conditional, 3.0), 3 * conditional - 2 * unconditional)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 7.5])
def test_corrected_target_meets_the_target_once_guided(scale):
    target, unconditional = random(2, 3), random(2, 3, seed=1)
    conditional = corrected_target(target, unconditional, scale)
    torch.testing.assert_close(guided(unconditional, conditional, scale), target, rtol=1e-5, atol=1e-5)


def test_a_difference_of_corrected_targets_moves_the_guided_field_by_the_difference():
    """So the control adapter's difference goes onto the conditional branch as it is, not divided by w once more."""
    accepted, everything = random(2, 3), random(2, 3, seed=1)
    unconditional, conditional = random(2, 3, seed=2), random(2, 3, seed=3)
    difference = corrected_target(accepted, unconditional, 3.0) - corrected_target(everything, unconditional, 3.0)
    moved = guided(unconditional, conditional + difference, 3.0) - guided(unconditional, conditional, 3.0)
    torch.testing.assert_close(moved, accepted - everything)


def test_corrected_target_needs_guidance():
    with pytest.raises(ValueError, match="guidance_scale is 0"):
        corrected_target(random(2, 3), random(2, 3, seed=1), 0.0)
