"""The functions of gain_ops.reference as Triton kernels, by the same names: dispatch.py loads this module."""

from gain_ops.kernels.add import add
from gain_ops.kernels.add_norm import (
    add_layer_norm,
    add_layer_norm_backward,
    add_rms_norm,
    add_rms_norm_backward,
)
from gain_ops.kernels.combine import combine, combine_backward
from gain_ops.kernels.glu import glu, glu_backward, glu_ddelta
from gain_ops.kernels.grouped import grouped_backward, grouped_ddelta, grouped_mm, grouped_scale
from gain_ops.kernels.grouped_glu import grouped_glu, grouped_glu_backward, grouped_glu_ddelta
from gain_ops.kernels.linear_backward import backward_input, backward_recompute, ddelta_recompute
from gain_ops.kernels.linear_forward import linear, linear_z
from gain_ops.kernels.norm_add import rms_norm_add, rms_norm_add_backward
from gain_ops.kernels.rms_norm import rms_norm, rms_norm_backward
from gain_ops.kernels.rows import COMPOSED, backward, ddelta, linear_input, scale

__all__ = [
    "COMPOSED",
    "add",
    "add_layer_norm",
    "add_layer_norm_backward",
    "add_rms_norm",
    "add_rms_norm_backward",
    "backward",
    "backward_input",
    "backward_recompute",
    "combine",
    "combine_backward",
    "ddelta",
    "ddelta_recompute",
    "glu",
    "glu_backward",
    "glu_ddelta",
    "grouped_backward",
    "grouped_ddelta",
    "grouped_glu",
    "grouped_glu_backward",
    "grouped_glu_ddelta",
    "grouped_mm",
    "grouped_scale",
    "linear",
    "linear_input",
    "linear_z",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_backward",
    "rms_norm_backward",
    "scale",
]
