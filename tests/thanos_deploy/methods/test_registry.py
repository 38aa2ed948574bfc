"""How methods are found, and what a file needs to be one."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from thanos_deploy import methods
from thanos_deploy.errors import UsageError

WHOLE = """
from dataclasses import dataclass

from thanos_deploy import option
from thanos_deploy.methods import Preset

@dataclass(frozen=True, slots=True)
class Options(option.Options):
    strength: float = option.option(0.5, "--strength", "How strong.")

PRESETS = {"paper": Preset(Options())}

def prune(problem, pattern, options): ...

def check(name, cols, pattern, options): ...
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a file of that name beside the methods."""
    known = set(sys.modules)

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield add
    methods.load.cache_clear()
    for name in set(sys.modules) - known:
        if name.startswith(f"{methods.__name__}."):
            del sys.modules[name]


def test_a_private_file_is_no_method(write: Callable[[str, str], None]) -> None:
    before = methods.names()
    write("_shared", "")
    assert methods.names() == before
    write("one", WHOLE)
    assert methods.names() == sorted([*before, "one"])
    assert methods.load("one").options().strength == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("whole", "broken", "message"),
    [
        ("class Options", "class Choices", "Options, a frozen dataclass"),
        ("(frozen=True, slots=True)", "", "Options is not frozen"),
        (
            'option.option(0.5, "--strength", "How strong.")',
            "0.5",
            "Options.strength is not made by option",
        ),
        ("PRESETS =", "SETTINGS =", 'PRESETS, with a preset "paper", is missing'),
        ('{"paper":', '{"usual":', 'PRESETS, with a preset "paper", is missing'),
        ("Preset(Options())}", "Options()}", "PRESETS['paper'] is not a Preset"),
        ("def prune(", "def cut(", "the function prune(problem, pattern, options) is missing"),
        ("def check(name, cols,", "def check(name,", "check(name, pattern, options) does not take"),
    ],
    ids=lambda text: text[:30],
)
def test_an_incomplete_method_is_not_registered(
    write: Callable[[str, str], None], whole: str, broken: str, message: str
) -> None:
    assert whole in WHOLE
    text = WHOLE.replace(whole, broken, 1).replace("Choices()", "Options()")
    write("broken", text if whole != "class Options" else "PRESETS = {}")
    with pytest.raises(TypeError) as caught:
        methods.load("broken")
    assert "broken.py is not a method: " in str(caught.value)
    assert message in str(caught.value)


def test_an_option_that_two_methods_share_comes_once_with_both_names(
    write: Callable[[str, str], None],
) -> None:
    write("one", WHOLE)
    write("two", WHOLE.replace("option(0.5", "option(0.75"))
    (shared,) = (m for m in methods.method_options() if m.option.declared.flag == "--strength")
    assert shared.methods == ("one", "two")
    assert shared.help == "one, two: how strong."
    assert shared.default == "one 0.5, two 0.75"


@pytest.mark.parametrize(
    "other",
    [
        WHOLE.replace("How strong.", "How weak."),
        WHOLE.replace("strength: float", "strength: int"),
        WHOLE.replace("strength: float", "force: float"),
    ],
    ids=["help", "type", "name"],
)
def test_one_flag_with_two_meanings_is_an_error(
    write: Callable[[str, str], None], other: str
) -> None:
    write("one", WHOLE)
    write("two", other)
    with pytest.raises(TypeError, match="methods one and two declare --strength differently"):
        methods.method_options()


def test_a_name_that_is_no_method_is_refused() -> None:
    with pytest.raises(UsageError, match="--method 'guess'") as caught:
        methods.load("guess")
    assert "thanos" in caught.value.fix


def test_the_options_of_all_methods_are_known_without_importing_pytorch() -> None:
    """In a process of its own, because this one has imported it."""
    code = (
        "import sys; from thanos_deploy.cli import cli; "
        "print([name for name in ('numpy', 'torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
