# SPDX-License-Identifier: Apache-2.0

"""
Train the emoji model and its verifier from nothing, on one GPU in about ten minutes.

    python -m examples.emoji.build_model --work outputs/emoji --seconds 560

Stages: scenes, VAE, detector, UNet with its text model, evaluation. Each stage but the first leaves its weights in
`--work`; a stage whose weights are there is not run again.
"""

import argparse
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.emoji.evaluate import draw_grid, evaluate, print_table, read_prompts
from examples.emoji.scenes import (
    FOLDER,
    NOUNS,
    OPENINGS,
    STYLES,
    Layout,
    Renderer,
    Spec,
    caption,
    layout,
    noisy_spec,
    random_spec,
    vocabulary,
)
from examples.emoji.verifier import STRIDE, Verifier


PROMPT_LENGTH = 16
CATEGORY_SHARES = {
    "single": 0.14, "count": 0.24, "two_objects": 0.14, "relation": 0.26, "background": 0.08, "background_count": 0.14
}  # fmt: skip
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
STARTED = time.perf_counter()


def say(*words) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s]", *words, flush=True)


# Tokenizer -----------------------------------------------------------------------------------------------------------


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """
    Write and load a `CLIPTokenizer` with one token for each word of the captions: byte-pair encoding over the closed
    vocabulary until every word is whole, ties in alphabetical order, so that every build gives the same files.
    """
    letters = [chr(code) for code in range(33, 127)]
    words = {word: (*word[:-1], word[-1] + "</w>") for word in vocabulary()}
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in words.values()):
        pairs = Counter(pair for symbols in words.values() for pair in itertools.pairwise(symbols))
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {word: _merge(symbols, merges[-1]) for word, symbols in words.items()}
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_LENGTH)


# Data ----------------------------------------------------------------------------------------------------------------


def captioned_scenes(size: int, rng: np.random.Generator) -> tuple[Layout, list[str]]:
    """Scenes of all categories with careless captions."""
    shares = np.array(list(CATEGORY_SHARES.values()))
    categories = rng.choice(list(CATEGORY_SHARES), size, p=shares / shares.sum())
    specs = [random_spec(rng, category) for category in categories]
    said = [noisy_spec(spec, rng) for spec in specs]
    return layout(specs, rng), [caption(spec, OPENINGS[rng.integers(len(OPENINGS))]) for spec in said]


def mixed_scenes(size: int, rng: np.random.Generator, styles: Sequence[str] = STYLES) -> Layout:
    """Scenes of one to five objects, half of them of any nouns and half of one noun, in a mix of `styles`."""
    specs = []
    for _ in range(size):
        count, noun = rng.integers(1, 6), NOUNS[rng.integers(len(NOUNS))]
        nouns = [noun] * count if rng.random() < 0.5 else [NOUNS[i] for i in rng.integers(len(NOUNS), size=count)]
        specs.append(Spec(tuple((name, 1) for name in nouns)))
    return layout(specs, rng, mix_styles=True, styles=styles)


class Scenes:
    """A pool of layouts, rendered a random batch at a time on the device."""

    def __init__(self, scenes: Layout, device: str, seed: int):
        self.fields = Layout(*(torch.as_tensor(value, device=device) for value in vars(scenes).values()))
        self.renderer, self.device = Renderer(device), device
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, size: int) -> tuple[torch.Tensor, Layout]:
        """Images (size, 3, 64, 64) in [0, 1] and their layouts."""
        scenes = self.fields[torch.randint(len(self.fields), (size,), generator=self.generator, device=self.device)]
        return self.renderer(scenes, self.generator), scenes

    def collate(self, size: int) -> Iterable[torch.Tensor]:
        """All images, in batches."""
        for start in range(0, len(self.fields), size):
            yield self.renderer(self.fields[start : start + size], self.generator)


# Training loop -------------------------------------------------------------------------------------------------------


