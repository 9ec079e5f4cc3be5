"""The raw ops in torch's dispatcher: schemas, fakes with true strides, every device.

Each op is one function of reference.py, with the backend's name as its last argument: ``torch.ops.gain_ops.linear`` and so
on. They know nothing of autograd, which lives in the file of each family, such as linear.py: a plain ``define``/``impl``
costs a third of the host time of ``torch.library.custom_op`` with ``register_autograd``. No output aliases an input, and
every output is contiguous. Their rules for DTensors are in sharding.py.
"""

from typing import Any

import torch

from gain_ops.backends import fakes
from gain_ops.ops import dispatch

_library = torch.library.Library("gain_ops", "DEF")


def _register(schema: str) -> Any:
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        *tensors, backend = args
        return getattr(dispatch.implementation(backend, tensors[0]), name)(*tensors)

    def fake(*args: Any) -> Any:
        *tensors, _ = args
        return getattr(fakes, name)(*tensors)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, run, "CompositeExplicitAutograd")  # every device: dispatch.py finds the backend that serves it
    torch.library.register_fake(f"gain_ops::{name}", fake, lib=_library)
    return getattr(torch.ops.gain_ops, name).default


_LINEAR = "(Tensor x, Tensor weight, Tensor delta, Tensor? bias, str backend)"

scale = _register("scale(Tensor x, Tensor delta, str backend) -> Tensor")
linear = _register(f"linear{_LINEAR} -> Tensor")
linear_z = _register(f"linear_z{_LINEAR} -> (Tensor y, Tensor z)")
linear_input = _register(f"linear_input{_LINEAR} -> Tensor")
backward = _register("backward(Tensor dy, Tensor z, Tensor delta, str backend) -> (Tensor dz, Tensor ddelta)")
ddelta = _register("ddelta(Tensor dy, Tensor z, str backend) -> Tensor")
backward_recompute = _register(
    "backward_recompute(Tensor dy, Tensor x, Tensor weight, Tensor delta, str backend) -> (Tensor dz, Tensor ddelta)"
)
ddelta_recompute = _register("ddelta_recompute(Tensor dy, Tensor x, Tensor weight, str backend) -> Tensor")
backward_input = _register(
    "backward_input(Tensor dy, Tensor x, Tensor weight, Tensor delta, str backend) -> (Tensor dx, Tensor ddelta)"
)
glu = _register("glu(Tensor gate, Tensor? up, Tensor delta, str activation, str backend) -> Tensor")
glu_backward = _register(
    "glu_backward(Tensor dh, Tensor gate, Tensor? up, Tensor delta, str activation, str backend)"
    " -> (Tensor dgate_up, Tensor ddelta)"
)
glu_ddelta = _register("glu_ddelta(Tensor dh, Tensor gate, Tensor? up, str activation, str backend) -> Tensor")
rms_norm = _register("rms_norm(Tensor x, Tensor weight, Tensor delta, float eps, str backend) -> (Tensor y, Tensor r)")
rms_norm_backward = _register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor delta, Tensor r, str backend)"
    " -> (Tensor dx, Tensor ddelta)"
)
