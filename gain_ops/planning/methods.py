"""The ways to adapt a model: gains, PEFT's adapters, full fine-tuning, or none; each is put on a model in place.

Plans, studies and benchmarks select from METHODS by name, and add their own options. The options of commands name methods, so
torch is imported when a method is put on a model, and not before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gain_ops.measure.step_bytes import LORA_RANK

if TYPE_CHECKING:
    from torch import nn


__all__ = ["DORA", "FROZEN", "FULL", "IA3", "IN_MODEL_DTYPE", "LORA", "METHODS", "ON_PEFTS_LAYERS", "Method", "by_peft"]

FROZEN, FULL = "frozen", "full fine-tuning"
IA3, LORA, DORA = "(IA)^3", f"LoRA r={LORA_RANK}", f"DoRA r={LORA_RANK}"
"""PEFT's methods, on the layers of gain-ffn and with adapters in fp32; a difference from this is appended to the name."""

IN_MODEL_DTYPE = ", adapters in the model's dtype"
ON_PEFTS_LAYERS = ", on PEFT's choice of layers"
"""For most models queries and values; of (IA)^3 keys, values and the FFN's down projection."""


class Put(Protocol):
    """Put a method on a model, in place: the trained parameters require a gradient. Returns the library's result.

    layers: full names of modules, instead of the method's own. backend: of gains.
    """

    def __call__(self, model: nn.Module, layers: list[str] | None = None, backend: str = "auto") -> Any: ...


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    Attributes:
        name: in METHODS.
        put: puts it on a model.
        line: the line of a script that does this.
        package: the package that it needs, if any.
        targets: of gain_ops.apply; None without gains.
        fused: whether an FFN runs as one function.
    """

    name: str
    put: Put
    line: str
    package: str | None = None
    targets: str | None = None
    fused: bool = False


def by_peft(name: str, config: str, *, own_layers: bool = False, fp32: bool = True, **options: Any) -> Method:
    """A method of PEFT's.

    Args:
        name: of the method.
        config: PEFT's class.
        own_layers: whether PEFT chooses the layers; those of gain-ffn otherwise.
        fp32: whether adapters are in fp32; in the model's dtype otherwise.
        options: of the config.
    """

    def put(model: nn.Module, layers: list[str] | None = None, backend: str = "auto") -> Any:
        import peft

        from gain_ops.measure import meta_models
        from gain_ops.models.sites import preset_sites

        if layers is None and not own_layers:
            layers = [site.name for site in preset_sites(model, "gain-ffn", experts=False).sites]
        made = getattr(peft, config)(target_modules=layers, **options)
        with meta_models.quiet():
            return peft.get_peft_model(model, made, autocast_adapter_dtype=fp32)

    given = [f"{key}={value!r}" for key, value in options.items()] + ["target_modules=..."] * (not own_layers)
    dtype = "" if fp32 else ", autocast_adapter_dtype=False"
    line = f"model = peft.get_peft_model(model, peft.{config}({', '.join(given)}){dtype})"
    return Method(name, put, line, "peft")


def _gain(name: str, targets: str, **options: Any) -> Method:
    def put(model: nn.Module, layers: list[str] | None = None, backend: str = "auto") -> Any:
        from gain_ops.models.apply import apply

        return apply(model, targets if layers is None else list(map(re.escape, layers)), backend=backend, **options)

    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    line = f'gain_ops.apply(model, "{targets}"{arguments})'.replace("'", '"')
    return Method(name, put, line, targets=targets, fused="fuse_mlp" in options)


def _weights(name: str, trained: bool) -> Method:
    def put(model: nn.Module, layers: list[str] | None = None, backend: str = "auto") -> Any:
        return model.requires_grad_(trained)

    return Method(name, put, f"model.requires_grad_({trained})")


METHODS = {
    method.name: method
    for method in (
        _weights(FROZEN, False),
        _gain("gain", "gain"),
        _gain("gain, lean", "gain", memory="lean"),
        _gain("gain-ffn", "gain-ffn"),
        _gain("gain-ffn, lean", "gain-ffn", memory="lean"),
        _gain("gain-ffn, input side", "gain-ffn", side="input"),
        _gain("gain-ffn, fused", "gain-ffn", side="input", fuse_mlp=True),
        _gain("gain-ffn, fused, lean", "gain-ffn", side="input", fuse_mlp=True, memory="lean"),
        by_peft(IA3, "IA3Config", feedforward_modules=[]),
        by_peft(IA3 + ON_PEFTS_LAYERS, "IA3Config", own_layers=True),
        by_peft(LORA, "LoraConfig", r=LORA_RANK),
        by_peft(LORA + IN_MODEL_DTYPE, "LoraConfig", fp32=False, r=LORA_RANK),
        by_peft(LORA + ON_PEFTS_LAYERS, "LoraConfig", own_layers=True, r=LORA_RANK),
        by_peft(DORA, "LoraConfig", r=LORA_RANK, use_dora=True),
        by_peft(DORA + IN_MODEL_DTYPE, "LoraConfig", fp32=False, r=LORA_RANK, use_dora=True),
        by_peft(DORA + ON_PEFTS_LAYERS, "LoraConfig", own_layers=True, r=LORA_RANK, use_dora=True),
        _weights(FULL, True),
    )
}
"""By name."""
