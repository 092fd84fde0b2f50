#!/usr/bin/env python3
"""Packs vLLM 0.24 small enough to be carried to a machine with an H100 or H200 that has torch 2.11 and reaches no network.

    python bench/pack_vllm.py [--to build/pack-vllm] [--python python3.12]     (`make pack-vllm`)

vLLM's wheel is 280 MB, because its libraries hold kernels for every GPU, dtype and kind of model; this makes some 13 MB of it, for `LLM`, `AsyncLLM` and `vllm serve` of
dense models in bfloat16. It writes vllm.tar.xz, serve.tar.xz (what only `vllm serve` needs), peers.tar.xz (what bench/gpu_vllm.py compares with: in a folder of its own, because
every engine would load their plugins), unpack.py and smoke.py, and no more into that folder; on the machine, with those that are wanted in one folder:

    eval "$(python3 unpack.py /tmp/vllm)"      # and there is vLLM: PYTHONPATH, PATH and what it needs to be told
    python3 smoke.py                           # LLM, AsyncLLM and `vllm serve` of a tiny model with random weights
    make gpu-bench-vllm VLLM_SITE=/tmp/vllm:/tmp/vllm/peers

What is left out, and why:

libraries    those of LEFT_OUT: whole kinds of models and of GPUs that are not served. Without them vLLM says that it could not import them, and goes on.
kernels      in the libraries that stay, all but those of KEPT, and of these all but the image for sm_90. One that is missing is reported by CUDA when it is launched, as
             "no kernel image is available": head sizes over 128 and 65 to 96, float16, quantised models, mixtures of experts, state space models.
packages     xgrammar, llguidance, openai_harmony and watchfiles are imported at start, and used for structured output, gpt-oss and the renewal of certificates alone: a module
             stands for each that has any name, and raises when one is called; so for the datasets of transformer_lens. What vLLM imports on demand alone is not there
             (mistral_common, compressed_tensors ...).

A kernel's images lie in a "fatbin": a header (magic, version, size) and one image after another, each with a header of its own. Those kept are moved to its front,
its size is shortened, and the rest is zeros, which compress to nothing: so no address in the library changes. A fatbin that would be empty, which CUDA refuses, gets
the smallest image that vLLM has for another GPU, which is never chosen.

It runs in the project's environment (.venv: uv and pyarrow), with c++filt of binutils. `--python` is any Python 3.12 (it looks for one): in an environment of its own
with what the machine has, and no driver, the unpacked pack is imported as if there were an H200; without one that is left out, and said.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 16.0
GPU, OTHER = 90, 75
"""Compute capabilities: of the images that are kept (sm_90 and sm_90a), and of the one that fills what would be empty."""
KEPT = {
    "vllm/_C_stable_libtorch.abi3.so": (
        r"vllm::(act_and_mul_kernel|activation_kernel|rotary_embedding_kernel|rms_norm_kernel|rms_norm_\w*quant\w*|silu_\w*quant\w*|merge_attn_states_kernel"
        r"|apply_repetition_penalties_kernel|persistent::persistent_topk_kernel|reshape_and_cache_kernel|cross_device_reduce_1stage)\b"
        r"|fusedQKNormRopeKernel\b|dynamic_per_token_scaled_fp8_quant|dynamic_scaled_int8_quant_kernel|per_token_group_quant_8bit_kernel\b"
    ),
    # Tile shape's third number and the one after it are the sizes of keys' and values' heads.
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": r"FlashAttnFwdCombine|prepare_varlen_num_blocks|cute::C<(64|128)> >, \1, cutlass::bfloat16_t, float, cutlass::arch::Sm90",
}
"""By library: a fatbin is kept where the name of any of its kernels has this. A fatbin is one source file of vLLM's."""
LEFT_OUT = {
    "vllm/vllm-rs": "the front end in Rust, which is chosen by an option",
    "vllm/_rust_tool_parser.abi3.so": "of the same",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "FlashAttention 2: sm_90 runs 3",
    "vllm/_moe_C_stable_libtorch.abi3.so": "mixtures of experts",
    "vllm/_flashmla_C.abi3.so": "DeepSeek's attention",
    "vllm/_flashmla_extension_C.abi3.so": "the same",
    "vllm/third_party/deep_gemm": "products in fp8",
    "vllm/third_party/fmha_sm100": "attention on Blackwell",
    "vllm/_qutlass_C.abi3.so": "weights of 4 bits on Blackwell",
    "vllm/entrypoints/serve/instrumentator/static": "the server's documentation page",
    "bin": "programs of the packages: vllm's own is written anew",
    "peers/bin": "the same",
    "peers/zstandard/backend_cffi.py": "the second of two ways into the same library",
    "peers/zstandard/_cffi.cpython-312-x86_64-linux-gnu.so": "the same",
}
STAND_INS = ("llguidance", "openai_harmony", "watchfiles", "xgrammar",
             "peers/datasets", "peers/datasets/arrow_dataset", "peers/datasets/iterable_dataset", "peers/datasets/load")  # fmt: skip
