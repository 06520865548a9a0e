"""Timing: every candidate of a row is checked, then all are timed in turns, so that a drifting machine hits all alike."""

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mixtral_bench import files
from mixtral_bench.peer import Unsupported

LONG = 5.0  # seconds; the checked call of a candidate this slow is its measurement
MOST_CALLS = 20  # in one batch


@dataclass
class Candidate:
    calls: Sequence[Callable[[], object]]  # the same on each of several copies of the inputs, gone through in turn
    error: Callable[[object], float]  # of what the first of them returned
    tolerance: float
    flops: float | None = None  # where it does other work than the row counts
    in_place: bool = False  # a second call sees other inputs, or returns them
    yardstick: bool = False  # it does other work of as many FLOPs


@dataclass(frozen=True)
class Effort:
    """How long to measure a candidate: until `budget` seconds are used and `least` batches are done, at most `most`."""

    budget: float = 0.15
    least: int = 10
    most: int = 50


CPU, CUDA, QUICK = Effort(2.0, 3, 30), Effort(), Effort(0.02, 2, 3)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN if there is one."""
    difference, size = float((actual.double() - expected.double()).norm()), float(expected.double().norm())
    return difference / size if size or difference else 0.0


def worst(errors: Sequence[float]) -> float:
    """The largest, NaN if there is one; 0 of none."""
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


class Timer:
    """Times batches of calls, about a millisecond each, which go through the copies in turn. On CUDA a batch is one graph, of all copies, or,
    of a candidate that waits for the device or cannot be captured, calls between two events; on the CPU a clock."""

    def __init__(self, calls: Sequence[Callable[[], object]], cuda: bool):
        self.first, self.turn, self.cuda, self.graph, self.count = calls[0], itertools.cycle(calls), cuda, None, 1
        wanted = self.count = max(1, min(MOST_CALLS, round(1e-3 / self.batch())))
        if cuda and self._never_waits():
            self.count = math.ceil(wanted / len(calls)) * len(calls)
            self.graph = self._captured()
            self.count = self.count if self.graph else wanted
        self.batch()

    @property
    def method(self) -> str:
        return "graph" if self.graph else "events" if self.cuda else "clock"

    def batch(self) -> float:
        """Seconds a call."""
        if not self.cuda:
            start = time.perf_counter()
            self._all()
            return (time.perf_counter() - start) / self.count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.graph:
            torch.cuda._sleep(200_000)  # 0.1 ms, in which the replay is enqueued: its launch is not part of the time
        start.record()
        self.graph.replay() if self.graph else self._all()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.count

    def _all(self):
        for _ in range(self.count):
            next(self.turn)()

    def _never_waits(self) -> bool:
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.first()
        except Exception:  # noqa: BLE001
            return False
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return True

    def _captured(self):
        graph = torch.cuda.CUDAGraph()
        try:  # the outer stream is there again after a capture that failed, where torch.cuda.graph leaves its own
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                self._all()
        except Exception:  # noqa: BLE001
            torch.cuda.synchronize()
            return None
        return graph


class Meter:
    """Measures rows. Remembers each candidate's speed, to leave out what would run for minutes."""

    def __init__(self, cuda: bool, effort: Effort, limit: float = math.inf, never_left_out: Sequence[str] = ()):
        """limit: candidates expected to need more seconds a run are left out, but for those named."""
        self.cuda, self.effort, self.limit, self.never_left_out = cuda, effort, limit, never_left_out
        self.seconds_per_flop: dict[tuple[str, str], float] = {}

    def measure(self, op: str, flops: float, candidates: dict[str, Callable[[], Candidate]], progress=lambda text: None) -> dict[str, dict]:
        """Each candidate is made and checked, then all are timed in turns -> what the row says of each. One that raises or is wrong is
        recorded as failed, one that does not take such a row as skipped."""
        results, timers, runs = {}, {}, {}
        for name, make in candidates.items():
            progress(f"checking {name}")
            guess = self.seconds_per_flop.get((op, name), 0.0) * flops
            if guess > self.limit and name not in self.never_left_out:
                results[name] = {"skipped": f"about {guess:{'.0f' if guess > 1 else '.1g'}} s a call, --limit is {self.limit:g}"}
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    candidate = make()
                    seconds, error = self._checked(candidate)
                    results[name] = {"error": error} | ({} if candidate.flops is None else {"flops": candidate.flops})
                    results[name] |= {"yardstick": True} if candidate.yardstick else {}
                    if seconds > LONG:
                        runs[name] = [seconds]
                        results[name] |= {"calls": 1, "method": "clock"}
                    else:
                        timers[name], runs[name] = Timer(candidate.calls, self.cuda), []
                        results[name] |= {"calls": timers[name].count, "method": timers[name].method}
                except Unsupported as reason:
                    results[name] = {"skipped": str(reason)}
                except Exception as failure:  # noqa: BLE001
                    results[name] = {"failed": with_warnings(failure, caught)}
        for number in range(self.effort.most):
            for name, timer in list(timers.items()):
                done = runs[name]
                if len(done) >= self.effort.least and sum(done) * timer.count >= self.effort.budget:
                    continue
                progress(f"{name}, run {number + 1}")
                try:
                    done.append(timer.batch())
                except Exception as failure:  # noqa: BLE001
                    results[name] = {"failed": first_line(failure)}
                    del timers[name], runs[name]
        for name, seconds in runs.items():
            if flops:
                self.seconds_per_flop[op, name] = statistics.median(seconds) / flops
            us = [1e6 * s for s in seconds]
            quartiles = statistics.quantiles(us, n=4) if len(us) > 1 else us * 3
            results[name] |= {"us": statistics.median(us), "us_range": [min(us), max(us)], "us_quartiles": [quartiles[0], quartiles[2]],
                              "runs": len(us)}
        return {name: results[name] for name in candidates}

    def _checked(self, candidate: Candidate) -> tuple[float, float]:
        """-> seconds of the checked call, error. It is called again after its first result was overwritten: what it leaves unwritten shows.
        On a GPU no call takes long by itself, but the first one may compile."""
        seconds, result = self._timed(candidate.calls[0])
        if candidate.in_place:
            error = candidate.error(result)
            if self.cuda:
                seconds, _ = self._timed(candidate.calls[0])
            return seconds, self._allowed(error, candidate)
        if seconds < LONG or self.cuda:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, torch.Tensor):
                    tensor.fill_(math.nan if tensor.is_floating_point() else -77)
            del result, tensor
            seconds, result = self._timed(candidate.calls[0])
        return seconds, self._allowed(candidate.error(result), candidate)

    def _allowed(self, error: float, candidate: Candidate) -> float:
        if not error <= candidate.tolerance:
            raise ArithmeticError(f"wrong result: relative error {error:.2g}, allowed {candidate.tolerance:g}")
        return error

    def _timed(self, call):
        start = time.perf_counter()
        result = call()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, result


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def with_warnings(error: Exception, caught) -> str:
    """The error's first line and what torch warned of before it: there it says why it has no kernel."""
    reasons = dict.fromkeys(str(w.message).partition(" (Triggered")[0].split("\n")[0] for w in caught)
    return "; ".join([first_line(error), *reasons])[:400]


def rated(row: dict, limits: dict[str, float]) -> dict:
    """The row with what follows from its numbers: limit_us and bound from the measured limits; of every candidate TB/s, TFLOP/s, share of the
    limit and `times`, its time over ours. One that does other work than the row's has no share, nor a row whose inputs stay in a cache."""
    limit = files.limit(row["bytes"], row["flops"], limits, row["dtype"])
    if limit:
        row = row | dict(zip(("limit_us", "bound"), limit))
    base, candidates = files.base(row), {}
    for name, found in row["candidates"].items():
        if "us" in found:
            seconds = found["us"] * 1e-6
            found = {k: v for k, v in found.items() if k not in ("tb_s", "share", "times")}
            found["tflop_s"] = found.get("flops", row["flops"]) / seconds / 1e12
            if "flops" not in found and not found.get("yardstick"):
                found["tb_s"] = row["bytes"] / seconds / 1e12
                if limit and not row.get("cached"):
                    found["share"] = row["limit_us"] / found["us"]
            if base:
                found["times"] = found["us"] / base
        candidates[name] = found
    return row | {"candidates": candidates}
