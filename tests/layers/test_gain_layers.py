"""GainLinear and GainWrapper by themselves: parameters, sharing, devices, dtypes, gradients at the edges."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from gain_ops.layers.linear import GainLinear
from gain_ops.layers.linears import is_plain_linear
from gain_ops.layers.make import gain_layer
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.testing import PlainGain, assert_no_worse_than_torch

SIDES = ("output", "input")


class Int8Linear(nn.Module):
    """A quantised linear as libraries have them: an int8 weight and one scale a row, in buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, (self.qweight * self.scale).to(x.dtype), self.bias)


def _with_delta(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.delta.copy_(torch.randn(layer.delta.shape, generator=generator) * 0.3)
    return layer


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters(side, dtype):
    layer = GainLinear(5, 3, side=side, dtype=dtype)
    assert isinstance(layer, nn.Linear)
    assert layer.delta.shape == ((3,) if side == "output" else (5,))
    assert layer.delta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.delta.is_contiguous()
    assert not layer.delta.any()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["delta"]
    assert set(layer.state_dict()) == {"weight", "bias", "delta"}
    assert torch.equal(layer.gain, torch.ones_like(layer.delta))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [True, False])
def test_identity_is_the_plain_linear(side, bias):
    linear = nn.Linear(7, 5, bias)
    x = torch.randn(6, 7)  # of rank 2: with more, plain torch may run another GEMM
    y = GainLinear.from_linear(linear, side=side)(x)
    if bias and side == "output":
        torch.testing.assert_close(y, linear(x))
    else:
        assert torch.equal(y, linear(x))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_shares_and_keeps(side, bias):
    linear = nn.Linear(7, 5, bias).eval()
    calls = []
    handle = linear.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    layer = GainLinear.from_linear(linear, side=side)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert not layer.weight.requires_grad
    layer(torch.randn(1, 7))
    assert calls == [GainLinear]
    handle.remove()
    layer(torch.randn(1, 7))
    assert len(calls) == 1


def test_from_linear_allocates_no_weight():
    linear = nn.Linear(1 << 9, 1 << 9)
    sizes = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type != "meta":
                sizes.append(out.numel())
            return out

    with Count():
        GainLinear.from_linear(linear)
    assert max(sizes) == 1 << 9, "only delta may be allocated"


def test_meta_device():
    linear = nn.Linear(6, 4, device="meta")
    layer = GainLinear.from_linear(linear)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    fresh = GainLinear(6, 4, device="meta").to_empty(device="cpu")
    fresh.delta.data.fill_(float("nan"))
    torch.manual_seed(3)
    fresh.reset_parameters()
    torch.manual_seed(3)
    plain = nn.Linear(6, 4)
    assert torch.equal(fresh.weight, plain.weight)
    assert torch.equal(fresh.bias, plain.bias)
    assert not fresh.delta.any()
    assert [name for name, p in fresh.named_parameters() if p.requires_grad] == ["delta"]


def test_sizes_do_not_come_from_parameters():
    # ZeRO-3 leaves every parameter empty outside forward.
    linear = nn.Linear(6, 4)
    linear.weight.ds_shape = torch.Size((4, 6))
    linear.weight.data = torch.empty(0)
    linear.bias.data = torch.empty(0)
    for side, features in (("output", 4), ("input", 6)):
        layer = GainLinear.from_linear(linear, side=side)
        assert layer.delta.shape == (features,)
        layer.delta.data = torch.empty(0)
        assert layer.features == features
        assert f"side={side}" in repr(layer)


