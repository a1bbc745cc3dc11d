# SPDX-License-Identifier: Apache-2.0

"""
A small noise correction in a process of its own, for tests that kill it or run two.

    python tests/helpers/noise_correction_in_process.py '{"output_dir": "out", "die_at": "training", ...}'

Options other than `die_at` and `float64` (a network in double precision) are fields of `NoiseCorrectionConfig`. Each
process writes its weights beside the output.
"""

import json
import os
import sys
from pathlib import Path

import torch
from run_in_process import at, kill
from tiny_flow import flow_data, make_config, tiny_flow

from trl_pgraft import NoiseCorrectionTrainer
from trl_pgraft.noise_correction import dataset as inverted_data
from trl_pgraft.noise_correction.correctors.network import make_network
from trl_pgraft.noise_correction.fine_tuning import CorrectorFinetuner


def main() -> None:
    """The run that the command line describes."""
    options = json.loads(sys.argv[1])
    die_at, folder = options.pop("die_at", None), Path(options.pop("folder"))
    if die_at == "inversion":
        save, strike = inverted_data.save_tensors, at(2, kill)

        def save_or_die(*args, **kwargs):
            strike()
            save(*args, **kwargs)

        inverted_data.save_tensors = save_or_die
    if die_at == "training":
        step, strike = CorrectorFinetuner._train_step, at(5, kill)

        def step_or_die(self, *args):
            strike()
            step(self, *args)

        CorrectorFinetuner._train_step = step_or_die
    torch.set_num_threads(1)
    network = None
    if options.pop("float64", False):
        torch.manual_seed(0)
        network = make_network((1, 8, 8), 8).double()
    trainer = NoiseCorrectionTrainer(make_config(folder, **options), tiny_flow(), flow_data(), network=network)
    trainer.train()
    torch.save([p.detach() for p in trainer.corrector.parameters], folder / f"weights-{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main()
