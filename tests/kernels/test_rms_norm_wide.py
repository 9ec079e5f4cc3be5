"""RMSNorms of rows that do not fit the registers: the same map by column blocks, whatever the sizes and strides."""

import pytest
import torch

from gain_ops import reference
from gain_ops.kernels import add_norm_wide, backend, config, norm_add_wide, rms_norm_wide
from gain_ops.kernels.config import NORM_FEATURES

from support.parity import CALLS as EVERY_CALL
from support.parity import DEVICE, LAYOUTS, compare, laid_out, run, tensors
from support.shapes import EMPTY, SMALL

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
CALLS = [call for call in EVERY_CALL if "norm" in call]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def every_row_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "NORM_FEATURES", 0)


@pytest.mark.usefixtures("every_row_is_wide")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((torch.float16, shape) for shape in (SMALL[2], SMALL[5], EMPTY[0], EMPTY[2], (17, 1, 300), (3, 1, 2050))),
        *((dtype, (17, 1, 300)) for dtype in DTYPES if dtype != torch.float16),
        pytest.param(torch.float32, SMALL[4], marks=pytest.mark.slow),
    ],
)
def test_no_worse_than_plain_torch(call: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    compare(backend, call, tensors(*shape, dtype))


@pytest.mark.usefixtures("every_row_is_wide")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(call: str, layout: str) -> None:
    arguments = tensors(19, 1, 261, torch.float16)
    for name in ("dy", "dh", "h", "z"):
        arguments[name] = laid_out(arguments[name], layout)
    compare(backend, call, arguments)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("over", [0, 1])
def test_the_widest_row_that_is_held_and_one_more(call: str, over: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    class Spy:
        def __getitem__(self, grid):
            used.append(grid)
            return kernel[grid]

    name = f"{call.split()[0]}_kernel"
    module = norm_add_wide if name.startswith("rms_norm_add") else rms_norm_wide
    if name.startswith("add"):
        module, name = add_norm_wide, "add_norm_backward_kernel" if "backward" in name else "add_norm_kernel"
    kernel = getattr(module, name)
    monkeypatch.setattr(module, name, Spy())
    compare(backend, call, tensors(2, 1, NORM_FEATURES + over, torch.float16))
    assert len(used) == over


@pytest.mark.usefixtures("every_row_is_wide")
@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_on_a_second_run(call: str) -> None:
    arguments = tensors(40, 1, 300, torch.float16)
    first, second = (run(backend, call, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("every_row_is_wide")
def test_a_row_of_zeros_has_finite_gradients() -> None:
    t = tensors(5, 1, 300, torch.float32)
    t["dy"][2] = 0
    _, r = backend.rms_norm(t["dy"], t["norm_weight"], t["delta_out"], 1e-5)
    dx, ddelta = backend.rms_norm_backward(t["dh"], t["dy"], t["norm_weight"], t["delta_out"], r)
    assert dx.isfinite().all()
    assert ddelta.isfinite().all()
    torch.testing.assert_close(r, reference.rms_norm(t["dy"], t["norm_weight"], t["delta_out"], 1e-5)[1])
