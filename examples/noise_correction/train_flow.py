# SPDX-License-Identifier: Apache-2.0

"""
Train an unconditional flow model on images of a domain.

    python -m examples.noise_correction.train_flow --domain fashion_mnist --output outputs/fm/flow

Rectified flow: the UNet sees x_s = (1 - s) x + s eps at timestep 1000 s, s uniform, and predicts eps - x. Saved is
the moving average of the weights, as a `FlowPipeline`. A run that broke goes on from its last checkpoint.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel, get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel

from examples.noise_correction.data import DOMAINS, dequantise, load_images
from examples.noise_correction.flow_pipeline import FlowPipeline


def new_pipeline(image_shape: tuple[int, ...], args: argparse.Namespace) -> FlowPipeline:
    """An untrained pipeline for images of `(C, H, W)`; attention at the lowest resolution only."""
    channels = image_shape[0] * args.patch_size**2
    levels = len(args.widths)
    unet = UNet2DModel(
        sample_size=image_shape[-1] // args.patch_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=args.widths,
        layers_per_block=args.layers,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
    )
    return FlowPipeline(unet, FlowMatchEulerDiscreteScheduler(), patch_size=args.patch_size)


def flow_loss(unet: torch.nn.Module, data: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity at one level and noise per row of `data`, of the UNet's shape."""
    noise, s = torch.randn_like(data), torch.rand(len(data), device=data.device)
    level = s.reshape(-1, 1, 1, 1)
    predicted = unet((1 - level) * data + level * noise, 1000 * s).sample
    return (predicted.float() - (noise - data)).square().mean()


def train(args: argparse.Namespace) -> FlowPipeline:
    """Run the training that the arguments describe, and save the pipeline in `args.output`."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    torch.set_float32_matmul_precision("high")  # as convolutions are computed anyway
    set_seed(args.seed, device_specific=True)
    pixels = load_images(args.domain, "train", args.data, args.limit).pixels.to(accelerator.device)
    torch.manual_seed(args.seed)
    pipeline = new_pipeline(tuple(pixels.shape[1:]), args)
    pipeline.unet.to(accelerator.device)
    average = {"decay": args.ema_decay, "min_decay": 0.0, "use_ema_warmup": True, "power": 3 / 4, "foreach": True}
    ema = EMAModel(pipeline.unet.parameters(), **average)
    optimizer = torch.optim.AdamW(pipeline.unet.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 50, args.steps)
    unet, optimizer = accelerator.prepare(pipeline.unet, optimizer)
    accelerator.register_for_checkpointing(ema, schedule)
    first = _resume(accelerator, args)
    set_seed(args.seed + first, device_specific=True)
    started, losses = time.perf_counter(), []
    for step in range(first, args.steps):
        rows = torch.randint(len(pixels), (args.batch,), device=pixels.device)
        loss = flow_loss(unet, pipeline.encode(dequantise(pixels[rows])))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(pipeline.unet.parameters())
        losses.append(loss.detach())  # not read at once: the GPU would wait for the CPU
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            accelerator.print(f"step {done}: loss {mean:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
            _save(accelerator, pipeline, ema, done, args.output)
    return pipeline


def _resume(accelerator: Accelerator, args: argparse.Namespace) -> int:
    folder = args.output / "state"
    if not (folder / "step").exists():
        return 0
    accelerator.load_state(str(folder))
    return int((folder / "step").read_text())


def _save(accelerator: Accelerator, pipeline: FlowPipeline, ema: EMAModel, step: int, folder: Path) -> None:
    accelerator.save_state(str(folder / "state"))
    if accelerator.is_main_process:
        (folder / "state" / "step").write_text(str(step))
        ema.store(pipeline.unet.parameters())
        ema.copy_to(pipeline.unet.parameters())
        pipeline.save_pretrained(folder)
        ema.restore(pipeline.unet.parameters())
    accelerator.wait_for_everyone()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--limit", type=int, help="train on the first images only")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=(48, 96), help="channels at each resolution")
    parser.add_argument("--layers", type=int, default=1, help="residual blocks at each resolution")
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=256, help="images a process and step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
