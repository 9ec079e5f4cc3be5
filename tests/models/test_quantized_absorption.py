"""Gains absorbed into the scales of quantised bases: exact to the scales' own rounding, refused where that is not so.

What runs on a CPU runs here; what needs a GPU's kernels is marked so. A package that is not installed is skipped.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.layers.linears import own_tensors
from gain_ops.layers.make import gain_layer
from gain_ops.models.quantized import foldable
from gain_ops.testing import assert_no_worse_than_torch

from support.quantized_bases import (
    CONFIGS,
    GROUP,
    IDS,
    IN,
    OUT,
    ROWWISE,
    TRAINABLE,
    Make,
    added_zero,
    exact_weight,
    load,
    make_linear,
    random_gain,
    repacked,
    save_llama,
    scale_dtype,
    set_gains,
    torchao,
    unpacked,
    with_plain_gains,
    with_weight,
)

T = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_llama(path)
    return path


def codes(base: nn.Module) -> dict[str, Tensor]:
    """All that a row's scales are not."""
    scales = ("weight.scale", "weight.scale_and_zero")
    return {name: tensor.clone() for name, tensor in own_tensors(base).items() if name not in scales}


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_absorbed_gain_is_in_the_scales(name, bias, dtype):
    model = nn.Sequential(ROWWISE[name](make_linear(bias, dtype)))
    base, before, added, kept_codes = model[0], exact_weight(model[0]), added_zero(model[0]), codes(model[0])
    gain_ops.apply(model, ["0"])
    with torch.no_grad():
        model[0].delta.copy_(random_gain(OUT))
        x = torch.randn(T, IN, dtype=dtype)
        expected = model(x)
        gain = model[0].gain.detach().double()[:, None]
        report = gain_ops.absorb(model)
        assert model[0] is base
        assert all(torch.equal(tensor, kept_codes[key]) for key, tensor in codes(base).items())
        wanted, unit = before * gain, torch.finfo(scale_dtype(base)).eps
        magnitude = wanted.abs() + (gain * added).abs()  # of opposite signs, these two may cancel
        assert ((exact_weight(base) - wanted).abs() <= magnitude * unit).all()
        assert 0 <= report.max_rel_error <= unit / 2
        got, truth = model(x), x.double() @ wanted.T + (base.bias.double() if bias else 0)
        magnitude = x.double().abs() @ magnitude.T
        assert_no_worse_than_torch(name, got, expected, truth, magnitude, scale_dtype(base))
        assert torch.equal(got[:, 1], torch.zeros(T, dtype=dtype) + (base.bias[1] if bias else 0)), "a gain of zero"


@pytest.mark.parametrize("name", ["nf4", "nf4-doubly", "fp4", "llm-int8", "llm-int8-outliers"])
def test_bitsandbytes_infers_with_absorbed_scales(name):
    # eval() takes other kernels; scales are negative and zero here
    base = ROWWISE[name](make_linear(False, torch.bfloat16)).eval()
    model, gained = nn.Sequential(base), gain_layer(copy.deepcopy(base))
    delta, before = random_gain(OUT), exact_weight(base)
    gain_ops.apply(model, ["0"])
    x = torch.randn(T, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in (gained, model[0]):
            layer.delta.copy_(delta)
        gain_ops.absorb(model)
        truth = x.double() @ (before * (1 + delta.double())[:, None]).T
        assert_no_worse_than_torch(name, model(x), gained(x), truth)
        assert not model(x)[:, 1].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_absorbed_model_is_saved_and_loaded_by_transformers_alone(folder, tmp_path, name):
    model = load(folder, CONFIGS[name]()).train()
    exact = unpacked(model, folder, torch.float64)
    keys = list(model.state_dict())
    applied = gain_ops.apply(model, "gain-ffn")
    set_gains(model)
    set_gains(with_plain_gains(exact, applied.names, "output"))
    with torch.no_grad():
        gained = model(IDS).logits
        report = gain_ops.absorb(model)
        assert report.layers == applied.names
        absorbed, unit = model(IDS).logits, scale_dtype(model.get_submodule(applied.names[0]))
        assert_no_worse_than_torch("logits", absorbed, gained, exact(IDS).logits, unit=unit)
    if name != "nf4-doubly":  # whose absorbed layers are doubly quantised no more
        assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = load(tmp_path).train()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, absorbed)
    assert gain_ops.apply(again, "gain-ffn").names == applied.names, "the next domain starts from here"


