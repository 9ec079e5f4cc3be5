"""The ops on DTensors: the placements of arguments and results. No operand is ever moved to make placements fit.

An op on DTensors is the same op on every rank's own shards, where the placements fit together. The table below says when
they do: one row is one way of sharding over one dimension of a mesh. Placements that fit no row raise, since torch's own
propagation would gather the operands to the nearest placements that it knows.

    tokens        activations sharded over tokens (batch or sequence), parameters replicated
    column        the weight's rows sharded: x replicated, y sharded over features, no Partial sum
    row           the weight's columns sharded: x sharded over features, y a Partial sum over the ranks

A row-parallel gain on the output side scales each rank's term of the sum, before the reduction: ``gain * sum_r(x_r @ W_r.T)``
is ``sum_r(gain * (x_r @ W_r.T))``. So the op moves nothing, and the gain stays in the GEMM's epilogue. Each term is rounded
as often as without a gain (twice in the eager backend, unless gain = 1); scaling after the reduction would round once more.
The gradient is a sum over ranks as well: ``sum_t dy * z`` is linear in z, whatever part of z a rank holds.

Importing this module registers the raw ops' rules (torch.library.register_torch_dispatch); the public functions import it
at their first DTensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from gain_ops.backends.interface import FAKES, OPS

Y = TypeVar("Y", bound=Tensor | tuple[Tensor, Tensor])

# The operands and the results, then the rows. A letter is a placement on one dimension of the mesh:
#   R  replicated        T  some of the tokens        F  some of an activation's features, its last dimension
#   P  a term of a sum   0  some rows of a weight, or entries of delta or a bias        1  some columns of a weight
#   an expert's weight is [E, out, in], its delta and bias [E, n]: 1 and 2 are their features
#   -  the operand must be None; an operand that is None fits everywhere
_RULES: dict[str, tuple[str, ...]] = {
    "scale": ("x delta -> y", "R R -> R", "T R -> T", "F 0 -> F", "P R -> P"),
    "linear": ("x weight delta bias -> y", "R R R R -> R", "T R R R -> T", "R 0 0 0 -> F", "F 1 R P -> P"),
    "linear_z": ("x weight delta bias -> y z", "R R R R -> R R", "T R R R -> T T", "R 0 0 0 -> F F", "F 1 R P -> P P"),
    "linear_input": ("x weight delta bias -> y", "R R R R -> R", "T R R R -> T", "R 0 R 0 -> F", "F 1 0 P -> P"),
    "backward": ("dy z delta -> dz ddelta", "R R R -> R R", "T T R -> T P", "F F 0 -> F 0", "R P R -> R P"),
    "ddelta": ("dy z -> ddelta", "R R -> R", "T T -> P", "F F -> 0", "R P -> P"),
    "backward_recompute": (
        "dy x weight delta -> dz ddelta",
        "R R R R -> R R",
        "T T R R -> T P",
        "F R 0 0 -> F 0",
        "R F 1 R -> R P",
    ),
    "ddelta_recompute": ("dy x weight -> ddelta", "R R R -> R", "T T R -> P", "F R 0 -> 0", "R F 1 -> P"),
    "backward_input": (
        "dy x weight delta -> dx ddelta",
        "R R R R -> R R",
        "T T R R -> T P",
        "F R 0 R -> P P",
        "R F 1 0 -> F 0",
    ),
    "glu": ("gate up delta -> h", "R R R -> R", "T T R -> T", "F F 0 -> F"),
    # with up the two gradients lie side by side on each rank, which is no sharding of the [T, 2n] result
    "glu_backward": (
        "dh gate up delta -> dgate_up ddelta",
        "R R R R -> R R",
        "T T T R -> T P",
        "F F - 0 -> F 0",
    ),
    "glu_ddelta": ("dh gate up -> ddelta", "R R R -> R", "T T T -> P", "F F F -> 0"),
    "rms_norm": ("x weight delta -> y r", "R R R -> R R", "T R R -> T T"),
    "rms_norm_backward": ("dy x weight delta r -> dx ddelta", "R R R R R -> R R", "T T R R T -> T P"),
    "add": (
        "residual z delta bias -> h",
        "R R R R -> R",
        "T T R R -> T",
        "F F 0 0 -> F",
        "P P R P -> P",
    ),
    "add_rms_norm": ("residual z delta bias weight -> h y r", "R R R R R -> R R R", "T T R R R -> T T T"),
    "add_rms_norm_backward": (
        "dy dh h z delta weight r -> dx dz ddelta",
        "R R R R R R R -> R R R",
        "T T T T R R T -> T T P",
    ),
    "add_layer_norm": (
        "residual z delta bias weight shift -> h y mean r",
        "R R R R R R -> R R R R",
        "T T R R R R -> T T T T",
    ),
    "add_layer_norm_backward": (
        "dy dh h z delta weight mean r -> dx dz ddelta",
        "R R R R R R R R -> R R R",
        "T T T T R R T T -> T T P",
    ),
    "rms_norm_add": ("residual z delta weight -> h r", "R R R R -> R R", "T T R R -> T T"),
    "rms_norm_add_backward": ("dh z delta weight r -> dz ddelta", "R R R R R -> R R", "T T R R T -> T P"),
    # rows by expert: where they end holds for all rows, so tokens are not sharded
    "grouped_mm": ("x weight bias offsets -> z", "R R R R -> R", "R 1 1 R -> F", "F 2 P R -> P"),
    "grouped_scale": ("x delta bias offsets -> y", "R R R R -> R", "F 1 1 R -> F", "P R P R -> P"),
    "grouped_backward": ("dy z delta offsets -> dz ddelta", "R R R R -> R R", "F F 1 R -> F 1", "R P R R -> R P"),
    "grouped_ddelta": ("dy z offsets -> ddelta", "R R R -> R", "F F R -> 1", "R P R -> P"),
    "grouped_glu": ("gate up delta offsets -> h", "R R R R -> R", "F F 1 R -> F"),
    "grouped_glu_backward": (
        "dh gate up delta offsets -> dgate_up ddelta",
        "R R R R R -> R R",
        "F F - 1 R -> F 1",
    ),
    "grouped_glu_ddelta": ("dh gate up offsets -> ddelta", "R R R R -> R", "F F F R -> 1"),
    "combine": (
        "z delta bias weights order offsets -> y",
        "R R R R R R -> R",
        "F 1 1 R R R -> F",
        "P R P R R R -> P",
    ),
    "combine_backward": (
        "dy z delta bias weights order offsets -> dz ddelta dw",
        "R R R R R R R -> R R R",
        "F F 1 1 R R R -> F 1 P",
        "R P R P R R R -> R P P",
    ),
    # the public functions that are no raw op; in a packed gate, gate and up share one dimension, and a shard would split them
    "grouped_linear_output": (
        "x weight delta bias offsets -> y",
        "R R R R R -> R",
        "R 1 1 1 R -> F",
        "F 2 R P R -> P",
    ),
    "grouped_linear_input": (
        "x weight delta bias offsets -> y",
        "R R R R R -> R",
        "R 1 R 1 R -> F",
        "F 2 1 P R -> P",
    ),
    "gain_combine": (
        "weights z delta bias order offsets -> y",
        "R R R R R R -> R",
        "R F 1 1 R R -> F",
        "R P R P R R -> P",
    ),
    "grouped_glu_packed": ("gate up delta offsets -> h", "R - R R -> R"),
    "glu_packed": ("gate up delta -> h", "R - R -> R", "T - R -> T"),
    "mlp": (
        "x gate_weight up_weight down_weight delta gate_bias up_bias down_bias -> y",
        "R R R R R R R R -> R",
        "T R R R R R R R -> T",
        "R 0 0 1 0 0 0 P -> P",
    ),
    "mlp_packed": (
        "x gate_weight up_weight down_weight delta gate_bias up_bias down_bias -> y",
        "R R - R R R - R -> R",
        "T R - R R R - R -> T",
    ),
}

_WORDS = {
    "R": "Replicate",
    "T": "Shard(tokens)",
    "F": "Shard(-1)",
    "P": "Partial",
    "0": "Shard(0)",
    "1": "Shard(1)",
    "2": "Shard(2)",
}
_STATISTICS = {"mean", "r"}
_ACTIVATIONS = {"x", "dy", "z", "dh", "h", "gate", "up", "residual", "weights"}


@dataclass(frozen=True)
class _Row:
    """One row of a rule: a letter for each operand by name, and for each result."""

    operands: dict[str, str]
    results: tuple[str, ...]

    @property
    def shards(self) -> bool:
        """Whether ranks do different work."""
        return any(letter not in "R-" for letter in self.operands.values())


def on_shards(rule: str, features: int, function: Callable[..., Y], *arguments: Any) -> Y:
    """``function(*arguments)`` on every rank's own shards, differentiable: what the public functions do with DTensors.

    Args:
        rule: the name of the rule in the table.
        features: the last size of the result, or of both.
        function: what computes it, or the first two results of the rule, from plain tensors.
        arguments: the rule's operands in its order, the first an activation [..., n]; then options, passed on unchanged.

    Returns:
        A DTensor [..., features] for each result. In backward the gradient of a parameter arrives in the parameter's own
        placements. Only its sum over ranks is communicated, where the ranks hold terms of it. An activation's gradient may be
        Partial.

    Raises:
        ValueError: operands that are not all DTensors on one mesh, or placements that fit no row.
        RuntimeError: in a double backward.

    """
    names = _TABLE[rule][0].operands
    operands: dict[str, Tensor | None] = dict(zip(names, arguments, strict=False))
    layout = _Layout(rule, operands)
    y = function(*layout.local(operands).values(), *arguments[len(names) :])

    def distributed(index: int, part: Tensor) -> Tensor:
        if part.requires_grad and not torch.compiler.is_compiling():
            part.register_hook(_refuse_double_backward)
        return layout.distributed(index, part, (*arguments[0].shape[:-1], features))

    return cast(Y, distributed(0, y) if isinstance(y, Tensor) else (distributed(0, y[0]), distributed(1, y[1])))


class _Layout:
    """The row that operands fit on each dimension of their mesh."""

    def __init__(self, rule: str, operands: Mapping[str, Tensor | None]) -> None:
        sharded = _all_sharded(rule, {name: tensor for name, tensor in operands.items() if tensor is not None})
        self.mesh = next(iter(sharded.values())).device_mesh
        self.rows: list[_Row] = []
        self.token_dims: list[int] = []
        for i in range(self.mesh.ndim):
            letters = {name: _letter(name, tensor, i) for name, tensor in sharded.items()}
            token_dims = {
                _sharded_dim(sharded[name].placements[i])
                for name in sharded
                if letters[name] == "T" and name not in _STATISTICS
            }
            row = next((row for row in _TABLE[rule] if _fits(row, letters)), None)
            if row is None or len(token_dims) > 1:
                raise ValueError(_refusal(rule, self.mesh, i, sharded))
            self.rows.append(row)
            self.token_dims.append((token_dims.pop() if token_dims else None) or 0)

    def local(self, operands: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """Every operand's shard, through which gradients flow back."""
        return {
            name: None if tensor is None else self._local(name, cast(DTensor, tensor))
            for name, tensor in operands.items()
        }

    def distributed(self, index: int, local: Tensor, shape: Sequence[int]) -> DTensor:
        """The result of that index in the rule, of that global shape, from this rank's part of it."""
        placements: list[Placement] = []
        for row, token_dim in zip(self.rows, self.token_dims, strict=True):
            letter = row.results[index]
            if letter == "R":
                placements.append(Replicate())
            elif letter == "P":
                placements.append(Partial())
            else:
                placements.append(Shard({"T": token_dim, "F": len(shape) - 1, "0": 0, "1": 1}[letter]))
        if self._even(placements, shape):  # from_local finds the shape by itself, which torch.compile asks of it
            return DTensor.from_local(local, self.mesh, placements, run_check=False)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)

    def _local(self, name: str, tensor: DTensor) -> Tensor:
        gradients: list[Placement] = []
        elsewhere = False
        for i, (row, placement) in enumerate(zip(self.rows, tensor.placements, strict=True)):
            partial = placement.is_replicate() and row.shards
            gradients.append(Partial() if partial else Replicate() if placement.is_partial() else placement)
            # a replicated bias belongs to one term of a sum
            elsewhere |= partial and row.operands[name] == "P" and self.mesh.get_local_rank(i) != 0
        if not tensor.requires_grad:
            with torch.no_grad():  # no node in the graph
                local = tensor.to_local()
        else:
            if name not in _ACTIVATIONS and any(placement.is_partial() for placement in gradients):
                tensor = tensor.redistribute(placements=tensor.placements)  # moves only the gradient
            local = tensor.to_local(grad_placements=gradients)
        return local * 0 if elsewhere else local

    def _even(self, placements: Sequence[Placement], shape: Sequence[int]) -> bool:
        parts = [1] * len(shape)
        for i, placement in enumerate(placements):
            if isinstance(placement, Shard):
                parts[placement.dim] *= self.mesh.size(i)
        return all(size % count == 0 for size, count in zip(shape, parts, strict=True))


