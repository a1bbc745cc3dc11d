# SPDX-License-Identifier: Apache-2.0

"""
Devices without float64, such as Apple's: what is computed on the device stays in float32.

The device is torch's "meta", which has no values; what would be copied from it to the host becomes ones.
"""

import pytest
import torch
from accelerate import Accelerator
from runs import make_trainer
from tiny_pipelines import add_random_adapter
from torch.utils._python_dispatch import TorchDispatchMode

from trl_pgraft.analysis import gradients
from trl_pgraft.noise_correction.correctors.network import NetworkCorrector, make_network
from trl_pgraft.noise_correction.correctors.transport import perturb, transport
from trl_pgraft.noise_correction.inversion import _anderson
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.rollouts.collect import gathered
from trl_pgraft.training.graft_loss import graft_loss
from trl_pgraft.training.metrics import FineTuningReport


DEVICE = torch.device("meta")


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on the device, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].device == DEVICE:
            to = kwargs.get("device")
            if to is not None and to.type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        found = function(*args, **kwargs)
        for value in torch.utils._pytree.tree_leaves(found):
            if isinstance(value, torch.Tensor) and value.device == DEVICE and value.dtype == torch.float64:
                raise TypeError(f"{function} makes float64 on a device that has none")
        return found


def test_float64_on_the_device_is_found():
    with WithoutFloat64():
        assert torch.ones(2, device=DEVICE).cpu().double().tolist() == [1, 1]
        for wrong in (lambda x: x.double(), lambda x: torch.ones(2, dtype=torch.float64).to(x.device)):
            with pytest.raises(TypeError, match="float64"):
                wrong(torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("guidance_loss", ["conditional", "corrected", "combined"])
def test_the_loss_and_its_gradient(config, sd, guidance_loss):
    add_random_adapter(sd.unet)
    trainer = make_trainer(config(guidance_loss=guidance_loss), sd)
    conditioning = record_conditioning(sd, trainer.policy.call, ["a cat", "a dog"], trainer.policy.arguments)
    loss = graft_loss(trainer.policy, "pgraft", conditioning)
    x_i, noise = torch.randn(2, 2, 4, 8, 8)
    trainer.denoiser.to(DEVICE)
    with WithoutFloat64():
        losses = loss(
            trainer.denoiser,
            x_i.to(DEVICE),
            noise.to(DEVICE),
            loss.levels.sample(2, torch.Generator().manual_seed(0)),
            torch.tensor([0, 1]),
            torch.tensor([True, False]),
        )
        losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.device == DEVICE


def test_the_pilots_gradients(config, sd, monkeypatch):
    trainer = make_trainer(config(), sd)
    parameters = [p for p in trainer.denoiser.parameters() if p.requires_grad]
    monkeypatch.setattr(
        gradients, "_losses", lambda *_: sum(p.sum() for p in parameters) * torch.ones(2, 4, device=DEVICE)
    )
    trainer.denoiser.to(DEVICE)
    parameters[:] = [p for p in trainer.denoiser.parameters() if p.requires_grad]
    with WithoutFloat64():
        gradient, losses = gradients._gradient(trainer.policy, None, None, parameters, torch.arange(2))
    assert gradient.dtype == losses.dtype == torch.float64


def test_rewards_and_losses_of_all_processes(config, monkeypatch):
    trainer = make_trainer(config())
    rewards = torch.rand(3, 2, dtype=torch.float64)
    assert torch.equal(gathered(trainer.accelerator, rewards), rewards)
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "device", DEVICE)
    with WithoutFloat64():
        assert gathered(trainer.accelerator, rewards).dtype == torch.float64
        report = FineTuningReport(losses=[torch.ones(2)], bins=[torch.tensor([0, 3])])
        assert report.to_metrics(accelerator)["loss"] == 1


def test_noise_correction():
    x = torch.randn(2, 1, 8, 8)
    corrector = NetworkCorrector(make_network((1, 8, 8), 8).to(DEVICE))
    with WithoutFloat64():
        y = x.to(DEVICE)
        assert all(part.dtype == torch.float32 for part in perturb(y, y, torch.rand(2, dtype=torch.float64)))
        assert transport(corrector, y, None, {}, 2).dtype == torch.float32
        assert _anderson([(y, y), (y, y)]).dtype == torch.float32
