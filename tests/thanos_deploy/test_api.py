"""The Python API: the same work as the commands, with the same names, defaults and errors.

Every name of the API has a test here, so this file is longer than others.
"""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import thanos_deploy as td
from tests.conftest import Invoke
from tests.store import Store
from thanos_deploy.api._checks import Range, parameters
from thanos_deploy.api._requests import Pipeline
from thanos_deploy.api.options import ExportOptions, PruneExportOptions, PruneOptions
from thanos_deploy.bundle import manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.cli import cli
from thanos_deploy.cli._types import CountsType, PatternType

SMALL: PruneOptions = {"nsamples": 4, "seqlen": 64, "block_size": 16}
SMALL_WORDS = ("--nsamples", "4", "--seqlen", "64", "--block-size", "16")
WHOLE: PruneExportOptions = {
    "nsamples": 4,
    "seqlen": 64,
    "block_size": 16,
    "eval_segments": 2,
    "eval_seqlen": 64,
    "prompt": [8],
    "new_tokens": 4,
    "rounds": 2,
}
REST_WORDS = (
    *("--eval-segments", "2", "--eval-seqlen", "64", "--prompt", "8", "--new-tokens", "4"),
    *("--rounds", "2"),
)

PUBLIC = {name: getattr(td, name) for name in td.__all__}
FUNCTIONS = {
    **{name: value for name, value in PUBLIC.items() if inspect.isfunction(value)},
    **{
        f"Bundle.{name}": value
        for name, value in vars(td.Bundle).items()
        if inspect.isfunction(value) and not name.startswith("_")
    },
}

# The functions that do what a command does, and what is not of the API: how a terminal is used.
COMMANDS = {
    "prune": ("prune",),
    "prune-export": ("prune_export",),
    "export": ("Bundle.export", "export"),
    "eval": ("Bundle.evaluate", "evaluate"),
    "bench": ("Bundle.bench",),
    "report": ("Bundle.report", "compare"),
    "verify": ("Bundle.verify",),
    "generate": ("Bundle.generate",),
    "plan": ("plan",),
    "doctor": ("doctor",),
}
OF_THE_TERMINAL = {"json", "quiet", "verbose", "offline", "layers", "dry_run", "processes"}
OF_THE_API = {"progress", "check", "on_text"}
# A bundle's methods have it already, and `doctor` and `report` do nothing that is kept.
LEFT_OUT = {"doctor": {"overwrite"}, "verify": {"overwrite"}}


@pytest.fixture(scope="module")
def made(store: Store, tiny_llama: Path, tiny_cache: Path) -> Path:
    """A bundle by `prune_export`, and its cache beside it. Not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_cache, folder / "cache")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("THANOS_DEPLOY_CACHE", str(folder / "cache"))
            td.prune_export(tiny_llama, pattern="2:4", out=folder / "out", **WHOLE)

    return store.folder("api-bundle", make)


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> td.Bundle:
    """A copy of it that may be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("THANOS_DEPLOY_CACHE", str(tmp_path / "cache"))
    return td.Bundle.open(tmp_path / "out")


