# SPDX-License-Identifier: Apache-2.0

"""
What a script does with a trainer after its `train()`, in as many processes as start this file.

    python tests/helpers/after_training_in_process.py <kind: pgraft or noise_correction> <new folder>

Each process writes to `result-<rank>.json` what it found.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_flow import flow_data, make_config, tiny_flow
from tiny_pipelines import tiny_sd

from trl_pgraft import GraftConfig, NoiseCorrectionTrainer, PGraftTrainer


def brightness(images, prompts, metadata):
    """A reward in DDPO's convention."""
    return images.mean((1, 2, 3)), {}


def pgraft(folder: Path) -> dict:
    """Everything that a user may call; the numbers are those of any number of processes."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = GraftConfig(
        num_epochs=1,
        sample_num_steps=4,
        sample_batch_size=4,
        sample_num_batches_per_epoch=2 // processes,
        samples_per_prompt=4,
        train_batch_size=2 // processes,
        train_timestep_fraction=0.25,
        control_adapter=False,
        log_with="tensorboard",
        run_name="mine",
        push_to_hub=True,
        hub_model_id="ann/after",
        hub_token="hf_write",
        output_dir=str(folder / "out"),
    )
    trainer = PGraftTrainer(config, brightness, lambda: ("a cat", {}), tiny_sd())
    trainer.train()
    first = trainer.evaluate(["a cat", "a dog", "an ant"]).reward.tolist()
    trainer.save_checkpoint()
    trainer.train(epochs=2)
    trainer.step(2, trainer.state.global_step)
    trainer.save_model(folder / "copy")
    pushed = trainer.push_to_hub(commit_message="Later")
    second = trainer.evaluate(["a cat", "a dog", "an ant"]).reward.tolist()
    return {"rewards": first + second, "iterations": len(trainer.history), "pushed": pushed}


def noise_correction(folder: Path) -> dict:
    """A corrector that is trained twice, saved, and used."""
    push = {"push_to_hub": True, "hub_model_id": "ann/corrector", "hub_token": "hf_write"}
    trainer = NoiseCorrectionTrainer(make_config(folder, **push), tiny_flow(), flow_data())
    trainer.train()
    trainer.invert()
    corrected = trainer.train()
    trainer.save_model(folder / "copy")
    generator = torch.Generator().manual_seed(0)
    images = corrected(batch_size=2, generator=generator, num_inference_steps=2, output_type="np").images
    return {"rewards": [float(images.mean())], "pushed": trainer.push_to_hub()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    found = {"pgraft": pgraft, "noise_correction": noise_correction}[kind](folder)
    (folder / f"result-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))
