"""What the machine is, and what it can do apart from our kernels: read bandwidth and matrix peak as torch reaches them."""

import datetime
import os
import platform
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch


def describe() -> dict:
    """Device, date, commit, versions and thread count of this run."""
    import transformers

    import mixtral_ext

    return {
        "device": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability() + (", AMX" if torch.cpu._is_amx_tile_supported() else ""),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory() / 2**30, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "mixtral_ext": mixtral_ext.__version__,
        },
    }


def fits_in_memory(needed: float) -> bool:
    """Whether `needed` bytes are at most half of the machine's memory."""
    return needed <= _memory() / 2


def read_bandwidth(size: int = 2**30) -> float:
    """Bytes per second: torch's multi-threaded sum over a buffer of `size` bytes, larger than any cache. Median of 7."""
    buffer = torch.ones(size // 4)
    return size / median_seconds(buffer.sum, 7)


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of torch's square matrix product a @ b.T (as in a linear layer; a @ b takes a slow path for bf16 on CPUs
    without bf16 instructions) of random numbers: the best of growing sizes, each a median of 3."""
    best = 0.0
    for n in (256, 512, 1024, 2048, 4096):
        a, b = torch.randn(2, n, n).to(dtype)
        seconds = median_seconds(lambda: a @ b.T, 3)
        best = max(best, 2 * n**3 / seconds)
        if seconds > 0.3:
            break
    return best


def median_seconds(call, runs: int) -> float:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the source tree this runs from, "-dirty" with changes; "unknown" when installed elsewhere."""
    if not shutil.which("git"):
        return "unknown"
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
