"""What is shipped, and what it may not be installed beside."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import thanos_deploy
from thanos_deploy.gpu import figures as gpu_figures

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
        path
        for package, patterns in project["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    on_disk = {
        path
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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = pins_of("constraints.txt")
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_the_lowest_versions_are_those_that_are_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["kernels"]]
    floors = {
        one.name: Version(specifier.version)
        for one in map(Requirement, required)
        for specifier in one.specifier
        if specifier.operator == ">="
    }
    pins = pins_of("constraints-oldest.txt")
    # No older CPU build can be had; the file says what was done about it.
    assert pins.pop("torch") > floors.pop("torch")
    assert pins == floors


@pytest.mark.slow
def test_wheels_are_complete_and_alike(tmp_path: Path) -> None:
    """Built as an installer builds it: a list of package data that misses a file looks complete.

    Two clones of one commit, in other folders and checked out at other times, give the same bytes.
    """
    wheels = []
    for name, age in (("one", 0), ("another/clone", 10**7)):
        source = tmp_path / name
        source.mkdir(parents=True)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        for top in ("thanos_deploy", "exporters", "runtime"):
            shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
        for path in source.rglob("*"):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
        wheels.append(wheel_of(source))
    with zipfile.ZipFile(wheels[0]) as archive:
        assert (
            archive.read(f"thanos_deploy/gpu/{gpu_figures.FILE}")
            == (ROOT / "thanos_deploy" / "gpu" / gpu_figures.FILE).read_bytes()
        )
        assert not [name for name in archive.namelist() if name.startswith(("tests", "benchmarks"))]
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def wheel_of(source: Path) -> Path:
    """The wheel of a copy of the sources, as `make wheel` fixes its time."""
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", script, source / "dist"],
        cwd=source,
        env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
        check=True,
        capture_output=True,
    )
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def pins_of(file: str) -> dict[str, Version]:
    """Names and versions of a file of constraints."""
    lines = (ROOT / file).read_text().splitlines()
    pairs = (line.replace("_", "-").split("==") for line in lines if "==" in line)
    return {name: Version(version) for name, version in pairs}
