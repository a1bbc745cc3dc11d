# SPDX-License-Identifier: Apache-2.0

"""
Modules that compute arguments of the denoiser from its latents and timestep, as a ControlNet does.

Their outputs belong to one state, so training runs them again. What is recorded of each prompt are their own
arguments, in the denoiser's conditioning under `"<component>.<argument>"`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .denoiser_format import DenoiserFormat, named_arguments
from .stand_in import Answer, replaced_forward
from .tree import fill_tree, take_rows, tensors_in


SHARE = "share"  # of its outputs in a row: 0 where the pipeline puts zeros in their place (`guess_mode`)


@dataclass(frozen=True)
class Control:
    """
    A module of a pipeline whose outputs are arguments of the denoiser.

    Args:
        name (`str`):
            Name of the component.
        module (`torch.nn.Module`):
            What the pipeline calls; perhaps compiled.
        format ([`DenoiserFormat`]):
            Where latents and timestep are in the module's arguments.
        denoiser_format ([`DenoiserFormat`]):
            Where they are in the denoiser's.
        answer (`Callable`):
            Stand-in for the module, see [`answer_like`].
        sources (`dict`):
            For each of the denoiser's arguments that are the module's outputs, the numbers of these outputs, nested
            as the argument is.
        batch_axes (`dict`):
            Batch axes of the module's own arguments.
        settings (`Sequence[tuple[float, dict]]`, *optional*):
            Training timestep and arguments without tensors, such as a scale, of each step.
    """

    name: str
    module: torch.nn.Module
    format: DenoiserFormat
    denoiser_format: DenoiserFormat
    answer: Answer
    sources: dict[str, Any]
    batch_axes: dict[str, Any]
    settings: Sequence[tuple[float, dict[str, Any]]] = ()

    def own(self, conditioning: dict[str, Any]) -> dict[str, Any]:
        """The module's arguments among the conditioning of the denoiser, by their own names."""
        return {n.removeprefix(f"{self.name}."): v for n, v in conditioning.items() if n.startswith(f"{self.name}.")}

    def recorded(self, arguments: dict[str, Any], own: dict[str, Any], output: Any) -> dict[str, Any]:
        """
        A denoiser call's arguments with the module's in place of its outputs; as they are where these do not match.

        Args:
            arguments (`dict`):
                Named arguments of the denoiser.
            own (`dict`):
                Named arguments of the module's call before it.
            output (`Any`):
                What the module, or its stand-in, returned.
        """
        outputs = tensors_in(output)
        pairs = [
            (given, outputs[number])
            for name, numbers in self.sources.items()
            for given, number in zip(tensors_in(arguments.get(name)), tensors_in(numbers, int), strict=False)
        ]
        rows = [matching_rows(*pair) for pair in pairs]
        if not pairs or rows[0] is None or any(other != rows[0] for other in rows):
            return arguments
        count = len(self.format.latents(own))
        taken = [row if row >= 0 else i % count for i, row in enumerate(rows[0])]
        self._check_state(arguments, own, taken)
        kept = {name: value for name, value in arguments.items() if name not in self.sources}
        conditioning = take_rows(self.format.conditioning(own), self.batch_axes, taken)
        share = torch.tensor([float(row >= 0) for row in rows[0]])
        return {**kept, **{f"{self.name}.{n}": v for n, v in {**conditioning, SHARE: share}.items()}}

    def _check_state(self, arguments: dict[str, Any], own: dict[str, Any], rows: list[int]) -> None:
        latents, timestep = self.denoiser_format.latents(arguments), self.denoiser_format.timestep(arguments)
        differing = {
            "other latents": not torch.equal(self.format.latents(own)[rows], latents),
            "another timestep": bool((self.format.timestep(own).flatten()[0] != timestep.flatten()[0]).any()),
        }
        for name in (name for name, differs in differing.items() if differs):
            raise ValueError(
                f"The pipeline calls its `{self.name}` with {name} than its denoiser, and training runs it on "
                f"the denoiser's. Tune with a pipeline without `{self.name}`, and use the adapter in this one."
            )

    @torch.no_grad()
    def fill(
        self, x_t: torch.Tensor, clock: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, Any]
    ) -> dict[str, Any]:
        """
        The denoiser's conditioning with the module's outputs for a state in place of its arguments.

        Args:
            x_t (`torch.Tensor` of shape `(B, ...)`):
                Noisy latents.
            clock, timesteps (`torch.Tensor` of shape `(B,)`):
                Timesteps on the denoiser's clock, and the scheduler's training timesteps.
            conditioning (`dict`):
                `B` rows of the denoiser's conditioning.
        """
        own = self.own(conditioning)
        share, parts = own.pop(SHARE), list[list[torch.Tensor]]()
        groups = self._rows_by_settings(timesteps)
        for step, rows in groups:
            settings = {name: value for name, value in self.settings[step][1].items() if name in own}
            of_rows = take_rows(own, self.batch_axes, rows) | settings
            parts.append(tensors_in(self.module(**self.format.arguments(x_t[rows], clock[rows], of_rows))))
        order = torch.tensor([row for _, rows in groups for row in rows]).argsort().to(x_t.device)
        outputs = [torch.cat(same)[order] for same in zip(*parts, strict=True)]
        scaled = [o * share.to(o).reshape(-1, *[1] * (o.ndim - 1)) for o in outputs]
        rest = {name: value for name, value in conditioning.items() if not name.startswith(f"{self.name}.")}
        return {**rest, **fill_tree(self.sources, scaled)}

    def _rows_by_settings(self, timesteps: torch.Tensor) -> list[tuple[int, list[int]]]:
        """Rows that have the settings of the same step, which is the one nearest in timestep."""
        levels, values = zip(*self.settings, strict=True)
        # By timestep, because that is what tells the levels of a sampler's steps apart in every schedule.
        nearest = (timesteps.cpu().double()[:, None] - torch.tensor(levels, dtype=torch.float64)).abs().argmin(1)
        steps = [values.index(values[i]) for i in nearest.tolist()]
        return [(step, [row for row, s in enumerate(steps) if s == step]) for step in sorted(set(steps))]


