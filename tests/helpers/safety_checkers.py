# SPDX-License-Identifier: Apache-2.0

"""A pipeline whose safety checker flags some images."""

import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import tiny_sd
from transformers import CLIPImageProcessor


class Checker(torch.nn.Module):
    """Flags the first image of each call, in one of the forms that checkers have: black, in place."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, images, clip_input):
        images[0] = images[0] * 0
        return images, self.form([i == 0 for i in range(len(images))])


def tiny_checked_sd(form=list) -> StableDiffusionPipeline:
    """Stable Diffusion with a [`Checker`]; without one where `form` is `None`."""
    parts = {**tiny_sd().components, "safety_checker": form and Checker(form)}
    parts["feature_extractor"] = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)
