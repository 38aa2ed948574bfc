"""What is taken of texts for one model: conversations, mixtures, rows, data sets of the hub."""

import json
from pathlib import Path

import pytest
import torch

from runtime.server import rendering
from tests.conftest import Invoke, MakeModel
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.calibration.data import Data
from thanos_deploy.errors import CalibrationError, ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.stages.texts import calibration

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def model(make_model: MakeModel) -> Checkpoint:
    folder = make_model("llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Checkpoint.open(folder)


def lines(path: Path, rows: list[object]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def bytes_of(ids: torch.Tensor, model: Checkpoint) -> list[str]:
    tokenizer = load_tokenizer(model.folder)
    return [str(tokenizer.decode(row)) for row in ids]


def test_a_conversation_is_written_by_the_models_template(
    model: Checkpoint, tmp_path: Path
) -> None:
    rows: list[object] = [{"messages": [{"role": "user", "content": "hello"}]}]
    name = lines(tmp_path / "chat.jsonl", rows)
    found = calibration(model, Data(name, nsamples=1, seqlen=8))
    assert found.text.content == "<u>hello"
    assert bytes_of(found.ids, model) == ["<u>hello"]


def test_a_template_that_refuses_a_conversation_is_bad_input(
    model: Checkpoint, tmp_path: Path
) -> None:
    (model.folder / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    name = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "system", "content": "x"}]}])
    with pytest.raises(CalibrationError, match=r"with the roles system .*no system"):
        calibration(model, Data(name, nsamples=1, seqlen=8))


def test_a_template_that_does_not_end_is_bad_input(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (model.folder / "chat_template.jinja").write_text(loop)
    name = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(CalibrationError, match=r"exceeded a limit of time or memory \(0\.3 s"):
        calibration(model, Data(name, nsamples=1, seqlen=8))


def test_a_template_that_is_none_is_a_bad_model(model: Checkpoint, tmp_path: Path) -> None:
    (model.folder / "chat_template.jinja").write_text("{% for %}")
    name = lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(ModelError, match="chat template is not readable"):
        calibration(model, Data(name, nsamples=1, seqlen=8))
    calibration(model, Data("builtin", nsamples=1, seqlen=8))  # which needs no template


def test_several_texts_are_mixed_by_weight(model: Checkpoint, tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 400)
    name = f"3*{tmp_path / 'a.txt'} + {tmp_path / 'b.txt'}"
    found = calibration(model, Data(name, nsamples=8, seqlen=16))
    assert bytes_of(found.ids, model) == ["a" * 16] * 6 + ["b" * 16] * 2
    assert found.text.origin == "a.txt + b.txt"


def test_a_segment_can_be_the_beginning_of_a_row(model: Checkpoint, tmp_path: Path) -> None:
    rows: list[object] = [
        {"text": letter * length} for letter, length in zip("abcd", (20, 5, 16, 9), strict=True)
    ]
    name = lines(tmp_path / "a.jsonl", rows)
    found = calibration(model, Data(name, nsamples=2, seqlen=16, calib_cut="row"))
    assert bytes_of(found.ids, model) == ["a" * 16, "c" * 16]
    with pytest.raises(CalibrationError, match="2 of 4 rows have at least the 16 tokens"):
        calibration(model, Data(name, nsamples=3, seqlen=16, calib_cut="row"))


def test_some_rows_are_taken(model: Checkpoint, tmp_path: Path) -> None:
    rows: list[object] = [{"text": chr(97 + number) * 16} for number in range(20)]
    name = lines(tmp_path / "a.jsonl", rows)
    found = calibration(model, Data(name, nsamples=2, seqlen=16, calib_rows=5))
    assert len(found.text.rows) == 5
    other = calibration(model, Data(name, nsamples=2, seqlen=16, calib_rows=5, seed=1))
    assert found.text.sha256 != other.text.sha256


def test_a_data_set_of_the_hub_is_read_through_datasets(model: Checkpoint, tmp_path: Path) -> None:
    """A folder of files is a data set to the library, as a repository is."""
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"text": "train " * 10}])
    lines(folder / "test.jsonl", [{"text": "test " * 10}])
    for split in ("train", "test"):
        name = f"hub:{folder}:{split}"
        found = calibration(model, Data(name, nsamples=1, seqlen=4))
        assert found.text.content.startswith(split)
        assert found.ids.shape == (1, 4)


def test_a_data_set_that_is_not_in_the_cache_is_bad_input_offline(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match=r"nobody/nothing: the split train cannot be read"):
        calibration(model, Data("hub:nobody/nothing", nsamples=1, seqlen=8))


def test_the_manifest_says_what_was_taken(
    make_model: MakeModel, tmp_path: Path, invoke: Invoke
) -> None:
    name = lines(tmp_path / "a.jsonl", [{"prompt": "x" * 40, "completion": "y" * 40}] * 4)
    options = ("--nsamples", 2, "--seqlen", 64, "--calib-rows", 3, "--calib-cut", "row", "-q")
    out = tmp_path / "out"
    arguments = (make_model("llama"), "--pattern", "2:4", "--method", "wanda", "-o", out, *options)
    assert invoke("prune", *arguments, "--calib", name)[0] == 0
    recorded = Bundle.open(out).stages["prune"].options
    assert {name: recorded[name] for name in ("calib", "calib_rows", "calib_cut")} == {
        "calib": "a.jsonl",
        "calib_rows": 3,
        "calib_cut": "row",
    }
