"""What a format gets beside the layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """The checkpoint's entries on its quantisation, and the caller's options.

    Attributes:
        config: "quantization_config" in config.json.
        metadata: the entries in the header of the layer's file beside its tensors.
        requantize: whether codes may be rounded again where no scale can take the gain.

    """

    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    requantize: bool