def fit(name: str, loss: Callable[[], torch.Tensor], modules: list[torch.nn.Module], seconds: float, lr: float,
        max_steps: int, ema_decay: float = 0.0) -> None:  # fmt: skip
    """AdamW with a cosine schedule over `seconds`, compilation included (or `max_steps`); leaves averaged weights."""
    end = time.perf_counter() + seconds
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    loss().backward()  # compiles
    optimizer.zero_grad()
    start, step, progress, printed, mean = time.perf_counter(), 0, 0.0, 0.0, 0.0
    seconds = max(end - start, 1.0)
    say(f"{name}: compiled, {seconds:.0f} s left")
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress))
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        step, mean = step + 1, value.detach() if step == 0 else 0.98 * mean + 0.02 * value.detach()
        elapsed = time.perf_counter() - start
        progress = max(elapsed / seconds, step / max_steps)
        if elapsed - printed > 10 or progress >= 1:
            printed = elapsed
            say(f"{name}: step {step}, loss {float(mean):.4f}, {step / elapsed:.1f} steps/s")
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


# Stages --------------------------------------------------------------------------------------------------------------


def new_vae() -> AutoencoderKL:
    """Factor 4, 4 latent channels, 0.9 M parameters."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def _gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def train_vae(scenes: Scenes, seconds: float, args: argparse.Namespace) -> AutoencoderKL:
    """L1 + L2 + gradient loss and a weak KL; the scaling factor gives the latents unit variance."""
    vae = new_vae().to(args.device)

    @torch.compile(disable=not args.compile)
    def objective(images, noise):
        with torch.autocast(args.device, torch.bfloat16):
            mean, log_variance = vae.quant_conv(vae.encoder(images)).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            latents = mean + (0.5 * log_variance).exp() * noise
            output = vae.decoder(vae.post_quant_conv(latents)).float()
        error = output - images
        slopes = zip(_gradients(output), _gradients(images), strict=True)
        gradient = sum((ours - theirs).abs().mean() for ours, theirs in slopes)
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        return error.abs().mean() + (error**2).mean() + 0.5 * gradient + 2e-4 * divergence

    def loss():
        images = scenes.draw(args.vae_batch)[0] * 2 - 1
        return objective(images, torch.randn(len(images), 4, 16, 16, device=args.device))

    fit("vae", loss, [vae], seconds, 1e-3, args.max_steps, ema_decay=0.999)
    with torch.no_grad():
        images = scenes.draw(2 * args.vae_batch)[0] * 2 - 1
        latents = vae.encode(images).latent_dist
        error = (vae.decode(latents.mean).sample - images).abs().mean() / 2
        vae.register_to_config(scaling_factor=round(1 / float(latents.mean.std()), 4))
    say(f"vae: L1 {float(error):.4f} (pixels in [0, 1]), scaling factor {vae.config.scaling_factor}, "
        f"noise {float(latents.std.mean() / latents.mean.std()):.3f} of the spread")  # fmt: skip
    return vae


def centre_targets(scenes: Layout, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heatmap (B, nouns, 16, 16) of Gaussians at the centres' cells, offsets (B, 2, 16, 16), and where they apply."""
    rows = torch.arange(len(scenes), device=scenes.noun.device)
    grid = torch.arange(size, device=rows.device)
    heat = torch.zeros(len(rows), len(NOUNS), size, size, device=rows.device)
    offset, centre = torch.zeros_like(heat[:, :2]), torch.zeros_like(heat[:, :1])
    for k in range(scenes.noun.shape[1]):
        present, noun = scenes.noun[:, k] >= 0, scenes.noun[:, k].clamp(0)
        x, y = ((corner[:, k] + scenes.side[:, k] / 2) / STRIDE for corner in (scenes.left, scenes.top))
        column, row = x.long().clamp(0, size - 1), y.long().clamp(0, size - 1)
        spread = 0.14 * scenes.side[:, k, None, None] / STRIDE
        square = (grid[None, :, None] - row[:, None, None]) ** 2 + (grid[None, None, :] - column[:, None, None]) ** 2
        bump = torch.exp(-square / (2 * spread**2)) * present[:, None, None]
        heat[rows, noun] = torch.maximum(heat[rows, noun], bump)
        place = (rows[present], row[present], column[present])
        offset[place[0], :, place[1], place[2]] = torch.stack([x - column, y - row], 1)[present]
        centre[place[0], 0, place[1], place[2]] = 1
    return heat, offset, centre


