"""PEFT's (IA)^3 adapters: gain files written as adapter folders that plain PEFT loads, and read from them.

::

    output side:  y = l * (x @ W.T)                 l [out, 1]        the layer must have no bias: PEFT scales it too
    input side:   y = (x * l) @ W.T + b             l [1, in]         one of PEFT's feedforward_modules

``l`` is the gain. Neither direction needs peft. A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``; a
folder that is written here also has a ``README.md``, the model card that the Hub shows.

Rounding: to_peft() writes ``l = 1 + delta`` in float32, exactly the gain that the kernels form. from_peft() writes
``delta = l - 1`` in float32: the gain is l again, to the bit, for 0.5 <= l < 2**24, and within ``2**-24 * (1 - l)`` of it for
-2**24 < l < 0.5. So a gain below 2**24 in magnitude goes from a gain file to a folder and back without losing a bit; its delta
loses the digits that 1 + delta does not have.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from gain_ops._version import __version__
from gain_ops.gainfiles.file import GainFile, read_gains, write_gains
from gain_ops.gainfiles.names import canonical_name
from gain_ops.layers.experts import ExpertsGain, ExpertsLinear
from gain_ops.layers.linears import sizes
from gain_ops.models.files import fingerprint, named_linears, refuse_misfit
from gain_ops.reference import SIDES
from gain_ops.utils import strict_json
from gain_ops.utils.errors import MissingFileError, UsageError
from gain_ops.utils.stages import staged_folder
from gain_ops.utils.wording import named, some_of

__all__ = ["from_peft", "to_peft"]

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

_PREFIX, _SUFFIX = "base_model.model.", ".ia3_l"


def to_peft(
    gains: str | os.PathLike[str], folder: str | os.PathLike[str], model: nn.Module, *, base_model: str | None = None
) -> None:
    """Write a gain file as an (IA)^3 adapter folder, for ``PeftModel.from_pretrained(base, folder)`` and for the Hub.

    Args:
        gains: a file written by save_gains().
        folder: the folder to make; it is written beside its place and moved into it.
        model: the base model, or one with gains; only its modules are read, so a model on the meta device is enough.
        base_model: the base's name for PEFT and the Hub, as in "HuggingFaceTB/SmolLM2-135M"; by default the name in the gain
            file.

    Raises:
        GainFileError: not a gain file, or one that does not fit the model.
        ValueError: a layer where (IA)^3 is another map: one with a bias and its gain on the output side, or one in several
            places of the model, of which PEFT would change one.
        FileExistsError: the folder exists and is not empty.
        FileNotFoundError: no such gain file.

    """
    folder = Path(folder)
    file = read_gains(gains)
    linears = named_linears(model)
    refuse_misfit(file, linears, exact=False, path=gains)
    layers = {name: linears[name] for name in file.deltas}
    _refuse_other_maps(f"cannot write {gains} as an (IA)^3 adapter", file.sides, layers, model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: give a new one")
    base_model = base_model or file.base_model
    config = {
        "peft_type": "IA3",
        "task_type": None,
        "auto_mapping": _auto_mapping(model),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **_modules(file.sides, model),
        "fan_in_fan_out": any(kind.__name__ == "Conv1D" for layer in layers.values() for kind in type(layer).__mro__),
        "modules_to_save": None,
        "init_ia3_weights": True,
    }
    tensors = {
        f"{_PREFIX}{name}{_SUFFIX}": (1 + delta)[:, None] if file.sides[name] == "output" else (1 + delta)[None, :]
        for name, delta in file.deltas.items()
    }
    import safetensors.torch

    contents = {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        TENSORS: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        "README.md": _model_card(file, base_model).encode(),
    }
    with staged_folder(folder, "ia3") as staged:
        for name, content in contents.items():
            (staged.folder / name).write_bytes(content)


def from_peft(folder: str | os.PathLike[str], gains: str | os.PathLike[str], model: nn.Module) -> None:
    """Write an (IA)^3 adapter folder as a gain file, for load_gains().

    Args:
        folder: an adapter that PEFT or to_peft() saved: on this machine, with an ``adapter_model.safetensors``.
        gains: the gain file to write; its folder is made.
        model: the base model, or one with gains. Its frozen weights give the fingerprints. With a model on the meta device
            the gain file has no fingerprints and fits any weights.

    Raises:
        ValueError: not an (IA)^3 adapter, or a damaged one; an adapter that trained other modules as well; layers that are
            not linear maps of the model, or of other sizes; values that are not finite; or a layer where (IA)^3 is another
            map than a gain, as in to_peft().
        FileNotFoundError: no such folder, or no adapter in it.

    """
    folder = Path(folder)
    config = _read_config(folder)
    vectors = _read_vectors(folder)
    linears = named_linears(model)
    if unknown := vectors.keys() - linears.keys():
        raise UsageError(f"{folder} does not fit the model, which has no linear layers {some_of(unknown)}")
    layers = {name: layer for name, layer in linears.items() if name in vectors}
    sides = {name: _side(folder, name, vectors[name], layer) for name, layer in layers.items()}
    _refuse_other_maps(f"cannot write {folder} as a gain file", sides, layers, model)
    targets, base_model = config.get("target_modules"), config.get("base_model_name_or_path")
    file = GainFile(
        deltas={name: vectors[name].flatten() - 1 for name in layers},
        sides=sides,
        fingerprints={name: fingerprint(layer) for name, layer in layers.items()},
        targets=tuple(sorted(map(str, targets))) if isinstance(targets, list) else tuple(layers),
        base_model=Path(base_model).name if base_model else None,
        package=__version__,
    )
    write_gains(file, gains)


def _refuse_other_maps(what: str, sides: dict[str, str], layers: dict[str, nn.Module], model: nn.Module) -> None:
    """Raise ValueError for layers where (IA)^3 and a gain are different maps."""
    if experts := [name for name, layer in layers.items() if isinstance(layer, ExpertsLinear | ExpertsGain)]:
        raise UsageError(
            f"{what}: {some_of(experts)} are gains on the experts of a mixture, whose weights are parameters without a module, "
            "and PEFT's (IA)^3 wraps modules alone. Share the gain file, or absorb the gains and share the model."
        )
    if biased := [name for name, layer in layers.items() if sides[name] == "output" and _has_bias(layer)]:
        raise UsageError(
            f"{what}: (IA)^3 scales outputs together with their bias, a gain on the output side does not scale the bias, "
            f"and {len(biased)} of {len(sides)} layers have one: {some_of(biased)}"
        )
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    if shared := [name for name, layer in layers.items() if places[id(layer)] > 1]:
        raise UsageError(
            f"{what}: {some_of(shared)} are in several places of the model, and PEFT changes a layer in one of them"
        )


def _has_bias(layer: nn.Module) -> bool:
    bias = getattr(layer, "bias", None)
    return (bias() if callable(bias) else bias) is not None  # a method in torch's own quantised layers


def _auto_mapping(model: nn.Module) -> dict[str, str] | None:
    """The model's class, as PEFT notes it for AutoPeftModel."""
    kind = type(model)
    if not kind.__module__.startswith("transformers."):
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _modules(sides: dict[str, str], model: nn.Module) -> dict[str, list[str] | str]:
    """``target_modules``, which select the layers, and ``feedforward_modules``, which select those on the input side."""
    names = [canonical_name(name) for name, _ in model.named_modules()]
    chosen = {}
    for side in SIDES:
        wanted = [name for name in sides if sides[name] == side]
        chosen[side] = _selection(wanted, (name for name in names if sides.get(name) != side))
    output, feedforward = chosen["output"], chosen["input"]
    if isinstance(output, list) and isinstance(feedforward, list):
        targets: list[str] | str = sorted(
            [*output, *feedforward]
        )  # PEFT requires that feedforward_modules are among them, string by string
    else:
        targets = _expression(sides)
    return {"target_modules": targets, "feedforward_modules": feedforward}


