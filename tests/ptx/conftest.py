"""The process in which Triton compiles, one for all tests of a run."""

from collections.abc import Iterator

import pytest

from ptx.worker import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.stop()
