"""deploy/containers without a container engine: the same users, mounts and separation, by namespaces alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dmi import engine as engines
from sessions import llama, plainly, until

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "deploy" / "containers"
SEPARATE = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"]
WORDS = ["the", "capital", "of", "france", "is", "and", "spain"]


def user_of(image: str) -> int:
    found = re.search(r"^USER (\d+):\1$", (CONTAINERS / f"Containerfile.{image}").read_text(), re.M)
    assert found
    return int(found[1])


def permitted(command: list[str]) -> str:
    """Why a command cannot be run here, or ""."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


class Machine:
    """How containers are run here: with users of their own, or where only that is permitted, in user namespaces with one user."""

    def __init__(self) -> None:
        engine = user_of("engine")
        full = permitted([*SEPARATE, "chroot", f"--userspec={engine}:{engine}", "--groups=64100", "/", "true"])
        self.users = full == ""
        self.unshare = SEPARATE if self.users else [*SEPARATE[:1], "--user", "--map-root-user", *SEPARATE[1:]]
        if not self.users:
            lesser = permitted([*self.unshare, "true"])
            if lesser:
                pytest.skip(f"namespaces cannot be made here: as root: {full}; in a user namespace: {lesser}")


def write_model(folder: Path) -> None:
    """A tiny model and its words, as from_pretrained reads them."""
    llama().save_pretrained(folder)
    vocabulary = {word: 3 + i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in [*range(3), *range(3 + len(WORDS), 128)]}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="dmi-deploy-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield child
    finally:
        for inside in [*insiders(child), child.pid]:  # a process that changes its user no longer dies with its parent
            with contextlib.suppress(ProcessLookupError):
                os.kill(inside, signal.SIGKILL)
        child.wait(300)
        for stream in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


def insiders(child: subprocess.Popen[str]) -> list[int]:
    """The first process in a namespace that `unshare` made: when it ends, all in it do."""
    try:
        return [int(pid) for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def line_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise AssertionError(f"it ended: {child.communicate()[1][-4000:]}")
    return line


def engine_command(machine: Machine, compose: dict[str, Any], place: Path, config: str) -> list[str]:
    """The engine's image is a root of its own; its volumes are bound into it."""
    user, root = user_of("engine"), place / "root"
    for folder in ("etc/dmi", "var/lib/dmi", "run/dmi", "proc", "tmp"):
        (root / folder).mkdir(parents=True)
    shutil.copy(engines.binary(), root / "dmi")
    (root / "etc/dmi/dmi.yaml").write_text(config)
    mounts = ["mount -t proc proc " + str(root / "proc")]
    for volume in compose["services"]["engine"]["volumes"]:
        name, inside = volume.split(":")
        folder = place / name
        folder.mkdir()
        folder.chmod(0o2750 if name == "socket" else 0o700)
        if machine.users:
            os.chown(folder, user, 64100 if name == "socket" else user)
            folder.chmod(0o2750 if name == "socket" else 0o700)
        mounts.append(f"mount --bind {folder} {root}{inside}")
    as_user = [f"--userspec={user}:{user}", "--groups=" + compose["services"]["engine"]["group_add"][0]] if machine.users else []
    image = (CONTAINERS / "Containerfile.engine").read_text()
    command = [*json.loads(re.findall(r"^ENTRYPOINT (.*)$", image, re.M)[0]), *json.loads(re.findall(r"^CMD (.*)$", image, re.M)[0])]
    return [*machine.unshare, "sh", "-ec", "; ".join(mounts) + '; exec "$@"', "sh", "chroot", *as_user, str(root), *command]


def model_command(machine: Machine, compose: dict[str, Any], place: Path) -> list[str]:
    """The model sees the volume of the socket, and of the captures nothing."""
    (volume,) = compose["services"]["model"]["volumes"]
    name, inside, access = volume.split(":")
    assert name == "socket" and access == "ro"
    mounts = [f"mount --bind -o ro {place / 'socket'} /mnt", f"mount -t tmpfs none {place / 'captures'}", "mount -t tmpfs none /run",
              f"mkdir -p {inside}", f"mount --move /mnt {inside} 2>/dev/null || mount --bind /mnt {inside}", f"mount -o remount,ro,bind {inside}"]  # fmt: skip
    drop: list[str] = []
    if machine.users:
        user = user_of("model")
        group = compose["services"]["model"]["group_add"][0]
        # Another user, where it can read this Python; else this one without any capability, so that it too needs the group to open the socket.
        readable = permitted(["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", sys.executable, "-c", "import torch"]) == ""
        identity = [f"--reuid={user}"] if readable else []
        drop = ["setpriv", *identity, f"--regid={user}", f"--groups={group}", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return [*machine.unshare, "sh", "-ec", "; ".join(mounts) + '; exec "$@"', "sh", *drop, sys.executable, str(CONTAINERS / "serve.py")]


def test_two_containers_by_namespaces(place: Path) -> None:
    machine = Machine()
    compose = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())
    config = (CONTAINERS / "dmi.yaml").read_text()
    if not machine.users:  # a user namespace with one user has one group
        config = re.sub(r"(?m)^ +group:.*\n", "", config)
    write_model(place / "model")
    prompt = "the capital of france is"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "python" / "src"), "HOME": str(place), "USER": "model", "MODEL": str(place / "model"),
                   "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip

    with running(engine_command(machine, compose, place, config)) as engine:
        said = json.loads(line_of(engine))
        assert said["control"] == "/run/dmi/engine.sock" and said["pid"] == 1, "it is alone in its process namespace"
        socket = (place / "socket" / "engine.sock").stat()
        if machine.users:
            assert (socket.st_uid, socket.st_gid, socket.st_mode & 0o777) == (user_of("engine"), 64100, 0o660)
        with running(model_command(machine, compose, place), environment) as model:
            assert line_of(model) == "ready\n"
            assert model.stdin is not None
            model.stdin.write(prompt + "\n")
            model.stdin.flush()
            answer = line_of(model).split()
            assert len(answer) == 8
            model.stdin.close()  # it says bye: what it captured is durable then
            assert model.wait(300) == 0
        dmi = [engines.binary(), "--engine", f"unix:{place}/captures/store/http.sock", "--json"]
        (request,) = json.loads(subprocess.run([*dmi, "requests"], check=True, capture_output=True, text=True).stdout)
        books = json.loads(subprocess.run([*dmi, "coverage", "--request", request["id"]], check=True, capture_output=True, text=True).stdout)
        assert books["complete"] and books["rows"] == 2 * (5 + 8 - 1)
        subprocess.run([*dmi, "get", "--request", request["id"], "--site", "blocks.1.hook_resid_post", "--out", str(place / "rows.npy")], check=True, capture_output=True)

        os.kill(insiders(engine)[0], signal.SIGTERM)
        assert engine.wait(300) == 0, engine.stderr and engine.stderr.read()
    until(lambda: not (place / "socket" / "engine.sock").exists())
    verified = subprocess.run([engines.binary(), "verify", "--store", str(place / "captures" / "store")], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr

    # The reference: the same weights in this process, watched by a hook that knows nothing of DMI.
    reference = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = torch.tensor([[3 + WORDS.index(word) for word in prompt.split()]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with plainly(reference.model.layers[1]) as seen, torch.no_grad():
            reference.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(np.load(place / "rows.npy"), torch.cat(seen, dim=1)[0].numpy())
