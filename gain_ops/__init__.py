"""gain_ops: adapt a frozen language model by a learned diagonal gain on its projections.

::

    W_new = diag(gain) @ W        (side="output")        W_new = W @ diag(gain)        (side="input")

W stays frozen, ``gain = 1 + delta`` is learned and absorbed into W when training is done. Importing this package loads no
CUDA, no triton and no transformers.

    gain_linear, gain_scale             the operation                      ops/linear.py
    gain_glu, gain_swiglu, ...          the gain in an FFN's activation    ops/glu.py
    gain_rms_norm                       the gain in a norm                 ops/rms_norm.py
    gain_mlp                            a whole FFN                        ops/mlp.py
    GainLinear, GainWrapper             the layers                         layers/
    apply, remove                       gains on a model                   models/apply.py
    save_gains, load_gains              a model's gain file                models/files.py
    GainFile, read_gains, write_gains   one without a model                gainfiles/file.py
    absorb                              fold the gains into the weights    models/absorb.py
    add_gains, set_gains, ...           several named gain sets            models/sets.py
    combine_gains                       gain files into one                gainfiles/combining.py
    saved_bytes                         what is saved for backward         measure/saved_bytes.py
"""

from gain_ops._version import __version__
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

__all__ = [
    "BackendUnavailable",
    "GainFile",
    "GainFileError",
    "GainLinear",
    "GainWrapper",
    "__version__",
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