def test_importing_the_package_imports_nothing_but_the_standard_library() -> None:
    script = (
        "import sys; before = set(sys.modules); import thanos_deploy as td;"
        "assert set(td.__all__) <= set(dir(td));"
        "print(*sorted(set(sys.modules) - before));"
        "[getattr(td, name) for name in ('prune', 'Bundle', 'PruneOptions', 'UsageError')];"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    alone, with_names = (line.split() for line in done.stdout.splitlines())
    assert [name for name in alone if name.startswith("thanos")] == ["thanos_deploy"]
    packages = {name.partition(".")[0] for name in with_names}
    assert packages - {"thanos_deploy"} <= set(sys.stdlib_module_names)


def test_every_promised_name_is_there_once_and_documented() -> None:
    assert td.__all__ == sorted(set(td.__all__))
    for name, value in PUBLIC.items():
        assert inspect.isclass(value) or inspect.isfunction(value), name
        assert value.__doc__, name
        members = vars(value).items() if inspect.isclass(value) else ()
        for member, function in members:
            if not member.startswith("_") and (
                inspect.isroutine(function) or isinstance(function, property)
            ):
                assert inspect.getdoc(getattr(value, member)), f"{name}.{member}"


def test_what_is_no_name_of_the_api_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'prnue'"):
        td.prnue  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_a_type_and_a_line(name: str) -> None:
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not signature.empty
    described = documented(FUNCTIONS[name].__doc__)
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        assert parameter.annotation is not parameter.empty
        assert parameter.name in described, parameter
    assert described <= set(signature.parameters)


@pytest.mark.parametrize("value", [PruneOptions, ExportOptions, PruneExportOptions])
def test_every_option_has_a_line(value: type) -> None:
    known = set(inspect.get_annotations(value))
    inherited = set(inspect.get_annotations(PruneOptions)) if value is PruneExportOptions else set()
    assert documented(value.__doc__) == known - inherited


@pytest.mark.parametrize("name", ["Diagnosis", "Forecast", "Report", "Verification"])
def test_every_field_of_a_result_has_a_line(name: str) -> None:
    fields = set(inspect.get_annotations(PUBLIC[name]))
    assert documented(PUBLIC[name].__doc__) == fields


def documented(docstring: str | None) -> set[str]:
    """The names that have a line under Args or Attributes."""
    assert docstring is not None
    lines = inspect.cleandoc(docstring).splitlines()
    found: set[str] = set()
    for start, line in enumerate(lines):
        if line not in ("Args:", "Attributes:"):
            continue
        for entry in lines[start + 1 :]:
            if not entry.startswith("    "):
                break
            if not entry.startswith("     "):
                found.update(entry.partition(":")[0].strip().split(", "))
    return found


def options(command: str) -> Iterator[tuple[click.Option, set[str]]]:
    """The options of a command, and the names that each could have here."""
    for option in cli.commands[command].params:
        if isinstance(option, click.Option):
            long = [flag for flag in option.opts if flag.startswith("--")]
            yield option, {flag.removeprefix("--").replace("-", "_") for flag in long}


def arguments(command: str) -> dict[str, Any]:
    """The annotations of the keyword arguments that stand for a command's options."""
    return {
        name: annotation
        for function in COMMANDS[command]
        for name, annotation in parameters(FUNCTIONS[function])
    }


def test_every_command_that_works_on_models_has_a_function() -> None:
    assert set(cli.commands) - set(COMMANDS) == {"serve", "gpu-check"}


@pytest.mark.parametrize("command", COMMANDS)
def test_keyword_arguments_are_called_as_the_options_are(command: str) -> None:
    here = set(arguments(command))
    spelled = [names for _, names in options(command)]
    positional = {
        param.name for param in cli.commands[command].params if isinstance(param, click.Argument)
    }
    for names in spelled:
        if not names & (OF_THE_TERMINAL | LEFT_OUT.get(command, set())):
            assert len(names & here) == 1, names
    assert here - set().union(*spelled) <= positional | OF_THE_API


@pytest.mark.parametrize("command", COMMANDS)
def test_options_have_the_same_choices_and_ranges(command: str) -> None:
    here = arguments(command)
    for option, names in options(command):
        for name in names & set(here):
            kind, annotation = option.type, repr(here[name])
            if isinstance(kind, click.Choice) and name not in ("target", "method"):
                assert all(repr(choice) in annotation for choice in kind.choices), name
            # Those of pruning are declared once, for the command and the API alike.
            declared = name in inspect.get_annotations(PruneOptions)
            if isinstance(kind, click.IntRange | click.FloatRange) and not declared:
                assert kind.min is not None
                limit = Range(kind.min, kind.max, kind.min_open)
                assert repr(limit) in annotation, name
            if isinstance(kind, CountsType | PatternType) and name != "pattern":
                assert "Sequence" in annotation, name


@pytest.mark.parametrize("command", COMMANDS)
def test_options_have_the_same_defaults(command: str) -> None:
    """Where a function names them; the other ones are those of the requests, see below."""
    for function in COMMANDS[command]:
        signature = inspect.signature(FUNCTIONS[function])
        for option, names in options(command):
            for name in names & set(signature.parameters):
                here, there = signature.parameters[name].default, default(option)
                if here is inspect.Parameter.empty:  # where a command chooses by it what to do
                    assert option.required or name in ("dense", "output", "to", "target")
                    continue
                # A command may tell its own default in words only.
                spelled = ",".join(map(str, here)) if isinstance(here, tuple) else str(here)
                told = there is None and spelled in (option.help or "")
                every = isinstance(option.type, click.Choice) and tuple(option.type.choices)
                assert (here or None) == there or told or here == every, name


@pytest.mark.parametrize("command", ["prune", "prune-export"])
def test_what_is_left_out_is_the_default_of_the_command(command: str) -> None:
    known = inspect.get_annotations(PruneExportOptions)
    given: Any = {
        name: value
        for option, names in options(command)
        for name in names & set(known)
        if (value := default(option)) is not None
    }
    assert {"nsamples", "seqlen", "method"} <= set(given)
    assert Pipeline.of("2:4", given) == Pipeline.of("2:4", {})


def default(option: click.Option) -> Any:
    """What a command takes for an option that is not given, None where it is nothing."""
    context = click.Context(click.Command(""))
    value = option.get_default(context)
    if isinstance(value, Enum):  # click's own mark of nothing
        return None
    return option.type_cast_value(context, value) or None


def test_the_command_confirms_what_the_function_made(
    bundle: td.Bundle, tiny_llama: Path, invoke: Invoke
) -> None:
    before = dict(bundle.stages)
    assert list(before) == ["prune", "eval", "onnx", "bench", "report"]
    words = ("--pattern", "2:4", *SMALL_WORDS, *REST_WORDS)
    code, _, errors = invoke("prune-export", tiny_llama, *words, "-o", bundle.path)
    assert code == 0, errors
    after = bundle.stages
    for name in ("prune", "eval", "onnx", "bench"):
        assert after[name] == before[name]


ODD: PruneOptions = {
    "method": "thanos",
    "preset": "paper",
    "damp": 0.02,
    "damp_mode": "median",
    "score": "obs",
    "refit_steps": 3,
    "true_sequential": True,
    "dense_target": 0.5,
    "tune_steps": 1,
    "include": ["re:.*mlp.*"],
    "ignore": ["re:.*down_proj"],
    "seed": 3,
    "calib_forward": "fp32",
    "device": "cpu",
    "dtype": "fp16",
}
ODD_WORDS = (
    *("--method", "thanos", "--preset", "paper", "--damp", "0.02", "--damp-mode", "median"),
    *("--score", "obs", "--refit-steps", "3", "--true-sequential"),
    *("--dense-target", "0.5", "--tune-steps", "1", "--include", "re:.*mlp.*"),
    *("--ignore", "re:.*down_proj", "--seed", "3", "--calib-forward", "fp32"),
    *("--device", "cpu", "--dtype", "fp16"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "wanted", "words"),
    [
        ("2:4", {"outlier_rows": 0.1}, ("--outlier-rows", "0.1")),
        ("unstructured:0.5", ODD, ODD_WORDS),
        (
            "structured:0.2",
            {"shrink": "ffn", "ffn_multiple": 8, "recover": 1},
            ("--shrink", "ffn", "--ffn-multiple", "8", "--recover", "1"),
        ),
        ("structured:0.2", {"keep_shape": True}, ("--keep-shape",)),
    ],
    ids=["two-four", "many-options", "shrunk", "columns"],
)
def test_the_function_and_the_command_make_the_same_bundle(
    pattern: str,
    wanted: PruneOptions,
    words: tuple[str, ...],
    tiny_llama: Path,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    few: Any = {"nsamples": 4, "seqlen": 64, **wanted}
    made = td.prune(tiny_llama, pattern=pattern, out=tmp_path / "here", **few)
    command = ("prune", tiny_llama, "--pattern", pattern, *SMALL_WORDS[:4], *words)
    code, _, errors = invoke(*command, "-o", tmp_path / "there")
    assert code == 0, errors
    ours, theirs = made.stages["prune"], td.Bundle(tmp_path / "there").stages["prune"]
    assert (ours.options, ours.inputs) == (theirs.options, theirs.inputs)
    assert unclocked(ours.files) == unclocked(theirs.files)


def unclocked(files: Mapping[str, object]) -> dict[str, object]:
    """All files but the one that says how long each layer took."""
    return {name: file for name, file in files.items() if name != "layers.json"}


@pytest.mark.slow
def test_a_model_in_memory_is_pruned_as_its_folder_is(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = td.prune(tiny_llama, pattern="2:4", out=tmp_path / "folder", **SMALL)
    memory = td.prune((model, tokenizer), pattern="2:4", out=tmp_path / "memory", **SMALL)
    weights = "model/model.safetensors"
    assert memory.stages["prune"].files[weights] == folder.stages["prune"].files[weights]
    source = manifest.Bundle.open(memory.path).source
    assert (source.kind, source.name) == ("memory", tiny_llama.name)
    assert all(bool((model.state_dict()[name] == value).all()) for name, value in before.items())
    assert str(tiny_llama.parent) not in (memory.path / "manifest.json").read_text()
    again = td.prune((model, tokenizer), pattern="2:4", out=tmp_path / "memory", **SMALL)
    assert again.stages == memory.stages


def test_a_model_in_memory_is_kept_once_and_judged(
    bundle: td.Bundle, tiny_llama: Path, tmp_path: Path
) -> None:
    pair = (
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        AutoTokenizer.from_pretrained(tiny_llama),
    )
    found = [td.evaluate(pair, segments=2, seqlen=64) for _ in range(2)]
    assert found[0] == found[1] == td.evaluate(tiny_llama, segments=2, seqlen=64)
    kept = [path for path in (tmp_path / "cache").iterdir() if (path / "model").exists()]
    assert len(kept) == 1
    assert not list((tmp_path / "cache").glob(".partial-*"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("a", "b"), "of type str"),
        ((1, 2, 3), "the argument model is of type tuple"),
        (7, "the argument model is of type int"),
    ],
    ids=["names", "three", "number"],
)
def test_what_is_no_model_is_refused(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(td.UsageError, match=message):
        td.prune(model, pattern="2:4", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


ERRORS: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...], type[td.DeployError]]] = {
    "pattern": (
        lambda model, out: td.prune(model, pattern="5:4", out=out),
        ("prune", "MODEL", "--pattern", "5:4", "-o", "OUT"),
        td.PatternError,
    ),
    "model": (
        lambda model, out: td.prune("./nowhere", pattern="2:4", out=out),
        ("prune", "./nowhere", "--pattern", "2:4", "-o", "OUT"),
        td.ModelError,
    ),
    "options": (
        lambda model, out: td.prune(model, pattern="2:4", out=out, shrink="ffn"),
        ("prune", "MODEL", "--pattern", "2:4", "--shrink", "ffn", "-o", "OUT"),
        td.UsageError,
    ),
    "text": (
        lambda model, out: td.prune(model, pattern="2:4", out=out, calib="no.txt", seqlen=64),
        ("prune", "MODEL", "--pattern", "2:4", "--calib", "no.txt", "--seqlen", "64", "-o", "OUT"),
        td.CalibrationError,
    ),
    "dry-run": (
        lambda model, out: td.dry_run_prune(model, pattern="2:4", out=out, seqlen=9999),
        ("prune", "MODEL", "--pattern", "2:4", "--seqlen", "9999", "--dry-run", "-o", "OUT"),
        td.UsageError,
    ),
    "whole": (
        lambda model, out: td.prune_export(
            model, pattern="2:4", out=out, target="packed", method="magnitude", nsamples=0
        ),
        (
            *("prune-export", "MODEL", "--pattern", "2:4", "--target", "packed", "-o", "OUT"),
            *("--method", "magnitude", "--nsamples", "0"),
        ),
        td.UsageError,
    ),
    "bundle": (
        lambda model, out: td.Bundle.open(model).export(),
        ("export", "MODEL"),
        td.InputError,
    ),
    "tasks": (
        lambda model, out: td.evaluate(model, runtime="onnx", device="cuda"),
        ("eval", "MODEL", "--runtime", "onnx", "--device", "cuda"),
        td.UsageError,
    ),
    "gpu": (
        lambda model, out: td.plan(model, gpu="V100"),
        ("plan", "MODEL", "--gpu", "V100"),
        td.UsageError,
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_those_of_the_command(
    name: str, tiny_llama: Path, tmp_path: Path, invoke: Invoke
) -> None:
    call, words, kind = ERRORS[name]
    places = {"MODEL": str(tiny_llama), "OUT": str(tmp_path / "out")}
    with pytest.raises(kind) as raised:
        call(tiny_llama, tmp_path / "out")
    code, _, errors = invoke(*(places.get(word, word) for word in words))
    assert type(raised.value) is kind
    assert code == raised.value.exit_code
    assert raised.value.message.splitlines()[0] in errors


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"shrink": "head"}, "shrink: 'head' is not one of"),
        ({"dtype": "fp8"}, "fp8"),
        ({"preset": "bets"}, "bets"),
        ({"recover": -1}, "-1"),
        ({"dense_target": 1.5}, "1.5"),
        ({"include": "re:.*"}, "a single text"),
    ],
    ids=["choice", "dtype", "preset", "negative", "above", "text"],
)
def test_a_value_that_the_command_does_not_take_is_refused(
    wanted: Any, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(td.UsageError, match=message):
        td.prune(tiny_llama, pattern="2:4", out=tmp_path / "out", **wanted)


def test_an_argument_that_there_is_not_is_a_type_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="patern"):
        td.doctor(patern="2:4")  # type: ignore[call-arg]
    with pytest.raises(td.UsageError, match="no option --patern"):
        td.prune(tiny_llama, pattern="2:4", out=tmp_path, patern="2:4")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="pattern"):
        td.prune(tiny_llama, out=tmp_path)  # type: ignore[call-arg]


