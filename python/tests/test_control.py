"""The control socket's framing and refusals, against peers that speak it badly. Sessions against the real engine are elsewhere."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import dmi
from dmi import control
from observed import fresh_seed


def test_messages_in_any_pieces() -> None:
    choose = random.Random(fresh_seed())
    sent = [{"type": "run", "id": f"r{i}", "labels": {"é": "ü" * choose.randrange(200)}} for i in range(50)]
    stream = b"".join(control.frame(message) for message in sent)
    for first, message in zip((0, len(control.frame(sent[0]))), sent, strict=False):
        (length,) = struct.unpack_from("<I", stream, first)
        assert json.loads(stream[first + 4 : first + 4 + length]) == message
    unframer, got = control.Unframer(), []
    while stream:
        cut = choose.randrange(1, 300)
        got += unframer.feed(stream[:cut])
        stream = stream[cut:]
    assert got == sent


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<I", 17 << 20), "at most"),
        (struct.pack("<I", 3) + b"{x}", "is it an engine"),
        (struct.pack("<I", 2) + b"[]", "without a type"),
        (struct.pack("<I", 2) + b"{}", "without a type"),
        (struct.pack("<I", 1) + b"\xff", "is it an engine"),
    ],
)
def test_what_no_engine_sends(data: bytes, message: str) -> None:
    with pytest.raises(dmi.EngineError, match=message):
        control.Unframer().feed(data)


def test_messages_have_a_bound() -> None:
    with pytest.raises(ValueError, match="at most"):
        control.frame({"type": "requests", "requests": ["x" * (17 << 20)]})


def peer(path: Path, talk: Callable[[socket.socket], None]) -> threading.Thread:
    """Listens, and lets `talk` have the first connection."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            connection.recv(1 << 16)
            talk(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ([], "hang-up", "hung up"),
        ([{"type": "error", "code": "abi", "message": "the producer's rings have version 1, this engine reads 2"}], "abi", "reads 2"),
        ([{"type": "durable", "id": "0"}], "", "it answered 'durable' to hello"),
    ],
)
def test_refusals(tmp_path: Path, answer: list[control.Message], code: str, message: str) -> None:
    thread = peer(tmp_path / "e", lambda connection: connection.sendall(b"".join(map(control.frame, answer))))
    with pytest.raises(dmi.EngineError, match=message) as caught:
        control.dial(str(tmp_path / "e"), {"type": "hello"}, [0])
    assert caught.value.code == code
    thread.join()


def test_a_silent_peer_is_waited_for_to_a_bound(tmp_path: Path) -> None:
    released = threading.Event()
    thread = peer(tmp_path / "e", lambda connection: (released.wait(30), None)[1])
    with pytest.raises(dmi.EngineError, match="timed out"):
        control.dial(str(tmp_path / "e"), {"type": "hello"}, [0], timeout_s=0.2)
    released.set()
    thread.join()


def test_descriptors_and_early_events(tmp_path: Path) -> None:
    import os

    got: list[int] = []
    event = {"type": "event", "level": "info", "code": "attach", "message": "attached"}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "e"))
    listener.listen(1)

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            _, fds, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            got.extend(fds)
            connection.sendall(control.frame(event) + control.frame({"type": "welcome"}) + control.frame({"type": "durable", "id": "1"}))

    thread = threading.Thread(target=serve)
    thread.start()
    ends = os.pipe()
    connection, welcome, _, early = control.dial(str(tmp_path / "e"), {"type": "hello"}, [*ends, ends[0]])
    thread.join()
    assert welcome == {"type": "welcome"}
    assert early == [event, {"type": "durable", "id": "1"}]
    os.write(got[1], b"through")
    assert os.read(ends[0], 7) == b"through"
    connection.close()
    for fd in (*ends, *got):
        os.close(fd)
