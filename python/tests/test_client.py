"""The HTTP client's transport, against a server that misbehaves. What the engine answers is tested with sessions."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from dmi.client import Client

FAR = {"stage": "reading", "share": 0.5, "bytes": 7}
EVENTS: dict[str, list[tuple[str, Any]]] = {
    "found": [("progress", FAR), ("items", [{"n": 1}, {"n": 2}]), ("progress", FAR), ("items", [{"n": 3}]), ("result", {"items": 3})],
    "failed": [("items", [{"n": 1}]), ("error", {"code": "io", "message": "the disk", "hint": "see it"})],
    "ended": [("items", [{"n": 1}])],
}


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str) -> None:
        self.seen: list[str] = []
        self.connections = 0
        super().__init__(path, Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def address_string(self) -> str:
        return "test"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path} {self.headers.get('Authorization', '')}")
        name = self.path.partition("?")[0].rpartition("/")[2]
        tensor = {"Dmi-Dtype": "F32", "Dmi-Shape": "2,3", "Dmi-Axes": "token,dim", "Dmi-Site": "x", "Dmi-Positions": "0:1,4:5"}
        body, status, headers = b"{}", 200, {}
        if name == "tensor":
            body, headers = torch.arange(6, dtype=torch.float32).numpy().tobytes(), tensor
        elif name == "cut":
            body, headers = b"\0" * 7, {**tensor, "Content-Length": "24"}
            self.close_connection = True
        elif name == "once":  # closes the connection after the answer, without saying so
            self.close_connection = True
        elif name in EVENTS:
            assert self.headers["Accept"] == "text/event-stream"
            body = "".join(f"event: {event}\ndata: {json.dumps(data)}\n\n" for event, data in EVENTS[name]).encode()
        elif name in ("409", "404", "400", "503"):
            status = int(name)
            body = json.dumps({"error": {"code": "c", "message": "the message", "hint": "the hint"}, "coverage": {"rows": 3}}).encode()
        elif name == "nonsense":
            status, body = 500, b"<html>"
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(str(tmp_path / "h")) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def client_of(server: Server, **options: Any) -> Client:
    return Client(lambda: f"unix:{server.server_address}", **options)


def test_tensors_and_arguments(server: Server) -> None:
    client = client_of(server, token="secret")
    arguments = {"request": ["a", "b&c"], "site": "x y", "layer": None, "partial": True}
    answer = client.tensor("/tensor", arguments)
    assert torch.equal(answer.tensor, torch.arange(6.0).reshape(2, 3))
    assert answer.positions == [(0, 1), (4, 5)]
    assert client.describe("/tensor", {}).shape == [2, 3]
    out = torch.empty(24, dtype=torch.uint8)
    client.tensor("/tensor", {}, into=out)
    assert torch.equal(out.view(torch.float32), torch.arange(6.0))
    with pytest.raises(dmi.EngineError, match="24 bytes where 20"):
        client.tensor("/tensor", {}, into=torch.empty(20, dtype=torch.uint8))
    assert server.seen[0] == "GET /v1/tensor?request=a&request=b%26c&site=x+y&partial=true Bearer secret"


def test_connections_are_kept(server: Server) -> None:
    client = client_of(server)
    for _ in range(5):
        client.get("/x")
    assert server.connections == 1
    client.get("/once")
    assert client.get("/x") == {}, "an idle connection that died costs another, not an error"
    assert server.connections == 2
    client.close()


def test_errors(server: Server) -> None:
    client = client_of(server)
    with pytest.raises(dmi.IncompleteError, match="the message; the hint") as incomplete:
        client.get("/409")
    assert incomplete.value.coverage == {"rows": 3}
    with pytest.raises(dmi.NotCapturedError, match="the message"):
        client.get("/404")
    with pytest.raises(dmi.NotCapturedError, match="the message"):
        client.describe("/404", {})
    with pytest.raises(ValueError, match="the hint"):
        client.get("/400")
    with pytest.raises(dmi.EngineError, match="the message") as busy:
        client.get("/503")
    assert busy.value.code == "c"
    with pytest.raises(dmi.EngineError, match="500"):
        client.get("/nonsense")
    with pytest.raises(dmi.EngineError, match="7 of 24 bytes"):
        client.tensor("/cut", {})
    assert client.get("/x") == {}


def test_lists_that_take_a_while(server: Server) -> None:
    client = client_of(server)
    far: list[Any] = []
    assert client.found("/found", {}, far.append) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert far == [FAR, FAR]
    with pytest.raises(dmi.EngineError, match="the disk; see it") as failed:
        client.found("/failed", {}, far.append)
    assert failed.value.code == "io"
    with pytest.raises(dmi.EngineError, match="before it was done"):
        client.found("/ended", {}, far.append)
    with pytest.raises(dmi.NotCapturedError, match="the message"):
        client.found("/404", {}, far.append)


def test_an_engine_that_moved(server: Server, tmp_path: Path) -> None:
    addresses = iter([str(tmp_path / "nobody"), str(tmp_path / "nobody"), str(server.server_address)])
    client = Client(lambda: "unix:" + next(addresses))
    assert client.get("/x") == {}
    gone = Client(lambda: f"unix:{tmp_path}/nobody")
    with pytest.raises(dmi.EngineError, match="is it running"):
        gone.get("/x")


def test_a_forked_child_has_connections_of_its_own(server: Server) -> None:
    client = client_of(server)
    client.get("/x")
    child = os.fork()
    if child == 0:
        os._exit(0 if client.get("/x") == {} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    client.get("/x")
    assert server.connections == 2
