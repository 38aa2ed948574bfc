"""What the pages on serving show works: snippets with their real clients, and the files."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pages import Block, blocks
from tests.runtime.server.conftest import Running

FILES = resources.files("runtime.server")


@pytest.mark.parametrize("block", blocks("docs/clients.md", "python"), ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a snippet closes no client
def test_a_snippet_runs_with_its_client(
    server: Running,
    bundle: Path,
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "demo").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    address = server.url.removeprefix("http://")
    code = block.text.replace("127.0.0.1:8000", address).replace('"demo"', '"tiny"')
    assert code != block.text
    exec(compile(code, str(block), "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.strip()


def test_the_dashboard_asks_for_metrics_that_are_there(server: Running) -> None:
    server.openai().completions.create(model="tiny", prompt="a", max_tokens=2)
    with server.http() as http:
        known = set(re.findall(r"^(\w+)", http.get("/metrics").text, re.MULTILINE))
    dashboard = json.loads(FILES.joinpath("grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for text in asked for name in re.findall(r"\b(?:thanos|process)_\w+", text)}
    assert len(dashboard["panels"]) == 8
    assert names <= known


def test_the_deployment_asks_routes_that_are_there_and_gives_time_to_finish(
    server: Running,
) -> None:
    deployment, service = yaml.safe_load_all(FILES.joinpath("kubernetes.yaml").read_text())
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    with server.http() as http:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert http.get(container[probe]["httpGet"]["path"]).status_code == 200
    deadline = next(
        float(argument.removeprefix("--deadline="))
        for argument in container["args"]
        if argument.startswith("--deadline=")
    )
    assert pod["terminationGracePeriodSeconds"] > deadline
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]
