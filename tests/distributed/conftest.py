import pytest

from support.group import Group


@pytest.fixture(scope="session")
def two():
    """Two processes in a gloo group: two(function, *args) runs on both, and gives what they returned."""
    with Group(2) as group:
        yield group


@pytest.fixture(scope="session")
def four():
    """The same with four."""
    with Group(4) as group:
        yield group
