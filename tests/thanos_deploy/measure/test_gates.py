from dataclasses import replace

import pytest

from tests import bundles
from thanos_deploy.bundle.codec import decode
from thanos_deploy.errors import UsageError
from thanos_deploy.measure import gates
from thanos_deploy.measure.latency import Decode, Prefill, Scenario
from thanos_deploy.measure.run import (
    Metric,
    ModelTimes,
    Run,
    ScenarioTimes,
    Subject,
    WarmUpRecord,
)

SCENARIOS: list[Scenario] = [Prefill(1, 8), Decode(1, 8, 4), Decode(1, 64, 4)]


def scenario(name: str, metric: str, dense: float, pruned: float) -> ScenarioTimes:
    return ScenarioTimes(
        name=name,
        kind=metric,
        headline=metric,
        batch=1,
        prompt=0,
        past=0,
        new_tokens=0,
        warmup=WarmUpRecord(1, stable=True),
        results={
            label: ModelTimes({metric: of_median(median)})
            for label, median in (("dense", dense), ("pruned", pruned))
        },
    )


def of_median(median: float) -> Metric:
    return Metric(unit="s", count=1, median=median, p90=2 * median, p99=3 * median)


RUN = replace(
    decode(Run, bundles.run()),
    subjects={
        label: Subject(
            model="tiny",
            sha256="",
            pattern=None,
            method=None,
            dtype="fp32",
            file_bytes=size,
            cache_bytes_per_token=1,
        )
        for label, size in (("dense", 100), ("pruned", 80))
    },
    scenarios=(
        scenario("prefill-1x8", "prefill", 0.2, 0.1),
        scenario("decode-1x8", "decode", 0.02, 0.01),
        scenario("decode-1x64", "decode", 0.02, 0.03),
    ),
)


def judge(text: str, *, run: Run = RUN) -> list[tuple[str, float | None, bool]]:
    outcomes = gates.judge(
        [gates.parse(text)],
        run,
        subject="pruned",
        quality={"ppl": {"dense": 10.0, "pruned": 12.0}, "kl": {"pruned": 0.3}},
    )
    return [(outcome.scenario, outcome.value, outcome.held) for outcome in outcomes]


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        ("prefill.p50.ratio<0.8", [("prefill-1x8", 0.5, True)]),
        ("prefill.p90 <= 0.2", [("prefill-1x8", 0.2, True)]),
        ("prefill.p99>1", [("prefill-1x8", 0.3, False)]),
        ("decode.p50.ratio<0.8", [("decode-1x8", 0.5, True), ("decode-1x64", 1.5, False)]),
        ("decode-1x64:decode.p50.ratio>=1.5", [("decode-1x64", 1.5, True)]),
        ("file_bytes<80", [("", 80, False)]),
        ("file_bytes.ratio<=0.8", [("", 0.8, True)]),
        ("ppl<12.5", [("", 12.0, True)]),
        ("ppl.ratio<1.1", [("", 1.2, False)]),
        ("kl<0.4", [("", 0.3, True)]),
        ("words>0.5", [("", None, False)]),
        ("gpu_peak_bytes.ratio<1", [("", None, False)]),
    ],
)
def test_a_gate_is_held_to_what_was_measured(
    text: str, outcomes: list[tuple[str, float | None, bool]]
) -> None:
    found = judge(text)
    assert [(where, held) for where, _, held in found] == [(one, held) for one, _, held in outcomes]
    assert [value for _, value, _ in found] == pytest.approx([value for _, value, _ in outcomes])


def test_times_of_an_invalid_run_hold_no_gate_and_sizes_do() -> None:
    invalid = replace(RUN, status="INVALID")
    assert judge("prefill.p50.ratio<0.8", run=invalid) == [("prefill-1x8", 0.5, False)]
    assert judge("file_bytes.ratio<0.9", run=invalid) == [("", 0.8, True)]


@pytest.mark.parametrize(
    "text",
    ["", "decode", "decode.p50", "decode.p50.ratio=0.8", "decode.p50<", "decode.p50<nan", "<1"],
)
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a gate"):
        gates.parse(text)


@pytest.mark.parametrize(
    "text", ["speed.p50<1", "decode.p95<1", "decode<1", "ppl.p50<1", "decode-1x8:ppl<1", "ratio<1"]
)
def test_an_unknown_metric_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(UsageError, match="no measurement is called") as caught:
        gates.parse(text)
    assert all(name in caught.value.fix for name in (*gates.METRICS, *gates.FIGURES, "ppl", "p99"))


def test_a_gate_on_what_a_run_does_not_time_is_refused() -> None:
    for text, message in (
        ("ttft.p50<1", "does not measure ttft"),
        ("decode-1x9:decode.p50<1", "in a scenario 'decode-1x9'"),
        ("prefill-1x8:decode.p50<1", "in a scenario 'prefill-1x8'"),
    ):
        with pytest.raises(UsageError, match=message):
            gates.check([gates.parse(text)], SCENARIOS)
    held = ("decode-1x8:decode.p50<1", "decode.p99.ratio<1", "ppl<1", "file_bytes<1")
    gates.check([gates.parse(text) for text in held], SCENARIOS)
