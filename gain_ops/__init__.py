"""gain_ops: adapt a frozen language model by a learned diagonal gain on its projections.

::

    W_new = diag(gain) @ W        (side="output")        W_new = W @ diag(gain)        (side="input")

W stays frozen, ``gain = 1 + delta`` is learned and absorbed into W when training is done. Importing this package loads no
CUDA, no triton and no transformers.

    gain_linear, gain_scale             the operation                      ops/linear.py
    gain_glu, gain_swiglu, ...          the gain in an FFN's activation    ops/glu.py
    gain_rms_norm                       the gain in a norm                 ops/rms_norm.py
    gain_add, gain_add_rms_norm, ...    the gain before a residual add     ops/residual.py
    gain_grouped_linear, gain_combine   gains on a mixture's experts       ops/grouped.py
    gain_mlp                            an FFN as one function             ops/mlp.py
    GainLinear, GainWrapper             the layers                         layers/
    apply, remove                       gains on a model                   models/apply.py
    check                               proof that a model uses its gains  models/check.py
    save_gains, load_gains              a model's gain file                models/files.py
    GainFile, read_gains, write_gains   a gain file, without a model       gainfiles/file.py
    absorb                              fold the gains into the weights    models/absorb.py
    add_gains, set_gains, ...           several named gain sets            models/sets.py
    combine_gains                       gain files into one                gainfiles/combining.py
    saved_bytes                         what is saved for backward         measure/saved_bytes.py
    GainOpsError                        the base of the package's errors   utils/errors.py
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gain_ops._version import __version__

__all__ = [
    "BackendUnavailable",
    "GainFile",
    "GainFileError",
    "GainLinear",
    "GainOpsError",
    "GainWrapper",
    "__version__",
    "absorb",
    "active_gains",
    "add_gains",
    "apply",
    "check",
    "combine_gains",
    "gain_activation",
    "gain_add",
    "gain_add_layer_norm",
    "gain_add_rms_norm",
    "gain_combine",
    "gain_geglu",
    "gain_glu",
    "gain_grouped_linear",
    "gain_linear",
    "gain_mlp",
    "gain_relu2",
    "gain_rms_norm",
    "gain_rms_norm_add",
    "gain_scale",
    "gain_swiglu",
    "list_gains",
    "load_gains",
    "mix_gains",
    "read_gains",
    "remove",
    "save_gains",
    "saved_bytes",
    "set_gains",
    "use_sets",
    "using_gains",
    "write_gains",
]

# torch takes seconds to import, and the command's --help needs none of it: the command gets these names when it asks for one
if TYPE_CHECKING or [Path(name).name for name in sys.argv[:1]] != ["gain-ops"]:
    from gain_ops._exports import *
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from gain_ops import _exports

        return getattr(_exports, name)
