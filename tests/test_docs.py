"""What the pages say is true: commands run, links lead somewhere, generated files are current."""

import json
import re
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from docs import api, commands, generate
from tests.conftest import Invoke
from tests.pages import PAGES, ROOT, Block, anchors, blocks, code, links, prose
from tests.store import Store
from thanos_deploy.cli import cli

SHELL = ("sh", "console", "bash")

# What makes a command fit the tiny model; the last value of an option counts.
CALIBRATION = ("--nsamples", "4", "--seqlen", "64")
SMALL = {
    "prune": CALIBRATION,
    "prune-export": (
        *(*CALIBRATION, "--eval-segments", "2", "--eval-seqlen", "64"),
        *("--prompt", "8", "--past", "8"),
    ),
    "eval": ("--segments", "2", "--seqlen", "64"),
}

# Bundles that a page speaks of and does not make.
BUNDLES = {"docs/report.md": ("two-four", "half", "shrunk")}

PATHS = r"(benchmarks|docs|exporters|runtime|tests|thanos_deploy)/[\w./-]*"

# Options that the pages name by themselves and that belong to `python -m benchmarks...`.
OF_BENCHMARKS = {"--rehearse", "--again"}

# Signatures without bodies.
API = "docs/reference/api.md"

every_page = pytest.mark.parametrize("page", PAGES)


@pytest.fixture(scope="session")
def demo(store: Store, tiny_llama: Path) -> Path:
    """A folder with the model `MODEL` in which the commands of the README were run.

    The other pages find what they made as `out/demo`.
    """

    def make(folder: Path) -> None:
        shutil.copytree(tiny_llama, folder / "MODEL")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("THANOS_DEPLOY_CACHE", str(folder / "cache"))
            for block in blocks("README.md", *SHELL):
                for program, *arguments in [] if block.marked else block.commands():
                    assert program == "thanos-deploy", f"{block}: neither run nor marked"
                    cli.main([*arguments, *small(arguments)], standalone_mode=False)
        (made,) = (folder / "out").iterdir()
        made.rename(folder / "out" / "demo")

    return store.folder("docs-demo", make)


def test_the_commands_of_the_readme_make_a_bundle_with_its_report(demo: Path) -> None:
    for name in ("model/model.safetensors", "onnx/model.onnx", "report/index.html"):
        assert (demo / "out" / "demo" / name).exists()


@pytest.fixture
def place(demo: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the working folder, to be changed at will."""
    place = tmp_path / "place"
    shutil.copytree(demo, place, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in ("README.md", API) and blocks(page, *SHELL, "python")],
)
def test_what_a_page_shows_runs_unless_it_says_what_it_needs(
    page: str, place: Path, invoke: Invoke
) -> None:
    for name in BUNDLES.get(page, ()):
        shutil.copytree("out/demo", f"out/{name}")
    if found := re.search(r'`(\{"re:[^`]*\})`', PAGES[page]):
        Path("own.json").write_text(json.dumps(json.loads(found[1])))
    for block in blocks(page, *SHELL, "python"):
        if block.marked:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
            continue
        for program, *arguments in block.commands():
            assert program == "thanos-deploy", f"{block}: {program} is neither run nor marked"
            code, _, errors = invoke(*arguments, *small(arguments))
            assert code == 0, f"{block}: {' '.join(arguments)}\n{errors}"


def small(arguments: Sequence[str]) -> tuple[str, ...]:
    """What to add to a command so that it takes a moment only."""
    recovery = ("--recover", "2") if "--recover" in arguments else ()
    return (*SMALL.get(arguments[0], ()), *recovery)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, *SHELL)])
def test_every_command_parses(page: str) -> None:
    for block in blocks(page, *SHELL):
        for program, *arguments in block.commands():
            if program == "thanos-deploy":
                parse(arguments, str(block))


def test_every_example_of_the_help_parses() -> None:
    examples = [
        (name, line)
        for name, command in cli.commands.items()
        for verbatim, text in commands.paragraphs(command)
        if verbatim
        for line in text.splitlines()
        if line.startswith("thanos-deploy ")
    ]
    assert examples
    for name, line in examples:
        block = Block(f"{name} --help", 0, "sh", line, marked=False)
        for _, *arguments in block.commands():
            parse(arguments, str(block))


def parse(arguments: Sequence[str], where: str) -> None:
    """Have click read the arguments, and run nothing."""
    name, *rest = arguments
    assert name in cli.commands, f"{where}: there is no command {name}"
    try:
        cli.commands[name].make_context(name, rest)
    except click.UsageError as error:
        pytest.fail(f"{where}: {' '.join(arguments)}: {error.format_message()}")


@every_page
def test_python_compiles(page: str) -> None:
    for block in blocks(page, "python"):
        if page != API:
            compile(block.text, str(block), "exec")


@every_page
def test_every_block_has_a_language_that_is_checked(page: str) -> None:
    every = re.findall(r"^```(.*)$", PAGES[page], re.MULTILINE)
    # `tests.triton.test_kserve` checks YAML.
    assert set(every[::2]) <= {*SHELL, "python", "text", "yaml"}
    assert set(every[1::2]) <= {""}


@every_page
def test_what_the_prose_names_is_there(page: str) -> None:
    options = {name for command in cli.commands.values() for name in options_of(command)}
    for text in code(page):
        first = text.removeprefix("thanos-deploy ").partition(" ")[0]
        if text.startswith("thanos-deploy ") and first.islower():
            assert first in cli.commands, text
        if first in cli.commands or first.startswith("--"):
            named = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", text))
            assert named <= options | OF_BENCHMARKS, text
        # benchmarks/results/gpu is there once a GPU has been measured.
        if re.fullmatch(PATHS, text) and not text.startswith("benchmarks/results/gpu"):
            assert (ROOT / text).exists(), text


def options_of(command: click.Command) -> list[str]:
    """The spellings of a command's options."""
    return [
        name
        for option in command.params
        if isinstance(option, click.Option)
        for name in (*option.opts, *option.secondary_opts)
    ]


@every_page
def test_targets_modules_and_extras_are_there(page: str) -> None:
    text = PAGES[page]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ((?:benchmarks|docs)\.\w+)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r"'(?:thanos-deploy|\.)\[([\w,]+)\]'", text):
        assert set(names.split(",")) <= set(extras), names


