"""Every Python block of the README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, flags=re.DOTALL))


def _model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
    )


def test_no_block_goes_untested() -> None:
    assert README.count("```python") == len(BLOCKS) == 2


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 50, (2, 8))
    batch = {"input_ids": ids, "labels": ids}
    model = _model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exec(BLOCKS[name], {"torch": torch, "model": model, "batches": [batch] * 3})
    if name == "loop":
        from transformers import LlamaForCausalLM

        after = model.state_dict()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert list(after) == list(before)
        assert {key.split(".")[-2] for key in changed} == {"o_proj", "down_proj"}
        loaded = LlamaForCausalLM.from_pretrained("adapted")
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_every_file_that_it_links_to_is_there() -> None:
    root = Path(__file__).resolve().parents[1]
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (root / target).exists(), target
