"""What a peer is: one thing that people use today in place of one of our ops, as a plug-in of a few lines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


class Unsupported(RuntimeError):
    """A peer cannot do a case; says why."""


@dataclass(frozen=True)
class Peer:
    """`prepare(case, inputs) -> call`; `call()` -> the result, shaped as the op's own. The inputs are those of the op, by name.

    What prepare does is not timed: only what the peer's users do once and keep (layouts of weights, masks, compiling). What depends on the
    routing of the moment is part of the call. Results in several parts: (topk_weights, topk_ids, ...) of moe_gate, (q, k) of apply_rope.
    """

    name: str
    prepare: Callable
    devices: tuple = ("cpu", "cuda")
    package: str | None = None              # the distribution whose version is recorded; None: torch
    module: str | None = None               # what must be importable; None: torch alone
    changed: dict = field(default_factory=dict)  # fields of the case in which it computes something else: {"window": None}
    tolerance: float | None = None          # of its error, where its arithmetic is coarser than ours may be
    yardstick: bool = False                 # computes something else; prepare -> (call, error), with error(result) against its own f32


def memory(device: torch.device) -> tuple[int, int]:
    """-> bytes that are free, and all there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    kib = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(kib["MemAvailable:"]), 1024 * int(kib["MemTotal:"])


def heads_first(t: torch.Tensor) -> torch.Tensor:
    """[T, H, D] or [B, L, H, D] -> [B, H, L, D], the same memory."""
    return (t[None] if t.ndim == 3 else t).transpose(1, 2)


def need(size: float, allowed: float, what: str) -> None:
    if size > allowed:
        raise Unsupported(f"{what}: {size / 1e9:.1f} GB, there are {allowed / 1e9:.1f}")