def _selection(wanted: Sequence[str], others: Iterable[str]) -> list[str] | str:
    """The value that makes PEFT choose these modules and no others: the shortest ends of their names, or an expression.

    PEFT compares the ends of names, those of feedforward_modules by characters and not by components.
    """
    lines = "".join(f"{other}\n" for other in others)
    ends = set()
    for name in wanted:
        parts = name.split(".")
        candidates = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        end = next((end for end in candidates if end in ends or f"{end}\n" not in lines), None)
        if end is None:
            return _expression(wanted)
        ends.add(end)
    return sorted(ends)


def _expression(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(names)))


def _side(folder: Path, name: str, vector: Tensor, layer: nn.Module) -> str:
    n_in, n_out = cast(tuple[int, int], sizes(layer))
    sides: dict[tuple[int, ...], str] = {(1, n_in): "input", (n_out, 1): "output"}
    if tuple(vector.shape) not in sides:
        raise UsageError(
            f"{folder} does not fit the model: {name} has a vector of shape {tuple(vector.shape)}, expected ({n_out}, 1) "
            f"or (1, {n_in})"
        )
    return sides[tuple(vector.shape)]


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder: download an adapter on the Hub first")
    try:
        config = strict_json.read(folder / CONFIG)
        kind, trained = str(config["peft_type"]), config.get("modules_to_save")
        trained = [str(module) for module in trained or ()]
        if not isinstance(base := config.get("base_model_name_or_path"), str | None):
            raise TypeError(f"base_model_name_or_path is {named(repr(base))}")
    except FileNotFoundError:
        raise MissingFileError(f"{folder} is not a PEFT adapter: it has no {CONFIG}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / CONFIG} is damaged: {error!r}") from error
    if kind != "IA3":
        raise UsageError(f"{folder} is a {named(kind)} adapter; of PEFT's methods only IA3 is a gain")
    if trained:
        raise UsageError(
            f"{folder} also trained other modules ({some_of(trained)}: its modules_to_save), and a gain file holds "
            "gains alone"
        )
    return cast(dict[str, Any], config)


