"""How long calls take, what of it passes inside of ops or on a GPU, and the kernels that a call launches."""
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

BLOCKS = 8  # of timed and of profiled calls, in turn
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "linear", "mkldnn_linear", "bmm")}


def times(call: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each; every call ends with a value on the host."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def result(seconds: list[float], tokens: int) -> dict:
    middle = statistics.median(seconds)
    return {"tokens_s": tokens / middle, "us_a_step": 1e6 * middle, "us_range": [1e6 * min(seconds), 1e6 * max(seconds)], "runs": len(seconds)}


def measure(call: Callable[[], object], runs: int, profiled: int, device: torch.device) -> tuple[list[float], dict]:
    """Seconds of calls, and the time inside of a call (None: the profiler saw nothing). On the CPU blocks of timed calls and of profiled ones
    take turns, so that both see the same machine; a GPU is its only user's, and there the profiler comes last."""
    blocks = 1 if device.type == "cuda" else min(BLOCKS, runs)
    seconds, ops = [], []
    for block in range(blocks):
        seconds += times(call, runs * (block + 1) // blocks - runs * block // blocks)
        ops += inside(call, max(profiled // blocks, 1), device)[0]
    middle = statistics.median(ops) if ops else None
    return seconds, {"ops_us": middle, "ops_share": middle and middle / (1e6 * statistics.median(seconds))}


def inside(call: Callable[[], object], runs: int, device: torch.device) -> tuple[list[float], dict[str, int], dict[str, int], dict[str, float]]:
    """On the CPU microseconds of each call inside of our ops and the products. On a GPU those in which a kernel runs, the mean of all calls (or
    nothing), how many kernels of each name a call launches, how many copies it makes, and the microseconds of a kernel of each name, the mean of
    all; one that is launched early waits in them for the one before it."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    if not cuda:
        events = [event for event in profiler.events() if event.name.startswith("mixtral_ext::") or event.name in PRODUCTS]
        times = [event.self_cpu_time_total for event in sorted(events, key=lambda event: event.time_range.start)]
        each = len(times) // runs  # every call does the same
        return [sum(times[i * each:(i + 1) * each]) for i in range(runs)], {}, {}, {}
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    copies = Counter(event.name for event in events if event.name.startswith(("Memcpy", "Memset")))
    kernels = [event for event in events if event.name not in copies]
    busy = union([(event.time_range.start, event.time_range.end) for event in kernels])
    counts, times = Counter(event.name for event in kernels), Counter()
    for event in kernels:
        times[event.name] += event.time_range.end - event.time_range.start
    return ([busy / runs] * bool(kernels), *({name: n // runs for name, n in counter.items()} for counter in (counts, copies)),
            {name: times[name] / n for name, n in counts.items()})


def union(intervals: list[tuple[float, float]]) -> float:
    """The length of what they cover: a kernel may start before the one before it ends."""
    covered, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        covered += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return covered
