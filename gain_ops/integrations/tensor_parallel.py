"""Tensor parallelism of a model with gains: the placement of its deltas, and a style for an FFN that runs as one function.

GainLinear is an nn.Linear, so torch's own styles (ColwiseParallel, RowwiseParallel, SequenceParallel) serve it. They know
nothing of a delta, and ``place_gains`` places it with its weight.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from gain_ops.layers.gained import Gained
from gain_ops.layers.linears import refuse_fsdp
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.folded_activation import refuse_folded_activations
from gain_ops.models.fused_mlp import FusedMlp, fused_modules
from gain_ops.models.fused_residual import refuse_fused_residual
from gain_ops.utils.dtensors import is_sharded
from gain_ops.utils.errors import UsageError


def place_gains(model: nn.Module) -> None:
    """Place every delta with its weight, in place: sharded if the weight's gained dimension is, otherwise replicated.

    ::

        column-parallel weight:   output side sharded        input side replicated
        row-parallel weight:      output side replicated     input side sharded

    Call it on every rank after parallelize_module() and before fully_shard() and the optimizer: the deltas are new
    parameters. Weights that are not sharded are skipped, and their deltas stay plain tensors. If a model has both, give the
    optimizer two groups of parameters, or ``foreach=False``, and clip each group by the norm of both: torch's functions on
    many tensors (``foreach``, ``clip_grad_norm_``) refuse a mix of DTensors and plain tensors.

    Raises:
        ValueError: after fully_shard(); gains that fuse_residual folded; a gain around a sharded linear map that is not a
            plain one (GainWrapper); or a fused FFN whose projections have styles, which only FusedMlpParallel serves. Nothing
            has been changed then.

    """
    refuse_fsdp(model, "place the gains")
    refuse_fused_residual(model, "place_gains")
    refuse_folded_activations(model, "place_gains")
    for ffn in fused_modules(model):
        layout = ffn._gain_layout
        if any(ffn.get_submodule(name)._forward_hooks for name in (layout.gate, layout.down)):
            raise UsageError(
                f"{type(ffn).__name__} reads the weights of its projections and does not call them, so their styles have no "
                "effect: take them out of the plan and give the FFN itself FusedMlpParallel()"
            )
    gained = [
        module for module in model.modules() if isinstance(module, Gained) and any(map(is_sharded, module.parameters()))
    ]
    for module in gained:
        if isinstance(module, GainWrapper):
            raise UsageError(
                f"a gain around {type(module.base).__name__} cannot be sharded with it: its layout on the ranks is not known. "
                "Leave it out of the plan, or put the gain on a plain nn.Linear."
            )
    for module in gained:
        weight = module.weight
        assert isinstance(weight, DTensor)
        placements: list[Placement] = [
            Shard(0) if isinstance(placement, Shard) and placement.dim == module.gained_dim else Replicate()
            for placement in weight.placements
        ]
        weight.requires_grad_(False)  # some versions of the styles reset it
        if module.bias is not None:
            module.bias.requires_grad_(False)
        _place(module, "delta", weight.device_mesh, placements)


class FusedMlpParallel(ParallelStyle):
    """The style of an FFN fused by ``apply(..., fuse_mlp=True)``, which reads its projections' weights and calls none of them.

    Gate and up are sharded over their rows, and down over its columns, with delta; the output is one sum over the ranks. This
    style replaces the styles of the three projections, which must have none::

        parallelize_module(layer, mesh, {"mlp": FusedMlpParallel()})

    Args:
        input_layouts: the placement of the FFN's input, if that is a plain tensor; by default Replicate().
        output_layouts: the placement of its output, by default Replicate(); Shard(1) for sequence parallelism.
        use_local_output: whether the output is a plain tensor.

    Raises:
        TypeError: when it is applied, for a module that is not a fused FFN.
        ValueError: for an FFN with gate and up in one weight, whose shards would not hold pairs, or with a dropout, which
            needs the reduced sum and not a Partial one.

    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = [input_layouts or Replicate()]
        self.output_layouts = [output_layouts or Replicate()]
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, FusedMlp):
            raise TypeError(
                f"FusedMlpParallel is for an FFN that apply(..., fuse_mlp=True) has fused, got {type(module).__name__}: "
                "use ColwiseParallel and RowwiseParallel on its projections"
            )
        layout = module._gain_layout
        if layout.packed or layout.dropout is not None:
            why = "gate and up in one weight" if layout.packed else "a dropout after its down projection"
            raise UsageError(f"FusedMlpParallel does not serve an FFN with {why} ({type(module).__name__})")
        for name in (layout.gate, layout.up):
            if name is not None:
                self._shard(module.get_submodule(name), device_mesh, 0)
        down = module.get_submodule(layout.down)
        self._shard(down, device_mesh, 1)
        _place(down, "delta", device_mesh, [Shard(0)])
        return distribute_module(module, device_mesh, None, self._prepare, self._finish)

    def _shard(self, linear: nn.Module, mesh: DeviceMesh, dim: int) -> None:
        """Shard a projection: dim 0 its output features, with the bias, or 1 its input features."""
        _place(linear, "weight", mesh, [Shard(dim)])
        if linear.bias is not None:
            _place(linear, "bias", mesh, [Shard(0) if dim == 0 else Replicate()])

    def _prepare(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x, *rest = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        return x.redistribute(placements=[Replicate()]), *rest

    def _finish(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        output = output.redistribute(placements=self.output_layouts)
        return output.to_local() if self.use_local_output else output


def _place(module: nn.Module, name: str, mesh: DeviceMesh, placements: list[Placement]) -> None:
    """Give a module's parameter these placements."""
    old = module._parameters[name]
    assert old is not None
    with torch.no_grad():
        new = (
            old.redistribute(placements=placements)
            if isinstance(old, DTensor)
            else distribute_tensor(old, mesh, placements)
        )
    module.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