SERVE = ("fastapi", "jmespath", "model_hosting_container_standards", "multipart", "partial_json_parser", "prometheus_fastapi_instrumentator", "python_multipart", "starlette",
         "uvicorn", "watchfiles")  # fmt: skip
MACHINE = ("torch==2.11.0", "torchvision==0.26.0", "transformers==5.17.0", "accelerate", "aiohttp", "cloudpickle", "einops", "httpx", "jaxtyping", "numba",
           "opencv-python-headless", "pandas", "prometheus-client", "psutil", "py-cpuinfo", "pillow", "protobuf", "pyarrow", "requests", "sentencepiece", "six", "tiktoken",
           "uvloop")  # fmt: skip
"""What the pack leaves to the machine."""
PULLED_IN = ("annotated-types", "pydantic", "pydantic-core", "typing-inspection")
"""What comes with those from the registry, and the machine lacks."""

STAND_IN = '''\
"""Stands for a package that was left out of this pack of vLLM (bench/pack_vllm.py says why). It has every name; what is called raises."""


class Absent(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name, (), {})

    def __call__(cls, *args, **kwargs):
        raise ImportError(f"{__name__}.{cls.__name__}: {__name__} was left out of this pack of vLLM")

    def __get_pydantic_core_schema__(cls, source, handler):
        return {"type": "any"}


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent(name, (), {})
'''

UNPACK = '''\
"""eval "$(python3 unpack.py DIR)": unpacks vLLM into DIR, and says what has to be in the environment."""

import importlib.util
import pathlib
import sys
import tarfile

if len(sys.argv) != 2 or sys.version_info[:2] != (3, 12):
    sys.exit('unpack.py: eval "$(python3 unpack.py DIR)", with Python 3.12: packages in it are built for that')
needed = "torch transformers aiohttp cloudpickle einops numba prometheus_client psutil cpuinfo PIL google requests uvloop".split()
missing = [name for name in needed if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"unpack.py: {sys.executable} lacks {', '.join(missing)}, which this pack leaves to the machine: install them")
folder = pathlib.Path(sys.argv[1]).absolute()
for archive in sorted(pathlib.Path(__file__).parent.glob("*.tar.xz")):
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
print(f"export PYTHONPATH={folder}${{PYTHONPATH:+:$PYTHONPATH}} PATH={folder}/bin:$PATH")
print("export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1")
'''

