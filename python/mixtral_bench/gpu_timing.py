"""What the benches of `make gpu-check` share: candidates are checked, then timed in turns with CUDA graphs; state of the card; reports."""

import json
import math
import shutil
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mixtral_bench.measure import TOLERANCE

MIN_RUNS, MAX_RUNS = 10, 50


def poison(*tensors) -> Callable[[], None]:
    """What a candidate writes, filled before its result is checked."""

    def fill():
        for tensor in tensors:
            tensor.fill_(-77)

    return fill


@dataclass
class Candidate:
    call: Callable[[], object]
    error: Callable[[object], float]  # of what it returned
    bytes: float  # that must be moved
    flops: float
    before: Callable[[], None] = poison()  # the checked call
    tolerance: float = TOLERANCE  # of the error
    copies: int = 1  # successive calls go through so many copies of the inputs


class Timer:
    """Times batches of calls, about a millisecond each. On CUDA a batch is one graph, or, of a candidate that waits for the device or
    cannot be captured, calls between two events; on the CPU a clock."""

    def __init__(self, candidate: Candidate, device: torch.device):
        self.call, self.calls, self.cuda, self.graph = candidate.call, 1, device.type == "cuda", None
        self.batch()
        calls = max(1, min(20, int(1e-3 / self.batch())))
        self.calls = math.ceil(calls / candidate.copies) * candidate.copies
        if self.cuda and self._never_waits():
            self.graph = self._captured()
        self.batch()

    def batch(self) -> float:
        """Seconds a call."""
        if not self.cuda:
            start = time.perf_counter()
            self._calls()
            return (time.perf_counter() - start) / self.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.graph:
            torch.cuda._sleep(200_000)  # 0.1 ms, in which the replay is enqueued: its launch is not part of the time
        start.record()
        self.graph.replay() if self.graph else self._calls()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.calls

    def _calls(self):
        for _ in range(self.calls):
            self.call()

    def _never_waits(self) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.call()
        except Exception:  # noqa: BLE001
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def _captured(self):
        graph = torch.cuda.CUDAGraph()
        try:  # the outer stream is there again after a capture that failed, where torch.cuda.graph leaves its own
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._calls()
        except Exception:  # noqa: BLE001
            torch.cuda.synchronize()
            return None
        return graph


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def with_warnings(error: Exception, caught) -> str:
    """The error's first line and what torch warned of before it: there it says why it has no kernel."""
    reasons = dict.fromkeys(str(w.message).partition(" (Triggered")[0].split("\n")[0] for w in caught)
    return "; ".join([first_line(error), *reasons])[:400]


def measure(candidates: dict[str, Candidate], device: torch.device, budget: float) -> dict[str, dict]:
    """Each candidate is checked, then all are timed in turns. One that raises or is wrong is recorded as failed."""
    results, timers, runs = {}, {}, {}
    for name, candidate in candidates.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                candidate.before()
                error = candidate.error(candidate.call())
                if not error <= candidate.tolerance:
                    raise ArithmeticError(f"wrong result: relative error {error:.2g}")
                timers[name], runs[name] = Timer(candidate, device), []
                method = "graph" if timers[name].graph else "events" if timers[name].cuda else "clock"
                results[name] = {"error": error, "method": method}
            except Exception as failure:  # noqa: BLE001
                results[name] = {"failed": with_warnings(failure, caught)}
    for _ in range(MAX_RUNS):
        for name, timer in list(timers.items()):
            if len(runs[name]) < MIN_RUNS or sum(runs[name]) * timer.calls < budget:
                try:
                    runs[name].append(timer.batch())
                except Exception as failure:  # noqa: BLE001
                    results[name] = {"failed": first_line(failure)}
                    del timers[name]
    for name, timer in timers.items():
        seconds, candidate = statistics.median(runs[name]), candidates[name]
        results[name] |= {"us": seconds * 1e6, "us_range": [min(runs[name]) * 1e6, max(runs[name]) * 1e6], "runs": len(runs[name]),
                          "calls": timer.calls, "bytes": candidate.bytes, "flops": candidate.flops,
                          "tb_s": candidate.bytes / seconds / 1e12, "tflop_s": candidate.flops / seconds / 1e12}
    return results


# ------------------------------------------------------------------------------------------------------------ machine

STATE = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def smi(fields, *options) -> list[str]:
    return ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *options]


def gpu_state(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    if not shutil.which("nvidia-smi"):
        return {"name": torch.cuda.get_device_name(device)}
    done = subprocess.run(smi(STATE), capture_output=True, text=True)
    return dict(zip(STATE, done.stdout.strip().split(", "))) if done.returncode == 0 else {"failed": done.stderr.strip() or done.stdout.strip()}


def watch(device: torch.device) -> Callable[[], dict]:
    """Reads clock and power twice a second until the returned function is called, which gives their medians and extremes."""
    if device.type != "cuda" or not shutil.which("nvidia-smi"):
        return lambda: {}
    process = subprocess.Popen(smi(("clocks.sm", "power.draw"), "-lms", "500"), stdout=subprocess.PIPE, text=True)

    def finish():
        process.terminate()
        samples = [line.split(", ") for line in process.communicate()[0].splitlines()]
        columns = zip(*((float(clock), float(power)) for clock, power in (s for s in samples if len(s) == 2 and "[" not in "".join(s))))
        return {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                for name, values in zip(("clocks.sm", "power.draw"), columns)}

    return finish


# ------------------------------------------------------------------------------------------------------------- report


def header(results: dict) -> list[str]:
    """The first two lines of a report: the card, its clocks and power; date, commit, versions."""
    info, versions = results["gpu"], results["machine"]["versions"]
    state = ", ".join(f"{key} {value}" for key, value in info["before"].items())
    during = "; ".join(f"{name} median {v['median']:g}, {v['min']:g} to {v['max']:g}" for name, v in info.get("during", {}).items())
    return [
        f"{state}. While measuring: {during or 'not known'}.",
        f"{results['machine']['date']}, commit {results['machine']['commit']}; " + ", ".join(f"{n} {v}" for n, v in versions.items()) + ".",
    ]


def shown_us(result: dict) -> str:
    return f"{result['us']:.{0 if result['us'] >= 1000 else 1}f}" if "us" in result else "-"


def write_report(file: Path, table: Callable[[dict], str], plot: Callable[[dict, Path], None]) -> None:
    """Prints the table of results that a bench wrote to `file`, and writes it and a plot beside them."""
    results = json.loads(file.read_text())
    text = table(results)
    file.with_suffix(".md").write_text(text + "\n")
    print(text)
    try:
        plot(results, file.with_suffix(".png"))
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed: pip install 'mixtral_ext[bench]'")
