"""What a tokenizer puts before a text is before every segment, and changes nothing without one."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runtime.text import open_tokenizer
from tests.bundles import checked
from tests.byte_tokenizer import save_byte_tokenizer
from tests.conftest import VOCABULARY, Invoke, MakeModel, stock_model
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.calibration.frame import Frame, frame_of
from thanos_deploy.calibration.segments import every_segment, segments
from thanos_deploy.calibration.texts import Text
from thanos_deploy.errors import CalibrationError, ModelError, UsageError
from thanos_deploy.measure import harness
from thanos_deploy.measure.options import TaskRequest
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.stages.texts import segments_for

END, BEGIN = VOCABULARY - 1, VOCABULARY
TEXT = Text("counting", "".join(chr(48 + i) for i in range(40)))
SMALL = (
    *("--pattern", "2:4", "--nsamples", "4", "--seqlen", "64", "--block-size", "16"),
    *("--eval-segments", "2", "--eval-seqlen", "64"),
    *("--prompt", "8", "--new-tokens", "4", "--rounds", "2"),
)


def save_framing_tokenizer(folder: Path, template: str) -> None:
    """A token a byte, `<end>`, `<begin>`, and a template such as "<begin> $A <end>"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<begin>"])
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<end>", END), ("<begin>", BEGIN)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", bos_token="<begin>"
    ).save_pretrained(folder)


@pytest.fixture
def framing(make_model: MakeModel) -> Path:
    """A model whose tokenizer puts `<begin>` before a text."""
    folder = make_model("llama", vocab_size=VOCABULARY + 1, bos_token_id=BEGIN)
    save_framing_tokenizer(folder, "<begin> $A")
    return folder


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        ("<begin> $A", [BEGIN]),
        ("<begin> $A <end>", [BEGIN]),
        ("$A <end>", []),
        ("<end> <begin> $A <end>", [END, BEGIN]),
        ("$A", []),
    ],
)
def test_the_frame_is_what_stands_before_a_text(
    tmp_path: Path, template: str, ids: list[int]
) -> None:
    save_framing_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(tmp_path)
    frame = frame_of(tokenizer)
    assert list(frame.ids) == ids
    assert [tokenizer.convert_tokens_to_ids(token) for token in frame.tokens] == ids
    cut = segments(TEXT, tokenizer, count=4, length=5 + len(ids), seed=None)
    content = torch.tensor(tokenizer(TEXT.content, add_special_tokens=False)["input_ids"])
    assert torch.equal(cut[:, len(ids) :], content[:20].reshape(4, 5))
    assert cut[:, : len(ids)].tolist() == [ids] * 4
    assert cut.dtype == torch.int64
    assert len(every_segment(TEXT, tokenizer, length=5 + len(ids))) == 8


def test_a_tokenizer_without_a_frame_changes_nothing(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    frame = frame_of(tokenizer)
    assert (frame, frame.inputs) == (Frame(), {})
    ids = torch.tensor(tokenizer(TEXT.content)["input_ids"])
    assert torch.equal(every_segment(TEXT, tokenizer, length=4), ids.reshape(-1, 4))


class Scattering:
    """A tokenizer that puts something between all tokens of a text."""

    name_or_path = "scattering"

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1, 7, 2, 7, 3] if add_special_tokens else [1, 2, 3]}


def test_a_text_that_is_not_left_in_one_piece_is_refused() -> None:
    tokenizer: Any = Scattering()
    with pytest.raises(ModelError, match="which tokens a segment has to begin with"):
        frame_of(tokenizer)


def test_segments_need_room_for_the_frame_and_a_token(framing: Path) -> None:
    tokenizer = load_tokenizer(framing)
    with pytest.raises(
        CalibrationError, match=r"40 tokens found, and 45 needed for 5 segments of 10 tokens"
    ):
        segments(TEXT, tokenizer, count=5, length=10, seed=0)
    with pytest.raises(CalibrationError, match="begins with 1 of the tokenizer"):
        every_segment(TEXT, tokenizer, length=1)
    save_framing_tokenizer(framing, "<begin> <end> $A")
    with pytest.raises(UsageError, match="the model takes 3 to 128 tokens"):
        segments_for(Checkpoint.open(framing), TEXT, 1, 2, seed=None)