def _letter(name: str, tensor: DTensor, i: int) -> str:
    """The table's letter for an operand's placement on dimension i of the mesh."""
    placement = tensor.placements[i]
    if placement == Replicate():
        return "R"
    if placement == Partial():
        return "P"
    dim = _sharded_dim(placement)
    if dim is None:
        return "?"
    if name in _STATISTICS:
        return "T"
    if name in _ACTIVATIONS:
        return "F" if dim == tensor.dim() - 1 else "T"
    return str(dim)


def _sharded_dim(placement: Placement) -> int | None:
    """d of a Shard(d); None for all else, a strided shard too, which interleaves."""
    if not placement.is_shard():
        return None
    dim: int = cast(Any, placement).dim
    return dim if placement == Shard(dim) else None


def _fits(row: _Row, letters: Mapping[str, str]) -> bool:
    for name, wanted in row.operands.items():
        letter = letters.get(name)
        replicated_bias = wanted == "P" and letter == "R" and name.endswith("bias")
        if letter is not None and letter != wanted and not replicated_bias:
            return False
    return True


def _parsed(header: str, *rows: str) -> tuple[_Row, ...]:
    names = header.split(" -> ")[0].split()
    sides = ([side.split() for side in row.split(" -> ")] for row in rows)
    return tuple(_Row(dict(zip(names, operands, strict=True)), tuple(results)) for operands, results in sides)