SMOKE = '''\
"""vLLM on this machine: LLM, AsyncLLM and `vllm serve` of a tiny model with random weights and a tokenizer of numbers."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request

CPU = {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True, "dtype": "float32"}
GPU = {"gpu_memory_utilization": 0.1, "dtype": "bfloat16"}


def model(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    Qwen3Config(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512,
                max_position_embeddings=1024, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"], eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(n): n for n in range(512)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", unk_token="0").save_pretrained(folder)
    return folder


async def stream(settings):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    async def ask(key):
        async for output in engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), key):
            pass
        return output.outputs[0].token_ids
    answers = await asyncio.gather(*(ask(str(n)) for n in range(4)))
    engine.shutdown()
    return [list(answer) for answer in answers]


def serve(folder, settings):
    options = [part for name, value in settings.items() if name not in ("model", "enforce_eager")
               for part in (f"--{name.replace('_', '-')}", str(value))] + (["--enforce-eager"] if "enforce_eager" in settings else [])
    address = "http://127.0.0.1:8199"
    with open(f"{folder}/serve.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", "8199", *options], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            except OSError:
                if server.poll() is not None:
                    break
                time.sleep(1)
        else:
            server.kill()
        if server.poll() is not None:
            sys.exit("smoke.py: vllm serve did not come up\\n" + open(log.name).read()[-4000:])
        body = {"model": folder, "prompt": "1 2 3", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))
    finally:
        server.terminate()
        server.wait(60)


def main():
    import torch
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        settings = {"model": model(folder), "load_format": "dummy", "max_model_len": 256, "seed": 0, **(GPU if torch.cuda.is_available() else CPU)}
        begun = time.monotonic()
        llm = LLM(**settings)
        batch = llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 4, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        alone = list(batch[0].outputs[0].token_ids)
        print(f"smoke.py: LLM {alone} after {time.monotonic() - begun:.0f} s", flush=True)
        del llm
        begun = time.monotonic()
        streamed = asyncio.run(stream(settings))
        print(f"smoke.py: AsyncLLM {streamed[0]} after {time.monotonic() - begun:.0f} s", flush=True)
        begun = time.monotonic()
        served = serve(folder, settings)
        print(f"smoke.py: vllm serve {served['choices'][0]['text']!r}, {served['usage']} after {time.monotonic() - begun:.0f} s", flush=True)
        assert served["usage"]["completion_tokens"] == 8, served
        assert all(len(answer) == 8 for answer in streamed), streamed


if __name__ == "__main__":
    main()
'''


# ------------------------------------------------------------------ kernels
class Image(NamedTuple):
    """One of a fatbin's: code for one GPU, its header before it."""

    capability: int
    data: bytes


class Fatbin(NamedTuple):
    at: int
    header: int
    size: int
    images: list[Image]


def sections(elf: bytes) -> dict[str, tuple[int, int]]:
    """By name, offset and size of a 64-bit ELF file's."""
    table, count, names = struct.unpack_from("<Q", elf, 40)[0], *struct.unpack_from("<HH", elf, 60)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + 64 * i) for i in range(count)]
    strings = headers[names][4]
    return {elf[strings + header[0] : elf.index(0, strings + header[0])].decode(): (header[4], header[5]) for header in headers}


def fatbins(library: bytes) -> Iterator[Fatbin]:
    start, size = at, _ = sections(library)[".nv_fatbin"]
    while at < start + size:
        magic, _, header, content = struct.unpack_from("<IHHQ", library, at)
        if magic != 0xBA55ED50:  # they begin at multiples of 8
            at += 8
            continue
        images, inside = [], at + header
        while inside < at + header + content:
            kind, _, before, length = struct.unpack_from("<HHIQ", library, inside)
            if kind == 2:  # 1 is PTX
                images.append(Image(struct.unpack_from("<I", library, inside + 28)[0], bytes(library[inside : inside + before + length])))
            inside += before + length
        yield Fatbin(at, header, content, images)
        at += header + content


def kernels(image: Image) -> set[str]:
    """Mangled names: an image is an ELF file with a section of code for each."""
    import pyarrow

    (header,), (compressed,), (flags, _, plain) = struct.unpack_from("<I", image.data, 4), struct.unpack_from("<I", image.data, 16), struct.unpack_from("<QQQ", image.data, 40)
    elf = image.data[header:]
    if flags & 0x8000:
        elf = pyarrow.decompress(elf[:compressed], decompressed_size=plain, codec="zstd", asbytes=True)
    elif flags & 0x2000:
        raise SystemExit("pack vLLM: an image is compressed with LZ4, which this version of vLLM had none of: teach kernels() to read it")
    return {name.removeprefix(".text.") for name in sections(elf) if name.startswith(".text.")}


