"""gain_glu, gain_activation, gain_rms_norm and gain_mlp: values, gradients, what is kept, every context of autograd."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.ops.glu import gain_activation, gain_geglu, gain_glu, gain_relu2, gain_swiglu
from gain_ops.ops.mlp import gain_mlp
from gain_ops.ops.rms_norm import gain_rms_norm
from gain_ops.reference import ACTIVATIONS
from gain_ops.testing import assert_no_worse_than_torch

T, N, IN, OUT = 7, 6, 5, 4


@pytest.fixture(autouse=True)
def _no_compiled_graphs() -> None:
    """One function compiled for many forms would reach the limit of recompilations."""
    torch._dynamo.reset()


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x) ** 2,
}


def randn(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def test_every_activation_is_tested() -> None:
    assert set(ACTS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("form", ["gated", "packed", "plain"])
class TestGlu:
    def run(self, form: str, activation: str, tensors: list[Tensor]) -> Tensor:
        if form == "plain":
            return gain_activation(tensors[0], tensors[-1], activation=activation)
        return gain_glu(tensors[0], tensors[1] if form == "gated" else None, tensors[-1], activation=activation)

    def tensors(self, form: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        count = 2 if form == "gated" else 1
        width = 2 * N if form == "packed" else N
        return [*(randn(2, T, width, dtype=dtype) for _ in range(count)), (0.3 * randn(N, dtype=wide)).detach()]

    def plain(self, form: str, activation: str, tensors: list[Tensor]) -> Tensor:
        g, u = tensors[0].chunk(2, -1) if form == "packed" else (tensors[0], tensors[1])
        h = ACTS[activation](g)
        return ((h if form == "plain" else h * u) * (1 + tensors[-1])).to(g.dtype)

    def test_gradcheck_and_double_backward(self, form: str, activation: str) -> None:
        tensors = self.tensors(form)
        tensors[-1].requires_grad_()
        assert torch.autograd.gradcheck(lambda *t: self.run(form, activation, list(t)), tensors)
        assert torch.autograd.gradgradcheck(lambda *t: self.run(form, activation, list(t)), tensors)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_no_worse_than_torch(self, form: str, activation: str, dtype: torch.dtype) -> None:
        tensors = self.tensors(form, dtype)
        tensors[-1].requires_grad_()
        dh = torch.randn(2, T, N, dtype=dtype)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        outcomes = []
        for run, given_, cotangent in (
            (self.run, tensors, dh),
            (self.plain, tensors, dh),
            (self.plain, exact, dh.double()),
        ):
            h = run(form, activation, given_)
            outcomes.append((h, *torch.autograd.grad(h, given_, cotangent)))
        for name, result, plain, truth in zip(["h", *"abc"], *outcomes, strict=False):
            assert result.dtype == plain.dtype
            assert_no_worse_than_torch(name, result, plain, truth, unit=dtype)

    def test_what_is_kept(self, form: str, activation: str) -> None:
        tensors = self.tensors(form, torch.float32)
        tensors[-1].requires_grad_()
        saved = saved_bytes(lambda: self.run(form, activation, tensors), exclude=[tensors[-1]], inputs=tensors[:-1])
        assert saved.new == 0
        assert saved.inputs == sum(t.nbytes for t in tensors[:-1])

    def test_only_what_is_wanted_is_computed(self, form: str, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from gain_ops.ops import raw

        tensors = [t.detach() for t in self.tensors(form)]
        tensors[-1].requires_grad_()
        whole = torch.autograd.grad(self.run(form, activation, tensors).sum(), tensors[-1])
        monkeypatch.setattr(raw, "glu_backward", None)
        alone = torch.autograd.grad(self.run(form, activation, tensors).sum(), tensors[-1])
        assert torch.equal(whole[0], alone[0])
        with torch.no_grad():
            assert saved_bytes(lambda: self.run(form, activation, [t.detach() for t in tensors])).total == 0

    def test_func_and_compile(self, form: str, activation: str) -> None:
        tensors = [t.detach() for t in self.tensors(form)]
        expected = self.run(form, activation, tensors)
        jacobian = torch.func.vmap(lambda *t: self.run(form, activation, [*t, tensors[-1]]))(*tensors[:-1])
        assert torch.allclose(jacobian, expected)
        for t in tensors:
            t.requires_grad_()
        compiled = torch.compile(lambda *t: self.run(form, activation, list(t)), backend="aot_eager", fullgraph=True)
        h = compiled(*tensors)
        assert torch.equal(h, expected)
        grads = torch.autograd.grad(h.sum(), tensors)
        for got, wanted in zip(
            grads, torch.autograd.grad(self.run(form, activation, tensors).sum(), tensors), strict=True
        ):
            assert torch.allclose(got, wanted)


def test_the_named_forms() -> None:
    g, u, d = randn(T, N), randn(T, N), randn(N)
    assert torch.equal(gain_swiglu(g, u, d), gain_glu(g, u, d, activation="silu"))
    assert torch.equal(gain_geglu(g, u, d), gain_glu(g, u, d, activation="gelu"))
    assert torch.equal(gain_geglu(g, u, d, approximate="tanh"), gain_glu(g, u, d, activation="gelu_tanh"))
    assert torch.equal(gain_relu2(g, d), gain_activation(g, d, activation="relu2"))


@pytest.mark.parametrize("activation", ACTS)
def test_a_zero_delta_changes_no_bit_in_fp32(activation: str) -> None:
    g, u = randn(64, 48, dtype=torch.float32, grad=False), randn(64, 48, dtype=torch.float32, grad=False)
    assert torch.equal(gain_glu(g, u, torch.zeros(48), activation=activation), ACTS[activation](g) * u)


@settings(max_examples=40)
@given(
    t=st.integers(0, 9), n=st.integers(1, 9), rank=st.integers(1, 3), step=st.integers(1, 3), offset=st.integers(0, 3)
)
def test_any_strides(t: int, n: int, rank: int, step: int, offset: int) -> None:
    shape = (n,) if rank == 1 else (2,) * (rank - 2) + (t, n)
    spread = torch.randn(*shape[:-1], n * step + offset)[..., offset::step][..., :n]
    up, d = torch.randn(shape), torch.randn(n)
    # not to the bit: torch's own silu on a CPU differs between its strided and its vectorised loop
    torch.testing.assert_close(gain_glu(spread, up, d), gain_glu(spread.contiguous(), up, d))
    torch.testing.assert_close(gain_rms_norm(spread, d, d), gain_rms_norm(spread.contiguous(), d, d))


class TestRmsNorm:
    def test_gradcheck_and_double_backward(self) -> None:
        w = randn(N, grad=False)
        run = lambda x, d: gain_rms_norm(x, w, d, 1e-5)  # noqa: E731
        assert torch.autograd.gradcheck(run, (randn(2, T, N), randn(N)))
        assert torch.autograd.gradgradcheck(run, (randn(2, T, N), randn(N)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_no_worse_than_torch(self, dtype: torch.dtype) -> None:
        x, w = randn(T, 32, dtype=dtype), randn(32, dtype=dtype, grad=False)
        d = (0.3 * torch.randn(32)).requires_grad_()
        dy = torch.randn(T, 32, dtype=dtype)

        def plain(x: Tensor, w: Tensor, d: Tensor) -> Tensor:
            return (F.rms_norm(x, (32,), w, 1e-5) * (1 + d)).to(x.dtype)

        exact = x.detach().double().requires_grad_(), w.double(), d.detach().double().requires_grad_()
        outcomes = []
        for run, (a, b, c), cotangent in (
            (lambda *t: gain_rms_norm(*t, 1e-5), (x, w, d), dy),
            (plain, (x, w, d), dy),
            (plain, exact, dy.double()),
        ):
            y = run(a, b, c)
            outcomes.append((y, *torch.autograd.grad(y, (a, c), cotangent)))
        for name, result, torchs, truth in zip(("y", "dx", "ddelta"), *outcomes, strict=True):
            assert result.dtype == torchs.dtype
            assert_no_worse_than_torch(name, result, torchs, truth, unit=dtype)

    def test_transforms_and_forward_mode(self) -> None:
        x, w, d = randn(3, T, N), randn(N, grad=False), randn(N)
        run = lambda x, d: gain_rms_norm(x, w, d, 0.5)  # noqa: E731
        torch.testing.assert_close(torch.func.vmap(run, (0, None))(x, d), run(x, d))
        assert torch.autograd.gradcheck(run, (x, d), check_forward_ad=True)

    def test_what_is_kept(self) -> None:
        x, w, d = randn(T, N, dtype=torch.float32), torch.ones(N), torch.zeros(N, requires_grad=True)
        saved = saved_bytes(lambda: gain_rms_norm(x, w, d), exclude=[w, d], inputs=[x])
        assert (saved.inputs, saved.new) == (x.nbytes, 4 * T)

    def test_refusals(self) -> None:
        x, w, d = torch.randn(T, N), torch.ones(N), torch.zeros(N)
        with pytest.raises(ValueError, match="weight requires a gradient"):
            gain_rms_norm(x, w.clone().requires_grad_(), d)
        with pytest.raises(ValueError, match=r"weight must be \[6\]"):
            gain_rms_norm(x, torch.ones(3), d)
        with pytest.raises(ValueError, match=r"delta must be \[6\]"):
            gain_rms_norm(x, w, torch.zeros(3))


FORMS = ["gated", "packed", "plain"]


def ffn(form: str, dtype: torch.dtype = torch.float64, bias: bool = True) -> dict[str, Tensor | None]:
    rows = 2 * N if form == "packed" else N
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def make(*shape: int) -> Tensor:
        return randn(*shape, dtype=dtype, grad=False)

    return {
        "x": randn(3, T, IN, dtype=dtype),
        "gate_weight": make(rows, IN),
        "up_weight": make(N, IN) if form == "gated" else None,
        "down_weight": make(OUT, N),
        "delta": (0.3 * randn(N, dtype=wide)).detach().requires_grad_(),
        "gate_bias": make(rows) if bias else None,
        "up_bias": make(N) if bias and form == "gated" else None,
        "down_bias": make(OUT) if bias else None,
    }


def plain_ffn(form: str, given_: dict[str, Tensor | None], activation: str = "silu") -> Tensor:
    g = F.linear(given_["x"], given_["gate_weight"], given_["gate_bias"])
    if form == "gated":
        u = F.linear(given_["x"], given_["up_weight"], given_["up_bias"])
    elif form == "packed":
        g, u = g.chunk(2, -1)
    h = ACTS[activation](g)
    h = ((h if form == "plain" else h * u) * (1 + given_["delta"])).to(g.dtype)
    return F.linear(h, given_["down_weight"], given_["down_bias"])


# half of the combinations compile all that there is
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("recompute", "chunk"), [(True, None), (False, 4)])
def test_mlp_compiled(form: str, recompute: bool, chunk: int | None) -> None:
    given_ = ffn(form)
    compiled = torch.compile(gain_mlp, backend="aot_eager", fullgraph=True)
    y = compiled(**given_, recompute=recompute, chunk=chunk)
    assert torch.allclose(y, plain_ffn(form, given_))
    grads = torch.autograd.grad(y.sum(), (given_["x"], given_["delta"]))
    wanted = torch.autograd.grad(plain_ffn(form, given_).sum(), (given_["x"], given_["delta"]))
    assert all(torch.allclose(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
class TestMlp:
    def test_gradcheck_and_double_backward(self, form: str, recompute: bool, chunk: int | None) -> None:
        given_ = ffn(form)

        def run(x: Tensor, delta: Tensor) -> Tensor:
            return gain_mlp(**given_ | {"x": x, "delta": delta}, recompute=recompute, chunk=chunk)

        assert torch.autograd.gradcheck(run, (given_["x"], given_["delta"]))
        assert torch.autograd.gradgradcheck(run, (given_["x"], given_["delta"]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [False, True])
    def test_no_worse_than_torch(
        self, form: str, recompute: bool, chunk: int | None, dtype: torch.dtype, bias: bool
    ) -> None:
        given_ = ffn(form, dtype, bias)
        dy = torch.randn(3, T, OUT, dtype=dtype)
        exact = {
            k: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in given_.items()
        }
        outcomes = []
        for y, tensors, cotangent in (
            (gain_mlp(**given_, recompute=recompute, chunk=chunk), given_, dy),
            (plain_ffn(form, given_), given_, dy),
            (plain_ffn(form, exact), exact, dy.double()),
        ):
            outcomes.append((y, *torch.autograd.grad(y, (tensors["x"], tensors["delta"]), cotangent)))
        for name, result, plain, truth in zip(("y", "dx", "ddelta"), *outcomes, strict=True):
            assert (result.shape, result.dtype) == (plain.shape, plain.dtype)
            assert_no_worse_than_torch(name, result, plain, truth, unit=dtype)

    def test_what_is_kept(self, form: str, recompute: bool, chunk: int | None) -> None:
        given_ = ffn(form, torch.float32)
        parameters = [v for k, v in given_.items() if v is not None and k != "x"]
        saved = saved_bytes(
            lambda: gain_mlp(**given_, recompute=recompute, chunk=chunk), exclude=parameters, inputs=[given_["x"]]
        )
        hidden = 3 * T * (N if form == "plain" else 2 * N) * 4
        assert (saved.new, saved.inputs) == ((0, given_["x"].nbytes) if recompute else (hidden, 0))

    def test_autocast_keeps_no_copy_of_a_weight(self, form: str, recompute: bool, chunk: int | None) -> None:
        given_ = ffn(form, torch.float32)
        parameters = [v for k, v in given_.items() if v is not None and k != "x"]

        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return gain_mlp(**given_, recompute=recompute, chunk=chunk)

        saved = saved_bytes(run, exclude=parameters)
        assert saved.new == 3 * T * (IN if recompute else N if form == "plain" else 2 * N) * 2
        y = run()
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert given_["x"].grad.dtype == given_["delta"].grad.dtype == torch.float32

    def test_only_the_gain(self, form: str, recompute: bool, chunk: int | None) -> None:
        given_ = ffn(form)
        wanted = torch.autograd.grad(plain_ffn(form, given_).sum(), given_["delta"])[0]
        given_["x"] = given_["x"].detach()
        y = gain_mlp(**given_, recompute=recompute, chunk=chunk)
        assert torch.allclose(torch.autograd.grad(y.sum(), given_["delta"])[0], wanted)

    def test_inference_and_func(self, form: str, recompute: bool, chunk: int | None) -> None:
        given_ = ffn(form)
        with torch.no_grad():
            y = gain_mlp(**given_, recompute=recompute, chunk=chunk)
        assert torch.allclose(y, plain_ffn(form, given_))
        rest = {k: v for k, v in given_.items() if k != "x"}
        vmapped = torch.func.vmap(lambda x: gain_mlp(x, **rest, recompute=recompute, chunk=chunk))(given_["x"])
        assert torch.allclose(vmapped, y)

    def test_no_tokens(self, form: str, recompute: bool, chunk: int | None) -> None:
        given_ = ffn(form)
        given_["x"] = torch.zeros(0, IN, dtype=torch.float64, requires_grad=True)
        y = gain_mlp(**given_, recompute=recompute, chunk=chunk)
        assert y.shape == (0, OUT)
        y.sum().backward()
        assert torch.equal(given_["delta"].grad, torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation='tanh' is not one of"),
        ({"chunk": 0}, "chunk must be"),
        ({"delta": torch.zeros(3)}, r"delta must be \[6\]"),
        ({"gate_weight": torch.zeros(7, IN)}, "gate_weight must be"),
        ({"up_weight": torch.zeros(7, IN)}, "up_weight must have"),
        ({"x": torch.zeros(2, 3)}, "x must be"),
        ({"down_bias": torch.zeros(1)}, "down_bias must be"),
        ({"down_weight": torch.zeros(OUT, N, requires_grad=True)}, "down_weight requires a gradient"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gain_mlp(**ffn("gated", torch.float32) | change)


def test_dtypes_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="the weights are"):
        gain_mlp(**ffn("gated", torch.float32) | {"x": torch.zeros(2, IN, dtype=torch.float64)})
    with pytest.raises(TypeError, match="up must have gate's dtype"):
        gain_glu(torch.zeros(2, N), torch.zeros(2, N, dtype=torch.float16), torch.zeros(N))
    with pytest.raises(ValueError, match="packed"):
        gain_glu(torch.zeros(2, 5), None, torch.zeros(2))
