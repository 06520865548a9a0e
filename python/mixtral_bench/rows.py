"""Runs the cases: copies of the inputs, our calls and the peers' on them, one row of results for each case."""

import dataclasses
import gc
import importlib
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterable

import torch

from mixtral_bench import attention_ops, attention_peers, machine, moe_ops, moe_peers
from mixtral_bench.cases import CASES, Case
from mixtral_bench.files import OURS
from mixtral_bench.op import Op
from mixtral_bench.peer import Peer
from mixtral_bench.timing import Candidate, Meter, first_line, rated, worst

OPS: dict[str, Op] = moe_ops.OPS | attention_ops.OPS
PEERS: dict[str, list[Peer]] = moe_peers.PEERS | attention_peers.PEERS
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
ROTATED = {"cuda": 2**28, "cpu": 2**29}  # bytes of inputs that successive calls go through: more than the L2 of a GPU, the caches of a CPU
MOST_COPIES = 64  # inputs of less than ROTATED / 64 stay in a cache, as what the kernel before has just written does: the row says so
QUICK = dict(hidden=512, intermediate=1024, inner=512, outer=1024, capacity=256)  # sizes of --quick, where a case has more


def chosen(ops: Iterable[str] = (), shapes: Iterable[str] = (), pattern=None) -> list[Case]:
    """The large cases, in the order of CASES: of these ops and models (none: of all), whose names `pattern` (a compiled expression) finds."""
    return [case for op, cases in CASES.items() for case in cases
            if case.large and (not ops or op in ops) and (not shapes or set(shapes) & set(case.shapes))
            and (pattern is None or pattern.search(case.name))]


def quick(case: Case) -> Case | None:
    """The case with smaller sizes, to see that everything runs; None of the long ones."""
    tokens = getattr(case, "tokens", 0) + sum(getattr(case, "segments", ()) or getattr(case, "chunks", ()))
    if tokens > 128 or max((m for _, m in getattr(case, "sequences", ())), default=0) > 4096:
        return None
    changes = {name: least for name, least in QUICK.items() if getattr(case, name, 0) > least}
    if "capacity" in changes:
        changes["lengths"] = tuple(min(length, 3 * 256 + 17 if case.window else 200) for length in case.lengths)
    if getattr(case, "sequences", ()):
        changes["sequences"] = tuple((n // 8, m // 8) for n, m in case.sequences)
    if getattr(case, "window", None):
        changes["window"] = 256
    return dataclasses.replace(case, **changes)


def clone(inputs: dict) -> dict:
    """Of all tensors, in their strides."""
    return {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) if isinstance(t, torch.Tensor) else t
            for name, t in inputs.items()}


SIZES = ("tokens", "hidden", "intermediate", "experts", "top_k", "routing", "segments", "inner", "outer", "gather", "sequences", "chunks", "lengths",
         "heads", "key_heads", "head_dim", "window", "capacity")


def sizes(case: Case) -> dict:
    """What the row's numbers depend on: the case's fields of these names, as JSON has them."""
    found = {name: getattr(case, name) for name in SIZES if hasattr(case, name)}
    return {name: json.loads(json.dumps(value)) for name, value in found.items()}


def peers_of(op: str, device: str, names: Iterable[str] | None) -> list[Peer]:
    """Of the op on the device; names: those to keep, None: all."""
    return [peer for peer in PEERS.get(op, []) if device in peer.devices and (names is None or peer.name in names)]


def applies(peer: Peer, case: Case) -> bool:
    """A peer that ignores a window is of no use where there is none, or where another entry of it has the same."""
    return all(getattr(case, field) != value for field, value in peer.changed.items())


def versions(peers: Iterable[Peer]) -> dict[str, str]:
    """Of the distributions behind the peers."""
    found = {}
    for peer in peers:
        if peer.package:
            try:
                found[peer.package] = importlib.metadata.version(peer.package)
            except importlib.metadata.PackageNotFoundError:  # not installed, or not as a distribution
                found[peer.package] = getattr(sys.modules.get(peer.module), "__version__", "absent")
    return found


def make_row(case: Case, dtype: str, device: torch.device, meter: Meter, limits: dict, peers: Iterable[Peer], rotated: int,
             progress=lambda text: None) -> dict:
    """The row of one case, as the JSON has it. What fails is recorded in it. rotated: see ROTATED."""
    op = OPS[case.op]
    row = {"op": case.op, "case": case.name, "shapes": list(case.shapes), "dtype": dtype, "sizes": sizes(case), "bytes": 0, "flops": 0}
    gc.collect()  # exceptions of the row before hold its tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    size, memory = op.size(case, DTYPES[dtype].itemsize), machine.memory_bytes(device)
    if size > memory / 4:
        reason = f"inputs of {size / 1e9:.1f} GB, and the peers' copies, do not fit into {memory / 1e9:.0f} GB"
        return row | {"candidates": {OURS: {"skipped": reason}}}
    try:
        first = op.complete(case, case.inputs(DTYPES[dtype], device))
        row |= {"flops": op.flops(case, first), "bytes": op.bytes(case, first)}
        tolerance = op.tolerance * (0.01 if dtype == "f32" else 1)
        taken = sum(t.numel() * t.element_size() for t in first.values() if isinstance(t, torch.Tensor))
        copies = max(1, min(MOST_COPIES, math.ceil(rotated / max(taken, 1))))
        row |= {"cached": True} if copies * taken < rotated else {}
        inputs = [first, *(clone(first) for _ in range(copies - 1))]
        errors = {(): op.expected(case, first)}
        stored = op.stored(case, first) if op.stored else lambda: 0.0

        def ours(prepare):
            return lambda: Candidate([prepare(case, copy) for copy in inputs], lambda result: worst([errors[()](result), stored()]), tolerance,
                                     in_place=op.in_place)

        def theirs(peer):
            def make():
                prepared = [peer.prepare(case, copy) for copy in inputs]
                if peer.yardstick:  # it brings its own check
                    return Candidate([call for call, _ in prepared], prepared[0][1], moe_ops.TOLERANCE, yardstick=True)
                changed = dataclasses.replace(case, **peer.changed)
                key = tuple(peer.changed.items())
                if key not in errors:
                    errors[key] = op.expected(changed, first)
                flops = op.flops(changed, first) if peer.changed else None
                return Candidate(prepared, errors[key], peer.tolerance or tolerance, flops, op.in_place)
            return make

        candidates = {name: ours(prepare) for name, prepare in op.ours.items()}
        candidates |= {peer.name: theirs(peer) for peer in peers if applies(peer, case)}
        row["candidates"] = meter.measure(case.op, row["flops"] or row["bytes"], candidates, progress)
    except Exception as failure:  # noqa: BLE001
        row["candidates"] = {OURS: {"failed": first_line(failure)}}
    return rated(row, limits)


def absent(peers: Iterable[Peer]) -> dict[str, str]:
    """name -> why, of the peers whose module cannot be imported."""
    found = {}
    for peer in peers:
        if peer.module:
            try:
                importlib.import_module(peer.module)
            except Exception as error:  # noqa: BLE001: a broken library is an absent one, and says why
                found[peer.name] = first_line(error)
    return found