def shrink(path: Path, kept: str, filler: Image) -> None:
    """In place."""
    library = bytearray(path.read_bytes())
    pattern, before, names, images = re.compile(kept), 0, set(), 0
    for fatbin in fatbins(bytes(library)):
        before += 1
        here = [image for image in fatbin.images if image.capability == GPU]
        mangled = set().union(*map(kernels, here)) if here else set()
        said = subprocess.run(["c++filt"], input="\n".join(sorted(mangled)), capture_output=True, text=True, check=True).stdout
        if pattern.search(said):
            names |= mangled
            images += len(here)
        else:
            here = [filler]
        content = b"".join(image.data for image in here)
        if len(content) > fatbin.size:
            raise SystemExit(f"pack vLLM: {path.name}: a fatbin of {fatbin.size} bytes has no room for an image of {len(content)} that takes its place")
        start = fatbin.at + fatbin.header
        library[start : start + fatbin.size] = content + bytes(fatbin.size - len(content))
        struct.pack_into("<Q", library, fatbin.at + 8, len(content))
    for name in (".symtab", ".strtab"):  # for debuggers
        start, size = sections(bytes(library)).get(name, (0, 0))
        library[start : start + size] = bytes(size)
    path.write_bytes(library)
    after = list(fatbins(bytes(library)))
    found = set().union(*(kernels(image) for fatbin in after for image in fatbin.images if image.capability == GPU))
    if len(after) != before or found != names or not names:
        raise SystemExit(f"pack vLLM: {path.name} has {len(after)} fatbins and {len(found)} kernels for sm_{GPU} where {before} and {len(names)} were meant to be: "
                         "its format is another than is assumed here")  # fmt: skip
    listed(path, images)
    print(f"{path.name}: {images} of {before} fatbins, {len(names)} kernels for sm_{GPU}", flush=True)


def listed(path: Path, images: int) -> None:
    """CUDA's own tool reads it: it comes with Triton, which comes with torch."""
    tools = [*Path(sys.prefix).glob("lib/python3*/site-packages/triton/backends/nvidia/bin/cuobjdump"), *([Path(found)] if (found := shutil.which("cuobjdump")) else [])]
    if not tools:
        print(f"{path.name}: NOT CHECKED with cuobjdump, which is not here", flush=True)
        return
    said = subprocess.run([tools[0], "--list-elf", path], capture_output=True, text=True, check=False)
    if said.returncode or said.stdout.count(f"sm_{GPU}") != images:
        raise SystemExit(f"pack vLLM: {tools[0]} --list-elf {path} lists {said.stdout.count(f'sm_{GPU}')} images for sm_{GPU}, not {images}: {said.stderr[-300:]}")


# ------------------------------------------------------------------ the pack
def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"pack vLLM: failed: {' '.join(map(str, command))}\n{done.stdout[-3000:]}")


def install(requirements: str, folder: Path) -> None:
    """As the machine would, from any Python. Copies, because uv's own are shared with other environments."""
    run(sys.executable, "-m", "uv", "pip", "install", "--target", folder, "--link-mode", "copy", "--python", sys.executable, "--python-version", "3.12",
        "--python-platform", "x86_64-manylinux_2_28", "--no-deps", "--require-hashes", "-r", ROOT / "requirements" / requirements)  # fmt: skip


def archive(path: Path, folder: Path, names: Sequence[str]) -> float:
    """MB. The same bytes from the same files."""
    files = sorted((file for name in names for file in (folder / name).rglob("*") if file.is_file() and file.name != ".lock"), key=lambda file: (file.suffix, file))
    total, done, said, begun = sum(file.stat().st_size for file in files), 0, 0.0, time.monotonic()
    with lzma.open(path, "wb", preset=9 | lzma.PRESET_EXTREME) as compressed, tarfile.open(fileobj=compressed, mode="w") as tar:
        for file in files:
            about = tarfile.TarInfo(str(file.relative_to(folder)))
            about.size, about.mode = file.stat().st_size, 0o755 if os.access(file, os.X_OK) else 0o644
            with file.open("rb") as opened:
                tar.addfile(about, opened)
            done += about.size
            if time.monotonic() > said + 10:
                said = time.monotonic()
                print(f"{path.name}: {100 * done // total} % of {total / 1e6:.0f} MB", flush=True)
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {size:.2f} MB of {total / 1e6:.0f}, {time.monotonic() - begun:.0f} s", flush=True)
    return size