def test_what_the_system_says_is_raised_as_what_it_means(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(td.PlatformError, match="Not a directory"):
        td.prune(tiny_llama, pattern="2:4", out=tmp_path / "file" / "out", **SMALL)


def test_progress_begins_with_nothing_done_and_ends_with_all(
    tiny_llama: Path, tmp_path: Path
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(title: str, done: int, total: int) -> None:
        told.setdefault(title, []).append((done, total))

    td.prune(tiny_llama, pattern="2:4", out=tmp_path / "out", progress=progress, **SMALL)
    assert list(told) == ["Prune to 2:4 with thanos"]
    for steps in told.values():
        assert steps == [(done, 2) for done in range(3)]


def test_a_bundle_says_what_is_in_it_and_cannot_be_changed_from_outside(bundle: td.Bundle) -> None:
    assert bundle.stages["prune"].options["pattern"] == "2:4"
    assert bundle.pruned.pattern_holds
    with pytest.raises(TypeError):
        bundle.stages["prune"] = bundle.stages["eval"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        bundle.path = Path()  # type: ignore[misc]
    assert repr(bundle) == f"Bundle({str(bundle.path)!r})"


def test_a_bundle_is_measured_and_reported(bundle: td.Bundle, tiny_llama: Path) -> None:
    found = bundle.evaluate(tiny_llama, segments=2, seqlen=64)
    alone = td.evaluate(bundle.path, segments=2, seqlen=64)
    assert isinstance(found.pruned, td.TextQuality)
    assert isinstance(found.dense, td.TextQuality)
    assert isinstance(alone, td.TextQuality)
    assert found.pruned.value == alone.value
    assert found.pruned.fidelity is not None
    assert alone.fidelity is None
    assert found.dense.value < found.pruned.value
    report = bundle.report()
    assert report.models[0].quality is not None
    assert (bundle.path / "report" / "index.html").is_file()


def test_the_answer_comes_whole_and_in_pieces(bundle: td.Bundle, invoke: Invoke) -> None:
    pieces: list[str] = []
    answer = bundle.generate("The capital", new_tokens=6, seed=1, on_text=pieces.append)
    assert "".join(pieces) == answer
    _, printed, _ = invoke("generate", bundle.path, "The capital", "--new-tokens", 6, "--json")
    assert json.loads(printed)["answer"] == answer
    with pytest.raises(td.UsageError, match="temperature"):
        bundle.generate("The capital", temperature=-1)


def test_a_missed_gate_is_raised_or_returned(bundle: td.Bundle) -> None:
    few: Any = {"scenario": ["decode"], "prompt": [8], "new_tokens": 2, "rounds": 2}
    with pytest.raises(td.GateError, match=r"ppl\.ratio<0\.5"):
        bundle.bench(gate=["ppl.ratio<0.5"], **few)
    done = bundle.bench(gate=["ppl.ratio<0.5", "ppl.ratio>0.5"], check=False, **few)
    assert [outcome.held for outcome in done.gates] == [False, True]
    assert not done.passed
    with pytest.raises(td.UsageError, match="--aa with --against"):
        bundle.bench(aa=True, against=["dense"])


def test_a_changed_file_is_raised_or_returned(bundle: td.Bundle) -> None:
    assert bundle.verify().passed
    with (bundle.path / "model" / "config.json").open("a") as config:
        config.write(" ")
    with pytest.raises(td.IntegrityError, match="prune: files"):
        bundle.verify()
    assert not bundle.verify(check=False).passed


def test_bundles_are_put_side_by_side(bundle: td.Bundle, made: Path, tmp_path: Path) -> None:
    report = td.compare([bundle, made / "out"], tmp_path / "page.html")
    assert len(report.models) == 2
    assert (tmp_path / "page.html").is_file()


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tiny_llama: Path, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "out"
    words = ("--pattern", "2:4", *SMALL_WORDS, "--dry-run", "--json", "-o", out)
    for found, command in (
        (td.dry_run_prune(tiny_llama, pattern="2:4", out=out, **SMALL), ("prune",)),
        (
            td.dry_run_prune_export(tiny_llama, pattern="2:4", out=out, **WHOLE),
            ("prune-export", *REST_WORDS),
        ),
    ):
        _, printed, _ = invoke(command[0], tiny_llama, *command[1:], *words)
        measured = ("estimate", "disk_bytes_free")
        expected, seen = json.loads(printed), encode(found)
        assert {name: seen[name] for name in expected if name not in measured} == {
            name: value for name, value in expected.items() if name not in measured
        }
    assert not out.exists()


def test_a_forecast_is_that_of_the_command(tiny_llama: Path, invoke: Invoke) -> None:
    found = td.plan(tiny_llama, gpu="H100", pattern=["2:4"], prompt=16, new_tokens=4)
    words = ("--gpu", "H100", "--pattern", "2:4", "--prompt", "16", "--new-tokens", "4")
    _, printed, _ = invoke("plan", tiny_llama, *words, "--json")
    assert json.loads(printed) == encode(found)


def test_the_machine_is_looked_at(bundle: td.Bundle) -> None:
    names = [check.name for check in td.doctor(check=False).checks]
    more = [check.name for check in td.doctor(bundle, check=False).checks]
    assert {"disk"} <= set(more) - set(names)


def test_the_pruned_model_is_loaded(bundle: td.Bundle) -> None:
    model = td.load_model(bundle.model_path)
    assert not model.training
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert isinstance(weight, torch.Tensor)
    assert int(weight.reshape(-1, 4).count_nonzero(dim=1).max()) == 2
