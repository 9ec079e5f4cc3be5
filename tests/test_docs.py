"""The Python blocks of the documentation and its gain-ops commands run, page by page, as a reader would run them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gain_ops

from support.tiny_llama import ENGLISH, save_tiny_llama

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```" in page.read_text(encoding="utf-8"))
BLOCK = re.compile(r"^```(\S*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)

# servers and installers of others: their commands are shown, and are not ours to run
OTHERS = {"curl", "huggingface-cli", "hf", "llama-cli", "llama-server", "pip", "sglang", "vllm"}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: my-model, my-texts and a gain file of it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("docs")
    save_tiny_llama(folder / "my-model")
    (folder / "my-texts").mkdir()
    for number in range(20):
        (folder / "my-texts" / f"{number}.txt").write_text(ENGLISH * 4, encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    gain_ops.apply(model, "gain-ffn")
    for name, parameter in model.named_parameters():
        if name.endswith("delta"):
            torch.nn.init.normal_(parameter, std=0.05)
    gain_ops.save_gains(model, folder / "gains.safetensors")
    return folder


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_blocks_run(page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    # a copy: a page may change what it works on
    subprocess.run(["cp", "-r", str(workplace), str(here)], check=True)
    monkeypatch.chdir(here)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
        elif language == "sh":
            for line in text.replace("\\\n", " ").strip().splitlines():
                run(line)


def run(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program in OTHERS:
        return
    command = {"gain-ops": [str(Path(sys.executable).with_name("gain-ops"))], "python": [sys.executable]}[program]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_every_block_says_what_it_is() -> None:
    found = {(page.name, language) for page in PAGES for language, _ in blocks(page)}
    unknown = {pair for pair in found if pair[1] not in ("python", "sh", "text", "{eval-rst}", "{toctree}")}
    assert not unknown
    assert any(language == "python" for _, language in found)


def test_every_link_leads_somewhere() -> None:
    for page in DOCS.rglob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
