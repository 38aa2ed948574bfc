import json
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from runtime.kernels import choice, kernel_times, linears, operator
from runtime.kernels.choice import DENSE, TOKENS, Row, Shape, Timed
from runtime.kernels.kernel_times import Origin
from runtime.kernels.linears import Multiply
from thanos_deploy.errors import InputError, PlatformError
from thanos_deploy.machine import environment

HERE = Origin(card="H", torch="2", triton=None, tool="1")
SHAPE = Shape(outputs=32, inputs=64, dtype="bf16")

# Seconds in the buckets of 1, 2-4, 5-16, 17-64, 65-256 and more tokens.
COSTS = {
    DENSE: (10, 10, 10, 10, 20, 100),
    "few": (6, 6, 9, 20, 90, 500),
    "many": (20, 20, 20, 20, 15, 60),
}


class Product:
    """A kernel that is right and whose time is known to the clock."""

    def __init__(self, weight: Tensor, kernel: str) -> None:
        self.weight = weight
        self.kernel = kernel

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, bias)


def fake(kernel: str) -> choice.Maker:
    return lambda weight, name: Product(weight, kernel)


def clock(calls: Sequence[Callable[[], object]]) -> float:
    call = calls[0]
    assert isinstance(call, partial)
    assert isinstance(call.func, Product)
    call()
    return COSTS[call.func.kernel][TOKENS.index(len(call.args[0]))]


def measured() -> Row:
    makers = {name: fake(name) for name in COSTS}
    (row,) = choice.measure([SHAPE], clock, candidates=makers, device="cpu")
    return row


def test_every_bucket_gets_the_faster_of_the_two_kernels_that_are_best_together() -> None:
    row = measured()
    assert row.shape == SHAPE
    # Beyond 16 tokens dense times of 10, 20 and 100 s are slower, as a product, than 20, 15 and 60.
    assert row.chosen == ("few", "few", "few", "few", "many", "many")
    assert [one.seconds for one in row.timed] == list(COSTS.values())


_SECONDS = st.lists(st.floats(1e-6, 1.0), min_size=6, max_size=6).map(tuple)


@given(st.lists(_SECONDS, min_size=1, max_size=5))
def test_a_choice_holds_two_kernels_at_most_and_is_within_the_worth_of_a_copy_of_the_best(
    seconds: list[tuple[float, ...]],
) -> None:
    timed = [Timed(str(number) if number else DENSE, each) for number, each in enumerate(seconds)]
    chosen = choice.fastest(timed)
    assert len(set(chosen)) <= 2
    of = dict(zip((one.kernel for one in timed), seconds, strict=True))

    def mean(pairs: Sequence[str]) -> float:
        return fmean(log(min(of[name][index] for name in pairs)) for index in range(6))

    best = min(mean((one, two)) for one in of for two in of)
    taken = fmean(log(of[name][index]) for index, name in enumerate(chosen))
    assert taken <= best + log(1 + choice.WORTH) + 1e-9
    # Nothing smaller is as good.
    limit = best + log(1 + choice.WORTH) - 1e-9
    assert all(
        choice.bits({one, two}) >= choice.bits(chosen)
        for one in of
        for two in of
        if mean((one, two)) <= limit
    )


def test_a_second_copy_that_gains_next_to_nothing_is_not_held() -> None:
    timed = [Timed("a", (1.0,) * 6), Timed("b", (0.99,) + (2.0,) * 5), Timed(DENSE, (0.99,) * 6)]
    assert choice.fastest(timed) == ("a",) * 6


def test_a_kernel_that_refuses_or_errs_is_not_chosen_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(weight: Tensor, name: str) -> Multiply:
        raise InputError(f"{name}: no", fix="")

    def refuse_many(weight: Tensor, name: str) -> Multiply:
        def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
            if len(x) > 16:
                raise RuntimeError("too many\nof them")
            return nn.functional.linear(x, weight, bias)

        return multiply

    def wrong(weight: Tensor, name: str) -> Multiply:
        return lambda x, bias: nn.functional.linear(x, weight.roll(1), bias)

    def constant(calls: Sequence[Callable[[], object]]) -> float:
        return 1.0 if isinstance(calls[0].func, Product) else 0.1  # type: ignore[attr-defined]

    makers = {DENSE: fake(DENSE), "no": refuse, "few": refuse_many, "wrong": wrong}
    (row,) = choice.measure([SHAPE], constant, candidates=makers, device="cpu")
    assert row.chosen == ("few",) * 3 + (DENSE,) * 3
    no, few, bad = row.timed[1:]
    assert no == Timed("no", (None,) * 6, "InputError: weight: no")
    assert few == Timed(
        "few", (0.1, 0.1, 0.1, None, None, None), "64 tokens: RuntimeError: too many"
    )
    assert bad.seconds == (None,) * 6
    assert bad.reason is not None
    assert "the product is wrong by" in bad.reason
    (warned, *_) = (one.getMessage() for one in caplog.records)
    assert warned.startswith("wrong is not used for 1 tokens: _WrongProductError: the product is")


