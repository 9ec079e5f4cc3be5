"""What the tests of a study work on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from gain_study.engine.settings import Settings

from small_studies import small_settings, write_domains


@pytest.fixture(scope="session")
def domain_folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three small domains."""
    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture
def small(tiny_model: Path, domain_folders: list[str]) -> Callable[..., Settings]:
    """``small(out, **changes)``: the settings of a study of the tiny model."""
    return partial(small_settings, model=tiny_model, domains=domain_folders)
