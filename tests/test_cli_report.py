"""`thanos-deploy report` as a user meets it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import bundles
from tests.bundles import report_of, write_bundle
from tests.conftest import Invoke
from thanos_deploy.bundle.manifest import Bundle


def test_one_bundle_gets_its_report_as_a_stage(invoke: Invoke, tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    code, printed, errors = invoke("report", out, "--json")
    assert code == 0, errors
    bundle = Bundle.open(out)
    bundle.verify("report")
    names = ("README.md", "report/index.html", "report/report.json", "report/report.md")
    assert tuple(bundle.stages["report"].files) == names
    assert json.loads(printed) == report_of(out)
    before = (out / "report" / "index.html").read_bytes()
    assert invoke("report", out, "--json") == (0, printed, "")
    assert (out / "report" / "index.html").read_bytes() == before
    assert str(tmp_path) not in before.decode()


@pytest.mark.slow
def test_an_interrupted_run_makes_the_report_anew(invoke: Invoke, tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    assert invoke("report", out)[0] == 0
    document = bundles.run("full", status="INTERRUPTED")
    (out / "bench" / "full.interrupted.json").write_text(json.dumps(document))
    code, printed, _ = invoke("report", out)
    assert code == 0
    assert "INTERRUPTED" in printed
    assert "INTERRUPTED" in report_of(out)["notices"][0]
    assert "INTERRUPTED" in (out / "README.md").read_text()


@pytest.mark.parametrize("stages", [("prune",), ("prune", "bench"), ("prune", "eval", "onnx")])
def test_what_is_missing_is_no_obstacle(
    stages: tuple[str, ...], invoke: Invoke, tmp_path: Path
) -> None:
    runs = (bundles.run("aa", baseline="pruned-again"),)
    out = write_bundle(tmp_path / "out", stages=stages, runs=runs)
    code, printed, errors = invoke("report", out)
    assert code == 0, errors
    assert "Not measured: " in printed
    assert "latency was not measured" in report_of(out)["headline"]


@pytest.mark.slow
def test_several_bundles_get_one_page_and_are_left_alone(invoke: Invoke, tmp_path: Path) -> None:
    paths = [
        write_bundle(tmp_path / "a"),
        write_bundle(tmp_path / "b", pattern="structured:0.2", perplexity=14.0),
    ]
    before = [sorted(path.rglob("*")) for path in paths]
    page = tmp_path / "new" / "v1.2.html"
    code, printed, errors = invoke("report", *paths, "-o", page)
    assert code == 0, errors
    assert "as cheap: structured:0.2 by" in " ".join(printed.split())
    assert sorted(path.name for path in page.parent.iterdir()) == [
        *("v1.2.html", "v1.2.json", "v1.2.md")
    ]
    assert [sorted(path.rglob("*")) for path in paths] == before
    assert "exists already" in invoke("report", *paths, "-o", page)[2]
    assert invoke("report", *paths, "-o", page, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("a", "b"), 2, "2 bundles without -o"),
        (("a", "-o", "page.txt"), 2, "give a file name that ends in .html"),
        (("a", "-o", "a/manifest.json/page.html"), 2, "is a file"),
        (("a", "-o", "/sys/nowhere/page.html"), 4, "/sys/nowhere"),
        (("a", "other", "-o", "page.html"), 2, "different base models"),
        (("dense", "-o", "page.html"), 3, "stage 'prune' is not finished"),
        (("dense",), 3, "run `thanos-deploy prune"),
        (("nothing", "-o", "page.html"), 3, "not a bundle"),
        (("nothing",), 3, "not a bundle"),
        (("changed", "-o", "page.html"), 7, "layers.json"),
        (("changed",), 7, "layers.json"),
        (("lost", "a", "-o", "page.html"), 7, "latency.json: is missing"),
        (("manifest",), 3, "not a readable manifest"),
    ],
)
def test_what_cannot_be_reported_is_refused_with_a_reason(
    arguments: tuple[str, ...],
    code: int,
    said: str,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle(Path("a"))
    write_bundle(Path("b"))
    write_bundle(Path("other"), source=replace(bundles.SOURCE, sha256="c2" * 32))
    write_bundle(Path("dense"), stages=("onnx",))
    (write_bundle(Path("changed")) / "layers.json").write_text("[]")
    (write_bundle(Path("lost")) / "bench" / "latency.json").unlink()
    (write_bundle(Path("manifest")) / "manifest.json").write_text("{")
    got, printed, errors = invoke("report", *arguments)
    assert (got, printed) == (code, ""), errors
    assert said in errors
    assert "Traceback" not in errors
    assert not Path("page.html").exists()


@pytest.mark.slow
def test_different_models_are_put_side_by_side_on_demand(invoke: Invoke, tmp_path: Path) -> None:
    paths = (
        write_bundle(tmp_path / "a"),
        write_bundle(tmp_path / "b", source=replace(bundles.SOURCE, sha256="c2" * 32)),
    )
    page = tmp_path / "page.html"
    assert invoke("report", *paths, "-o", page, "--allow-different-models")[0] == 0
    assert "base models differ" in json.loads(page.with_suffix(".json").read_text())["notices"][0]


@pytest.mark.slow
def test_the_report_needs_no_pytorch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom thanos_deploy.report.write import compare\n"
        "compare([Path(sys.argv[1])], Path(sys.argv[2]))\nassert 'torch' not in sys.modules"
    )
    arguments = (write_bundle(tmp_path / "a"), tmp_path / "page.html")
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=60)