def pack(to: Path, python: str | None) -> None:
    begun, work = time.monotonic(), to.with_name(f"{to.name}-work")
    site = work / "site"
    shutil.rmtree(site, ignore_errors=True)
    to.mkdir(parents=True, exist_ok=True)
    for old in to.glob("*.tar.xz"):
        old.unlink()
    print("installing requirements/vllm-gpu.txt (330 MB the first time)", flush=True)
    install("vllm-gpu.txt", site)
    install("vllm-peers.txt", site / "peers")
    for name in LEFT_OUT:
        left = site / name
        if not left.exists():
            raise SystemExit(f"pack vLLM: there is no {name} to leave out: another version of vLLM, whose parts are others? Look at LEFT_OUT, KEPT and STAND_INS")
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for record in site.rglob("*.dist-info/RECORD"):
        record.unlink()
    run("strip", *(site / "peers" / "zstandard").glob("*.so"))  # 11 MB of 12
    for name in STAND_INS:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(STAND_IN)
    fillers = [image for fatbin in fatbins((site / next(iter(KEPT))).read_bytes()) for image in fatbin.images if image.capability == OTHER]
    for library, kept in KEPT.items():
        shrink(site / library, kept, min(fillers, key=lambda image: len(image.data)))
    (site / "bin").mkdir()
    program = site / "bin" / "vllm"
    program.write_text("#!/usr/bin/env python3\nfrom vllm.entrypoints.cli.main import main\n\nmain()\n")
    program.chmod(0o755)
    names = sorted(path.name for path in site.iterdir() if path.is_dir() and path.name not in ("__pycache__", "peers"))
    serve = [name for name in names if re.sub(r"-[\d.].*", "", name) in SERVE]
    parts = {"vllm": [name for name in names if name not in serve], "serve": serve, "peers": ["peers"]}
    size = sum(archive(to / f"{name}.tar.xz", site, folders) for name, folders in parts.items())
    (to / "unpack.py").write_text(UNPACK)
    (to / "smoke.py").write_text(SMOKE)
    if size > LIMIT_MB:
        raise SystemExit(f"pack vLLM: {size:.1f} MB, where {LIMIT_MB:g} can be carried: leave out more")
    check(to, work, python)
    print(f"{to}: {size:.2f} MB in {time.monotonic() - begun:.0f} s; carry it, and there: eval \"$(python3 unpack.py DIR)\"", flush=True)


