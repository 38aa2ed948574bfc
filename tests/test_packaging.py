"""What is shipped, and what it may not be installed beside."""

import tomllib
from importlib import metadata
from pathlib import Path

import thanos_deploy

ROOT = Path(__file__).parent.parent


def test_every_package_is_shipped_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("thanos_deploy", "exporters", "runtime")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == on_disk


def test_files_that_are_no_code_are_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = {
        (package, name)
        for package, names in project["tool"]["setuptools"]["package-data"].items()
        for name in names
    }
    on_disk = {
        (".".join(path.parent.relative_to(ROOT).parts), path.name)
        for top in ("thanos_deploy", "exporters", "runtime")
        for path in (ROOT / top).rglob("*.*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert shipped == on_disk


def test_the_installed_version_is_the_one_in_the_code() -> None:
    assert metadata.version("thanos-deploy") == thanos_deploy.__version__


def test_there_is_one_onnxruntime() -> None:
    """The CPU package beside the GPU package takes its providers away."""
    names = {distribution.name.lower() for distribution in metadata.distributions()}
    assert len(names & {"onnxruntime", "onnxruntime-gpu"}) == 1


def test_the_pins_are_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.replace("_", "-").split("==") for line in lines if "==" in line)
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
