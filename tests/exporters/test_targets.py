"""The contract of all targets, and a new one, from the page that describes how to add it."""

import csv
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from exporters import targets
from exporters.options import NoOptions
from exporters.target import Target, no_checks
from tests.bundles import report_of, write_bundle
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import UsageError
from thanos_deploy.option import options_by_name, options_of
from thanos_deploy.report.write import write_report

PAGE = Path(__file__).parents[2] / "docs" / "develop" / "add-a-target.md"
HEAVY = ("click", "numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers")

# Stages that export nothing.
OTHERS = ("import", "prune", "eval", "eval-onnx", "eval-tasks", "bench", "report")


@pytest.mark.parametrize("name", targets.names())
class TestContract:
    """What holds for every target."""

    def test_its_options_are_a_record_whose_defaults_it_takes(self, name: str) -> None:
        target = targets.get(name)
        options = target.options()
        target.check(options)
        assert decode(target.options, encode(options)) == options
        assert all(each.default is not MISSING for each in fields(target.options))

    def test_options_of_one_name_are_the_same_everywhere(self, name: str) -> None:
        for other in targets.every():
            own, others = (options_by_name(one.options) for one in (targets.get(name), other))
            for field in own.keys() & others.keys():
                assert own[field].declared == others[field].declared

    def test_it_exports_from_a_bundle_a_request_and_nothing_else(self, name: str) -> None:
        parameters = inspect.signature(targets.get(name).export).parameters
        assert list(parameters) == ["bundle", "request", "overwrite", "announce"]

    def test_its_stages_are_its_own(self, name: str) -> None:
        assert targets.of_stage(name) is targets.get(name)
        assert targets.of_stage(f"{name}-sm90") is targets.get(name)
        assert all(targets.of_stage(stage) is None for stage in OTHERS)

    def test_it_is_in_the_help_with_its_words(self, name: str) -> None:
        target, shown = targets.get(name), help_of("export")
        assert f"{name} " in shown
        assert f"{target.summary}: OUT/{target.writes}" in shown
        assert all(one.declared.flag in shown for one in options_of(target.options))


def help_of(command: str) -> str:
    module = import_module(f"thanos_deploy.cli.{command}")
    return CliRunner().invoke(module.command, ["--help"], catch_exceptions=False).output


def test_the_targets_are_the_files() -> None:
    assert targets.names() == [
        "compressed-tensors",
        "genai",
        "gguf",
        "onnx",
        "packed",
        "tensorrt",
        "tensorrt-rtx",
        "triton",
        "vllm",
    ]


def test_an_unknown_target_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="tensort") as caught:
        targets.get("tensort")
    assert caught.value.fix == "use tensorrt or tensorrt-rtx"


def test_options_of_another_target_are_refused(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "out"))
    with pytest.raises(UsageError, match="onnx has no option 'architectures'"):
        targets.get("onnx").request(bundle, {"architectures": ("sm80",)})
    with pytest.raises(UsageError, match="logits is 'some'"):
        targets.get("onnx").request(bundle, {"logits": "some"})
    with pytest.raises(UsageError, match="onnx with NoOptions"):
        targets.get("onnx").check(NoOptions())


