# SPDX-License-Identifier: Apache-2.0

"""What a fine-tuning reports: its steps, and the losses of the rows of all processes."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator


_NO_BINS = torch.empty(0, dtype=torch.long)  # of a process that had no rows


@dataclass
class FineTuningReport:
    r"""
    What one fine-tuning did.

    Args:
        steps (`int`, *optional*, defaults to `0`):
            Optimizer steps.
        skipped (`int`, *optional*, defaults to `0`):
            Steps among them whose gradient was not finite.
        control (`dict[str, float]`, *optional*):
            Metrics of the merge with a reference fit, see [`merge_fits`]; none without one.
        losses (`list[torch.Tensor]`, *optional*):
            Loss of each row, a tensor of shape `(B,)` for each microbatch of this process; none where not given.
        bins (`list[torch.Tensor]`, *optional*):
            Quarter of the tuned range in which each row's timestep lies, from 0, the cleanest; shaped as `losses`.
    """

    steps: int = 0
    skipped: int = 0
    control: dict[str, float] = field(default_factory=dict)
    losses: list[torch.Tensor] = field(default_factory=list)
    bins: list[torch.Tensor] = field(default_factory=list)

    def to_metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Metrics by name, of the rows of all processes; level 0 is the cleanest quarter of the tuned range."""
        losses, bins = torch.cat([torch.empty(0), *(x.cpu() for x in self.losses)]), torch.cat([*self.bins, _NO_BINS])
        sums = torch.stack([torch.bincount(bins, values, minlength=4) for values in (losses, torch.ones_like(losses))])
        # As float32, because not every device has float64.
        total, count = accelerator.reduce(sums.float().to(accelerator.device)).cpu()
        levels = count.nonzero().flatten().tolist()
        return {
            "loss": (total.sum() / count.sum()).item(),
            **{f"loss/level_{i}": (total[i] / count[i]).item() for i in levels},
            "skipped_steps": self.skipped,
            **self.control,
        }
