# SPDX-License-Identifier: Apache-2.0

"""Adapters on disk: in PEFT's and in diffusers' format, with the noise level at which they switch off."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import get_token, snapshot_download
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..core.switch_level import SwitchLevel
from ..pipelines.denoiser_call import denoiser_name_of, denoiser_of
from ..pipelines.denoiser_format import DenoiserFormat, uncompiled
from ..pipelines.placement import check_adaptable
from .gate import TimestepGate, gate_on
from .layers import check_layers
from .lora import ADAPTER_NAME, adapter_parameters, add_adapter, remove_adapter


SWITCH_FILE = "pgraft.json"
SWITCH_METADATA = "pgraft"  # the switch level once more, in the metadata of the weights
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILES = (SWITCH_FILE, *PEFT_FILES, LORA_FILE)
# Of a noise corrector, instead of a switch level and beside or instead of an adapter.
CORRECTOR_FILE = "noise_correction.json"
NETWORK_FOLDER = "network"
GAUSSIAN_FILE = "gaussian.safetensors"
CORRECTOR_FOLDER = "corrector"  # where the trainer saves it, in its output folder
NETWORK_FILES = (f"{NETWORK_FOLDER}/config.json", f"{NETWORK_FOLDER}/diffusion_pytorch_model*")
CORRECTOR_FILES = (CORRECTOR_FILE, *PEFT_FILES, *NETWORK_FILES, GAUSSIAN_FILE)
# One of these says that the files beside it are of this package.
MARKERS = (SWITCH_FILE, CORRECTOR_FILE)
PEFT_PREFIX = "base_model.model."


def save_pgraft_adapter(
    pipeline: DiffusionPipeline, folder: str | Path, switch: SwitchLevel, name: str = ADAPTER_NAME
) -> None:
    r"""
    Save an adapter and the noise level at which it switches off. Files of an earlier one in the folder are removed.

    The folder loads with `pipeline.load_lora_weights` and with PEFT, which both leave out the switch, and with
    [`load_pgraft_adapter`], which does not.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline whose denoiser has the adapter.
        folder (`str` or `Path`):
            Folder to write to; made if missing.
        switch ([`SwitchLevel`]):
            Noise level at which the adapter hands over to the reference.
        name (`str`, *optional*, defaults to `"pgraft"`):
            Name of the adapter in the denoiser.

    Raises:
        `ValueError`: the folder holds a noise corrector.
    """
    folder, denoiser = Path(folder), uncompiled(denoiser_of(pipeline))
    metadata = {"format": "pt", SWITCH_METADATA: switch.to_json()}
    make_folder(folder, ADAPTER_FILES, CORRECTOR_FILE)
    state = save_adapter_weights(denoiser, folder, name, metadata)
    config = denoiser.peft_config[name]
    if isinstance(config, LoraConfig) and hasattr(pipeline, "save_lora_weights"):
        prefix, path = denoiser_name_of(pipeline), folder / LORA_FILE
        # Without the adapter's own metadata diffusers forgets alpha, and a LoRA of alpha != r comes back wrong.
        arguments = {f"{prefix}_lora_layers": state, f"{prefix}_lora_adapter_metadata": config.to_dict()}
        pipeline.save_lora_weights(folder, **arguments)
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
        save_file(load_file(path), path, metadata={**written, **metadata})
    (folder / SWITCH_FILE).write_text(switch.to_json(indent=2) + "\n")


def save_adapter_weights(
    denoiser: ModelMixin, folder: Path, name: str, metadata: dict[str, str]
) -> dict[str, torch.Tensor]:
    r"""
    Write an adapter in PEFT's format.

    Args:
        denoiser (`diffusers.ModelMixin`):
            Model that has the adapter; not compiled.
        folder (`Path`):
            Folder to write to; made if missing.
        name (`str`):
            Name of the adapter in the denoiser. It is not stored.
        metadata (`dict[str, str]`):
            Metadata of the weights' safetensors file.

    Returns:
        `dict[str, torch.Tensor]`: the adapter's weights on the CPU, by PEFT's names without the adapter's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().cpu() for k, v in get_peft_model_state_dict(denoiser, adapter_name=name).items()}
    save_file({PEFT_PREFIX + k: v for k, v in state.items()}, folder / "adapter_model.safetensors", metadata=metadata)
    denoiser.peft_config[name].save_pretrained(str(folder))
    return state


