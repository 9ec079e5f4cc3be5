"""The launch paths of the Triton kernels: every kind of configuration, and the pass of the input side."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experiments import fused_backward
from gain_ops import reference
from gain_ops.backends.operands import fuses
from gain_ops.kernels import backend, config, devices, linear_backward, linear_forward, rows
from gain_ops.kernels.config import GemmConfig
from gain_ops.testing import assert_no_worse_than_torch

from support.parity import DEVICE, compare, laid_out, tensors

# of the operands that a fused GEMM takes; the interpreter computes wrong bfloat16 dots
HALF = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

pytestmark = pytest.mark.usefixtures("poisoned")


def _run_gemms(config: GemmConfig, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    """Both GEMM kernels in all that they can write, in one configuration, held to the rule."""
    t = tensors(*shape, dtype)
    x, dy, delta = t["x"], t["dy"], t["delta_out"]
    weight = laid_out(t["weight"], "transposed") if transposed else t["weight"]
    assert fuses(x, weight, dy)
    exact = [v.double() for v in (x, weight, delta, t["bias"], dy)]
    y, z = torch.empty_like(dy), torch.empty_like(dy)
    linear_forward.launch(x, weight, delta, t["bias"], y, z, config)
    plain, truth = reference.linear_z(x, weight, delta, t["bias"]), reference.linear_z(*exact[:4])
    assert_no_worse_than_torch("y", y, plain[0], truth[0])
    assert_no_worse_than_torch("z", z, plain[1], truth[1])
    plain_dz, plain_sum = reference.backward_recompute(dy, x, weight, delta)
    truth_dz, truth_sum = reference.backward_recompute(exact[4], exact[0], exact[1], exact[2])
    for writes in ("c", "acc", "nothing"):
        out = None if writes == "nothing" else torch.empty_like(dy)
        sums = linear_backward.launch(x, weight, dy, None if out is None else delta, out, writes, config)
        assert_no_worse_than_torch(f"sums, {writes}", sums, plain_sum, truth_sum)
        if writes == "c":
            assert_no_worse_than_torch("gain * c", out, plain_dz, truth_dz)
        if writes == "acc":
            unbiased = reference.linear(*exact[:3], None)
            assert_no_worse_than_torch("gain * acc", out, reference.linear(x, weight, delta, None), unbiased)


# each two of the four settings meet in every combination
PATHS = [
    (False, False, 1, False),
    (True, True, 1, True),
    (False, True, 2, False),
    (True, False, 2, True),
    (True, True, 2, False),
    (False, False, 2, True),
    (False, True, 1, True),
    (True, False, 1, False),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("transposed", "use_tma", "subtiles", "persistent"), PATHS)
def test_every_path_of_the_gemm_kernels(
    dtype: torch.dtype, transposed: bool, use_tma: bool, subtiles: int, persistent: bool
) -> None:
    """Descriptors and pointers, both layouts of W, whole and split stores, a grid of tiles and a persistent one."""
    config = GemmConfig(
        16, 32, 16, num_warps=4, num_stages=2, subtiles=subtiles, group_m=2, persistent=persistent, use_tma=use_tma
    )
    _run_gemms(config, (72, 48, 80), dtype, transposed)


SHIPPED = sorted({(arch, one) for arch in devices.ARCHITECTURES for one in config.choices(arch)}, key=str)


def _runs_here(arch: str) -> bool:
    """The interpreter runs every configuration; a GPU its own architecture's."""
    return DEVICE == "cpu" or devices.architecture(torch.cuda.current_device()) == arch


@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=() if DEVICE == "cuda" else pytest.mark.slow)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("arch", "shipped"), SHIPPED, ids=[f"{arch}-{one.block_m}x{one.block_n}" for arch, one in SHIPPED]
)
def test_every_configuration_that_ships_on_partial_tiles(
    arch: str, shipped: GemmConfig, dtype: torch.dtype, transposed: bool
) -> None:
    """Three tile rows, the last of one row; a last tile of 8 columns, half of it past the end; a partial k."""
    if not _runs_here(arch):
        pytest.skip(f"a configuration of {arch}")
    _run_gemms(shipped, (2 * shipped.block_m + 1, 72, shipped.block_n + 8), dtype, transposed)
    if fused_backward.serves("interpreter", shipped):
        _run_backward_dx(shipped, (2 * shipped.block_m + 1, shipped.block_n + 8, 72), dtype, transposed)


