"""Asks cuBLASLt whether any of its algorithms scales the rows of a product by a vector on the device.

With a bf16 algorithm of that pointer mode, the gained forward would be the vendor's own GEMM. The question needs a GPU, and the
cuBLASLt that torch loaded. The numbers are those of cublasLt.h.
"""

import ctypes
import glob
from collections.abc import Iterator
from pathlib import Path

import torch

_MODES = {0: "host", 1: "device", 2: "device vector", 3: "alpha vector, beta zero", 4: "alpha vector, beta host"}
_F32, _F16, _I8, _I32, _BF16, _E4M3 = 0, 2, 3, 10, 14, 28
_COMPUTE_F32, _COMPUTE_I32 = 68, 72
_POINTER_MODE, _TRANSA = 2, 3  # CUBLASLT_MATMUL_DESC_*
_CAP_POINTER_MODE_MASK = 11  # CUBLASLT_ALGO_CAP_*
_MAX_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_*
_TRANSPOSED = 1
_M, _N, _K = 4096, 2048, 4096

# name, operands, result, compute type, scale type
CASES = [
    ("bf16 -> bf16", _BF16, _BF16, _COMPUTE_F32, _F32),
    ("fp16 -> fp16", _F16, _F16, _COMPUTE_F32, _F32),
    ("fp32 -> fp32", _F32, _F32, _COMPUTE_F32, _F32),
    ("int8 -> int8", _I8, _I8, _COMPUTE_I32, _F32),
    ("e4m3 -> bf16", _E4M3, _BF16, _COMPUTE_F32, _F32),
]


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def lines() -> Iterator[str]:
    """One line for each case: the pointer modes that algorithms claim, and how many the heuristic offers in each."""
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")  # loads torch's cuBLAS
    library = _load()
    if library is None:
        yield "libcublasLt was not found"
        return
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    handle = ctypes.c_void_p()
    if library.cublasLtCreate(ctypes.byref(handle)):
        yield "cublasLtCreate failed"
        return
    yield f"cuBLASLt {library.cublasLtGetVersion()} on {torch.cuda.get_device_name()}"
    for name, operands, result, compute, scale in CASES:
        masks = sorted(_claimed(library, handle, operands, result, compute, scale))
        offered = {mode: _offered(library, handle, operands, result, compute, scale, mode) for mode in _MODES}
        modes = ", ".join(f"{_MODES[mode]}: {count}" for mode, count in offered.items())
        yield f"{name}: algorithms claim pointer modes {masks}; heuristic offers {modes}"


def _load() -> ctypes.CDLL | None:
    beside = Path(torch.__file__).parent.parent / "nvidia"
    for name in (*glob.glob(str(beside / "*" / "lib" / "libcublasLt.so.*")), "libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _claimed(lt: ctypes.CDLL, handle: ctypes.c_void_p, ab: int, d: int, compute: int, scale: int) -> set[int]:
    """The pointer-mode masks of every algorithm of these types."""
    ids, count = (ctypes.c_int * 200)(), ctypes.c_int()
    if lt.cublasLtMatmulAlgoGetIds(handle, compute, scale, ab, ab, d, d, 200, ids, ctypes.byref(count)):
        return set()
    masks = set()
    for identity in ids[: count.value]:
        algorithm, mask, written = _Algorithm(), ctypes.c_uint32(), ctypes.c_size_t()
        if lt.cublasLtMatmulAlgoInit(handle, compute, scale, ab, ab, d, d, identity, ctypes.byref(algorithm)):
            continue
        if not lt.cublasLtMatmulAlgoCapGetAttribute(
            ctypes.byref(algorithm),
            _CAP_POINTER_MODE_MASK,
            ctypes.byref(mask),
            ctypes.c_size_t(4),
            ctypes.byref(written),
        ):
            masks.add(mask.value)
    return masks


def _offered(lt: ctypes.CDLL, handle: ctypes.c_void_p, ab: int, d: int, compute: int, scale: int, mode: int) -> int:
    """How many algorithms the heuristic offers for a product in that pointer mode."""
    description, preference = ctypes.c_void_p(), ctypes.c_void_p()
    a, b, c = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    lt.cublasLtMatmulDescCreate(ctypes.byref(description), compute, scale)
    for attribute, value in ((_TRANSA, _TRANSPOSED), (_POINTER_MODE, mode)):
        number = ctypes.c_int32(value)
        lt.cublasLtMatmulDescSetAttribute(description, attribute, ctypes.byref(number), ctypes.c_size_t(4))
    for layout, kind, rows, cols in ((a, ab, _K, _M), (b, ab, _K, _N), (c, d, _M, _N)):
        lt.cublasLtMatrixLayoutCreate(
            ctypes.byref(layout), kind, ctypes.c_uint64(rows), ctypes.c_uint64(cols), ctypes.c_int64(rows)
        )
    lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference))
    workspace = ctypes.c_size_t(64 << 20)
    lt.cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, ctypes.byref(workspace), ctypes.c_size_t(8))
    found, count = (_Heuristic * 8)(), ctypes.c_int()
    status = lt.cublasLtMatmulAlgoGetHeuristic(
        handle, description, a, b, c, c, preference, 8, found, ctypes.byref(count)
    )
    return 0 if status else count.value