def refused(model: nn.Module, message: str) -> None:
    """absorb() refuses and leaves every tensor as it was, scales that are no parameters included."""
    before = {key: value.clone() for key, value in tensors_of(model).items()}
    with pytest.raises(ValueError, match=message):
        gain_ops.absorb(model)
    after = tensors_of(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(after[key].float(), value.float()), key


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    found = own_tensors(model)
    for name, module in model.named_modules():
        for path in ("weight.quant_state", "weight.quant_state.state2", "state", "weight"):
            holder = module
            for part in path.split("."):
                holder = getattr(holder, part, None)
            for key in ("absmax", "SCB"):
                if isinstance(value := vars(holder).get(key) if hasattr(holder, "__dict__") else None, Tensor):
                    found[f"{name}.{path}.{key}"] = value
    return found


def gained_pair(*layers: nn.Module, side: str = "output") -> nn.Sequential:
    model = nn.Sequential(*layers)
    gain_ops.apply(model, [r"\d"], side=side)
    with torch.no_grad():
        for layer in model:
            layer.delta.copy_(random_gain(layer.features))
    return model


def square(make: Make, size: int = 64, **options) -> nn.Module:
    return make(nn.Linear(size, size, bias=False, **options).requires_grad_(False))


@pytest.mark.parametrize("name", [name for name in ROWWISE if name != "int4-for-cpus"])
def test_the_input_side_would_have_to_be_quantised_anew(name):
    first, second = (square(ROWWISE["nf4"]), square(ROWWISE[name]))
    refused(
        gained_pair(first, second, side="input"), "cannot absorb 0: its gain is on the input side.*check_base=False"
    )


def test_one_scale_for_several_rows():
    layers = square(ROWWISE["nf4-doubly"]), square(TRAINABLE["int8-tensor"])
    refused(
        gained_pair(*layers), r"cannot absorb 1: a scale .* covers more than one row \(scales \(1, 1\) for 64 rows\)"
    )


def test_one_scale_shown_as_many():
    layer = square(ROWWISE["int8-row"])
    layer.weight.scale = layer.weight.scale[:1].expand(64, 1)
    refused(gained_pair(square(ROWWISE["nf4"]), layer), "cannot absorb 1: a scale .* covers more than one row")


def test_blocks_that_cross_rows():
    layers = square(ROWWISE["int8-row"]), square(ROWWISE["nf4"], 96)
    refused(gained_pair(*layers), "cannot absorb 1: .* covers 64 weights, which do not end with a row of 96")


def test_a_repacked_base_is_not_absorbed():
    model = nn.Sequential(repacked("nf4"))
    gain_ops.apply(model, ["0"])
    refused(model, "cannot absorb 0: bitsandbytes has repacked its weight.*load the model again")


def test_what_is_not_quantised_yet():
    bnb = pytest.importorskip("bitsandbytes")
    refused(gained_pair(bnb.nn.Linear4bit(64, 64)), "it is not quantised yet. Move it to its device")
    refused(gained_pair(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)), "its weight is not held in 8 bits")
    every_forward = bnb.nn.Linear8bitLt(64, 64).to("cpu")
    every_forward(torch.randn(4, 64))
    refused(gained_pair(every_forward), "has_fp16_weights=True")


def test_a_forward_of_its_own():
    bnb = pytest.importorskip("bitsandbytes")

    class Shifted(bnb.nn.LinearNF4):
        def forward(self, x):
            return super().forward(x)

    layer = Shifted(64, 64).to("cpu")
    refused(gained_pair(layer), "it wraps a Shifted with a Params4bit")
    hooked = square(ROWWISE["int8-row"])
    hooked.forward = lambda x: x @ hooked.weight.dequantize().T
    refused(gained_pair(hooked), "it wraps a Linear with a Int8Tensor")


def test_scales_in_the_layout_of_another_kernel():
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    codes, scales = torch.zeros(2, 4, GROUP, 16, dtype=torch.uint8), torch.ones(2, 64, 2)
    weight = int4.Int4OpaqueTensor(codes, scales, [1, GROUP], torch.Size((64, 64)), act_mapping_type="asymmetric")
    layer = with_weight(nn.Linear(64, 64, bias=False), weight)
    refused(gained_pair(layer), "its scales are packed for a kernel of int8 activations.*check_base=False")


def test_packed_gguf_blocks():
    refused(gained_pair(square(TRAINABLE["gguf-q8_0"])), "it wraps a GgufLinear .* quantised again")


@pytest.mark.parametrize("name", ["nf4-doubly", "llm-int8", "int8-row"])
def test_scales_that_overflow(name):
    model = gained_pair(square(ROWWISE["nf4"]), square(ROWWISE[name]))
    model[1].delta.data[3] = 3e38
    scales = foldable(model[1].base, "output").carriers[0].tensor
    if name != "nf4-doubly":
        scales.mul_(1e6)
    else:
        model[1].base.weight.quant_state.state2.absmax.mul_(1e6)
    refused(model, "cannot absorb 1: its scale overflows in torch.float32; nothing was changed")


