"""The list of planted faults fits the source as it is; tests/plant_faults.py runs it."""

from collections import Counter

import pytest
from plant_faults import ROOT, Fault, read_faults

FAULTS = read_faults()


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(fault.name for fault in FAULTS).items() if count > 1] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    content = (ROOT / fault.file).read_text(encoding="utf-8")
    assert content.count(fault.text) == 1, f"{fault.file} has changed: correct its text in tests/faults.toml"
    compile(content.replace(fault.text, fault.fault), fault.file, "exec")
    assert fault.fault != fault.text
    assert fault.tests
    assert [test for test in fault.tests if not (ROOT / test).is_file()] == []
