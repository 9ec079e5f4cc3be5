"""gain_ops: adapt a frozen language model by a learned diagonal gain on its projections.

::

    W_new = diag(gain) @ W        (side="output")        W_new = W @ diag(gain)        (side="input")

W stays frozen, ``gain = 1 + delta`` is learned and absorbed into W when training is done. Importing this package loads no
CUDA, no triton and no transformers.

    gain_linear, gain_scale        the operation                      functional.py
    gain_swiglu, gain_geglu, ...   the gain in an FFN's activation    ffn.py
    gain_rms_norm                  the gain in a norm                 ffn.py
    gain_mlp                       a whole FFN                        mlp.py
    GainLinear                     the layer                          modules.py
    apply, remove                  gains on a model                   adapt.py
    save_gains, load_gains         gain files                         adapters.py
    write_gains                    one without a model
    absorb                         fold the gains into the weights    absorption.py
    add_gains, set_gains           several named gain sets            gain_sets.py
    combine_gains                  gain files into one                combining.py
"""

from gain_ops._version import __version__
from gain_ops.gainfiles.combining import combine_gains
from gain_ops.gainfiles.file import write_gains
from gain_ops.layers.linear import GainLinear
from gain_ops.models.absorb import absorb
from gain_ops.models.apply import apply, remove
from gain_ops.models.files import load_gains, save_gains
from gain_ops.models.sets import add_gains, set_gains
from gain_ops.ops.dispatch import BackendUnavailable
from gain_ops.ops.glu import gain_activation, gain_geglu, gain_glu, gain_relu2, gain_swiglu
from gain_ops.ops.linear import gain_linear, gain_scale
from gain_ops.ops.mlp import gain_mlp
from gain_ops.ops.rms_norm import gain_rms_norm

__all__ = [
    "BackendUnavailable",
    "GainLinear",
    "__version__",
    "absorb",
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
    "load_gains",
    "remove",
    "save_gains",
    "set_gains",
    "write_gains",
]