def test_a_shared_quantised_weight():
    layer = square(ROWWISE["int8-row"])
    tied = nn.Linear(64, 64, bias=False)
    tied.weight = layer.weight
    model = nn.Sequential(layer, tied)
    gain_ops.apply(model, ["0"])
    refused(model, r"cannot absorb 0: 1.weight.\w+ shares its weight \(tied\)")


def test_a_plain_layer_beside_a_quantised_one():
    model = nn.Sequential(nn.Linear(64, 64), square(ROWWISE["int8-row"]), square(ROWWISE["nf4-doubly"]))
    gain_ops.apply(model, ["0"])
    model[0].delta.data.fill_(1)
    weight = model[0].weight.detach().clone()
    gain_ops.absorb(model)
    assert torch.equal(model[0].weight, 2 * weight)


def test_a_copy_is_absorbed_by_itself():
    model = gained_pair(square(ROWWISE["nf4-doubly"]), square(ROWWISE["nf4"]), square(ROWWISE["llm-int8"]))
    x = torch.randn(T, 64)
    expected, twin = model(x), copy.deepcopy(model)
    gain_ops.absorb(twin)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(twin(x), expected, atol=1e-4, rtol=1e-3)
    weight = twin[0].weight
    assert twin[0].quant_state is weight.quant_state, "where bitsandbytes looks when FSDP has replaced the weight"
    assert not weight.quant_state.nested
    assert not weight.compress_statistics


# torchao's int4 for GPUs: that its scales and zeros are found is seen anywhere, what its kernels make of them only there


def test_int4_of_either_packing_has_its_scales_and_zeros_multiplied():
    quantization = pytest.importorskip("torchao.quantization")
    gain, groups, padded = 1 + random_gain(OUT), IN // GROUP, OUT + 16
    both = torch.randn(groups, padded, 2, dtype=torch.bfloat16)
    scale, zero = both[:, :OUT].unbind(-1)
    plain = quantization.Int4Tensor(
        torch.zeros(OUT, IN // 2, dtype=torch.int8), scale.clone(), zero.clone(), [1, GROUP], torch.Size((OUT, IN))
    )
    tiles = torch.zeros(padded // 8, 8, 32, 4, dtype=torch.int32)
    tiled = quantization.Int4TilePackedTo4dTensor(tiles, both.clone(), [1, GROUP], torch.Size((OUT, IN)))
    model = nn.Sequential(*(with_weight(make_linear(False, torch.bfloat16), weight) for weight in (plain, tiled)))
    gain_ops.apply(model, [r"\d"])
    with torch.no_grad():
        for layer in model:
            layer.delta.copy_(gain - 1)
    gain = model[0].gain.detach()
    gain_ops.absorb(model)
    wanted = [(part.float() * gain).bfloat16() for part in (scale, zero)]
    assert torch.equal(model[0].weight.scale, wanted[0])
    assert torch.equal(model[0].weight.zero_point, wanted[1])
    assert torch.equal(model[1].weight.scale_and_zero[:, :OUT], torch.stack(wanted, -1))
    assert torch.equal(model[1].weight.scale_and_zero[:, OUT:], both[:, OUT:])


def int4_for_gpus(linear: nn.Linear) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(copy.deepcopy(linear))
    config = quantization.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    quantization.quantize_(holder, config)
    return holder[0]


ON_GPUS: dict[str, Make] = {
    **{name: ROWWISE[name] for name in ("nf4", "nf4-doubly", "fp4", "llm-int8", "int8-row", "int8-dynamic", "float8")},
    "int4-for-gpus": int4_for_gpus,
    "float8-dynamic": torchao("Float8DynamicActivationFloat8WeightConfig", granularity=("PerRow",)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPUS)
def test_on_a_gpu_an_absorbed_gain_is_the_gain(name):
    linear = nn.Linear(1024, 256, bias=False, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    base = ON_GPUS[name](linear).eval()
    x = torch.randn(64, 1024, dtype=torch.bfloat16, device="cuda")
    model, gained = nn.Sequential(base), gain_layer(copy.deepcopy(base))
    gain_ops.apply(model, ["0"])
    with torch.no_grad():
        exact = base(x).double()
        delta = random_gain(256)
        for layer in (gained, model[0]):
            layer.delta.copy_(delta)
        gain_ops.absorb(model)
        truth = exact * (1 + delta.double()).cuda()
        # the plain result here is the gain on an output that is rounded already
        assert_no_worse_than_torch(name, model(x), gained(x), truth, exact.abs(), torch.bfloat16)
        assert not model(x)[:, 1].any()