def focal_loss(logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """CenterNet's penalty-reduced focal loss, per object."""
    log_p, log_q, p = F.logsigmoid(logits), F.logsigmoid(-logits), logits.sigmoid()
    hit = (heat == 1).float()
    losses = hit * (1 - p) ** 2 * log_p + (1 - hit) * (1 - heat) ** 4 * p**2 * log_q
    return -losses.sum() / hit.sum().clamp(1)


@torch.no_grad()
def spoil(images: torch.Tensor, vae: AutoencoderKL) -> torch.Tensor:
    """Make scenes look generated: half pass through the VAE with noisy latents; blur, colour and noise for all."""
    half, device = len(images) // 2, images.device
    latents = vae.encode(images[:half] * 2 - 1).latent_dist.mean
    strength = 0.3 * torch.rand(half, 1, 1, 1, device=device) / vae.config.scaling_factor
    decoded = vae.decode(latents + strength * torch.randn_like(latents)).sample / 2 + 0.5
    images = torch.cat([decoded.float(), images[half:]])

    def draw() -> torch.Tensor:
        return torch.rand(len(images), 1, 1, 1, device=device)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + 0.7 * draw() * (blurred - images)
    images = (images - 0.5) * (0.85 + 0.3 * draw()) + 0.5 + 0.1 * (draw() - 0.5)
    return (images + 0.04 * draw() * torch.randn_like(images)).clamp(0, 1)


def train_detector(scenes: Scenes, vae: AutoencoderKL, seconds: float, args: argparse.Namespace) -> Verifier:
    """The verifier's detector on spoiled scenes."""
    verifier = Verifier().to(args.device).train()
    detector = torch.compile(verifier.detector, disable=not args.compile)

    def loss():
        images, layouts = scenes.draw(args.detector_batch)
        with torch.autocast(args.device, torch.bfloat16):
            logits, offsets = detector(spoil(images, vae))
        heat, offset, centre = centre_targets(layouts)
        distance = ((offsets.float() - offset).abs() * centre).sum() / centre.sum()
        return focal_loss(logits.float(), heat) + 0.5 * distance

    fit("detector", loss, [verifier.detector], seconds, 2e-3, args.max_steps)
    return verifier.eval()


def new_unet() -> UNet2DConditionModel:
    """6.7 M parameters; attention at 8x8 and 4x4 only, which keeps a step at 5 ms an image on two CPU cores."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """CLIP's text model, four layers of width 128."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids (len(captions), 16) as the pipeline would give them."""
    ids = tokenizer(captions, padding="max_length", max_length=PROMPT_LENGTH, truncation=True).input_ids
    return torch.tensor(ids)


@torch.no_grad()
def encode_scenes(scenes: Scenes, vae: AutoencoderKL, args: argparse.Namespace) -> torch.Tensor:
    """Scaled latents of the whole pool, in half precision."""
    latents = []
    for images in scenes.collate(1000):
        with torch.autocast(args.device, torch.bfloat16):
            mean = vae.encode(images * 2 - 1).latent_dist.mean
        latents.append((mean * vae.config.scaling_factor).half())
    return torch.cat(latents)


def train_unet(unet, text_encoder, latents, tokens, empty, seconds: float, args: argparse.Namespace) -> None:
    """Epsilon loss on SD's schedule, UNet and text model together; a tenth of the captions is dropped."""
    alphas = DDIMScheduler(**DIFFUSION).alphas_cumprod.to(args.device)
    denoiser = torch.compile(unet, disable=not args.compile)

    def loss():
        rows = torch.randint(len(latents), (args.batch,), device=args.device)
        ids = torch.where(torch.rand(args.batch, 1, device=args.device) < 0.1, empty, tokens[rows])
        timesteps = torch.randint(len(alphas), (args.batch,), device=args.device)
        alpha_bar, x_0 = alphas[timesteps].view(-1, 1, 1, 1), latents[rows].float()
        noise = torch.randn_like(x_0)
        x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
        with torch.autocast(args.device, torch.bfloat16):
            prediction = denoiser(x_t, timesteps, text_encoder(ids).last_hidden_state, return_dict=False)[0]
        return F.mse_loss(prediction.float(), noise)

    fit("unet", loss, [unet, text_encoder], seconds, args.lr, args.max_steps, ema_decay=0.9995)


def save_pipeline(folder: Path, vae, text_encoder, tokenizer, unet, spacing: str = "leading") -> None:
    """Write a `StableDiffusionPipeline` folder in half precision."""
    rules = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": spacing}
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**DIFFUSION, **rules),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    pipeline.to(torch.float32)


