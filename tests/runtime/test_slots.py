import math
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.batching import Batcher, Request
from runtime.engine import Reading, open_engine, open_slots
from runtime.generate import generate, generate_batch
from runtime.graph import Graph
from runtime.memory import HostMemory
from runtime.padded import PaddedRows
from runtime.prefixes import Prefixes, covered
from runtime.sampling import Sampling
from runtime.slots import OnnxRuntimeSlots
from tests.conftest import VOCABULARY, Exported
from tests.runtime.counting import Answer
from thanos_deploy.errors import InputError, IntegrityError, PlatformError, UsageError
from thanos_deploy.gpu import driver

SLOTS = 4

Open = Callable[[str], Graph]


@pytest.fixture(scope="module")
def graph(exported_two_four: Exported, exported_shrunk: Exported, exported_ort: Exported) -> Open:
    """Opens the graph of a small model of a type.

    "shrunk llama" is one whose blocks differ, "ort llama" a graph that writes its cache in place.
    """
    kinds = {"": exported_two_four, "shrunk": exported_shrunk, "ort": exported_ort}

    @cache
    def make(name: str) -> Graph:
        kind, _, model_type = name.rpartition(" ")
        folder = kinds[kind](model_type)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            folder / "onnx" / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        return Graph(session, ort, memory=HostMemory(), max_sequence=128)

    return make


def alone(graph: Graph, text: Sequence[int]) -> NDArray[np.float32]:
    """float32[vocabulary], what follows a text that is read on its own, all at once."""
    ids = np.array([text])
    logits: NDArray[np.float32] = graph.run(ids, np.ones_like(ids), graph.empty_cache(1))[0]
    return logits.squeeze(0)


