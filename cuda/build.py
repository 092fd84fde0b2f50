"""Build libdmi, and run its tests.

    python cuda/build.py           python/src/dmi/lib/libdmi.so, if anything changed
    python cuda/build.py --cpu     the same without CUDA; --to FILE for elsewhere
    python cuda/build.py --test    the native tests: of the library's own objects, and under the sanitizers; --full: with more chance
    python cuda/build.py --gpu-test  the native tests on a GPU
    python cuda/build.py --gpu-soak  10^8 records of random traffic on a GPU, every row on the books
    python cuda/build.py --gpu-sanitize  the native tests on a GPU under compute-sanitizer, which comes with the CUDA toolkit

Run with a Python that can import torch (2.11 or later): its headers and libraries are used, none of Python's. g++ (or $CXX)
with C++20 is needed, and for CUDA nvcc: $NVCC, the one on PATH, or that of the nvidia-cuda-nvcc package beside torch
(requirements/cuda.txt). Without one the library is built for the CPU alone, and says so. It serves any later torch and any
Python; CUDA's runtime is linked in, and asks for a driver only when a ring is made on a device. $DMI_CUDA_ARCHS: compute
capabilities to build for, the last one as PTX too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).resolve().parent
ROOT = CUDA.parent
LIBRARY = ROOT / "python" / "src" / "dmi" / "lib" / "libdmi.so"
OBJECTS = ROOT / "build" / "native"

CXX = os.environ.get("CXX", "g++")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # quantised elements are the same bytes everywhere; the engine evaluates the same conditions on the same rows
    "-fno-trapping-math",  # nobody looks at floating-point exceptions, which would keep loops from being vectors
    "-fno-math-errno",
    f"-I{CUDA}/include",
    f"-I{ROOT}",
]
NO_DEVICE = CUDA / "src" / "device_none.cpp"
HOST_DEVICE = CUDA / "test" / "host_device.cpp"  # for tests: what runs on a GPU is run by threads
SOURCES = sorted(source for source in (CUDA / "src").glob("*.cpp") if source != NO_DEVICE)
KERNELS = CUDA / "src" / "device" / "cuda.cu"
HEADERS = sorted([*(CUDA / "include" / "dmi").glob("*.h"), *(CUDA / "src").glob("**/*.h"), ROOT / "abi" / "ring.h"])
# Code for 8.0 runs on all of 8.x, and so on; PTX of the last serves what is newer.
ARCHS = os.environ.get("DMI_CUDA_ARCHS", "80 90 100 120").split()
TESTS = sorted((CUDA / "test").glob("*_test.cpp"))
# Random steps of levels_test, in full or not. What they come to is looked at plain; a sanitizer looks at how.
STEPS = {False: {"plain": "120", "tsan": "60", "asan": "60"}, True: {"plain": "1200", "tsan": "1200", "asan": "1200"}}


def torch_root() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"build libdmi: {sys.executable} has no torch; run this with a Python that has it (make setup installs one)"
        )
    return Path(spec.origin).parent


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise SystemExit(f"build libdmi: failed: {' '.join(command)}")


def digest(command: list[str], inputs: list[Path]) -> str:
    hashed = hashlib.sha256("\0".join(command).encode())
    for path in inputs:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def make(target: Path, command: list[str], inputs: list[Path]) -> bool:
    """Run the command unless target was made by the same one from the same bytes."""
    stamp = OBJECTS / f"{target.parent.name}.{target.name}.stamp"
    now = digest(command, inputs)
    if target.exists() and stamp.exists() and stamp.read_text() == now:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    run(command)
    stamp.write_text(now)
    return True


def compile_objects(kind: str, sources: list[Path], flags: list[str], extra: list[Path]) -> list[Path]:
    objects = [OBJECTS / kind / f"{source.stem}.o" for source in sources]

    def one(pair: tuple[Path, Path]) -> None:
        source, target = pair
        make(target, [CXX, *FLAGS, *flags, "-c", str(source), "-o", str(target)], [source, *HEADERS, *extra])

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(one, zip(sources, objects, strict=True)))
    return objects


def toolkit() -> tuple[str, list[str], list[str]] | None:
    """nvcc, where its headers are, and where its libraries are; None without one."""
    packages = torch_root().parent / "nvidia" / "cu13"
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    if found is None and (packages / "bin" / "nvcc").exists():
        found = str(packages / "bin" / "nvcc")
    if found is None:
        return None
    root = Path(found).resolve().parents[1]
    include = [f"-I{root}/include", f"-I{root}/include/cccl"]
    return found, include, [f"-L{path}" for path in (root / "lib64", root / "lib") if path.is_dir()]


def build_device(cpu_only: bool, kind: str = "library", flags: Sequence[str] = ()) -> tuple[list[Path], list[str]]:
    """The device's objects, and what to link them with. `flags`: of kernels of a kind for themselves."""
    tools = None if cpu_only else toolkit()
    if tools is None:
        if not cpu_only:
            print("no nvcc ($NVCC, PATH, or the nvidia-cuda-nvcc package): libdmi will capture CPU tensors only")
        return compile_objects("library", [NO_DEVICE], [], []), []
    nvcc, include, libraries = tools
    target = OBJECTS / kind / "cuda.o"
    print(f"{' '.join([str(KERNELS.relative_to(ROOT)), *flags])} for compute capabilities {', '.join(ARCHS)}", flush=True)
    make(target, [*kernel_command(nvcc, include), *flags, "-c", str(KERNELS), "-o", str(target)], [KERNELS, *HEADERS])
    return [target], [*libraries, "-lcudart_static", "-lrt", "-ldl", "-Wl,--exclude-libs,ALL"]


