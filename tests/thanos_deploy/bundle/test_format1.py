"""Bundles of format 1, as the version that began it wrote them, are read by every version since.

`tests/data/format1` has two of them, of a random model of one block: `sparse`, pruned to 2:4,
evaluated, exported and timed, and `shrunk`, with channels cut out.
"""

import shutil
from pathlib import Path

import pytest

from tests.bundles import checked
from thanos_deploy.bundle import manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.report.write import write_report
from thanos_deploy.stages import verify

FORMAT_1 = Path(__file__).parents[2] / "data" / "format1"


@pytest.fixture(params=["sparse", "shrunk"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMAT_1 / request.param, tmp_path / request.param))


def test_an_old_bundle_holds_what_it_says(old: Path) -> None:
    checks = verify.verify(Bundle.open(old))
    assert {check.outcome for check in checks} <= {"PASS", "SKIP"}, checks
    names = {check.name for check in checks}
    assert {"prune: files", "prune: pattern", "eval: files"} <= names
    if old.name == "sparse":
        assert {"onnx: pattern", "onnx: parity", "bench: files"} <= names


def test_an_old_bundle_is_reported(old: Path) -> None:
    with manifest.claim(old, Bundle.open(old).source) as bundle:
        report = checked(encode(write_report(bundle)))
    (model,) = report["models"]
    assert model["source"]["name"] == "tiny8"
    assert model["stale"] == []
    assert (old / "report" / "index.html").is_file()
    if old.name == "shrunk":
        assert model["pattern"] == "structured:0.2"
        assert model["widths"]["channels"] == {"before": [16], "after": [8]}
        assert model["bench"] == []
    else:
        assert model["pattern"] == "2:4"
        assert model["linear_layers"]["sparsity"] == 0.5
        assert [run["run"] for run in model["bench"]] == ["latency"]
        assert model["graph_quality"]["pruned"] == pytest.approx(model["quality"]["pruned"])
        assert set(model["sample"]) == {"prompt", "dense", "pruned"}


def test_a_manifest_is_written_as_it_was_read(old: Path) -> None:
    before = (old / manifest.MANIFEST).read_text()
    with manifest.claim(old, Bundle.open(old).source) as bundle:
        bundle._save()
    assert (old / manifest.MANIFEST).read_text() == before