def make_folder(folder: Path, files: Sequence[str], marker: str) -> None:
    r"""
    Make a folder for an adapter or a corrector, without the files of an earlier one.

    Args:
        folder (`Path`):
            The folder; it may be there.
        files (`Sequence[str]`):
            Patterns of the files that an earlier one may have.
        marker (`str`):
            File that a folder of the other kind has.

    Raises:
        `ValueError`: the folder holds one of the other kind, which nothing is to be written beside or over.
    """
    if (folder / marker).is_file():
        raise ValueError(
            f"{folder} has {marker}, so it holds {'a noise corrector' if marker == CORRECTOR_FILE else 'an adapter'}. "
            "Save to another folder, or delete that one first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in [path for pattern in files for path in folder.glob(pattern)]:
        earlier.unlink(missing_ok=True)


def read_switch(folder: str | Path) -> SwitchLevel:
    r"""
    The switch level of an adapter of [`save_pgraft_adapter`].

    Args:
        folder (`str` or `Path`):
            Folder of the adapter.

    Raises:
        `ValueError`: the folder has no switch level.
    """
    path = Path(folder) / SWITCH_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SWITCH_FILE}, so the noise level at which its adapter switches off is not known. Load "
            "it with `pipeline.load_lora_weights` if it is an ordinary LoRA."
        )
    return SwitchLevel.from_json(path.read_text())


def read_switch_of_weights(path: Path) -> SwitchLevel | None:
    """The switch level in the metadata of the weights at `path`; `None` for an adapter of another library."""
    with safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get(SWITCH_METADATA)
    return SwitchLevel.from_json(stored) if stored else None


def load_pgraft_adapter(
    pipeline: DiffusionPipeline,
    source: str | Path,
    name: str = ADAPTER_NAME,
    *,
    revision: str | None = None,
    token: str | None = None,
    denoiser_format: type[DenoiserFormat] | None = None,
) -> TimestepGate:
    r"""
    Load an adapter of [`save_pgraft_adapter`] and put the gate on the denoiser that switches it at its noise level.

    The adapter needs its gate: `fuse_lora`, `pipeline.load_lora_weights` and user interfaces that load LoRAs run it at
    all noise levels. After this, `fuse_lora` and caches end in an error at the next sampling.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline that the adapter was trained for.
        source (`str` or `Path`):
            Folder of the adapter, or its repository on the Hub.
        name (`str`, *optional*, defaults to `"pgraft"`):
            Name that the adapter gets in the denoiser.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository; its default branch where not given.
        token (`str`, *optional*):
            Token for a private repository; the one of `HF_TOKEN` or `hf auth login` where not given.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] that the adapter was trained with. It is needed where that reads the
            timestep in a way of its own; the name of its argument is kept with the adapter.

    Returns:
        [`TimestepGate`]: the gate, which acts until its `remove()`; `disable()` and `enable()` are for comparisons.

    Raises:
        `ValueError`: the folder has no switch level, its weights do not fit, the name is taken, or the denoiser takes
            no adapter as it is offloaded, compiled, cached or has something fused.
    """
    folder = fetched(source, (SWITCH_FILE, *PEFT_FILES), revision, token)
    check_adaptable(denoiser_of(pipeline))
    switch, denoiser = read_switch(folder), uncompiled(denoiser_of(pipeline))
    check_layers(denoiser, can_cache=switch.switch_timestep is None)
    format = _format_of(denoiser, switch, denoiser_format, source)
    if switch.tuned_guidance_scale is not None:
        warnings.warn(
            f"{source} was trained for guidance {switch.tuned_guidance_scale} above its switch level, which the gate "
            "does not set. Sample inside `TunedGuidance(pipeline, introspect(pipeline, arguments).call, w, "
            f"{switch.tuned_guidance_scale}, {switch.switch_timestep})` of trl_pgraft as well, with the arguments of "
            "your call and its guidance scale w.",
            stacklevel=2,
        )
    load_frozen_adapter(denoiser, folder, name)
    if (former := gate_on(denoiser_of(pipeline), name)) is not None:
        former.remove()  # of an adapter that was deleted
    return TimestepGate(denoiser_of(pipeline), name, switch.switch_timestep, switch.clock, pipeline, format)


