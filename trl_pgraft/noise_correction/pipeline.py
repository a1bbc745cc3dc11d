# SPDX-License-Identifier: Apache-2.0

"""A flow pipeline that starts from corrected noise: run, saved, loaded and pushed."""

import inspect
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline

from ..adapters.files import CORRECTOR_FILE, CORRECTOR_FILES, CORRECTOR_FOLDER, SWITCH_FILE, fetched, make_folder
from ..hub.push import push_corrector_to_hub
from ..pipelines.denoiser_call import DenoiserCall, branches_of
from ..pipelines.denoiser_format import DenoiserFormat
from ..pipelines.inputs import input_names, parameters_of
from ..pipelines.introspection import introspect
from ..pipelines.recording import first_calls
from .correctors import CORRECTORS, Corrector, NetworkCorrector, NoCorrector


# Arguments that do not change how the pipeline calls its denoiser.
NO_SETTINGS = {
    "prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
    "batch_size",
    "num_images_per_prompt",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "callback",
    "callback_steps",
}


class NoiseCorrectedPipeline:
    """
    A flow pipeline that starts from corrected noise, the second half of inverse noise correction (arXiv 2510.02692).

    A call takes what the pipeline's own call takes, and returns what that returns. The pipeline's attributes can be
    read here as well, and its components set (`corrected.scheduler = ...`).

    Args:
        pipeline (`DiffusionPipeline`):
            A flow pipeline whose call takes `latents`.
        corrector (`Corrector` or `None`):
            From [`NoiseCorrectionTrainer`], or loaded with [`~NoiseCorrectedPipeline.from_pretrained`]. `None` where
            it is set before the first corrected call.
        corrector_steps (`int`, *optional*, defaults to `1`):
            Steps of the corrector in calls that do not give `corrector_steps`. Each costs one evaluation of a network,
            or two of the denoiser where the corrector is an adapter.
        trained_for (`dict`, *optional*):
            What the corrector was trained on, for the model card: `base_model`, `num_inference_steps`, `guided` and
            `samples`.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser whose arguments or output the default does not read.

    Raises:
        `ValueError`: the pipeline does not take `latents`, or `corrector_steps` is not a whole number of 0 or more.

    Example:

    ```python
    pipeline = StableDiffusion3Pipeline.from_pretrained("path/to/model")
    corrected = NoiseCorrectedPipeline.from_pretrained("path/to/corrector", pipeline)
    image = corrected("a cat", num_inference_steps=10, corrector_steps=1).images[0]
    ```
    """

    corrector: Corrector

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        corrector: Corrector | None,
        corrector_steps: int = 1,
        trained_for: dict[str, Any] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        if "latents" not in parameters_of(pipeline):
            raise ValueError(
                f"{type(pipeline).__name__} does not take `latents`, so it cannot be started from corrected noise."
            )
        # `None` until the trainer has fitted it.
        self.pipeline, self.corrector = pipeline, cast(Corrector, corrector)
        self.corrector_steps, self.trained_for = _checked(corrector_steps), trained_for or {}
        self._format, self._calls, self._said = denoiser_format, dict[str, DenoiserCall](), set[str]()

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # not set yet, while this object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in getattr(vars(self).get("pipeline"), "components", {}):  # such as another scheduler
            setattr(self.pipeline, name, value)
            self._calls.clear()
        else:
            super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> "NoiseCorrectedPipeline":
        """Move the pipeline by its own `to(*args, **kwargs)`; the corrector follows in the next call."""
        self.pipeline.to(*args, **kwargs)
        return self

    def __call__(self, *args: Any, corrector_steps: int | None = None, **kwargs: Any) -> Any:
        """
        Sample from corrected noise.

        Args:
            args, kwargs:
                Arguments of the pipeline's call. `latents` are the noise before correction.
            corrector_steps (`int`, *optional*):
                Steps of the corrector; 0 is the pipeline's own call, without correction. The attribute
                `corrector_steps` holds where it is not given.

        Returns:
            What the pipeline's call returns.

        Raises:
            `TypeError`: the pipeline's call does not take the arguments.
            `ValueError`: `corrector_steps` is not a whole number of 0 or more, the pipeline calls its denoiser in
                a way that cannot be recorded, or the corrector does not exist yet or cannot run at this size.
        """
        steps = self.corrector_steps if corrector_steps is None else _checked(corrector_steps)
        inspect.signature(self.pipeline.__call__).bind(*args, **kwargs)  # raises what the call would
        arguments = {**dict(zip(parameters_of(self.pipeline), args, strict=False)), **kwargs}
        if self.corrector is None:
            raise ValueError("There is no corrector yet: NoiseCorrectionTrainer.train() makes it.")
        if steps == 0 or isinstance(self.corrector, NoCorrector):
            return self.pipeline(**arguments)
        return self.pipeline(**{**arguments, "latents": self._corrected_noise(arguments, steps)})

    def _corrected_noise(self, arguments: dict[str, Any], steps: int) -> torch.Tensor:
        """The noise that the pipeline would start from, in the layout of the denoiser's latents, corrected."""
        call = self._call_with(arguments)
        calls = first_calls(self.pipeline, call, lambda: self.pipeline(**arguments))
        latents = call.format.latents(calls[0])
        count = len(latents) * call.calls_per_step // call.branches
        branch = branches_of(calls, call.format, call.batch_axes, count)[call.conditional_branch]
        self._warn_if_other(arguments, call, latents)
        noise, fitted, shape = latents[:count], self.trained_for.get("shape"), list(latents.shape[1:])
        try:
            return self.corrector.correct(noise, call, send_to_device(branch, latents.device), steps)
        except (RuntimeError, ValueError) as error:
            if not isinstance(self.corrector, NetworkCorrector) or fitted in (None, shape):
                raise
            raise ValueError(
                f"The network of this corrector was trained on latents of shape {fitted} and cannot run on {shape}: "
                f"{error}\nSample with the height and width that were inverted, or with corrector_steps=0."
            ) from error

    def _warn_if_other(self, arguments: dict[str, Any], call: DenoiserCall, latents: torch.Tensor) -> None:
        """Say how a call differs from the sampler whose noise was learned, once for each difference."""
        given, facts = {n: p.default for n, p in parameters_of(self.pipeline).items()} | arguments, self.trained_for
        pairs = {
            "latents of shape": (facts.get("shape"), list(latents.shape[1:])),
            "num_inference_steps": (facts.get("num_inference_steps"), given.get("num_inference_steps")),
            "guidance": (facts.get("guided"), call.is_guided),
        }
        other = {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
        said = "; ".join(f"{name} {now}, trained for {then}" for name, (then, now) in other.items())
        if said and said not in self._said:
            self._said.add(said)
            warnings.warn(
                f"The corrector learned the noise of another sampler than this call's: {said}. What it does to these "
                "samples was not measured; corrector_steps=0 samples without it.",
                stacklevel=4,
            )

    def _call_with(self, arguments: dict[str, Any]) -> DenoiserCall:
        """How the pipeline calls its denoiser with these settings; introspected once for each."""
        ignored = input_names(self.pipeline) | NO_SETTINGS
        settings = {name: value for name, value in arguments.items() if name not in ignored}
        key = repr(sorted(settings.items()))
        if key not in self._calls:
            self._calls[key] = introspect(self.pipeline, settings, self._format).call
        return self._calls[key]

    def save_pretrained(self, folder: str | Path) -> None:
        """
        Save the corrector, without the pipeline. Files of an earlier corrector in the folder are removed.

        Args:
            folder (`str` or `Path`):
                Folder to write to; it is made if missing.

        Raises:
            `ValueError`: the folder holds an adapter.
        """
        folder = Path(folder)
        make_folder(folder, CORRECTOR_FILES, SWITCH_FILE)
        self.corrector.save(folder)
        facts = {
            "corrector": self.corrector.kind,
            "corrector_steps": self.corrector_steps,
            "trained_for": self.trained_for,
        }
        (folder / CORRECTOR_FILE).write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        pipeline: DiffusionPipeline,
        *,
        denoiser_format: type[DenoiserFormat] | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "NoiseCorrectedPipeline":
        """
        Load a corrector into the pipeline that it was trained for.

        Args:
            source (`str` or `Path`):
                Folder of [`~NoiseCorrectedPipeline.save_pretrained`], or repository id on the Hub; or an output folder
                of the trainer, there or here, in which the corrector is in `corrector`.
            pipeline (`DiffusionPipeline`):
                The pipeline that the corrector was trained for. A LoRA is added to its denoiser, switched off.
            denoiser_format (`type`, *optional*):
                Subclass of [`DenoiserFormat`] for a denoiser whose arguments or output the default does not read.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository; its default branch where not given.
            token (`str`, *optional*):
                Token for a private repository; the one of `HF_TOKEN` or `hf auth login` where not given.

        Returns:
            [`NoiseCorrectedPipeline`]: the pipeline with its corrector.

        Raises:
            `ValueError`: there is no corrector, or it is of an unknown kind, or its weights do not fit the denoiser.
        """
        files = (*CORRECTOR_FILES, *(f"{CORRECTOR_FOLDER}/{name}" for name in CORRECTOR_FILES))
        folder = fetched(source, files, revision, token)
        if not (folder / CORRECTOR_FILE).is_file() and (folder / CORRECTOR_FOLDER / CORRECTOR_FILE).is_file():
            folder = folder / CORRECTOR_FOLDER
        if not (folder / CORRECTOR_FILE).is_file():
            raise ValueError(f"{source} has no {CORRECTOR_FILE}: it is no corrector of NoiseCorrectionTrainer.")
        facts = json.loads((folder / CORRECTOR_FILE).read_text())
        if facts["corrector"] not in CORRECTORS:
            raise ValueError(
                f"{folder} has a corrector of the kind {facts['corrector']!r}; this version of trl_pgraft supports "
                f"{', '.join(CORRECTORS)}. Train one of these to the same data."
            )
        return cls(
            pipeline,
            CORRECTORS[facts["corrector"]].load(folder, pipeline),
            facts["corrector_steps"],
            facts["trained_for"],
            denoiser_format,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str = "Upload noise corrector",
        revision: str | None = None,
    ) -> str:
        """
        Push the corrector, without the pipeline, to a model repository on the Hub, with a model card.

        Args:
            repo_id (`str`):
                Repository, `name` or `owner/name`; it is made if missing.
            private (`bool`, *optional*, defaults to `False`):
                Whether the repository must be private. A public one that is there already is then refused.
            token (`str`, *optional*):
                Token with write access; the one of `HF_TOKEN` or `hf auth login` where not given.
            commit_message (`str`, *optional*, defaults to `"Upload noise corrector"`):
                Message of the commit.
            revision (`str`, *optional*):
                Branch to push to; the default branch where not given.

        Returns:
            `str`: id of the repository, with its owner.

        Raises:
            [`PushError`]: the Hub did not take it. The message has the command that pushes it later.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_corrector_to_hub(
                folder, repo_id, private=private, token=token, commit_message=commit_message, revision=revision
            )


def _checked(steps: int) -> int:
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"corrector_steps={steps} must be a whole number, 0 or more.")
    return steps
