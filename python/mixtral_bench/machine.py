"""What the machine is, and what it can do apart from our kernels: memory bandwidth and matrix rate as torch reaches them."""

import datetime
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe(device: torch.device) -> dict:
    """Device, date, commit, versions and thread count of this run."""
    import mixtral_ext

    versions = {"python": platform.python_version(), "torch": torch.__version__, "mixtral_ext": mixtral_ext.__version__}
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability() + (", AMX" if torch.cpu._is_amx_tile_supported() else ""),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes(device) / 2**30, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
    }


def memory_bytes(device: torch.device) -> int:
    """Of the device: what the GPU has in all, or the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ------------------------------------------------------------------------------------------------------------- limits


def limits(device: torch.device, quick: bool = False) -> dict[str, float]:
    """The rates that torch reaches on large buffers and square products of random numbers; of the fastest runs, as others may use the machine too.

    copy_tb_s: of a copy, bytes read and written; read_tb_s: the best of a sum and a matrix-vector product over a buffer that no cache holds;
    bf16_tflop_s, f32_tflop_s (on the CPU): a @ b.T as in a linear layer, the best of growing sizes."""
    size = 2**24 if quick else 2**30 if device.type == "cpu" else 2**32
    rows = size // 2 // 4096
    buffer = torch.empty(rows, 4096, dtype=torch.bfloat16, device=device).normal_()
    vector, floats = torch.ones(4096, dtype=torch.bfloat16, device=device), buffer.view(torch.float32)
    half = buffer.view(2, -1)
    found = {
        "copy_tb_s": size / least_seconds(lambda: half[0].copy_(half[1]), device) / 1e12,
        "read_tb_s": size / min(least_seconds(call, device) for call in (floats.sum, lambda: buffer @ vector)) / 1e12,
    }
    del buffer, floats, half
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "f32")):
        if device.type == "cpu" or dtype == torch.bfloat16:
            found[f"{name}_tflop_s"] = _matrix_rate(dtype, device, quick) / 1e12
    return found


def _matrix_rate(dtype: torch.dtype, device: torch.device, quick: bool) -> float:
    """In short bursts: a GPU that multiplies without a pause is soon at its power limit, and slower."""
    best, pause = 0.0, 0.02 if device.type == "cuda" else 0.0
    for n in (256, 512) if quick else (256, 512, 1024, 2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        seconds = least_seconds(lambda: a @ b.T, device, pause=pause)
        best = max(best, 2 * n**3 / seconds)
        if seconds > 0.3:
            break
    return best


def least_seconds(call: Callable[[], object], device: torch.device, runs: int = 15, warm_up: float = 0.3, pause: float = 0.0) -> float:
    """Of the fastest run, after some for `warm_up` seconds, in which the clocks of a GPU rise; with a pause before each."""
    start = time.perf_counter()
    while True:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if time.perf_counter() - start > warm_up:
            break
    times = []
    for _ in range(runs):
        time.sleep(pause)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)


# -------------------------------------------------------------------------------------------------------------- state

STATE = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def state(device: torch.device) -> dict[str, str]:
    """Clocks (MHz), power (W), temperature of an NVIDIA GPU; load of the last minute on a CPU."""
    if device.type == "cpu":
        return {"load": f"{os.getloadavg()[0]:.2f}"}
    if not shutil.which("nvidia-smi"):
        return {}
    done = subprocess.run(_smi(STATE, device), capture_output=True, text=True)
    return dict(zip(STATE, done.stdout.strip().split(", "))) if done.returncode == 0 else {"failed": done.stderr.strip() or done.stdout.strip()}


def watch(device: torch.device) -> Callable[[], dict]:
    """Reads clock and power of a GPU every two seconds until the returned function is called, which gives their medians and extremes."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return lambda: {}
    process = subprocess.Popen(_smi(("clocks.sm", "power.draw"), device, "-lms", "2000"), stdout=subprocess.PIPE, text=True)

    def finish():
        process.terminate()
        samples = [line.split(", ") for line in process.communicate()[0].splitlines()]
        columns = zip(*((float(clock), float(power)) for clock, power in (s for s in samples if len(s) == 2 and "[" not in "".join(s))))
        return {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                for name, values in zip(("clocks.sm", "power.draw"), columns)}

    return finish


def _smi(fields, device, *options) -> list[str]:
    return ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *options]


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
