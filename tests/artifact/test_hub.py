"""A program is pushed to a hub over HTTP as it is saved, and comes back from what was pushed."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import huggingface_hub.constants
import pytest
from fakes import Parity
from saved import fresh_engine, tuned_program

from bettertogether import load, push_to_hub
from bettertogether.errors import ArtifactError


class Hub(http.server.ThreadingHTTPServer):
    """What the hub's API answers where a repository is made and a commit is written."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                self.deleted.append(line["value"]["path"])
                del self.files[line["value"]["path"]]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if "/tree/" not in self.path:
            self._answer({"error": "Repository not found"}, 404)
            return
        self._answer([{"type": "file", "path": name, "oid": "0", "size": 1} for name in self.server.files])

    def do_POST(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        sent = self._sent()
        if self.server.refuses:
            self._answer({"error": "You don't have the rights"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(sent))
            self._answer({"url": f"{self.server.address}/me/p"})
        elif self.path == "/api/models/me/p/preupload/main":
            names = [file["path"] for file in json.loads(sent)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path == "/api/models/me/p/commit/main":
            self.server.commit([json.loads(line) for line in sent.splitlines()])
            self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.address}/me/p/commit/1"})
        else:
            assert self.path == "/api/validate-yaml", self.path
            self._answer({"errors": [], "warnings": []})

    def _sent(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_was_pushed_is_a_program_again(hub: Hub, tmp_path: Path) -> None:
    program = tuned_program(fresh_engine())
    url = push_to_hub(program, "me/p", private=True, token="hf_secret")
    assert url == f"{hub.address}/me/p/commit/1"
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "p")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert hub.tokens == {"Bearer hf_secret"}
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    loaded = load(tmp_path, into=dspy.Predict(Parity), base_model=fresh_engine())
    assert (loaded.lm.model, len(loaded.demos)) == (program.lm.model, 3)


def test_the_card_of_a_pushed_program_names_the_repository(hub: Hub) -> None:
    push_to_hub(tuned_program(fresh_engine()), "me/p", token="hf_secret")
    card = hub.files["README.md"].decode()
    assert 'snapshot_download("me/p", local_dir="p")\n' in card
    assert 'program = load("p")' in card
    assert "hf_secret" not in b"".join(hub.files.values()).decode()


def test_an_adapter_that_the_program_no_longer_uses_is_deleted_there(hub: Hub) -> None:
    hub.files = {"adapters/old/fake_adapter.json": b"{}", "notes.txt": b"mine"}
    push_to_hub(tuned_program(fresh_engine()), "me/p", token="hf_secret")
    assert hub.deleted == ["adapters/old/fake_adapter.json"]
    assert "notes.txt" in hub.files


def test_the_report_of_another_program_is_deleted_there(hub: Hub) -> None:
    hub.files = {"report.json": b"{}"}
    push_to_hub(tuned_program(fresh_engine()), "me/p", token="hf_secret")
    assert hub.deleted == ["report.json"]


def test_what_the_hub_refuses_is_said_with_what_to_do(hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(ArtifactError, match=r"me/p can't be written on the hub: .*have the rights.*`hf auth login`"):
        push_to_hub(tuned_program(fresh_engine()), "me/p", token="hf_secret")


@pytest.mark.parametrize("repo", ["me/p/q", "", "a b", 3])
def test_a_name_that_the_hub_does_not_allow_is_refused(hub: Hub, repo: Any) -> None:
    with pytest.raises(ArtifactError, match=r"repo=.* is not allowed: give 'owner/name'"):
        push_to_hub(tuned_program(fresh_engine()), repo, token="hf_secret")
    assert not hub.files
