"""The weights that a study starts from, and those it has reached: copied, restored, and saved between stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gain_ops.utils.errors import MissingFileError, file_errors
from gain_ops.utils.files import replace_file

__all__ = ["Base", "State", "load_state", "put", "save_state"]

_FISHER = "fisher:"


class Base:
    """A copy of a plain model's parameters, in the memory of the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self._values = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}

    def restore(self, model: nn.Module) -> None:
        """Give the plain model these parameters again."""
        put(model, self._values)

    def changed(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of the plain model that differ from these."""
        present = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
        return {name: value for name, value in present.items() if not torch.equal(value, self._values[name])}


@dataclass(frozen=True)
class State:
    """What a run needs to go on after a stage: parameters by name, and EWC's Fisher information."""

    parameters: dict[str, Tensor]
    fisher: dict[str, Tensor]


def put(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copy values into the model's parameters by name."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in parameters.items():
            own[name].copy_(value)


@file_errors()
def save_state(state: State, path: Path) -> None:
    """Write it as a safetensors file; the file is complete or absent."""
    from safetensors.torch import save_file

    tensors = state.parameters | {_FISHER + name: value for name, value in state.fisher.items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    replace_file(path, lambda beside: save_file(tensors, beside))


@file_errors()
def load_state(path: Path) -> State:
    """Read what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from safetensors.torch import load_file

    if not path.exists():
        raise MissingFileError(
            f"{path} is missing, and this study cannot go on without it: start one in another folder (--out)"
        )
    tensors = load_file(path)
    fisher = {name.removeprefix(_FISHER): value for name, value in tensors.items() if name.startswith(_FISHER)}
    return State({name: value for name, value in tensors.items() if not name.startswith(_FISHER)}, fisher)
