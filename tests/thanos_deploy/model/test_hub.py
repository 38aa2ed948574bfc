"""Models of a hub: one on this machine that answers as the real one does, by the real client."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from thanos_deploy.errors import ModelError, PlatformError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.locate import locate, locate_configuration

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(ThreadingHTTPServer):
    """A hub with one model.

    Attributes:
        folder: of the model.
        cut: names of files whose first answer ends in the middle.
        gated: nobody may read it.
        asked: what was asked for: file, and first byte.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.gated = folder, False
        self.cut: set[str] = set()
        self.asked: list[tuple[str, int]] = []


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        if self.server.gated:
            self._say(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif found := re.fullmatch(r"/api/models/a/b/revision/([^/?]+)(\?.*)?", self.path):
            self._tell_files(found[1], with_content=with_content)
        elif found := re.fullmatch(r"/api/models/a/b/tree/([^/?]+)(\?.*)?", self.path):
            self._list_files(with_content=with_content)
        elif found := re.fullmatch(r"/a/b/resolve/([^/]+)/([^?]+)(\?.*)?", self.path):
            self._send(found[1], found[2], with_content=with_content)
        else:
            self._say(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _tell_files(self, revision: str, *, with_content: bool) -> None:
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            self._say(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        files = [{"rfilename": path.name} for path in sorted(self.server.folder.iterdir())]
        told = json.dumps({"id": "a/b", "sha": commit, "siblings": files}).encode()
        self._say(200, told if with_content else b"", {"Content-Type": "application/json"})

    def _list_files(self, *, with_content: bool) -> None:
        files = [
            {"type": "file", "oid": path.name, "size": path.stat().st_size, "path": path.name}
            for path in sorted(self.server.folder.iterdir())
        ]
        told = json.dumps(files).encode() if with_content else b""
        self._say(200, told, {"Content-Type": "application/json"})

    def _send(self, revision: str, name: str, *, with_content: bool) -> None:
        path = self.server.folder / name
        if not path.exists():
            self._say(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        rest = content[start:]
        heads = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMITS.get(revision, revision)}
        if wanted:
            heads["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if not with_content:
            self._say(200, b"", heads, len(content))
            return
        self.server.asked.append((name, start))
        if name in self.server.cut:
            self.server.cut.remove(name)
            self._say(200, rest[: len(rest) // 2], heads, len(rest))
            self.close_connection = True
            return
        self._say(206 if wanted else 200, rest, heads)

    def _say(
        self, code: int, content: bytes, heads: dict[str, str], length: int | None = None
    ) -> None:
        self.send_response(code)
        for name, value in heads.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tiny_llama)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_that_is_cut_off_is_gone_on_with(hub: Hub, tiny_llama: Path) -> None:
    hub.cut = {"model.safetensors"}
    found = locate("a/b")
    size = (tiny_llama / "model.safetensors").stat().st_size
    first, then = (start for name, start in hub.asked if name == "model.safetensors")
    assert first == 0 < then <= size // 2
    assert found.source.sha256 == locate(str(tiny_llama)).source.sha256
    assert Checkpoint.open(found.path).linears
    # What is there is not fetched again, not even where one file is lacking.
    (found.path / "config.json").resolve().unlink()
    (found.path / "config.json").unlink()
    hub.asked.clear()
    locate("a/b")
    assert hub.asked == [("config.json", 0)]


def test_a_revision_is_the_one_that_was_asked_for(hub: Hub) -> None:
    assert locate("a/b", revision="v1").source.revision == COMMITS["v1"]
    assert locate_configuration("a/b", revision="v1").name == COMMITS["v1"]  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="with revision v2"):
        locate("a/b", revision="v2")


def test_a_gated_model_is_said_to_be_one(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(PlatformError, match="this model is gated") as raised:
        locate("a/b")
    assert "HF_TOKEN" in raised.value.fix


def test_what_is_in_the_cache_serves_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = locate("a/b")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("a/b") == with_it
    assert hub.asked == []
    with pytest.raises(PlatformError, match="not in the hub's local cache"):
        locate("a/c")