def _format_of(
    denoiser: ModelMixin, switch: SwitchLevel, denoiser_format: type[DenoiserFormat] | None, source: str | Path
) -> DenoiserFormat:
    """How a gate reads the timestep: by the class that is given, or by what was kept with the adapter."""
    if denoiser_format is None and switch.denoiser_format is not None:
        raise ValueError(
            f"{source} was trained with denoiser_format={switch.denoiser_format}, which reads the timestep in a "
            "way of its own. Pass that class to load_pgraft_adapter as denoiser_format."
        )
    if denoiser_format is None and switch.timestep_name is not None:
        return DenoiserFormat("", switch.timestep_name)
    return (denoiser_format or DenoiserFormat).of(denoiser)


def fetched(source: str | Path, files: tuple[str, ...], revision: str | None, token: str | None) -> Path:
    """The folder `source`, or where the `files` of the Hub's repository `source` were downloaded to."""
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), allow_patterns=list(files), revision=revision, token=token))


def load_adapter_weights(denoiser: ModelMixin, folder: str | Path, name: str) -> None:
    """Add the PEFT adapter stored in `folder` to the denoiser as `name`, trainable and in float32."""
    put_adapter(denoiser, *read_adapter(folder), name, folder)


def load_frozen_adapter(denoiser: ModelMixin, folder: str | Path, name: str) -> None:
    """Add the PEFT adapter stored in `folder` as `name`, to sample with: frozen, in the denoiser's precision."""
    load_adapter_weights(denoiser, folder, name)
    for parameter in adapter_parameters(denoiser, name):
        parameter.data = parameter.data.to(denoiser.dtype)
        parameter.requires_grad_(False)


def read_adapter(folder: str | Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of the PEFT adapter stored in `folder`."""
    state = {k.removeprefix(PEFT_PREFIX): v for k, v in load_file(Path(folder) / PEFT_FILES[0]).items()}
    return PeftConfig.from_pretrained(str(folder)), state


def put_adapter(
    denoiser: ModelMixin, peft_config: PeftConfig, state: dict[str, torch.Tensor], name: str, source: str | Path
) -> None:
    r"""
    Add an adapter with given weights to a denoiser, trainable and in float32.

    Args:
        denoiser (`diffusers.ModelMixin`):
            Model that gets the adapter.
        peft_config (`PeftConfig`):
            The adapter's configuration.
        state (`dict[str, torch.Tensor]`):
            Its weights by PEFT's names, as [`read_adapter`] returns them.
        name (`str`):
            Name that the adapter gets in the denoiser.
        source (`str` or `Path`):
            Folder or repository that the weights were read from, for the error's message.

    Raises:
        `ValueError`: the weights are not those of this configuration on this denoiser, which is left without them.
    """
    add_adapter(denoiser, peft_config, name)
    own = get_peft_model_state_dict(denoiser, adapter_name=name)
    shapes, own_shapes = ({key: value.shape for key, value in weights.items()} for weights in (state, own))
    amiss = [key for key in own.keys() | state.keys() if own_shapes.get(key) != shapes.get(key)]
    if amiss:
        remove_adapter(denoiser, name)
        raise ValueError(
            f"{source}: {len(amiss)} weights do not fit {type(denoiser).__name__}, e.g. {min(amiss)}. Was the adapter "
            "trained for another model?"
        )
    set_peft_model_state_dict(denoiser, state, adapter_name=name)


def clean(token: str | None) -> str | None:
    """
    A token without the white space around it that comes with copying; `None` for the client's own.

    Raises:
        `ValueError`: it has characters that an HTTP client would refuse, and quote in its error.
    """
    token = (token or "").strip() or None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ValueError("hub_token has line breaks or other characters that no token has; copy it again.")
    return token


def redacted(error: Exception, token: str | None) -> str:
    """An error's message without the tokens in use, whatever the client or the Hub says."""
    message = str(error)
    for secret in (token, (token or "").strip(), get_token()):
        message = message.replace(secret, "<token>") if secret else message
    return message