@pytest.mark.parametrize("make", [lambda: GainLinear(4, 3), lambda: GainWrapper(Int8Linear(nn.Linear(4, 3)), 4, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_keeps_its_precision_when_the_model_is_cast(make, dtype):
    model = nn.Sequential(_with_delta(make()))
    before = model[0].delta.detach().clone()
    model[0].delta.grad = before / 3
    model.to(dtype)
    assert model[0].delta.dtype == torch.float32
    assert torch.equal(model[0].delta, before)
    assert torch.equal(model[0].delta.grad, before / 3)
    assert model(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert model.double()[0].delta.dtype == torch.float64
    assert model.float()[0].delta.dtype == torch.float32


@pytest.mark.parametrize("switch", ["swap_module_params_on_conversion", "overwrite_module_params_on_conversion"])
def test_delta_keeps_its_precision_however_torch_converts(switch):
    layer = _with_delta(GainLinear(4, 3))
    before = layer.delta.detach().clone()
    layer.delta.grad = before / 3
    getattr(torch.__future__, f"set_{switch}")(True)
    try:
        layer.to(torch.bfloat16)
    finally:
        getattr(torch.__future__, f"set_{switch}")(False)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.delta, before)
    assert torch.equal(layer.delta.grad, before / 3)
    layer.to("meta", torch.float16).to_empty(device="cpu")
    assert (layer.delta.dtype, layer.weight.dtype) == (torch.float32, torch.float16)


def test_extra_repr():
    layer = GainLinear(4, 3, side="input", save="input")
    assert repr(layer) == "GainLinear(in_features=4, out_features=3, bias=True, side=input, save=input)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "rows"}, "side='rows' is not one of 'output', 'input'"),
        ({"save": "z"}, "save='z'"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"side": "input", "save": "output"}, "save='output' has no use on the input side"),
    ],
)
def test_options_are_checked_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        GainLinear(4, 3, **options)
    with pytest.raises(ValueError, match=message):
        GainLinear.from_linear(nn.Linear(4, 3), **options)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("save", ["auto", "output", "input"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_composite(side, save, bias, dtype):
    if side == "input" and save == "output":
        return
    torch.manual_seed(0)
    linear = nn.Linear(24, 16, bias, dtype=dtype)
    x, dy = torch.randn(2, 5, 24, dtype=dtype), torch.randn(2, 5, 16, dtype=dtype)
    layers = {
        "ours": _with_delta(GainLinear.from_linear(copy.deepcopy(linear), side=side, save=save)),
        "plain": _with_delta(PlainGain(linear, side)),
        "exact": _with_delta(PlainGain(copy.deepcopy(linear).double(), side)),
    }
    results = {}
    for name, layer in layers.items():
        wide = torch.float64 if name == "exact" else dtype
        xs = x.to(wide, copy=True).requires_grad_()
        y = layer(xs)
        y.backward(dy.to(wide))
        results[name] = {"y": y, "dx": xs.grad, "ddelta": layer.delta.grad}
    for key in ("y", "dx", "ddelta"):
        assert_no_worse_than_torch(key, *(results[name][key] for name in ("ours", "plain", "exact")))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dead_gains_and_dead_rows_have_finite_right_gradients(side, wrap, bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias)
    with torch.no_grad():
        linear.weight[1] = 0
        linear.weight[:, 2] = 0
    make = Overridden if wrap else (lambda linear: linear)
    layer = gain_layer(make(copy.deepcopy(linear)), side=side)
    assert isinstance(layer, GainWrapper if wrap else GainLinear)
    exact = PlainGain(copy.deepcopy(linear).double(), side)
    x, dy = torch.randn(7, 6), torch.randn(7, 5)
    grads = []
    for module, wide in ((layer, torch.float32), (exact, torch.float64)):
        with torch.no_grad():
            module.delta.fill_(0.25)
            module.delta[0] = -1
            module.delta[1] = -1
        xs = x.to(wide, copy=True).requires_grad_()
        y = module(xs)
        y.backward(dy.to(wide))
        grads.append((y, xs.grad, module.delta.grad))
    for ours, expected in zip(*grads, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected.float())
    assert grads[0][2][0] != 0, "a dead gain must still get its gradient, or it stays dead"


class Overridden(nn.Linear):
    """A linear map with a forward of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("...i,oi->...o", x, self.weight)
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [False, True])
def test_wrapper_is_the_gained_map(side, bias):
    torch.manual_seed(0)
    base = Int8Linear(nn.Linear(6, 5, bias))
    layer = GainWrapper(base, 6, 5, side=side)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x)), "at delta = 0 the wrapper must not change a bit"
    gain = _with_delta(layer).gain
    weight = base.qweight * base.scale
    weight = gain[:, None] * weight if side == "output" else weight * gain
    torch.testing.assert_close(layer(x), F.linear(x, weight, base.bias))
    assert layer.bias is base.bias
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["delta"]
    assert "side=" + side in repr(layer)


@pytest.mark.parametrize("side", SIDES)
def test_wrapper_under_autocast(side):
    layer = _with_delta(GainWrapper(Overridden(nn.Linear(6, 5)), 6, 5, side=side))
    x = torch.randn(3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert layer.delta.grad.dtype == torch.float32
    assert layer.delta.grad.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao.quantization")
def test_torchs_own_quantised_linear_is_wrapped():
    linear = nn.Linear(16, 8)
    base = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]
    layer = gain_layer(base)
    assert isinstance(layer, GainWrapper)
    x = torch.randn(4, 16)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.delta.grad, (base(x) - base.bias()).sum(0).detach())


def _parametrised():
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    return linear


def _hooked():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: F.linear(x, linear.weight, linear.bias)
    return linear


def _packed():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    return linear


def _subclassed():
    class Quantised(torch.Tensor):
        pass

    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4).as_subclass(Quantised), requires_grad=False)
    return linear


def _eight_bit_float():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def _with_a_buffer():
    linear = nn.Linear(4, 4)
    linear.register_buffer("mask", torch.ones(4))
    return linear


@pytest.mark.parametrize(
    "make",
    [
        lambda: Overridden(nn.Linear(4, 4)),
        _parametrised,
        _with_a_buffer,
        _hooked,
        _packed,
        _subclassed,
        _eight_bit_float,
    ],
)
def test_what_is_not_a_plain_linear_is_wrapped(make):
    linear = make()
    assert not is_plain_linear(linear)
    assert isinstance(gain_layer(linear), GainWrapper)
    with pytest.raises(TypeError, match="GainWrapper"):
        GainLinear.from_linear(linear)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GainLinear(4, 4), r"got GainLinear.*It has a gain already\."),
        (lambda: GainWrapper(nn.Linear(4, 4), 4, 4), r"It has a gain already\."),
        (lambda: nn.Conv1d(4, 4, 1), r"It is not a linear map\."),
        (lambda: Conv1D(4, 4), r"Take gain_ops.layers.conv1d.GainConv1D.from_conv1d\(\)\."),
    ],
)
def test_what_from_linear_says_of_others(make, message):
    with pytest.raises(TypeError, match=message):
        GainLinear.from_linear(make())


def test_what_is_not_linear_is_refused():
    with pytest.raises(TypeError, match="no in_features"):
        gain_layer(nn.LayerNorm(4))


@pytest.mark.parametrize("make", [lambda: GainLinear(4, 3), lambda: GainWrapper(Int8Linear(nn.Linear(4, 3)), 4, 3)])
def test_copy_and_pickle(make):
    layer = _with_delta(make())
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.delta is not layer.delta


def test_plain_of_a_layer_made_by_hand():
    layer, calls = _with_delta(GainLinear(4, 3, bias=False)).eval(), []
    layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    plain = layer.plain()
    assert type(plain) is nn.Linear
    assert plain.weight is layer.weight
    assert plain.bias is None
    assert not plain.training
    plain(torch.randn(1, 4))
    assert calls == [nn.Linear]


@pytest.mark.parametrize("side", SIDES)
def test_state_dict_round_trip(side):
    layer, twin = _with_delta(GainLinear(4, 3, side=side)), GainLinear(4, 3, side=side)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), layer(x))


def test_compiled_layer():
    layer = _with_delta(GainLinear(8, 6))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 8, requires_grad=True)
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert layer.delta.grad.isfinite().all()


@pytest.mark.parametrize("wrap", [False, True])
def test_gains_put_on_meta_are_1_where_the_weights_come_one_by_one(wrap):
    """As accelerate's load_checkpoint_and_dispatch brings them: no checkpoint has a delta."""
    linear = nn.Linear(6, 4, device="meta")
    layer = GainWrapper(linear, 6, 4) if wrap else GainLinear.from_linear(linear)
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name != "delta":
                setattr(module, name, nn.Parameter(torch.randn(parameter.shape), requires_grad=False))
    layer.to("cpu")
    assert torch.equal(layer.delta, torch.zeros(4))
    assert layer.delta.requires_grad