@every_page
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    folder = (ROOT / page).parent
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else ROOT / page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT).as_posix()), link


def test_every_page_is_listed() -> None:
    for index in ("README.md", "docs/README.md"):
        folder = (ROOT / index).parent
        listed = {(folder / link.partition("#")[0]).resolve() for link in links(index)}
        missing = {page for page in PAGES if (ROOT / page).resolve() not in listed}
        assert missing <= {"README.md", "docs/README.md"}, index


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("name", generate.GENERATED)
def test_what_is_generated_is_current(name: str) -> None:
    committed = (generate.ROOT / name).read_text(encoding="utf-8")
    assert committed == generate.GENERATED[name](), "run `python -m docs.generate`"


def test_the_picture_has_a_mark_for_every_figure_and_names_the_front() -> None:
    from benchmarks.comparison.front import COSTS, front
    from benchmarks.comparison.record import read
    from docs import picture

    rows, drawn = read().rows, picture.draw()
    assert len(drawn) < 100_000
    for row in rows:
        assert drawn.count(f"<title>{row.name}</title>") == 3
    named = [row.weights for cost in COSTS for row in front(rows, cost)]
    assert drawn.count('class="mark"') == 3 * len(rows)
    assert drawn.count('class="name"') == len(named)
    for name in named:
        assert drawn.count(f">{name}</text>") == named.count(name)


class Example:
    """A class.

    Attributes:
        size: how large; a second line
            of it.
    """

    def __init__(self, size: int, name: str = "a") -> None:
        self.size = size
        self.name = name

    def double(self, *, by: "Path | None" = None) -> "Example":
        """Twice as large.

        Raises:
            ValueError: never.
        """
        return Example(2 * self.size, str(by or self.name))

    @property
    def half(self) -> float:
        """Half of it."""
        return self.size / 2


def test_the_api_page_has_signatures_and_sections() -> None:
    written = "\n".join(api.section("Example", Example))
    assert "```python\nExample(size: int, name: str = 'a')\n```" in written
    assert "**Attributes**\n\n- `size`: how large; a second line of it." in written
    assert (
        "### Example.double\n\n```python\nExample.double(*, by: Path | None = None) -> Example"
        in (written)
    )
    assert "**Raises**\n\n- `ValueError`: never." in written
    assert "### Example.half\n\nHalf of it." in written
    assert "__init__" not in written


def test_a_long_signature_has_a_line_for_each_parameter() -> None:
    written = api.signature("small" * 20, small)
    assert written == f"{'small' * 20}(\n    arguments: Sequence[str],\n) -> tuple[str, ...]"


def test_prose_has_no_riddle_left() -> None:
    """Phrases that readers stumbled over."""
    for page in PAGES:
        for phrase in ("in all its ways", "so many segments", "of which the number"):
            assert page.startswith("docs/reference/") or phrase not in prose(page), page