@pytest.mark.parametrize("frame", [0, 1, 3])
def test_the_tokens_of_the_frame_are_read_and_not_scored(make_model: MakeModel, frame: int) -> None:
    model = stock_model(make_model("llama"))
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0))
    first = max(frame, 1)
    total = 0.0
    with torch.no_grad():
        for row in ids:
            odds = model(row[None]).logits[0].double().log_softmax(-1)
            total -= sum(odds[place - 1, row[place]].item() for place in range(first, 20))
    expected = math.exp(total / (3 * (20 - first)))
    assert perplexity(model, ids, frame=frame).value == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["<begin> $A", "<begin> $A <end>", "$A"])
def test_every_stage_reads_texts_as_the_tokenizer_frames_them(
    framing: Path,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
) -> None:
    save_framing_tokenizer(framing, template)
    frame = [BEGIN] if template.startswith("<begin>") else []
    read: list[torch.Tensor] = []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        read.append(segments(*arguments, **options))
        return read[-1]

    monkeypatch.setattr("thanos_deploy.calibration.segments.segments", spy)
    out = tmp_path / "out"
    code, printed, said = invoke(
        "prune-export", framing, *SMALL, "--target", "onnx", "-o", out, "--json"
    )
    assert code == 0, said
    assert read
    assert all(one[:, : len(frame)].tolist() == [frame] * len(one) for one in read)
    assert all((one[:, len(frame) :] != BEGIN).all() for one in read)
    code, _, said = invoke(
        "eval",
        out,
        "--dense",
        framing,
        "--runtime",
        "onnx",
        "--segments",
        "2",
        "--seqlen",
        "64",
    )
    assert code == 0, said
    stages = Bundle.open(out).stages
    for name in ("prune", "eval", "eval-onnx"):
        assert stages[name].result["frame"]["ids"] == frame
        assert stages[name].inputs.get("frame", []) == frame
    assert stages["eval-onnx"].result["value"] == pytest.approx(
        stages["eval"].result["value"], rel=1e-4
    )
    (model,) = checked(json.loads(printed))["models"]
    assert model["quality"]["frame"] == (["<begin>"] if frame else [])
    before = "`<begin>`" if frame else "nothing"
    assert f"with {before} before each" in (out / "README.md").read_text()
    # The sample goes on where `generate` goes on.
    ids = torch.tensor([open_tokenizer(out).encode("The capital of France is")])
    assert ids[0, : len(frame)].tolist() == frame
    stock = stock_model(out / "model", dtype=torch.float32)
    answer = stock.generate(ids, max_new_tokens=48, do_sample=False)[0, ids.shape[1] :]
    said_by_sample = stages["bench"].result["sample"]["pruned"]
    assert said_by_sample == load_tokenizer(out / "model").decode(
        [token for token in answer.tolist() if token != END]
    )


@pytest.mark.slow
def test_a_bundle_of_the_old_rule_is_not_taken_for_one_of_the_new(
    framing: Path, tmp_path: Path, invoke: Invoke
) -> None:
    out = tmp_path / "out"
    prune = ("prune", framing, *SMALL[:8], "-o", out)
    assert invoke(*prune)[0] == 0
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    old = manifest["stages"]["prune"]
    assert old["inputs"].pop("frame") == [BEGIN]
    finished = old["finished"] = "2020-01-01T00:00:00+00:00"
    path.write_text(json.dumps(manifest))
    assert invoke(*prune)[0] == 0
    stage = Bundle.open(out).stages["prune"]
    assert stage.inputs["frame"] == [BEGIN]
    assert stage.finished != finished
    assert invoke(*prune)[0] == 0
    assert Bundle.open(out).stages["prune"] == stage  # and this one is kept


def test_an_interrupted_run_of_the_old_rule_is_not_gone_on_with(
    framing: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `prune` takes a journal to belong to has the frame in it."""
    owners: list[Any] = []

    class SeenError(Exception):
        pass

    def journal(folder: Path, owner: Any, report: Any) -> None:
        owners.append(owner)
        raise SeenError

    monkeypatch.setattr("thanos_deploy.stages.prune_work.Journal", journal)
    for template in ("<begin> $A", "$A"):
        save_framing_tokenizer(framing, template)
        out = tmp_path / template.replace(" ", "").strip("<>$A") / "out"
        assert invoke("prune", framing, *SMALL[:8], "-o", out)[0] == 1
    framed, bare = owners
    assert framed["frame"] == [BEGIN]
    assert "frame" not in bare  # as before: such journals are still good


def test_tasks_are_framed_too(framing: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    for template, frame in (("<begin> $A", [BEGIN]), ("$A", [])):
        save_framing_tokenizer(framing, template)
        request = TaskRequest(("any",))
        judge = harness._language_model(framing, Checkpoint.open(framing), request, "torch")
        assert judge.tok_encode("a")[:-1] == frame
