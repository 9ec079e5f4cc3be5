"""What ``gain_ops`` exports, with torch."""

from gain_ops.gainfiles.combining import combine_gains
from gain_ops.gainfiles.file import GainFile, GainFileError, read_gains, write_gains
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.models.absorb import absorb
from gain_ops.models.apply import apply, remove
from gain_ops.models.files import load_gains, save_gains
from gain_ops.models.sets import active_gains, add_gains, list_gains, set_gains, using_gains
from gain_ops.ops.dispatch import BackendUnavailable
from gain_ops.ops.glu import gain_activation, gain_geglu, gain_glu, gain_relu2, gain_swiglu
from gain_ops.ops.linear import gain_linear, gain_scale
from gain_ops.ops.mlp import gain_mlp
from gain_ops.ops.rms_norm import gain_rms_norm
from gain_ops.utils.errors import GainOpsError

__all__ = [
    "BackendUnavailable",
    "GainFile",
    "GainFileError",
    "GainLinear",
    "GainOpsError",
    "GainWrapper",
    "absorb",
    "active_gains",
    "add_gains",
    "apply",
    "combine_gains",
    "gain_activation",
    "gain_geglu",
    "gain_glu",
    "gain_linear",
    "gain_mlp",
    "gain_relu2",
    "gain_rms_norm",
    "gain_scale",
    "gain_swiglu",
    "list_gains",
    "load_gains",
    "read_gains",
    "remove",
    "save_gains",
    "saved_bytes",
    "set_gains",
    "using_gains",
    "write_gains",
]