def test_where_no_kernel_has_a_time_that_is_an_error_and_not_a_choice() -> None:
    few = Timed("few", (1.0, 1.0, None, None, None, None), "16 tokens: InputError: too many")
    with pytest.raises(PlatformError, match=r"16 tokens here \(few: 16 tokens: .* too many\)"):
        choice.fastest([few])
    assert choice.fastest([few, Timed(DENSE, (2.0,) * 6)])[2:] == (DENSE,) * 4


def test_a_dense_product_that_fails_is_an_error() -> None:
    def out_of_memory(weight: Tensor, name: str) -> Multiply:
        def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
            raise torch.OutOfMemoryError("full")

        return multiply

    with pytest.raises(torch.OutOfMemoryError):
        choice.measure([SHAPE], clock, candidates={DENSE: out_of_memory}, device="cpu")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "MAKERS", {name: fake(name) for name in ("few", "many")})


@pytest.mark.usefixtures("known")
def test_a_measurement_is_read_back_and_only_new_shapes_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "engines" / "torch-sm90" / kernel_times.FILE
    asked = []

    def measure(shapes: Sequence[Shape]) -> tuple[Row, ...]:
        asked.append(list(shapes))
        return tuple(Row(shape, measured().chosen, measured().timed) for shape in shapes)

    other = Shape(8, 16, "fp16")
    rows = kernel_times.rows_for([SHAPE, SHAPE], path, HERE, measure)
    assert kernel_times.rows_for([SHAPE], path, HERE, measure) == rows == {SHAPE: measured()}
    assert set(kernel_times.rows_for([SHAPE, other], path, HERE, measure)) == {SHAPE, other}
    assert asked == [[SHAPE], [other]]
    assert len(kernel_times.read(path, HERE)) == 2


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"origin": {"card": "A", "torch": "2", "triton": None, "tool": "1"}}, "card='A'"),
        ({"origin": {"card": "H", "torch": "3", "triton": None, "tool": "1"}}, "torch='3'"),
        ({"format": "thanos-deploy/kernels/9"}, "thanos-deploy/kernels/9"),
        ({"rows": [{"shape": {}}]}, "not readable"),
    ],
)
def test_a_file_of_another_gpu_or_version_is_measured_anew_and_that_is_said(
    tmp_path: Path, change: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / kernel_times.FILE
    kernel_times.write(path, HERE, [measured()])
    assert kernel_times.read(path, HERE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with caplog.at_level(logging.WARNING):
        assert kernel_times.read(path, HERE) == ()
    assert said in caplog.text
    assert "measured again" in caplog.text


@pytest.mark.usefixtures("known")
def test_a_kernel_that_there_is_no_more_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / kernel_times.FILE
    kernel_times.write(path, HERE, [measured()])
    monkeypatch.setattr(linears, "MAKERS", {})
    assert kernel_times.read(path, HERE) == ()


def test_a_bundle_that_cannot_be_written_to_has_its_file_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = tmp_path / "engines"
    assert kernel_times.folder(engines, "sm90") == engines / "torch-sm90"
    cached = environment.cache_folder() / "torch-sm90"
    assert kernel_times.folder(None, "sm90") == cached
    # Root may write everywhere, whatever the permissions.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert kernel_times.folder(engines, "sm90") == cached


def test_a_layer_takes_the_kernel_of_its_tokens_and_holds_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[tuple[str, str | int]] = []

    def spy(kernel: str) -> operator._Kernel:
        def hold(weight: Tensor, name: str) -> tuple[Tensor, ...]:
            used.append((kernel, name))
            return (weight,)

        def multiply(
            x: Tensor, held: Sequence[Tensor], bias: Tensor | None, outputs: int
        ) -> Tensor:
            used.append((kernel, len(x)))
            return nn.functional.linear(x, held[0], bias)

        return operator._Kernel(lambda weight, name: None, hold, 1, multiply)

    for name in ("few", "many"):
        monkeypatch.setitem(operator._KERNELS, name, spy(name))
    model = nn.ModuleDict({"up": nn.Linear(64, 32, dtype=torch.bfloat16)})
    reference = model["up"]
    rows = {SHAPE: Row(SHAPE, ("few", "few", DENSE, DENSE, DENSE, DENSE), ())}
    assert choice.shapes_of(model, ["up"]) == [SHAPE]
    choice.replace(model, ["up"], rows)
    for shape in ((1, 64), (2, 2, 64), (5, 64), (16, 64), (1, 300, 64)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        torch.testing.assert_close(model["up"](x), reference(x))
    assert used == [("few", "up"), ("few", 1), ("few", 4)]