@pytest.fixture
def _dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What numpy leaves as it is holds NaN, which no mask hides."""
    empty = np.empty

    def dirty(*arguments: Any, **options: Any) -> NDArray[Any]:
        array = empty(*arguments, **options)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    monkeypatch.setattr(np, "empty", dirty)


tokens = st.integers(0, VOCABULARY - 1)
# Many begin alike.
prompt = st.builds(
    lambda common, own: [*range(common), *own],
    st.integers(0, 20),
    st.lists(tokens, min_size=1, max_size=24),
)
prompts = st.lists(prompt, min_size=1, max_size=SLOTS)
events = st.lists(
    st.one_of(
        st.tuples(st.just("join"), prompts),
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("read"), st.just(200)),
        st.tuples(st.just("decode"), tokens),
        st.tuples(st.just("leave"), st.integers(0, SLOTS - 1)),
        st.tuples(st.just("abandon"), st.integers(0, SLOTS - 1)),
    ),
    min_size=30,
    max_size=30,
)


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.prefixes._TOKENS", 4)


@pytest.mark.usefixtures("_dirty_memory")
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "opt",
        "gpt2",
        "shrunk llama",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gemma2", "ort llama", "ort opt")
        ),
    ],
)
@given(events=events)
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_row_computes_what_it_computes_alone_whoever_comes_and_goes(
    graph: Open, name: str, events: list[tuple[str, object]]
) -> None:
    model = graph(name)
    slots = OnnxRuntimeSlots(model, slots=SLOTS, prefix_bytes=12 * block_bytes(model))
    rows: list[list[int]] = []
    groups: list[tuple[Reading, list[list[int]]]] = []  # read in turn

    def agree(texts: list[list[int]], logits: np.ndarray) -> None:
        for text, row in zip(texts, logits, strict=True):
            expected = alone(model, text)
            np.testing.assert_allclose(row, expected, atol=1e-5 * float(np.ptp(expected)))

    for event, value in events:
        if event == "join":
            assert isinstance(value, list)
            taken = len(rows) + sum(len(newcomers) for _, newcomers in groups)
            if newcomers := [list(prompt) for prompt in value[: SLOTS - taken]]:
                groups.append((slots.join(newcomers), newcomers))
        elif event == "read" and groups:
            assert isinstance(value, int)
            reading, newcomers = groups.pop(0)
            logits = reading.read(value)
            if logits is None:
                groups.append((reading, newcomers))
            else:
                agree(newcomers, logits)
                rows = rows + newcomers
        elif event == "decode" and rows:
            assert isinstance(value, int)
            ids = (np.arange(len(rows)) + value) % VOCABULARY
            rows = [[*text, int(token)] for text, token in zip(rows, ids, strict=True)]
            agree(rows, slots.decode(ids))
        elif event == "leave" or (event == "abandon" and groups):
            assert isinstance(value, int)
            texts = groups[0][1] if event == "abandon" else rows
            if value < len(texts):
                (groups[0][0].abandon if event == "abandon" else slots.leave)(value)
                texts[value] = texts[-1]
                texts.pop()
                groups = [group for group in groups if group[1]]


def block_bytes(graph: Graph) -> int:
    """Of as many tokens as a block of a prefix has here."""
    return sum(
        math.prod(tensor.shape[1::2]) * 4 * tensor.type.bytes for tensor in graph.empty_cache(1)
    )


def test_a_beginning_that_was_read_is_not_read_again_and_the_rest_is_the_same(graph: Open) -> None:
    model = graph("llama")
    slots = OnnxRuntimeSlots(model, slots=4, prefix_bytes=1 << 20)
    common = list(range(30))

    def read(*prompts: list[int]) -> Reading:
        reading = slots.join(prompts)
        logits = reading.read(1000)
        assert logits is not None
        for prompt, row in zip(prompts, logits, strict=True):
            expected = alone(model, prompt)
            np.testing.assert_allclose(row, expected, atol=1e-5 * float(np.ptp(expected)))
            slots.leave(0)
        return reading

    assert read([*common, 99]).reused == 0
    assert slots.remembered([*common, 98, 97]) == 28  # in blocks of 4
    assert slots.remembered(common[:28]) == 24  # the last token is always read
    # Read together, each reads as much as the one that knows least.
    assert read([*common, 98, 97], [*common[:10], 96]).reused == 32 - 4 + 11 - 4
    assert read([*common, 98]).reused == 28
    assert slots.remembered([1, *common]) == 0


def test_what_was_not_used_for_longest_is_forgotten_first(graph: Open) -> None:
    model = graph("llama")
    prefixes = Prefixes(model, 4 * block_bytes(model) + 1)
    first, second = list(range(9)), list(range(50, 62))

    def known(ids: list[int]) -> int:
        return covered(prefixes.find([*ids, 0]))

    prefixes.keep(first, lambda tokens: ())
    assert known(first) == 8
    prefixes.keep(second[:4], lambda tokens: ())
    assert known(first) == 8  # now the latest
    prefixes.keep(second, lambda tokens: ())
    assert (known(second), known(first)) == (12, 4)  # its end went before its beginning
    prefixes.keep(list(range(100, 200)), lambda tokens: ())
    assert (known(second), known(first), known(list(range(100, 200)))) == (0, 0, 16)
    nothing = Prefixes(model, block_bytes(model) - 1)
    nothing.keep(first, lambda tokens: ())
    assert nothing.find(first) == []


def test_the_cache_stays_as_long_as_the_longest_text_needs(graph: Open) -> None:
    slots = OnnxRuntimeSlots(graph("llama"), slots=2)
    assert isinstance(slots._rows, PaddedRows)
    slots.join([[1, 2, 3]]).read(100)
    longest = 0
    for step in range(300):  # there is always one row, and none is longer than 14 tokens
        slots.decode(np.full(len(slots._rows.lengths), 5))
        if step % 10 == 0:
            slots.join([[7, 8, 9]]).read(100)
            if len(slots._rows.lengths) == 2:
                slots.leave(0)
        longest = max(longest, slots._rows._past)
    assert longest <= 2 * 14 + 1
    slots.leave(0)
    assert slots._rows._past == 0
    assert slots._rows._present_room == slots._rows._spare_room == 0


def test_a_step_in_place_copies_nothing(graph: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = OnnxRuntimeSlots(graph("ort llama"), slots=3)
    slots.join([list(range(40)), [7, 8]]).read(100)
    monkeypatch.setattr(HostMemory, "copy", lambda *_: pytest.fail("copied"))
    for _ in range(8):
        slots.decode(np.array([1, 2]))


def test_sequences_beside_the_rows_leave_no_trace(graph: Open) -> None:
    model = graph("ort llama")
    slots = OnnxRuntimeSlots(model, slots=1)
    text = list(range(30))
    ids = np.array([text, [0] * 27 + text[:3]])
    mask = np.array([[1] * 30, [0] * 27 + [1] * 3])
    for row, expected in zip(slots.logits(ids, mask), (text, text[:3]), strict=True):
        np.testing.assert_allclose(row, alone(model, expected), atol=1e-4)
    (whole,) = slots.score(text)
    np.testing.assert_allclose(whole[-1], alone(model, text), atol=1e-4)


def test_an_engine_in_place_continues_prompts_of_any_lengths(exported_ort: Exported) -> None:
    engine = open_engine(exported_ort("llama"))
    prompts = PROMPTS[:4]
    together = list(generate_batch(engine, prompts, new_tokens=6))
    for row, prompt in enumerate(prompts):
        expected = list(generate(engine, prompt, new_tokens=6))
        assert [step[row] for step in together] == expected


def test_a_graph_for_the_cpu_is_refused_by_other_providers(
    exported_ort: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.engines.onnxruntime.driver.require", lambda: None)
    with pytest.raises(UsageError, match="exported for ONNX Runtime's CPU provider") as caught:
        open_engine(exported_ort("llama"), provider="cuda")
    assert "--graph neutral --overwrite" in str(caught.value.fix)


PROMPTS = [(72, 101, 108, 108, 111), (7,), tuple(range(1, 13)), (3, 4), (200, 100), (9,) * 30]


@pytest.mark.parametrize(
    ("temperature", "graph"), [(0.0, "neutral"), (1.0, "neutral"), (1.0, "ort")]
)
def test_requests_that_share_steps_get_the_tokens_that_they_get_alone(
    exported_llama: Path, exported_ort: Exported, temperature: float, graph: str
) -> None:
    bundle = exported_ort("llama") if graph == "ort" else exported_llama
    engine = open_engine(bundle)
    batcher = Batcher(open_slots(bundle, slots=3), queue=8, prompt_tokens_per_step=7)
    requests = [
        Request(
            prompt,
            10 + 5 * count,
            stop=frozenset({256}),
            sampling=Sampling(temperature=temperature, top_p=0.9, seed=count),
        )
        for count, prompt in enumerate(PROMPTS)
    ]
    answers = [Answer() for _ in requests]
    for request, answer in zip(requests, answers, strict=True):
        batcher.submit(request, answer)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.ids() == list(
            generate(
                engine,
                request.prompt,
                new_tokens=request.new_tokens,
                stop=request.stop,
                sampling=request.sampling,
            )
        )
    assert batcher.close()


def test_log_probabilities_are_those_of_the_model_before_temperature_and_cut_offs(
    exported_llama: Path,
) -> None:
    batcher, answer = Batcher(open_slots(exported_llama, slots=1), queue=1), Answer()
    sampling = Sampling(temperature=2.0, top_k=5, repetition_penalty=1.5, seed=3)
    batcher.submit(Request((72, 101), 6, sampling=sampling, alternatives=4), answer)
    engine = open_engine(exported_llama)
    logits = engine.prefill(np.array([[72, 101]]))[0].astype(np.float64)
    answer.end()
    assert batcher.close()
    for token in answer.tokens:
        odds = np.exp(logits) / np.exp(logits).sum()
        assert token.logprob == pytest.approx(np.log(odds[token.id]), abs=1e-5)
        assert [other for other, _ in token.alternatives] == np.argsort(-odds)[:4].tolist()
        assert [logprob for _, logprob in token.alternatives] == pytest.approx(
            np.log(np.sort(odds)[::-1][:4]), abs=1e-5
        )
        logits = engine.decode(np.array([token.id]))[0].astype(np.float64)


@pytest.mark.parametrize(("alternatives", "given"), [(None, False), (0, True)])
def test_log_probabilities_are_given_where_they_are_asked_for(
    exported_llama: Path, alternatives: int | None, given: bool
) -> None:
    batcher, answer = Batcher(open_slots(exported_llama, slots=1), queue=1), Answer()
    batcher.submit(Request((72, 101), 2, alternatives=alternatives), answer)
    answer.end()
    assert batcher.close()
    assert [(token.logprob is not None, token.alternatives) for token in answer.tokens] == [
        (given, ())
    ] * 2


def test_slots_that_cannot_be_opened_say_why(exported_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 slots"):
        open_slots(exported_llama, slots=0)
    with pytest.raises(UsageError, match="'tpu'"):
        open_slots(exported_llama, slots=1, provider="tpu")
    with pytest.raises(UsageError, match="'openvino' is not known"):
        open_slots(exported_llama, slots=1, backend="openvino")
    with pytest.raises(
        UsageError, match="tensorrt does not support requests that join and leave"
    ) as caught:
        open_slots(exported_llama, slots=1, backend="tensorrt")
    assert caught.value.fix == "give one of onnxruntime"
    with pytest.raises(InputError, match="not a bundle"):
        open_slots(tmp_path, slots=1)
    if not driver.probe().gpus:
        with pytest.raises(PlatformError, match="no GPU"):
            open_slots(exported_llama, slots=1, provider="cuda")


def test_a_changed_graph_gets_no_slots(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "copy"))
    (bundle / "onnx" / "model.onnx").write_bytes(b"changed")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        open_slots(bundle, slots=1)