def _run_backward_dx(config: GemmConfig, shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    t = tensors(*shape, dtype)
    dy, z, delta, dx = t["dy"], t["z"], t["delta_out"], torch.empty_like(t["x"])
    weight = laid_out(t["weight"], "transposed") if transposed else t["weight"]

    def plain(dy: Tensor, z: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        dz, ddelta = reference.backward(dy, z, delta)
        return dz @ weight, ddelta

    sums = fused_backward.launch(dy, z, weight, delta, dx, config)
    given = (dy, z, weight, delta)
    expected, truth = plain(*given), plain(*(v.double() for v in given))
    assert_no_worse_than_torch("dx", dx, expected[0], truth[0])
    assert_no_worse_than_torch("ddelta", sums, expected[1], truth[1])


GEMMS = ("linear", "linear without bias", "linear_z", "backward_recompute", "ddelta_recompute", "backward_input")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, by name."""
    names: list[str] = []
    for module, name in (
        (linear_forward, "linear_kernel"),
        (linear_backward, "linear_backward_kernel"),
        (rows, "backward_kernel"),
        (rows, "scale_kernel"),
    ):
        kernel = getattr(module, name)

        class Spy:
            def __init__(self, kernel: object, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: object) -> object:
                names.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(module, name, Spy(kernel, name))
    return names


@pytest.mark.parametrize("call", GEMMS)
def test_operands_with_wide_rows_are_fused(call: str, launched: list[str]) -> None:
    compare(backend, call, tensors(40, 48, 64, torch.float16))
    assert set(launched) <= {"linear_kernel", "linear_backward_kernel"}
    assert launched


UNSERVED = {
    "fp32": {"dtype": torch.float32},
    "sizes of no multiple of 8": {"shape": (40, 44, 60)},
    "one size of no multiple of 8": {"shape": (40, 48, 60)},
    "expanded dy": {"expanded": ("dy",)},
    "every operand transposed": {"transposed": ("x", "dy")},
    "a base off 16 bytes": {"misaligned": ("x", "dy")},
}


@pytest.mark.parametrize("call", GEMMS)
@pytest.mark.parametrize("case", UNSERVED)
def test_other_operands_get_the_vendor_s_gemm_and_one_pass(call: str, case: str, launched: list[str]) -> None:
    """Never a fused GEMM that reads element by element, nor one in fp32."""
    how = UNSERVED[case]
    t = tensors(*how.get("shape", (40, 48, 64)), how.get("dtype", torch.float16))
    for name in how.get("expanded", ()):
        t[name] = laid_out(t[name], "expanded")
    for name in how.get("transposed", ()):
        t[name] = laid_out(t[name], "transposed")
    for name in how.get("misaligned", ()):
        shifted = t[name].new_empty(t[name].numel() + 1)[1:].view_as(t[name])
        t[name] = shifted.copy_(t[name])
    compare(backend, call, t)
    reads_dy = call not in ("linear", "linear without bias", "linear_z")
    fused = {"linear_kernel", "linear_backward_kernel"}
    if case == "expanded dy" and not reads_dy:
        assert set(launched) <= fused
    else:
        assert launched == ["backward_kernel" if reads_dy else "scale_kernel"]


def test_an_expanded_dy_is_copied_once_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sum: the GEMM reads it, the pass beside it takes it as it lies."""
    t = tensors(40, 48, 64, torch.float16)
    dy = t["dy"][:1, :1].expand(40, 64)
    products: list[str] = []
    mm, linear = torch.mm, F.linear
    monkeypatch.setattr(torch, "mm", lambda *of: products.append("mm") or mm(*of))
    monkeypatch.setattr(F, "linear", lambda *of: products.append("linear") or linear(*of))
    seen = []
    backward = rows.launch_backward
    monkeypatch.setattr(rows, "launch_backward", lambda d, *of: seen.append(d.stride()) or backward(d, *of))
    backend.backward_recompute(dy, t["x"], t["weight"], t["delta_out"])
    assert (products, seen) == (["linear"], [(0, 0)]), "recomputing z reads no dy, and the pass reads it expanded"
    products.clear()
    backend.backward_input(dy, t["x"], t["weight"], t["delta_in"])
    assert products == ["mm"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("t", "scaled"), [(16, (16, 24)), (40, (40, 24)), (41, (40, 24))])
def test_the_input_side_scales_the_smaller_operand_in_one_pass(
    t: int, scaled: tuple[int, int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = tensors(t, 24, 40, torch.float32)
    if transposed:
        arguments["weight"] = laid_out(arguments["weight"], "transposed")
    passes: list[tuple[int, ...]] = []
    one_pass = rows._scale

    def record(x: Tensor, *rest: object, **options: object) -> Tensor:
        passes.append(tuple(sorted(x.shape, reverse=True)))
        return one_pass(x, *rest, **options)

    monkeypatch.setattr(rows, "_scale", record)
    compare(backend, "linear_input", arguments)
    assert passes == [tuple(sorted(scaled, reverse=True))]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_composed_writes_in_place_where_z_is_not_saved(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors(9, 24, 40, dtype)
    arguments = [t[name] for name in ("x", "weight", "delta_out", "bias")]
    made: list[Tensor] = []
    product = F.linear

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        made.append(product(x, weight))
        return made[-1]

    monkeypatch.setattr(F, "linear", noted)
    y = backend.COMPOSED.linear(*arguments)
    assert y.data_ptr() == made[-1].data_ptr()
    apart, z = backend.COMPOSED.linear_z(*arguments)
    assert z.data_ptr() == made[-1].data_ptr() != apart.data_ptr()
    assert torch.equal(apart, y)
    assert torch.equal(z, product(*arguments[:2]))
