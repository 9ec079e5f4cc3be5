"""Every Triton kernel as it is compiled and launched, run as PTX, is no worse than torch: in any timing that PTX allows."""

import pytest

from ptx.worker import Worker

pytest.importorskip("triton")

from ptx.cases import CASES

QUICK = [
    "sm_80 scale bf16 37x64x72 on 132",
    "sm_90 backward fp32 37x64x72 on 132",
    "sm_80 glu bf16 37x64x72 on 132",
    "sm_80 linear bf16 70x96x136 on 132",
    "sm_90 linear bf16 70x96x136 on 132",
]


def test_the_worker_has_the_cases(worker: Worker) -> None:
    # first, and by itself: starting a process that imports torch and Triton takes seconds
    assert worker.call("ptx.cases:names") == list(CASES)


@pytest.mark.parametrize("name", QUICK)
def test_a_call_is_right(name: str, worker: Worker) -> None:
    assert worker.call("ptx.cases:run", name=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_call_is_right_late_early_and_in_any_order(name: str, worker: Worker) -> None:
    worker.call("ptx.cases:run", name=name, timing="late")
    worker.call("ptx.cases:run", name=name, timing="early")
    worker.call("ptx.cases:run", name=name, timing="random", together=False, seed=len(name))
