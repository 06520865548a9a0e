"""Timing: every candidate of a row is checked, then all are timed in turns, so that a drifting machine hits all alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

OURS = "mixtral_ext"
TOLERANCE = 0.02  # relative Frobenius error in bf16: roundings of several stages come to about 0.005
LONG = 5.0  # seconds; the checked run of a candidate this slow is its measurement


@dataclass
class Row:
    """One line of the table. `candidates` take the number of the run (to rotate buffers past the caches) and return
    the result; all compute the same thing. `slowdown` tells how a candidate's time grows from row to row of a group."""

    group: str
    name: str
    flops: float  # that the result needs
    bytes: float  # that must be read once
    slowdown: float
    target: float  # wanted speed-up over the best peer
    expected: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # result -> (its checked part, what it should be)
    candidates: dict[str, Callable[[int], torch.Tensor]]
    skipped: dict[str, str] = field(default_factory=dict)  # name -> why it does not run


class Meter:
    """Measures rows; remembers each candidate's speed within a group, to leave out what would run for minutes."""

    def __init__(self, limit: float = 90.0, budget: float = 2.0, min_runs: int = 3, max_runs: int = 30):
        """`limit`: peers expected to need more seconds a run are left out. Others are run until they have used
        `budget` seconds and at least `min_runs` times, at most `max_runs` times."""
        self.limit, self.budget, self.min_runs, self.max_runs = limit, budget, min_runs, max_runs
        self.seconds_per_slowdown: dict[tuple[str, str], float] = {}

    def measure(self, row: Row, progress=lambda text: None) -> dict:
        """-> the row as JSON: median, all runs and error of each candidate, or why it was left out."""
        results: dict[str, dict] = {name: {"skipped": reason} for name, reason in row.skipped.items()}
        for name, call in row.candidates.items():
            progress(f"{row.name}: checking {name}")
            guess = self.seconds_per_slowdown.get((row.group, name), 0.0) * row.slowdown
            if guess > self.limit and name != OURS:
                results[name] = {"skipped": f"about {guess:.0f} s a run"}
                continue
            seconds, out = _timed(call, 0)
            error = relative_error(*row.expected(out))
            if not error <= TOLERANCE:
                raise RuntimeError(f"{row.name}: {name} is wrong: relative error {error:.2g}, allowed {TOLERANCE}")
            results[name] = {"error": error, "runs": [seconds] if seconds > LONG else []}
            del out
        timed = {name: result["runs"] for name, result in results.items() if result.get("runs") == []}
        for number in range(1, self.max_runs + 1):
            for name, runs in timed.items():
                if len(runs) < self.min_runs or sum(runs) < self.budget:
                    progress(f"{row.name}: {name}, run {number}")
                    runs.append(_timed(row.candidates[name], number)[0])
        for name, result in results.items():
            if "runs" in result:
                result["median"] = statistics.median(result["runs"])
                self.seconds_per_slowdown[row.group, name] = result["median"] / row.slowdown
        return {
            "group": row.group,
            "name": row.name,
            "flops": row.flops,
            "bytes": row.bytes,
            "target": row.target,
            "candidates": results,
        }


def _timed(call, number: int):
    start = time.perf_counter()
    out = call(number)
    return time.perf_counter() - start, out


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN if there is one."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
