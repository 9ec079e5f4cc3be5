"""The results file, the weights between stages, the peak of memory, the toy model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gain_ops.measure.perplexity import perplexity
from gain_ops.training.domains import split_domain
from gain_ops.training.loading import load_model
from gain_study.engine import records
from gain_study.engine.peak import Peak
from gain_study.engine.records import Base, Curve, Header, Rate, Stage
from gain_study.engine.toy import save_toy_model
from gain_study.engine.weights import Base as BaseWeights
from gain_study.engine.weights import State, load_state, put, save_state

from support.small_studies import LINES

HEADER = Header({"steps": 1}, "tiny", 7, "a CPU", {"torch": "2"}, "2026-01-01", [["a"]], {"a": {}}, {})
STAGE = Stage(
    method="gain",
    lr=1e-2,
    seed=0,
    order=0,
    number=1,
    domain="a",
    perplexity={"a": 1.1},
    accuracy={},
    curve=[Curve(0, {"a": 1.3})],
    losses=[0.1],
    trained=3,
    seconds=1.0,
    tokens_per_second=2.0,
    saved_bytes=4,
    peak_bytes=5,
)


def test_records_come_back_as_they_were_written(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    base, rate = Base({"a": 1.25}, {"words": 0.5}), Rate("gain", 1e-2, "a", None)
    for record in (HEADER, base, rate, STAGE):
        records.append(path, record)
    assert records.read(path) == records.Study(HEADER, base, [rate], [STAGE])


@pytest.mark.parametrize("kept", [1, 60, -2])
def test_half_a_last_line_does_not_count_and_is_cut_before_more_is_written(tmp_path: Path, kept):
    path = tmp_path / "results.jsonl"
    records.append(path, HEADER)
    whole = path.read_bytes()
    records.append(path, STAGE)
    cut = whole + path.read_bytes()[len(whole) :][:kept]
    path.write_bytes(cut)
    assert records.read(path) == records.Study(HEADER, None, [], [])
    assert path.read_bytes() == cut  # a reader leaves the file of a study at work alone
    records.mend(path)
    assert path.read_bytes() == whole
    records.mend(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["", "{}\n", "not json\n", '{"kind": "rate"}\n', "[1]\n"])
def test_what_is_no_results_file_is_said_to_be_none(tmp_path: Path, text):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(ValueError, match="is not the results file of a study"):
        records.read(tmp_path / "results.jsonl")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        records.append(tmp_path / "results.jsonl", Base({"a": float("nan")}, {}))
    assert not (tmp_path / "results.jsonl").exists()


def test_what_changed_is_found_saved_and_put_back(tmp_path: Path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    base = BaseWeights(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert base.changed(model) == {}
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    changed = base.changed(model)
    assert list(changed) == ["1.weight"]
    save_state(State(changed, {"1.weight": torch.ones(2, 3)}), tmp_path / "state.safetensors")
    base.restore(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = load_state(tmp_path / "state.safetensors")
    put(model, state.parameters)
    assert model[1].weight[0, 0] == before["1.weight"][0, 0] + 1
    assert list(state.fisher) == ["1.weight"]
    with pytest.raises(FileNotFoundError, match="cannot go on"):
        load_state(tmp_path / "none.safetensors")


def test_the_peak_is_that_since_the_beginning():
    peak = Peak(torch.device("cpu"))
    if not peak.exact:
        pytest.skip("this system does not let a process start its peak anew")
    before = peak.bytes()
    block = torch.ones(64 << 18)  # 64 MiB
    assert peak.bytes() - before >= 60 << 20
    del block
    assert peak.bytes() - before >= 60 << 20
    assert Peak(torch.device("cpu")).bytes() - before < 30 << 20


def test_the_peak_is_that_of_the_process_where_it_cannot_begin_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gain_study.engine.peak._reset", lambda: False)
    peak = Peak(torch.device("cpu"))
    assert not peak.exact
    assert peak.bytes() > 50 << 20


def test_the_toy_model_has_learned_something_and_comes_out_the_same(tmp_path: Path):
    texts = {name: [f"{' '.join(lines)} {n}\n" * 20 for n in range(20)] for name, lines in LINES.items()}
    mixture = [split_domain(name, documents, source="a test") for name, documents in texts.items()]
    state = torch.random.get_rng_state()
    for name in ("one", "other"):
        save_toy_model(tmp_path / name, mixture, steps=12, width=32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
    models = [load_model(tmp_path / name, dtype=None, device=torch.device("cpu")) for name in ("one", "other")]
    parameters = [dict(loaded.model.named_parameters()) for loaded in models]
    assert all(torch.equal(parameters[0][name], parameters[1][name]) for name in parameters[0])
    ids = models[0].tokenizer.encode("1 + 1 = 2 é", add_special_tokens=False)
    assert len(ids) == len("1 + 1 = 2 é".encode())
    assert perplexity(models[0].model, torch.tensor([ids])) < 257