def kernel_command(nvcc: str, include: list[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    codes.append(f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}")
    host = ["-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden"]
    command = [nvcc, "-std=c++20", "-O3", "-t", str(min(4, os.cpu_count() or 1)), "-ccbin", CXX, *codes, f"-I{CUDA}/src"]
    return command + [f"-Xcompiler={flag}" for flag in host] + include + [f"-I{CUDA}/include", f"-I{ROOT}"]


def build(cpu_only: bool, library: Path) -> None:
    torch = torch_root()
    objects = compile_objects("library", SOURCES, [], [])
    device, device_libraries = build_device(cpu_only)
    objects += device
    stable = ["-DTORCH_TARGET_VERSION=0x020B000000000000", f"-isystem{torch}/include"]
    objects += compile_objects("torch", [CUDA / "torch" / "op.cpp"], stable, [torch / "version.py"])
    # No path to this torch is kept: the process that loads libdmi has its own torch loaded already.
    fresh = OBJECTS / f"{library.stem}{'-cpu' if cpu_only else ''}.so"
    link = [CXX, "-shared", "-Wl,-z,defs", "-Wl,-z,relro", "-Wl,-z,now", *map(str, objects)]
    link += [
        f"-L{torch}/lib",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath-link,{torch}/lib",
        *device_libraries,
        "-pthread",
        "-o",
        str(fresh),
    ]
    if make(fresh, link, objects) or not library.exists() or library.stat().st_size != fresh.stat().st_size:
        # Renamed into place, not rewritten: a process that has it loaded keeps what it loaded.
        library.parent.mkdir(parents=True, exist_ok=True)
        beside = library.with_suffix(".new")
        shutil.copyfile(fresh, beside)
        beside.replace(library)
        print(f"{library}: built with {CXX} for torch >= 2.11{' and CUDA' if device_libraries else ', CPU only'}")
    else:
        print(f"{library}: up to date")


def test_golden() -> None:
    """The dumps of abi/golden are what a C program writes today."""
    golden = ROOT / "abi" / "golden"
    writer = OBJECTS / "golden" / "write"
    make(
        writer,
        ["gcc", "-std=c17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}", str(golden / "write.c"), "-o", str(writer)],
        [golden / "write.c", golden / "offsets.h", ROOT / "abi" / "ring.h"],
    )
    with tempfile.TemporaryDirectory() as directory:
        run([str(writer), directory])
        written = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
    kept = {path.name: path.read_bytes() for path in golden.glob("*.bin")}
    if written != kept:
        differ = sorted(name for name in written.keys() | kept.keys() if written.get(name) != kept.get(name))
        raise SystemExit(f"abi/golden: {', '.join(differ)} differ from what abi/golden/write.c writes")
    print(f"golden dumps: {len(kept)} as written by C")


def test(full: bool) -> None:
    test_golden()
    if toolkit() is not None:
        for program in build_gpu_tests():
            print(f"{program.relative_to(ROOT)}: built, to be run on a GPU machine (--gpu-test)", flush=True)
    support = sorted((CUDA / "test").glob("*.h"))
    inside = f"-I{CUDA}/src"
    for kind, flags in {
        "plain": ["-O2"],
        "tsan": ["-O1", "-fsanitize=thread"],
        "asan": ["-O1", "-fsanitize=address,undefined"],
    }.items():
        if kind == "plain":
            objects = [*compile_objects("library", SOURCES, [], []), *compile_objects(kind, [HOST_DEVICE], [*flags, inside], support)]
        else:
            objects = compile_objects(kind, [*SOURCES, HOST_DEVICE], [*flags, inside], support)
        for source in TESTS:
            program = OBJECTS / kind / source.stem
            make(
                program,
                [CXX, *FLAGS, *flags, inside, str(source), *map(str, objects), "-pthread", "-o", str(program)],
                [source, *support, *objects, *HEADERS],
            )
            arguments = [STEPS[full][kind]] if source.stem == "levels_test" else []
            print(" ".join([source.stem, *arguments, f"({kind})"]), flush=True)
            run([str(program), *arguments])


def build_gpu_tests(kind: str = "gpu", flags: Sequence[str] = ()) -> list[Path]:
    """`flags`: of kernels of a kind for themselves."""
    tools = toolkit()
    if tools is None:
        raise SystemExit("build the GPU tests: no nvcc ($NVCC, PATH, or the nvidia-cuda-nvcc package)")
    nvcc, include, _ = tools
    device, libraries = build_device(False, kind if flags else "library", flags)
    objects = [*compile_objects("library", SOURCES, [], []), *device]
    support = sorted((CUDA / "test").glob("*.h"))
    traffic, levels = CUDA / "test" / "gpu_test.cu", CUDA / "test" / "levels_test.cpp"
    code = OBJECTS / kind / "gpu_test.o"
    make(code, [*kernel_command(nvcc, include), "-c", str(traffic), "-o", str(code)], [traffic, *support, *HEADERS])
    compiled = [code, *compile_objects(kind, [levels], ["-DDMI_TEST_CUDA", f"-I{CUDA}/src", *include], support)]
    programs = []
    for built in compiled:
        programs.append(built.with_suffix(""))
        make(programs[-1], [CXX, str(built), *map(str, objects), *libraries, "-pthread", "-o", str(programs[-1])], [built, *objects])
    return programs


ALONE = ("gpu-alone", ["-DDMI_WARPS_ALONE"])
"""For racecheck: see sanitize_on_gpu."""


def carry_gpu_tests(to: Path) -> None:
    for name, programs in (("gpu", build_gpu_tests()), ("gpu-alone", build_gpu_tests(*ALONE))):
        (to / name).mkdir(parents=True, exist_ok=True)
        for program in programs:
            run(["strip", str(program), "-o", str(to / name / program.name)])


def gpu_tests(kind: str = "gpu", flags: Sequence[str] = ()) -> list[Path]:
    """Those that were built elsewhere, with --gpu-build, where DMI_GPU_TESTS says; else they are built."""
    folder = os.environ.get("DMI_GPU_TESTS")
    if folder is None:
        return build_gpu_tests(kind, flags)
    programs = [Path(folder) / kind / name for name in ("gpu_test", "levels_test")]
    for program in programs:
        if not program.exists():
            raise SystemExit(f"run the GPU tests: there is no {program}, where DMI_GPU_TESTS says: carry it (make gpu-carry), or unset that to build them here")
    return programs


def test_on_gpu() -> None:
    for program in gpu_tests():
        run([str(program)])


def soak_on_gpu() -> None:
    traffic, _ = gpu_tests()
    run([str(traffic), "--records", "100000000"])


def sanitize_on_gpu() -> None:
    programs = gpu_tests()
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        raise SystemExit("check with compute-sanitizer: it is not installed (it comes with the CUDA toolkit)")
    # Racecheck does not follow barriers that some of a block's warps have for themselves: it calls what the whole block's barriers divide a race. Without teams of warps
    # there are none; theirs are synccheck's, and thread sanitizer's where threads run the kernels.
    alone = gpu_tests(*ALONE)
    for tool in ("memcheck", "racecheck", "synccheck"):
        for program in alone if tool == "racecheck" else programs:
            print(f"compute-sanitizer --tool {tool} {program.name}", flush=True)
            run([sanitizer, "--tool", tool, "--error-exitcode", "1", str(program), "12"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="build and run the native tests instead")
    parser.add_argument("--full", action="store_true", help="with --test: ten times as many random steps, and more under the sanitizers")
    parser.add_argument("--gpu-test", action="store_true", help="build the native tests for a GPU and run them")
    parser.add_argument("--gpu-build", type=Path, metavar="DIR", help="build the native tests for a GPU, and those for racecheck, into DIR/gpu and DIR/gpu-alone")
    parser.add_argument("--gpu-soak", action="store_true", help="run 10^8 records of random traffic on a GPU")
    parser.add_argument("--gpu-sanitize", action="store_true", help="run the native tests on a GPU under compute-sanitizer")
    parser.add_argument("--cpu", action="store_true", help="build without CUDA")
    parser.add_argument("--to", type=Path, default=LIBRARY, metavar="FILE", help="where the library goes")
    arguments = parser.parse_args()
    if arguments.test:
        test(arguments.full)
    elif arguments.gpu_test:
        test_on_gpu()
    elif arguments.gpu_build:
        carry_gpu_tests(arguments.gpu_build)
    elif arguments.gpu_soak:
        soak_on_gpu()
    elif arguments.gpu_sanitize:
        sanitize_on_gpu()
    else:
        build(arguments.cpu, arguments.to)


if __name__ == "__main__":
    main()
