"""benchmarks.comparison: the fronts, what is said of them, and a run on a tiny model."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conversion.base import TextModel
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import pages
from benchmarks.comparison import __main__ as comparison
from benchmarks.comparison.front import front, points, sentence, spans
from benchmarks.comparison.record import Bits, Row, Times, read
from benchmarks.comparison.table import headline, section
from tests.conftest import MakeModel
from thanos_deploy.calibration.texts import BUILTIN
from thanos_deploy.measure.perplexity import perplexity
from thanos_deploy.measure.run import Interval
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.stages.texts import open_text, segments_for


def row(model: str, perplexity: float, cost: float, half: float = 0.0, bits: Bits = "fp32") -> Row:
    """Of a made-up model, whose cost in milliseconds or megabytes is known up to `half`."""
    ratio = None
    if model != "dense" or bits != "fp32":
        ratio = Interval(cost / 10, (cost - half) / 10, (cost + half) / 10, 0.95)
    times = Times(cost / 1e3, ratio)
    return Row(
        model=model,
        bits=bits,
        way="exact",
        runtime="ONNX Runtime",
        bytes=round(cost * 1e6),
        perplexity=perplexity,
        prefill=times,
        decode=times,
    )


DENSE = row("dense", 10.0, 10.0)


DRAWN = st.lists(st.tuples(st.integers(8, 16), st.integers(1, 20), st.integers(0, 3)), max_size=8)


@given(DRAWN)
def test_with_exact_costs_a_front_has_the_least_for_every_accepted_perplexity(
    drawn: list[tuple[int, int, int]],
) -> None:
    rows = [DENSE, *(row(f"2:{n + 3}", ppl, cost) for n, (ppl, cost, _) in enumerate(drawn))]
    best = front(rows, "decode")
    for accepted in {one.perplexity for one in rows}:
        (*_, last) = (one for one in best if one.perplexity <= accepted)
        least = min(one.decode.median for one in rows if one.perplexity <= accepted)
        assert last.decode.median == least


@given(DRAWN)
def test_whoever_is_on_a_front_is_shown_to_cost_less_than_all_that_are_better(
    drawn: list[tuple[int, int, int]],
) -> None:
    made = [row(f"2:{n + 3}", ppl, cost, half / 2) for n, (ppl, cost, half) in enumerate(drawn)]
    rows = [DENSE, *made]
    place = {point.label: point for point in points(rows, "decode")}
    best = {one.name for one in front(rows, "decode")}
    for one in rows:
        cheaper = all(
            place[one.name].high < place[other.name].low
            for other in rows
            if other.perplexity < one.perplexity
        )
        equal = any(
            place[other.name].high < place[one.name].low
            for other in rows
            if other.perplexity == one.perplexity
        )
        assert (one.name in best) == (cheaper and not equal)


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_spans_follow_each_other_and_hold_every_model_once(kinds: list[bool]) -> None:
    best = [
        row(f"structured:{number}" if pruned else "dense", 10.0 + number, 1.0, bits="int8")
        for number, pruned in enumerate(kinds)
    ]
    found = spans(best)
    assert [one for span in found for one in span.rows] == best
    assert found[-1].high is None
    assert [span.low for span in found[1:]] == [span.high for span in found[:-1]]
    assert all(one.pruned != other.pruned for one, other in pairwise(found))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            [row("2:4", 9.0, 5.0)],
            "Whatever perplexity is accepted, the fastest in decode is a pruned model: "
            "2:4 fp32 on ONNX Runtime (perplexity 9.00, 5.0 ms).",
        ),
        (
            [row("2:4", 12.0, 10.0)],
            "No pruned model is shown to be the fastest in decode: for each there is a "
            "better one that is not shown to cost more. On the front are "
            "dense fp32 on ONNX Runtime (perplexity 10.00, 10.0 ms).",
        ),
        (
            [row("structured:0.2", 12.0, 8.0)],
            "Where a perplexity of 12.00 or more is accepted, the fastest in decode is a pruned "
            "model: structured:0.2 fp32 on ONNX Runtime (perplexity 12.00, 8.0 ms). Where 10.00 to "
            "12.00 is accepted, it is a dense model: dense fp32 on ONNX Runtime (perplexity 10.00, "
            "10.0 ms).",
        ),
        (
            [row("structured:0.2", 12.0, 8.0), row("dense", 14.0, 3.0, bits="int8")],
            "Where a perplexity of 12.00 to 14.00 is accepted, the fastest in decode is a pruned "
            "model: structured:0.2 fp32 on ONNX Runtime (perplexity 12.00, 8.0 ms). Where 10.00 to "
            "12.00 or 14.00 or more is accepted, it is a dense model: dense fp32 on ONNX Runtime "
            "(perplexity 10.00, 10.0 ms); dense int8 on ONNX Runtime (perplexity 14.00, 3.0 ms).",
        ),
        (
            [row("structured:0.2", 12.0, 9.5, 1.0)],
            "No pruned model is shown to be the fastest in decode: for each there is a "
            "better one that is not shown to cost more. On the front are "
            "dense fp32 on ONNX Runtime (perplexity 10.00, 10.0 ms).",
        ),
    ],
)
def test_a_sentence_says_who_is_best_where(others: list[Row], said: str) -> None:
    assert sentence([DENSE, *others], "decode") == said


def test_sizes_are_exact() -> None:
    said = sentence([DENSE, row("structured:0.2", 12.0, 9.5, 1.0)], "size")
    assert "the smallest is a pruned model: structured:0.2 fp32" in said


def test_the_pages_say_what_the_results_say() -> None:
    published = read()
    for name, written in (
        ("docs/choose.md", section(published)),
        ("README.md", headline(published)),
    ):
        page = (comparison.ROOT / name).read_text(encoding="utf-8")
        found = pages.rewritten(page, comparison.COMMAND, written)
        assert found == page, f"run `{comparison.COMMAND}`"


@pytest.mark.slow
def test_a_tiny_model_is_compared_in_every_runtime_and_taken_up_again(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By each runtime its perplexity is that of PyTorch where the weights are the same."""
    # The converter knows tokenizers by a hash, and not the one that this model has.
    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda *_: "gpt-2")
    model = make_model("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    out = tmp_path / "out"

    def run(*arguments: object) -> None:
        given = [
            *("comparison", out, "--model", model, "--patterns", "2:4", "--preset", "fast"),
            *("--nsamples", 4, "--seqlen", 64, "--eval-segments", 2, "--eval-seqlen", 64),
            *("--prompt", 8, "--new-tokens", 4, "--rounds", 6, "--pause", 0, "--threads", 1),
            *("--results", tmp_path, *arguments),
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        comparison.main()

    run("--make")
    assert not (tmp_path / "comparison.json").exists()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.onnx")}
    run()
    assert made == {path: path.stat().st_mtime_ns for path in out.rglob("*.onnx")}
    found = read(tmp_path / "comparison.json")
    assert found.rows[0].name == "dense fp32 on ONNX Runtime"
    text = open_text(BUILTIN, "text", held_out=True)
    for weights in ("dense", "2:4"):
        exact = {
            one.runtime: one.perplexity
            for one in found.rows
            if (one.model, one.way) == (weights, "exact")
        }
        assert set(exact) == {"ONNX Runtime", "llama.cpp", "OpenVINO"}
        checkpoint = model if weights == "dense" else out / "2-4" / "model"
        ids, frame = segments_for(Checkpoint.open(checkpoint), text, 2, 64, seed=None)[::2]
        wanted = perplexity(load_model(checkpoint), ids, frame=len(frame)).value
        # The cache of llama.cpp is in float16.
        assert exact == {name: pytest.approx(wanted, rel=2e-3) for name in exact}
    assert {"dense int4 on ORT-GenAI", "dense q4_0 on llama.cpp"} <= {
        one.name for one in found.rows
    }
    assert len(found.rows) == 16
    assert all(len(one.decode.samples) == 6 for one in found.rows)
    assert section(found) in capsys.readouterr().out