def evaluate_model(folder: Path, verifier: Verifier, work: Path, args: argparse.Namespace) -> None:
    """Held-out scores for each timestep spacing at 10 and 25 steps; the better one at 10 is stored in the folder."""
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    rows, results = read_prompts("held_out")[: args.eval_prompts], {}
    for spacing, steps in itertools.product(("leading", "trailing"), (10, 25)):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        table, images = evaluate(pipeline, verifier, rows, steps, 3.0, args.eval_samples, batch=928)
        print_table(table, f"held_out, {spacing}, {steps} steps")
        draw_grid(images, rows, str(work / f"grid_{spacing}_{steps}.png"))
        results[spacing, steps] = table
    best = max(("leading", "trailing"), key=lambda spacing: results[spacing, 10]["all"]["score"])
    DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing=best).save_pretrained(folder / "scheduler")
    text = json.dumps({f"{spacing} {steps}": table for (spacing, steps), table in results.items()}, indent=1)
    (work / "scores.json").write_text(text)
    say(f"stored timestep_spacing={best}")


def main(args: argparse.Namespace) -> None:
    """Run the stages."""
    work, rng = args.work, np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    tokenizer = build_tokenizer(work / "tokenizer")
    layouts, captions = captioned_scenes(args.scenes, rng)
    scenes = Scenes(layouts, args.device, args.seed)
    tokens = tokenize(tokenizer, captions).to(args.device)
    say(f"{len(layouts)} scenes, {len(tokenizer)} tokens; e.g. {captions[:3]}")

    if (work / "vae").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").to(args.device)
    else:
        vae = train_vae(scenes, args.vae_seconds, args)
        vae.save_pretrained(work / "vae")
    vae.requires_grad_(False)

    if (work / "verifier").exists():
        verifier = Verifier.load(work / "verifier").to(args.device)
    else:
        mixed = Layout.concatenate([layouts[: args.scenes // 4], mixed_scenes(args.scenes // 4, rng)])
        verifier = train_detector(Scenes(mixed, args.device, args.seed), vae, args.detector_seconds, args)
        verifier.save(work / "verifier")

    if not model.exists():
        unet, text_encoder = new_unet().to(args.device), new_text_encoder(tokenizer).to(args.device)
        latents = encode_scenes(scenes, vae, args)
        say(f"latents: standard deviation {float(latents.float().std()):.3f}")
        empty = tokenize(tokenizer, [""]).to(args.device)
        left = args.seconds - args.eval_seconds - (time.perf_counter() - STARTED)
        train_unet(unet, text_encoder, latents, tokens, empty, left, args)
        save_pipeline(model, vae, text_encoder, tokenizer, unet)
        build_tokenizer(model / "tokenizer")  # the plain files too, which older releases of transformers read
    say("evaluating")
    evaluate_model(model, verifier, work, args)
    say("done")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=FOLDER)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=560, help="wall time of everything, compilation included")
    parser.add_argument("--vae-seconds", type=float, default=90)
    parser.add_argument("--detector-seconds", type=float, default=58)
    parser.add_argument("--eval-seconds", type=float, default=60, help="of --seconds, kept for the evaluation")
    parser.add_argument("--scenes", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--vae-batch", type=int, default=256)
    parser.add_argument("--detector-batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=1_000_000, help="end each stage after this many steps")
    parser.add_argument("--eval-prompts", type=int)
    parser.add_argument("--eval-samples", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())
