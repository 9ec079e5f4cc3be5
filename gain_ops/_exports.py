"""What ``gain_ops`` exports, with torch.

Each name is imported as itself, which type checkers take for an export.
"""

from gain_ops.gainfiles.combining import combine_gains as combine_gains
from gain_ops.gainfiles.file import GainFile as GainFile
from gain_ops.gainfiles.file import GainFileError as GainFileError
from gain_ops.gainfiles.file import read_gains as read_gains
from gain_ops.gainfiles.file import write_gains as write_gains
from gain_ops.layers.linear import GainLinear as GainLinear
from gain_ops.layers.wrapper import GainWrapper as GainWrapper
from gain_ops.measure.saved_bytes import saved_bytes as saved_bytes
from gain_ops.models.absorb import absorb as absorb
from gain_ops.models.apply import apply as apply
from gain_ops.models.apply import remove as remove
from gain_ops.models.check import check as check
from gain_ops.models.files import load_gains as load_gains
from gain_ops.models.files import save_gains as save_gains
from gain_ops.models.mixing import mix_gains as mix_gains
from gain_ops.models.mixing import use_sets as use_sets
from gain_ops.models.sets import active_gains as active_gains
from gain_ops.models.sets import add_gains as add_gains
from gain_ops.models.sets import list_gains as list_gains
from gain_ops.models.sets import set_gains as set_gains
from gain_ops.models.sets import using_gains as using_gains
from gain_ops.ops.dispatch import BackendUnavailable as BackendUnavailable
from gain_ops.ops.glu import gain_activation as gain_activation
from gain_ops.ops.glu import gain_geglu as gain_geglu
from gain_ops.ops.glu import gain_glu as gain_glu
from gain_ops.ops.glu import gain_relu2 as gain_relu2
from gain_ops.ops.glu import gain_swiglu as gain_swiglu
from gain_ops.ops.grouped import gain_combine as gain_combine
from gain_ops.ops.grouped import gain_grouped_linear as gain_grouped_linear
from gain_ops.ops.linear import gain_linear as gain_linear
from gain_ops.ops.linear import gain_scale as gain_scale
from gain_ops.ops.mlp import gain_mlp as gain_mlp
from gain_ops.ops.residual import gain_add as gain_add
from gain_ops.ops.residual import gain_add_layer_norm as gain_add_layer_norm
from gain_ops.ops.residual import gain_add_rms_norm as gain_add_rms_norm
from gain_ops.ops.residual import gain_rms_norm_add as gain_rms_norm_add
from gain_ops.ops.rms_norm import gain_rms_norm as gain_rms_norm
from gain_ops.utils.errors import GainOpsError as GainOpsError
