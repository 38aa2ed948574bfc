"""The method that docs/develop/add-a-method.md adds, from the page itself."""

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Invoke
from tests.golden import random_problem
from tests.pages import blocks
from thanos_deploy import cli, methods
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.cli import _pruning, prune
from thanos_deploy.errors import UsageError
from thanos_deploy.pattern import SemiStructured, parse
from thanos_deploy.pruning.result import PRUNE
from thanos_deploy.stages.request import PruneRequest

PAGE = "docs/develop/add-a-method.md"
NAME = "between"
TWO_FOUR = SemiStructured(2, 4)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[methods.Method]:
    """The method, as if its file were in the folder when the command started."""
    (file,) = blocks(PAGE, "python")
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / f"{NAME}.py").write_text(file.text)
    with monkeypatch.context() as patch:
        patch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
        start_again(patch)
        yield methods.load(NAME)
    methods.load.cache_clear()
    sys.modules.pop(f"{methods.__name__}.{NAME}")
    delattr(methods, NAME)
    importlib.reload(_pruning)
    importlib.reload(prune)


def start_again(patch: pytest.MonkeyPatch) -> None:
    """Make the options of `prune` anew, as a process does that starts."""
    importlib.reload(_pruning)
    patch.setitem(cli.cli.commands, "prune", importlib.reload(prune).command)


def test_its_ends_are_magnitude_and_the_score_of_wanda(added: methods.Method) -> None:
    problem = random_problem(0)
    for exponent, other in ((0.0, "magnitude"), (1.0, "wanda")):
        known = methods.load(other)
        expected = known.prune(problem, TWO_FOUR, known.options()).mask
        options = added.choose("best", {"exponent": exponent})
        assert torch.equal(added.prune(problem, TWO_FOUR, options).mask, expected)


@pytest.mark.slow
def test_the_commands_of_the_page_show_it_everywhere(
    added: methods.Method,
    tiny_llama: Path,
    tmp_path: Path,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "MODEL")
    (shown,) = blocks(PAGE, "text")
    help_, dry_run, real = (arguments for _, *arguments in shown.commands())
    small = ("--nsamples", "4", "--seqlen", "64", "--json")

    code, output, errors = invoke(*help_)
    assert code == 0, errors
    words = " ".join(output.split())
    assert (
        "between: power of the input's norm in the score. [default: 0.5 (fast 1.0, paper 1.0)]"
        in words
    )

    code, output, errors = invoke(*dry_run, *small)
    assert code == 0, errors
    planned = json.loads(output)["prune"]
    assert (planned["method"], planned["exponent"]) == (NAME, 0.25)

    code, _, errors = invoke(*real, *small)
    assert code == 0, errors
    bundle = Bundle.open(tmp_path / "out" / NAME)
    recorded = bundle.stages["prune"].options
    assert recorded == planned
    options = bundle.options(PRUNE)
    assert (options.pattern, options.method, options.cut) == (str(TWO_FOUR), NAME, False)
    assert PruneRequest.from_json(recorded).to_json() == recorded

    code, _, errors = invoke(*real, *small, "--exponent", "0.75")
    assert code == 2
    assert "exponent was 0.25 and is now 0.75" in errors
    code, _, errors = invoke(*real, *small, "--exponent", "1.5")
    assert code == 2
    assert "1.5 is not in the range 0.0<=x<=1.0" in errors


def test_its_option_is_refused_for_another_method(added: methods.Method) -> None:
    with pytest.raises(UsageError, match="method wanda has no option --exponent"):
        PruneRequest.of(parse("2:4"), method="wanda", exponent=0.3)