# ------------------------------------------------------------------ is it whole?
def check(to: Path, work: Path, python: str | None) -> None:
    """Unpacks it as the machine does, and imports it."""
    pythons = [python] if python else [shutil.which("python3.12") or "", *map(str, Path.home().glob(".pyenv/versions/3.12.*/bin/python"))]
    python = next((found for found in pythons if found and not subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode), None)
    if python is None or not shutil.which("gcc"):
        print("NOT CHECKED: that the pack can be imported. It needs gcc and a Python 3.12 (--python)", flush=True)
        return
    venv, unpacked = work / "venv", work / "unpacked"
    made, what = venv / "made", "\n".join(MACHINE)
    if not made.exists() or made.read_text() != what:
        print("an environment like the machine's, to import the pack in (3 GB the first time)", flush=True)
        shutil.rmtree(venv, ignore_errors=True)
        run(python, "-m", "venv", venv)
        run(sys.executable, "-m", "uv", "pip", "install", "--python", venv / "bin" / "python", *MACHINE)
        run(sys.executable, "-m", "uv", "pip", "uninstall", "--python", venv / "bin" / "python", *PULLED_IN)
        made.write_text(what)
    shutil.rmtree(unpacked, ignore_errors=True)
    run(venv / "bin" / "python", to / "unpack.py", unpacked)
    driver = work / "driver" / "libcuda.so.1"
    driver.parent.mkdir(exist_ok=True)
    asked = subprocess.run(["nm", "-D", "--undefined-only", *unpacked.glob("vllm/**/*.so")], capture_output=True, text=True, check=True).stdout
    source = "".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted({*re.findall(r" U (cu[A-Z]\w*)$", asked, re.MULTILINE), "cuInit"}))
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", driver], input=source, text=True, check=True)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{unpacked}:{unpacked}/peers", "LD_LIBRARY_PATH": str(driver.parent), "HF_HUB_OFFLINE": "1",
                   "VLLM_NO_USAGE_STATS": "1", "HOME": str(venv)}  # fmt: skip
    done = subprocess.run([venv / "bin" / "python", __file__, "--import"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=work)
    if done.returncode:
        raise SystemExit(f"pack vLLM: what was packed cannot be imported by {venv}/bin/python:\n{done.stdout[-3000:]}")
    print(done.stdout.strip().splitlines()[-1], flush=True)


def imported() -> None:
    """In an environment like the machine's, without a GPU: what an engine and a server import, their settings, a model without memory, and the server's routes."""
    import importlib

    import torch
    import triton
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class Hopper(cuda.NonNvmlCudaPlatform):  # type: ignore[misc]
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "H200")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 140 << 30)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
        device_count = classmethod(lambda cls: 1)

    vllm.platforms._current_platform = Hopper()
    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)  # or vLLM does without Triton
    Hopper.import_kernels()
    ops = {"_C": "rms_norm fused_add_rms_norm rotary_embedding silu_and_mul apply_repetition_penalties_", "_C_cache_ops": "reshape_and_cache_flash",
           "_vllm_fa3_C": "fwd get_scheduler_metadata"}  # fmt: skip
    modules = """vllm.entrypoints.llm vllm.v1.engine.async_llm vllm.v1.engine.core vllm.v1.worker.gpu_worker vllm.v1.worker.gpu_model_runner vllm.v1.worker.gpu.model_runner
        vllm.v1.attention.backends.flash_attn vllm.v1.attention.backends.triton_attn vllm.model_executor.models.llama vllm.model_executor.models.gpt2 vllm.compilation.backends
        vllm.v1.executor.uniproc_executor vllm.v1.executor.multiproc_executor vllm.v1.core.sched.async_scheduler vllm.v1.spec_decode.ngram_proposer vllm.device_allocator.cumem
        vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector vllm.vllm_flash_attn vllm.entrypoints.cli.main vllm.entrypoints.cli.serve
        transformer_lens.model_bridge.sources.vllm transformer_lens.model_bridge.sources.vllm.worker_extension vllm_lens._activations_plugin vllm_lens._worker_ext""".split()
    for module in modules:
        importlib.import_module(module)
    for library, names in ops.items():
        for name in names.split():
            getattr(getattr(torch.ops, library), name)  # raises

    from transformers import Qwen3Config
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.openai import api_server, cli_args
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    with tempfile.TemporaryDirectory() as folder:
        Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=512, tie_word_embeddings=True,
                    architectures=["Qwen3ForCausalLM"]).save_pretrained(folder)  # fmt: skip
        config = AsyncEngineArgs(model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=512).create_engine_config(UsageContext.ENGINE_CONTEXT)
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            with torch.device("meta"):
                model = initialize_model(config)
            attention = get_flash_attn_version(head_size=64)
        arguments = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", folder])
        routes = len(api_server.build_app(arguments, ("generate",), config.model_config).routes)
    print(f"imported: {len(modules)} modules, {type(model).__name__}, FlashAttention {attention}, {routes} routes; no kernel was run", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "pack-vllm")
    parser.add_argument("--python", help="a Python 3.12, to import the pack with")
    parser.add_argument("--import", dest="imported", action="store_true", help=argparse.SUPPRESS)  # this file in that environment
    given = parser.parse_args()
    if given.imported:
        imported()
    else:
        pack(given.to.absolute(), given.python)


if __name__ == "__main__":
    main()
