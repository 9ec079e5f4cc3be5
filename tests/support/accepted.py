"""Figures that may not grow: those accepted are committed, and one that is larger fails until somebody accepts it."""

import json
import os
from pathlib import Path

import pytest


def hold(path: Path, what: str, found: dict[str, list[int]]) -> None:
    """Fail where a figure of ``found`` is larger than in the file, or a name is new or gone; ACCEPT=1 writes the file.

    A file is of certain versions, which are in its name; other versions have other figures, and are skipped without a file.
    """
    if os.environ.get("ACCEPT"):
        lines = (f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in sorted(found.items()))
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if not path.exists():
        pytest.skip(f"nothing was accepted for these versions: there is no {path.name}")
    accepted = json.loads(path.read_text())
    grown = {
        name: f"{accepted[name]} -> {figures}"
        for name, figures in found.items()
        if name in accepted and any(now > before for now, before in zip(figures, accepted[name], strict=True))
    }
    how = f"To accept: run this test with ACCEPT=1, look at the diff of {path.name}, and say in the commit why."
    assert not grown, f"{what} grew: {grown}. {how}"
    assert accepted.keys() == found.keys(), f"{path.name} has other names than the test. {how}"
