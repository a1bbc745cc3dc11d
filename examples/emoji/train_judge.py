# SPDX-License-Identifier: Apache-2.0

"""
Train the second judge from nothing, on one GPU in about two minutes and a half.

    python -m examples.emoji.train_judge --work outputs/judge --seconds 120

It learns scenes in all styles, spoiled as the verifier's are with the committed VAE, and writes `judge.safetensors` to
`--work`. Right scenes and hard negatives are then counted, in the model's styles and in the others.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from examples.emoji.build_model import CATEGORY_SHARES, Scenes, fit, mixed_scenes, say, spoil
from examples.emoji.check_verifier import check
from examples.emoji.judge import GRID, NONE, OTHER, PATCH, Judge, View
from examples.emoji.scenes import ALL_STYLES, BACKGROUNDS, FOLDER, NOUNS, STYLES, Layout, layout, random_spec


NEAR = 0.25  # cells by which a centre may lie outside a cell that is then not taught whether it holds it
OTHER_SHARE = 0.15  # of the scenes have a background of no named colour,
FAR = 0.25  # at least this far (RGB in [0, 1]) from each named one


# Data ----------------------------------------------------------------------------------------------------------------


def judge_scenes(size: int, rng: np.random.Generator) -> Layout:
    """Scenes in all styles: half of the captions' categories, half of one to five objects in mixed styles."""
    categories = rng.choice(list(CATEGORY_SHARES), size // 2, p=list(CATEGORY_SHARES.values()))
    specs = [random_spec(rng, category, ALL_STYLES) for category in categories]
    asked = layout(specs, rng, styles=ALL_STYLES)
    return Layout.concatenate([asked, mixed_scenes(size - len(asked), rng, ALL_STYLES)])


def other_colors(size: int, rng: np.random.Generator) -> np.ndarray:
    """Random colours (size, 3) in [0, 1], none of them near a named one."""
    named = np.array(list(BACKGROUNDS.values())) / 255
    colors = rng.random((100 * size, 3))
    return colors[np.linalg.norm(colors[:, None] - named, axis=2).min(1) > FAR][:size]


def judge_pool(size: int, device: str, seed: int) -> Scenes:
    """The scenes to train on; a background index from `OTHER` on is a colour without a name."""
    rng = np.random.default_rng(seed)
    scenes, colors = judge_scenes(size, rng), other_colors(256, rng)
    nameless = rng.random(size) < OTHER_SHARE
    scenes.background[nameless] = OTHER + rng.integers(len(colors), size=nameless.sum())
    pool = Scenes(scenes, device, seed)
    extra = torch.as_tensor(colors, dtype=torch.float32, device=device)
    pool.renderer.colors = torch.cat([pool.renderer.colors, extra])
    return pool


# Targets and loss ----------------------------------------------------------------------------------------------------


def cell_targets(scenes: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What each cell should say.

    Returns:
        `torch.Tensor`: (B, 16, 16) the noun whose centre it holds, `NONE` without one, -100 (not counted) where a
            centre lies just outside.
        `torch.Tensor`: (B, 16, 16, 2) the centre's (x, y) from the cell's middle, in cells.
        `torch.Tensor`: (B, 16, 16) whether a centre lies in the cell or just outside.
    """
    middle = torch.arange(GRID, device=scenes.noun.device) + 0.5
    noun = torch.full((len(scenes), GRID, GRID), NONE, device=middle.device)
    offset = torch.zeros(*noun.shape, 2, device=middle.device)
    for k in range(scenes.noun.shape[1]):
        x, y = ((corner[:, k] + scenes.side[:, k] / 2) / PATCH for corner in (scenes.left, scenes.top))
        away = torch.stack(torch.broadcast_tensors(x[:, None, None] - middle, y[:, None, None] - middle[:, None]), -1)
        distance, present = away.abs().amax(-1), (scenes.noun[:, k] >= 0)[:, None, None]
        near = (distance <= 0.5 + NEAR) & present
        said = torch.where(distance <= 0.5, scenes.noun[:, k, None, None], -100)
        noun, offset = torch.where(near, said, noun), torch.where(near[..., None], away, offset)
    return noun, offset, noun != NONE


def contents(scenes: Layout) -> torch.Tensor:
    """Which nouns and which styles are there, as zeros and ones (B, nouns + styles)."""
    present = (scenes.noun >= 0)[..., None]
    nouns = F.one_hot(scenes.noun.clamp(0), len(NOUNS)) * present
    styles = F.one_hot(scenes.style, len(ALL_STYLES)) * present
    return torch.cat([nouns, styles], dim=-1).amax(1).float()


def judge_loss(view: View, scenes: Layout) -> torch.Tensor:
    """Cross entropy of the cells per object, distance of the centres, and cross entropies of the image as a whole."""
    noun, offset, near = cell_targets(scenes)
    cells = F.cross_entropy(view.nouns.float().flatten(0, 2), noun.flatten(), reduction="sum")
    distance = ((view.offsets.float() - offset).abs().sum(-1) * near).sum() / near.sum()
    background = F.cross_entropy(view.background.float(), scenes.background.clamp(max=OTHER))
    whole = F.binary_cross_entropy_with_logits(view.contents.float(), contents(scenes))
    return cells / (scenes.noun >= 0).sum() + 0.5 * distance + 0.5 * background + 0.5 * whole


# Training ------------------------------------------------------------------------------------------------------------


def train_judge(scenes: Scenes, vae: AutoencoderKL, args: argparse.Namespace) -> Judge:
    """The judge on spoiled scenes."""
    judge = Judge().to(args.device).train()
    model = torch.compile(judge, disable=not args.compile)

    def loss():
        images, layouts = scenes.draw(args.batch)
        with torch.autocast(args.device, torch.bfloat16):
            view = model(spoil(images, vae))
        return judge_loss(view, layouts)

    fit("judge", loss, [judge], args.seconds, args.lr, args.max_steps, ema_decay=0.998)
    return judge.eval().requires_grad_(False)


def main(args: argparse.Namespace) -> None:
    """Train, save and check."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    vae = AutoencoderKL.from_pretrained(FOLDER / "model", subfolder="vae").to(args.device).requires_grad_(False)
    scenes = judge_pool(args.scenes, args.device, args.seed)
    say(f"{args.scenes} scenes")
    train_judge(scenes, vae, args).save(args.work)
    say(f"saved to {args.work}")
    judge = Judge.load(args.work).to(args.device)
    for styles in (STYLES, ALL_STYLES[len(STYLES) :]):
        say(f"{', '.join(styles)}:")
        check(judge, args.check_scenes, args.seed + 1, styles)
    say("done")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/judge"), help="where the weights go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=1234, help="another than build_model's")
    parser.add_argument("--seconds", type=float, default=120, help="of training, compilation included")
    parser.add_argument("--scenes", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=1_000_000, help="end training after this many steps")
    parser.add_argument("--check-scenes", type=int, default=600, help="scenes per category to check on")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