def matching_rows(given: torch.Tensor, output: torch.Tensor) -> list[int] | None:
    """The row of `output` that each row of `given` equals, or -1 where it is zero; `None` where one is neither."""
    if given is output:
        return list(range(len(given)))
    if not given.ndim or given.shape[1:] != output.shape[1:] or given.dtype != output.dtype:
        return None
    found, starts = [], output.flatten(1)[:, :32]
    for row in given:
        candidates = (starts == row.flatten()[:32]).all(1).nonzero().flatten().tolist() if row.any() else []
        number = next((i for i in candidates if torch.equal(output[i], row)), -1)
        if number < 0 and row.any():
            return None
        found.append(number)
    return found


def settings_of(*calls: dict[str, Any]) -> dict[str, Any]:
    """Those recorded arguments of controls that have no tensors, which may change from step to step."""
    return {name: v for arguments in calls for name, v in arguments.items() if "." in name and not tensors_in(v)}


@contextmanager
def answered(controls: Sequence[Control]) -> Iterator[None]:
    """Let stand-ins answer for the modules of `controls` inside the block."""
    with ExitStack() as stack:
        for control in controls:
            stack.enter_context(replaced_forward(control.module, control.answer, control.format.latents_name))
        yield


@contextmanager
def observe_controls(controls: Sequence[Control]) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A function that puts arguments of `controls` in the place of their outputs among the denoiser's arguments."""
    with observe_results({control.name: control.module for control in controls}) as last:

        def recorded(arguments: dict[str, Any]) -> dict[str, Any]:
            for control in controls:
                if control.name in last:
                    arguments = control.recorded(arguments, *last[control.name])
            return arguments

        yield recorded


@contextmanager
def observe_results(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, tuple[dict[str, Any], Any]]]:
    """Named arguments and output of each module's latest call inside the block, by its name."""
    last: dict[str, tuple[dict[str, Any], Any]] = {}
    with ExitStack() as stack:
        for name, module in modules.items():

            def keep(
                module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, name: str = name
            ) -> None:
                last[name] = named_arguments(module)(*args, **kwargs), output

            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        yield last
