"""What counts as a linear map, and which of them GainLinear can replace: questions that change nothing."""

from typing import cast

import torch
from torch import Tensor, nn

from gain_ops.utils.dtensors import is_sharded
from gain_ops.utils.errors import UsageError

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# nn.Linear subclasses of other packages whose own forward is x @ W.T + b.
_SAME_MAP = ("transformers.models.falcon.modeling_falcon.FalconLinear",)

_CONV1D = "transformers.pytorch_utils.Conv1D"


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear map, or None for a module that does not have them."""
    if _is_conv1d_class(module):
        return cast(int, module.nx), cast(int, module.nf)
    n_in, n_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (n_in, n_out) if isinstance(n_in, int) and isinstance(n_out, int) else None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the module is nn.Linear's own map on a floating [out, in] weight that is a plain Parameter, and nothing more."""
    return "forward" not in vars(module) and _is_linear_class(module) and _is_bare(module) and has_plain_weight(module)


def is_plain_conv1d(module: nn.Module) -> bool:
    """The same for transformers' Conv1D, weight [in, out]."""
    return is_conv1d(module) and _is_bare(module) and has_plain_weight(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' own Conv1D, weight [in, out]; asks without importing transformers."""
    return _is_conv1d_class(module) and "forward" not in vars(module)


def computes_from_weight(module: nn.Module) -> bool:
    """Whether the map is that of a plain weight, whatever else the module holds and wherever accelerate puts the weight."""
    known = _is_linear_class(module) or _is_conv1d_class(module)
    return known and not has_own_forward(module) and has_plain_weight(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, other than accelerate's, which calls the class's."""
    return "forward" in vars(module) and "_hf_hook" not in vars(module)


def offloads(module: nn.Module) -> bool:
    """Whether a hook of accelerate brings the tensors for each forward, and leaves them on the meta device between."""
    hook = vars(module).get("_hf_hook")
    return any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ())))


def weight_dim(module: nn.Module, side: str) -> int:
    """The dimension of the stored weight that runs over the features of a side."""
    return int((side == "output") == _is_conv1d_class(module))


def has_plain_weight(module: nn.Module) -> bool:
    """Whether ``module.weight`` is an ordinary floating Parameter of two dimensions, the layer's sizes in either order.

    False for packed and other quantised weights, tensor subclasses, parametrised weights and other float formats.
    """
    weight = floating_parameter(module, "weight")
    if weight is None:
        return False
    n_in, n_out = sizes(module) or (0, 0)
    # ZeRO-3 holds a parameter partitioned, and its shape in ds_shape.
    return tuple(getattr(weight, "ds_shape", weight.shape)) == (
        (n_in, n_out) if _is_conv1d_class(module) else (n_out, n_in)
    )


def floating_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """A module's own parameter of a name if it is an ordinary one with floating values, or None."""
    parameter = module._parameters.get(name)
    ordinary = type(parameter) is nn.Parameter or (parameter is not None and is_sharded(parameter))
    return parameter if ordinary and cast(Tensor, parameter).dtype in _FLOATING else None


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is of another package's class that holds tensors, such as torchao's quantised weights."""
    return hasattr(tensor, "__tensor_flatten__") and type(tensor).__module__.partition(".")[0] != "torch"


def refuse_sharded(module: nn.Module) -> None:
    """Raise ValueError if a parameter is a DTensor: a plain delta beside it cannot work."""
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            raise UsageError(
                f"{name} of {type(module).__name__} is already sharded (a DTensor). Put the gains on first and "
                "shard after (fully_shard, parallelize_module), so that delta is sharded with the weight."
            )


def refuse_fsdp(model: nn.Module, action: str) -> None:
    """Raise ValueError if fully_shard() was called in the model: the modules are the same, and their parameters are not."""
    for name, module in model.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise UsageError(
                f"cannot {action} after fully_shard() ({name or type(model).__name__} is sharded). Do it before "
                "sharding, or save the gains and load them into an unsharded model."
            )


def describe(module: nn.Module) -> str:
    """The class and weight of a module, for an error message."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return type(module).__name__
    return f"{type(module).__name__} with a {type(weight).__name__} of shape {tuple(weight.shape)} and {weight.dtype}"


def quantises_activations(module: nn.Module) -> bool:
    """Whether torchao or compressed-tensors rounds the layer's input; neither has a backward for this."""
    scheme = getattr(module, "quantization_scheme", None)
    weight = getattr(module, "weight", None)
    marks = "act_quant_kwargs", "activation_quantization", "act_mapping_type"
    return getattr(scheme, "input_activations", None) is not None or any(getattr(weight, mark, None) for mark in marks)


def is_kind(thing: object, name: str) -> bool:
    """Whether its class, or one that it derives from, is ``package.Class``; asks without importing the package."""
    return any(name == kind_name(kind) for kind in type(thing).__mro__)


def kind_name(kind: type) -> str:
    """``package.Class``, whichever of the package's modules the class is defined in."""
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _is_linear_class(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _qualified_name(type(module)) in _SAME_MAP


def _is_conv1d_class(module: nn.Module) -> bool:
    return _qualified_name(type(module)) == _CONV1D


def _is_bare(module: nn.Module) -> bool:
    """Whether the module holds weight and bias alone: a layer that replaces it would lose the rest."""
    return module._parameters.keys() <= {"weight", "bias"} and not module._buffers and not module._modules


def _qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def own_tensors(module: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, tensor subclasses split into the plain tensors in them."""
    tensors: dict[str, Tensor] = {}
    pending = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
    for name, tensor in pending:
        if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
            inner, _ = tensor.__tensor_flatten__()
            pending.extend((f"{name}.{part}", getattr(tensor, part)) for part in inner)
        else:
            tensors[name] = tensor
    return tensors
