# SPDX-License-Identifier: Apache-2.0

"""
A small run in a process of its own, for tests that kill it.

    python tests/helpers/run_in_process.py '{"output_dir": "out", "die_at": "training", ...}'

Options other than `die_at` and `float64` are fields of `GraftConfig`. What is drawn and scored is written to
`drawn.log` and `scored.log` beside the output folder, a line a batch, flushed at once.
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

import torch
from tiny_pipelines import tiny_sd
from torch.optim.optimizer import register_optimizer_step_post_hook

from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.training import checkpoints


FIELDS = {
    "num_epochs": 3,
    "control_adapter": False,
    "sample_num_steps": 4,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 4,
    "samples_per_prompt": 4,
    "acceptance_kwargs": {"k": 1},
    "train_batch_size": 1,
    "train_timestep_fraction": 0.25,
    "train_num_inner_epochs": 3,
    "train_learning_rate": 1e-2,
    "lora_rank": 2,
    "reward_retry_wait": 0.0,
}


def kill() -> None:
    """What the operating system, an impatient user or a lack of memory do: no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(count: int, act):
    """A function that acts when it is called for the n-th time."""
    calls = iter(range(1, 10**9))
    return lambda *_, **__: act() if next(calls) == count else None


def arm(die_at: str, trainer: PGraftTrainer, tick: dict) -> None:
    """Have the run die at a stage of its second round (8 images, 4 batches and 6 optimizer steps a round)."""
    if die_at == "sampling":
        # A batch is 4 calls, a fit 6: in the second batch of the second round.
        trainer.denoiser.register_forward_pre_hook(at(4 * 4 + 6 + 4 + 2, kill))
    elif die_at == "scoring":
        tick["score"] = at(4 + 3, kill)
    elif die_at == "training":
        register_optimizer_step_post_hook(at(6 + 4, kill))
    elif die_at == "control":
        # With a control adapter there are two fits a round: in the second one of the second round.
        register_optimizer_step_post_hook(at(2 * 6 + 6 + 4, kill))
    elif die_at == "saving":
        whole = os.replace
        die = at(2, kill)

        def replace(source, target):
            if Path(target).name.startswith(checkpoints.PREFIX):
                die()
            whole(source, target)

        os.replace = replace
    elif die_at == "full disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        whole_save = trainer.save_checkpoint
        fill = at(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)))
        trainer.save_checkpoint = lambda: (fill(), whole_save())


def main() -> None:
    options = json.loads(sys.argv[1])
    die_at, float64 = options.pop("die_at", ""), options.pop("float64", False)
    output, tick = Path(options["output_dir"]), {}
    output.parent.mkdir(parents=True, exist_ok=True)

    def note(name: str, images: torch.Tensor) -> None:
        with open(output.parent / f"{name}.log", "a") as file:
            file.write(json.dumps([hashlib.sha256(i.contiguous().numpy()).hexdigest() for i in images]) + "\n")

    def brightness(images, prompts, metadata):
        tick.get("score", lambda: None)()
        note("scored", images)
        return images.mean((1, 2, 3)), {}

    pipeline = tiny_sd()
    if float64:
        pipeline.to(torch.float64)
    decode = pipeline.vae.decode
    config = GraftConfig(**{**FIELDS, **options})
    animals = ["a cat", "a dog", "an ant"]
    trainer = PGraftTrainer(config, brightness, lambda: (random.choice(animals), {}), pipeline)

    def noted_decode(*arguments, **keywords):
        decoded = decode(*arguments, **keywords)
        note("drawn", decoded[0].detach().float())
        return decoded

    pipeline.vae.decode = noted_decode
    arm(die_at, trainer, tick)
    trainer.train()
    rank = trainer.accelerator.process_index
    parameters = [p.detach() for p in adapter_parameters(trainer.denoiser, "pgraft")]
    torch.save({"adapter": parameters, "history": trainer.history}, output.parent / f"result{rank}.pt")


if __name__ == "__main__":
    main()
