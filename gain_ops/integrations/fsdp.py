"""FSDP2 under a mixed precision policy: layers with a gain in groups of their own, so that delta is not rounded.

A group of FSDP2 has one policy, whose ``param_dtype`` is the dtype in which every parameter of the group is gathered. So delta
reaches the layer in bfloat16, with a relative error of up to 2^-8, although it is stored and updated in float32.

Without ``param_dtype`` nothing is cast, and one group may hold a bfloat16 weight and a float32 delta. This is the better way,
and needs nothing from this file: a frozen weight has no use for a float32 copy, so load it in bfloat16 and set no policy.
Where something else sets a policy, call shard_gains() before it. It costs one more gather a layer, forward and backward.

A group's trained parameters must have one dtype, so shard_gains() is also for gains beside parameters that are trained in
bfloat16. Parameters that FSDP2 ignores would not be rounded either, but it does not reduce their gradients.
"""

from typing import Any

from torch import nn

from gain_ops.models.folded_activation import refuse_folded_activations
from gain_ops.models.fused_mlp import fused_modules
from gain_ops.models.fused_residual import refuse_fused_residual
from gain_ops.models.record import gained_modules
from gain_ops.utils.errors import UsageError

__all__ = ["shard_gains"]


def shard_gains(model: nn.Module, **options: Any) -> None:
    """Call fully_shard() on every layer with a gain, before you call it on the blocks around them with a policy.

    ::

        shard_gains(model, mesh=mesh)
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    An FFN that fuse_mlp fused is one group, since it reads the parameters of its projections.

    Args:
        model: with gains, and the frozen weights of these layers in the policy's ``param_dtype`` already: they are gathered
            without a cast.
        options: the arguments of fully_shard(), without a ``param_dtype``.

    Raises:
        ValueError: the model has no gains, or gains that fuse_residual folded, or fuse_mlp into an activation;
            or the options have a ``param_dtype``.

    """
    from torch.distributed.fsdp import fully_shard

    if getattr(options.get("mp_policy"), "param_dtype", None) is not None:
        raise UsageError(
            "param_dtype would round delta: give shard_gains() a policy without it, and give the blocks the other policy"
        )
    layers = list(gained_modules(model).values())
    if not layers:
        raise UsageError(f"{type(model).__name__} has no gains: put them on with gain_ops.apply() first")
    refuse_fused_residual(model, "shard_gains")
    refuse_folded_activations(model, "shard_gains")
    fused = list(fused_modules(model))
    inside = {id(module) for ffn in fused for module in ffn.modules()}
    for module in (*fused, *(layer for layer in layers if id(layer) not in inside)):
        fully_shard(module, **options)
