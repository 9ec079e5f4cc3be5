"""The registry of methods: a line of a script does what its method does, and a method serves the layers that it is given."""

import importlib.util

import pytest
import torch
from torch import nn

from gain_ops.models.fused_mlp import FusedMlp
from gain_ops.models.sites import preset_sites
from gain_ops.planning.methods import FROZEN, FULL, METHODS

ABLE = {name: m for name, m in METHODS.items() if m.package is None or importlib.util.find_spec(m.package)}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16)


def _parameters(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ABLE)
def test_the_line_of_a_script_does_what_the_method_does(name: str) -> None:
    method, model, theirs = ABLE[name], _llama(), _llama()
    method.put(model)
    names = [site.name for site in preset_sites(theirs, "gain-ffn").sites]
    lines = f"import gain_ops\n{f'import {method.package}' if method.package else ''}\n{method.line}"
    exec(lines.replace("...", repr(names)), {"model": theirs})
    assert _parameters(model) == _parameters(theirs)
    assert method.fused == any(isinstance(module, FusedMlp) for module in model.modules())


@pytest.mark.parametrize("name", [n for n, m in ABLE.items() if n not in (FROZEN, FULL) and not m.fused])
def test_a_method_serves_the_layers_that_it_is_given(name: str) -> None:
    model = _llama()
    ABLE[name].put(model, ["model.layers.1.self_attn.v_proj"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("model.layers.1.self_attn.v_proj.") for name in trained)