def _read_vectors(folder: Path) -> dict[str, Tensor]:
    """The vectors of an adapter by layer, in float32."""
    import safetensors.torch

    if not (folder / TENSORS).is_file():
        raise MissingFileError(
            f"{folder} has no {TENSORS}: load the adapter with PEFT and save it again with save_pretrained()"
        )
    try:
        tensors = safetensors.torch.load_file(folder / TENSORS)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{folder / TENSORS} is not a complete safetensors file: {error}") from error
    strange = [key for key in tensors if not (key.startswith(_PREFIX) and key.endswith(_SUFFIX))]
    if strange or not tensors:
        raise UsageError(f"{folder} holds {some_of(strange) or 'nothing'}, where vectors of (IA)^3 were expected")
    vectors = {key.removeprefix(_PREFIX).removesuffix(_SUFFIX): tensor.float() for key, tensor in tensors.items()}
    if bad := [name for name, vector in vectors.items() if not vector.isfinite().all()]:
        raise UsageError(f"{folder} holds values that are not finite, in {some_of(bad)}")
    return vectors


def _model_card(file: GainFile, base_model: str | None) -> str:
    metadata = ["library_name: peft", "tags:", "- gain", "- ia3"]
    if base_model:
        metadata.insert(0, f"base_model: {json.dumps(base_model)}")
    lines = [
        "---",
        *metadata,
        "---",
        "",
        "# Gains as an (IA)^3 adapter",
        "",
        f"A learned gain on each of {len(file.deltas)} layers of {base_model or 'the base model'}, for PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        'model = PeftModel.from_pretrained(base, "this folder, or its name on the Hub")',
        "```",
        "",
        f"Written by gain_ops {file.package}; `gain_ops.integrations.ia3.from_peft` turns it into a gain file.",
    ]
    return "\n".join(lines) + "\n"
