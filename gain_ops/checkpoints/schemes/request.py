"""What a format is told beside the layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """What the checkpoint says of its quantisation, and what was asked for.

    Attributes:
        config: "quantization_config" in config.json.
        metadata: what the header of the layer's file says beside its tensors.
        requantize: whether codes may be rounded anew where no scale can take the gain.

    """

    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    requantize: bool