def _all_sharded(rule: str, operands: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """The operands, if all are DTensors on one mesh."""
    sharded = {name: tensor for name, tensor in operands.items() if isinstance(tensor, DTensor)}
    plain = [name for name in operands if name not in sharded]
    if plain:
        raise ValueError(
            f"gain_ops {rule}: got {', '.join(sharded)} as DTensor and {', '.join(plain)} as a plain tensor. All "
            "must be DTensors: an activation becomes one by DTensor.from_local, and a model's deltas go with their weights by "
            "gain_ops.integrations.tensor_parallel.place_gains(model)."
        )
    meshes = {tensor.device_mesh for tensor in sharded.values()}
    if len(meshes) > 1:
        raise ValueError(f"gain_ops {rule}: the operands are on different meshes: {', '.join(map(str, meshes))}")
    return sharded


def _refusal(rule: str, mesh: DeviceMesh, i: int, operands: Mapping[str, DTensor]) -> str:
    came = ", ".join(f"{name} {_said(tensor.placements[i])}" for name, tensor in operands.items())
    taken = []
    for row in _TABLE[rule]:
        if all(letter != "-" or name not in operands for name, letter in row.operands.items()):
            words = (f"{name} {_WORDS[letter]}" for name, letter in row.operands.items() if name in operands)
            taken.append("  " + ", ".join(words))
    where = mesh.mesh_dim_names[i] if mesh.mesh_dim_names else str(i)
    return "\n".join(
        [
            f"gain_ops {rule}: on dimension {where} of the mesh it got {came}. It takes one of these, with all tokens "
            "sharded over one dimension:",
            *taken,
            "No operand is gathered to make others fit: redistribute() the one that does not. A delta goes with its weight by "
            "gain_ops.integrations.tensor_parallel.place_gains(model).",
        ]
    )


def _said(placement: Placement) -> str:
    if placement == Replicate():
        return "Replicate"
    if placement == Partial():
        return "Partial"
    dim = _sharded_dim(placement)
    return repr(placement) if dim is None else f"Shard({dim})"


def _refuse_double_backward(dy: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True reached a gain on DTensors, and torch cannot differentiate twice from a DTensor to its "
            "shard: take second derivatives in one process"
        )


def _dispatch(_: type, op: Any, types: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A raw op that got a DTensor, without gradients, as raw ops are."""
    rule = op._schema.name.removeprefix("gain_ops::")
    given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    operands = {name: given[name] for name in _TABLE[rule][0].operands}
    layout = _Layout(rule, operands)
    results = op(**given | layout.local(operands))
    del given["backend"]
    shapes = getattr(FAKES, rule)(**{name: _meta(value) for name, value in given.items()})
    if isinstance(results, Tensor):
        return layout.distributed(0, results, shapes.shape)
    return tuple(layout.distributed(i, t, like.shape) for i, (t, like) in enumerate(zip(results, shapes, strict=True)))


def _meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


_TABLE = {rule: _parsed(*lines) for rule, lines in _RULES.items()}

for _name in OPS:
    torch.library.register_torch_dispatch(f"gain_ops::{_name}", DTensor, _dispatch)
