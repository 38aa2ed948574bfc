from pathlib import Path

import pytest

from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.model.assignment import assign, counts, describe, read_file
from thanos_deploy.pattern import Pattern, SemiStructured, Unstructured
from thanos_deploy.pruning.result import PrunedBlock, PrunedLayer, patterns_in

NAMES = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("up_proj", "down_proj")]
UP, DOWN, LATER_UP, LATER_DOWN = NAMES
TWO_FOUR = SemiStructured(2, 4)


def file(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "own.json"
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("include", "ignore", "left"),
    [
        ((), (), NAMES),
        ((), (UP,), NAMES[1:]),
        ((), ("re:.*down_proj",), [UP, LATER_UP]),
        ((DOWN,), (), [DOWN]),
        (("re:.*layers.0.*", LATER_UP), ("re:.*up_proj",), [DOWN]),
        # A plain name is no expression, though it has dots.
        ((), (r"re:model\.layers\.1\..*",), [UP, DOWN]),
    ],
)
def test_names_and_expressions_choose_layers(
    include: tuple[str, ...], ignore: tuple[str, ...], left: list[str]
) -> None:
    assigned = assign(NAMES, TWO_FOUR, include=include, ignore=ignore)
    assert list(assigned) == left
    assert set(assigned.values()) == {TWO_FOUR}


def test_a_file_gives_layers_patterns_of_their_own(tmp_path: Path) -> None:
    own = read_file(file(tmp_path, f'{{"re:.*up_proj": "unstructured:0.6", "{DOWN}": "dense"}}'))
    assert assign(NAMES, TWO_FOUR, file=own) == {
        UP: Unstructured(0.6),
        LATER_UP: Unstructured(0.6),
        LATER_DOWN: TWO_FOUR,
    }
    # What is dense anyway may be ignored as well.
    assert DOWN not in assign(NAMES, TWO_FOUR, ignore=(DOWN,), file=own)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ('["2:4"]', "not a JSON object"),
        ("{}", "names no layer"),
        ('{"a": "2:4", "a": "dense"}', "'a' appears twice"),
        ('{"a": "2:5x"}', "'a': pattern '2:5x' is not understood"),
        ('{"a": 0.5}', "'a': pattern '0.5' is not understood"),
        ('{"a": {"b": "2:4"}}', "'a': pattern"),
        ('{"a": "unstructured:1.5"}', "'a': pattern unstructured:1.5: the fraction is not"),
    ],
)
def test_a_file_that_says_nothing_is_bad_input_and_the_place_is_named(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read_file(path)
    assert message in caught.value.message
    assert caught.value.exit_code == 3


def test_a_file_that_is_missing_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_file(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "include", "ignore", "message"),
    [
        (None, (), ("re:.*up",), "--ignore re:.*up: no linear layer ... most similar are model"),
        (None, ("up_proj",), (), f"--include up_proj: ... {UP}"),
        (None, (), ("lm_head",), "--ignore lm_head: no linear layer"),
        (None, (), ("re:*",), "--ignore re:*: not a regular expression"),
        (None, (), ("re:.*",), "all 4 linear layers are left out"),
        ('{"re:.*": "dense"}', (), (), "all 4 linear layers are left out"),
        ('{"nothing": "2:4"}', (), (), "own.json: nothing: no linear layer"),
        (
            f'{{"re:.*up_proj": "4:8", "{UP}": "dense"}}',
            *((), ()),
            f"own.json: the entry 're:.*up_proj' makes {UP} 4:8, and the entry '{UP}' "
            "makes it dense",
        ),
        (f'{{"{UP}": "4:8"}}', (), ("re:.*up_proj",), "makes ... 4:8, but --ignore names it"),
        (f'{{"{UP}": "4:8"}}', (DOWN,), (), "makes ... 4:8, but --include does not name it"),
    ],
)
def test_what_contradicts_itself_or_names_no_layer_is_refused(
    tmp_path: Path,
    content: str | None,
    include: tuple[str, ...],
    ignore: tuple[str, ...],
    message: str,
) -> None:
    own = None if content is None else read_file(file(tmp_path, content))
    with pytest.raises(UsageError) as caught:
        assign(NAMES, TWO_FOUR, include=include, ignore=ignore, file=own)
    for part in message.split(" ... "):
        assert part in caught.value.message
    assert caught.value.exit_code == 2


def test_what_was_recorded_is_what_was_assigned() -> None:
    patterns: dict[str, Pattern] = {UP: TWO_FOUR, LATER_DOWN: Unstructured(2 / 3)}
    blocks = [block(name, str(patterns.get(name, "dense"))) for name in NAMES]
    assert patterns_in(blocks, TWO_FOUR) == patterns
    older = [block(name, None) for name in NAMES]
    assert patterns_in(older, TWO_FOUR) == dict.fromkeys(NAMES, TWO_FOUR)


def block(name: str, pattern: str | None) -> PrunedBlock:
    layer = PrunedLayer(
        name=name,
        rows=8,
        cols=8,
        pattern=pattern,
        sparsity=0.5,
        pattern_holds=True,
        relative_error=0.1,
        damping=0.01,
        seconds=0.1,
    )
    return PrunedBlock((layer,), {})


def test_patterns_in_words() -> None:
    assert describe({}, 4) is None
    assert describe(dict.fromkeys(NAMES, TWO_FOUR), 4) == "2:4"
    assert describe({UP: TWO_FOUR}, 4) == "2:4 in 1 layers, dense in 3 layers"
    fractions = [Unstructured(0.5), Unstructured(0.25), None]
    assert counts(fractions) == {"unstructured:0.2500 to 0.5000": 2, "dense": 1}
