"""What DMI takes of a device's memory, and of torch's allocator: nothing."""

from __future__ import annotations

from pathlib import Path

import torch

import dmi
from observed import fresh_seed, model_of

MIB = 1 << 20


def test_memory(tmp_path: Path) -> None:
    fresh_seed()
    model = model_of("llama").cuda()
    ids = torch.randint(3, 128, (2, 9), device="cuda")
    with torch.no_grad():
        model(ids, use_cache=False)
        # A ring of another size first: what CUDA loads once for a process (kernels, a stream's state) is no ring's.
        with dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "first", ring_mib=16):
            model(ids, use_cache=False)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        statistics = {k: v for k, v in torch.cuda.memory_stats().items() if "current" in k}
        free, _ = torch.cuda.mem_get_info()
        session = dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "second", ring_mib=256)
        assert session._ring is not None
        taken = free - torch.cuda.mem_get_info()[0]
        ours = session._ring.device_bytes
        print(f"attached: {taken / MIB:.1f} MiB of device memory gone, {ours / MIB:.1f} MiB of it the ring's own account")
        assert {k: v for k, v in torch.cuda.memory_stats().items() if "current" in k} == statistics, "torch's allocator gave something"
        assert 256 * MIB <= ours <= 264 * MIB
        assert taken <= ours + 8 * MIB, "more than the ring says; a second context would be about 520 MiB"
        model(ids, use_cache=False)
        session.flush()
        session.detach()
        torch.cuda.empty_cache()
        kept = free - torch.cuda.mem_get_info()[0]
        print(f"detached: {kept / MIB:.1f} MiB still taken")
        assert kept <= 8 * MIB  # what recorded graphs may still point at