def test_listing_the_targets_imports_nothing_heavy() -> None:
    """In a process of its own: this one has imported everything."""
    script = (
        "import sys\nfrom exporters import targets\ntargets.every()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@dataclass(frozen=True)
class WithoutFlag:
    """Options that the command line cannot offer."""

    level: int = 1


GOOD: dict[str, Any] = {
    "name": "good",
    "summary": "nothing",
    "writes": "good",
    "options": NoOptions,
    "result": NoOptions,
    "packages": (),
    "gpu": False,
    "export": lambda *_, **__: None,
    "verify": no_checks,
    "size": None,
    "missing": None,
}


@pytest.mark.parametrize("entry", sorted(GOOD))
def test_a_target_without_an_entry_cannot_be_made(entry: str) -> None:
    with pytest.raises(TypeError, match=f"required keyword-only argument: '{entry}'"):
        Target(**{name: value for name, value in GOOD.items() if name != entry})


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"name": "Good One"}, "name is not lower-case words"),
        ({"summary": ""}, "summary is ''"),
        ({"summary": "A sentence."}, "not a line without a full stop"),
        ({"export": None}, "export is not a function"),
        ({"verify": "later"}, "verify is not a function"),
        ({"options": {}}, "options is not a dataclass"),
        ({"result": dict}, "result is not a dataclass"),
        ({"options": WithoutFlag}, "its option level has no flag"),
        ({"dtypes": ("fp16",)}, "dtypes and the option dtype do not go together"),
        ({"export": None, "writes": ""}, "writes is ''.*; export is not a function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_target_with_a_wrong_entry_cannot_be_made(wrong: dict[str, Any], complaint: str) -> None:
    assert Target(**GOOD).name == "good"
    with pytest.raises(TypeError, match=complaint):
        Target(**{**GOOD, **wrong})


Add = Callable[[str, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Puts the text of a file beside the other targets, for one test."""
    folder = tmp_path / "targets"
    folder.mkdir()
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(folder)])

    def put(name: str, text: str) -> None:
        (folder / f"{name}.py").write_text(text, encoding="utf-8")

    yield put
    for path in folder.glob("*.py"):
        sys.modules.pop(f"{targets.__name__}.{path.stem}", None)
        vars(targets).pop(path.stem, None)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"openvino\.py: has no TARGET"),
        ("TARGET = 'openvino'\n", r"openvino\.py: has no TARGET"),
        ("from exporters.targets.packed import TARGET\n", "its TARGET is called 'packed'"),
    ],
    ids=["empty", "a text", "another's"],
)
def test_a_file_without_a_target_of_its_name_is_refused(
    add: Add, text: str, complaint: str
) -> None:
    add("openvino", text)
    assert "openvino" in targets.names()
    with pytest.raises(TypeError, match=complaint):
        targets.every()


def blocks(language: str) -> list[str]:
    """The pieces of code of the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_target_of_the_page_works_everywhere(
    add: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = blocks("python")
    add("inventory", text)
    # The command line is made when it is imported.
    for module in ("_targets", "export"):
        monkeypatch.delitem(sys.modules, f"thanos_deploy.cli.{module}")
    assert "a table of the checkpoint's files: OUT/inventory" in help_of("export")

    out = write_bundle(tmp_path / "out")
    (commands,) = blocks("text")
    printed = []
    for line in commands.splitlines():
        program, name, *words = shlex.split(line.replace("OUT", str(out)))
        assert program == "thanos-deploy"
        if name == "verify":  # the fixture has no model and no graph to look into
            continue
        command = import_module(f"thanos_deploy.cli.{name}").command
        done = CliRunner().invoke(command, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        printed.append(done.output)
    assert "files" in printed[0]

    bundle = Bundle.open(out)
    with (out / "inventory" / "files.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["model/model.safetensors", "model/tokenizer.json"]
    assert float(rows[0]["megabytes"]) == pytest.approx(4000e-6)
    assert bundle.stages["inventory"].options == {"unit": "megabytes"}
    target = targets.get("inventory")
    (check,) = target.verify(bundle, "inventory")
    assert (check.outcome, check.detail) == ("PASS", "2 listed")

    (model,) = report_of(out)["models"]
    assert model["bytes"]["inventory"]["pruned"] == (out / "inventory/files.csv").stat().st_size
    assert "thanos-deploy export OUT --target inventory --unit megabytes" in model["commands"]
    assert not any(gap["what"] == "the table of files" for gap in model["not_measured"])

    without = write_bundle(tmp_path / "without")
    write_report(Bundle.open(without))
    (model,) = report_of(without)["models"]
    (gap,) = [gap for gap in model["not_measured"] if gap["what"] == "the table of files"]
    assert gap["command"] == "thanos-deploy export OUT --target inventory"
