"""Several gain sets in one batch of one model: each sequence has its set's results, and what does not fit is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gain_ops
from gain_ops.models.record import gained_modules

IDS = torch.arange(1, 19).view(3, 6)
NAMES = ["law", None, "code"]


def build():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    found = {}
    for seed, (name, targets) in enumerate([("code", "gain-ffn"), ("law", "gain")]):
        gain_ops.apply(model := build(), targets)
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in gained_modules(model).values():
                layer.delta.normal_(std=0.5)
        found[name] = tmp_path_factory.mktemp("gains") / f"{name}.safetensors"
        gain_ops.save_gains(model, found[name])
    return found


@pytest.fixture
def mixed(files):
    model = build()
    assert gain_ops.mix_gains(model, files) == ("code", "law")
    return model


def alone(files, name, run):
    """What run(model) gives with one set, in the layers of the mixed model."""
    gain_ops.add_gains(model := build(), files)
    gain_ops.set_gains(model, name)
    return run(model)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_each_sequence_has_the_bits_of_its_set_alone(mixed, files):
    base = logits(mixed)
    with gain_ops.use_sets(mixed, NAMES):
        together = logits(mixed)
    for row, name in enumerate(NAMES):
        assert torch.equal(together[row], alone(files, name, logits)[row])
    assert torch.equal(logits(mixed), base)
    assert torch.equal(logits(build()), base)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generate(mixed, files, options):
    mask = torch.ones_like(IDS)
    mask[1, :2] = 0  # padded on the left

    def run(model):
        kept = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True, **options}
        return model.generate(IDS, attention_mask=mask, **kept)

    with gain_ops.use_sets(mixed, NAMES, beams=options.get("num_beams", 1)):
        together = run(mixed)
    for row, name in enumerate(NAMES):
        expected = alone(files, name, run)[row]
        assert torch.equal(together[row], expected)


def test_other_names_compile_nothing_again(mixed):
    compiled = torch.compile(mixed, backend="eager")
    with gain_ops.use_sets(mixed, NAMES):
        compiled(IDS)
    with gain_ops.use_sets(mixed, NAMES[::-1]), torch.compiler.set_stance("fail_on_recompile"):
        found = compiled(IDS).logits
    with gain_ops.use_sets(mixed, NAMES[::-1]):
        assert torch.equal(found, mixed(IDS).logits)


def test_remove_gives_back_the_base(mixed):
    gain_ops.remove(mixed)
    plain = build().state_dict()
    assert list(mixed.state_dict()) == list(plain)
    assert all(torch.equal(value, plain[name]) for name, value in mixed.state_dict().items())
    with pytest.raises(ValueError, match="no mixed gain sets"), gain_ops.use_sets(mixed, NAMES):
        pass


def test_what_does_not_fit_is_refused(mixed, files):
    for names, said in [(["tax"], "no gain set 'tax', it has code, law"), ([], "a name"), ("law", "a list")]:
        with pytest.raises(ValueError, match=said), gain_ops.use_sets(mixed, names):
            pass
    with gain_ops.use_sets(mixed, NAMES):
        with pytest.raises(ValueError, match="running on this model already"), gain_ops.use_sets(mixed, NAMES):
            pass
        with pytest.raises(ValueError, match="the sets of 3 sequences"):
            mixed(IDS[:2])
    with pytest.raises(ValueError, match="already has gains"):
        gain_ops.mix_gains(mixed, files)
