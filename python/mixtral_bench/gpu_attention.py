"""Attention on an NVIDIA GPU: sliding_window_attention of whole prompts and rolling_attention's decode step beside what people use today,
a dense product and a copy. Part of `make gpu-check`; by itself: python -m mixtral_bench.gpu_attention --help."""

import argparse
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import mixtral_ext
from mixtral_bench import attention_peers, machine
from mixtral_bench.attention_report import OURS, plot, table
from mixtral_bench.gpu_timing import Candidate, first_line, gpu_state, measure, poison, watch, write_report
from mixtral_bench.measure import relative_error
from mixtral_ext import reference

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
MIXES = {  # sequences packed into 16384 tokens
    "mixed": (4096, 1, 317, 2048, 777, 5000, 64, 129, 1500, 2452),
    "one long": (12288, *(128,) * 32),
}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
KINDS = ("prompt", "packed", "decode")
TOLERANCE = 0.006  # of a row's relative error: kernels reach 0.0025 in bf16, and one key too many at the window of 4096 makes 0.01
THETA = 1e4


@dataclass(frozen=True)
class Sizes:
    """Attention of Mistral 7B, and of what is measured beside it."""

    heads: int = 32
    key_heads: int = 8
    head_dim: int = 128
    window: int = 4096
    dense: int = 8192  # rows of the square product
    moved: int = 2**30  # bytes that the copy reads and writes
    rotated: int = 2**28  # bytes of caches that successive decode steps go through: several times the L2
    causal_capacity: int = 32768  # of the caches without a window


@dataclass(frozen=True)
class Prompt:
    name: str
    lengths: tuple[int, ...]  # of the packed sequences
    window: int | None

    @property
    def kind(self):
        return "packed" if len(self.lengths) > 1 else "prompt"


@dataclass(frozen=True)
class Decode:
    name: str
    batch: int
    capacity: int
    window: int | None
    length: int  # tokens seen, of every sequence
    kind: str = "decode"

    @property
    def keys(self) -> int:
        """That a query sees, its own included."""
        return self.length + 1 if self.window is None else min(self.window, self.length + 1)


def all_rows(sizes: Sizes, kinds=KINDS, lengths=LENGTHS, mixes=MIXES, batches=BATCHES) -> list:
    rows = []
    for window in (sizes.window, None):
        rows += [Prompt(f"T={n}, W={window}", (n,), window) for n in lengths if "prompt" in kinds]
        rows += [Prompt(f"{name} of {sum(mix)}, W={window}", mix, window) for name, mix in mixes.items() if "packed" in kinds]
    if "decode" in kinds:
        capacity = sizes.window  # the ring has wrapped, and the window begins in its middle
        rows += [Decode(f"B={b}, C={capacity}, W={capacity}", b, capacity, capacity, 2 * capacity + capacity // 3) for b in batches]
        capacity = sizes.causal_capacity
        rows += [Decode(f"B={b}, C={capacity}, W=None", b, capacity, None, capacity - 64) for b in batches]
    return rows


def visited_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: the sum of min(window, position + 1)."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


# --------------------------------------------------------------------------------------------------------- references


def attend_rows(q, k, v, rows, starts, window):
    """Some rows of packed attention, in the dtype of q: that of row r sees the keys max(starts, r - window + 1) .. r.

    q [n, Hq, D], k and v [T, Hk, D]; rows and starts i64 [n] -> out [n, Hq, D], lse [Hq, n]. Holds n * (Hq/Hk) * T scores.
    """
    group, position = q.shape[1] // k.shape[1], torch.arange(len(k), device=q.device)
    first = starts if window is None else torch.maximum(starts, rows - window + 1)
    hidden = (position < first[:, None]) | (position > rows[:, None])
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        scores = (q[:, heads].transpose(0, 1) @ k[:, head].T / math.sqrt(q.shape[2])).masked_fill_(hidden, -math.inf)  # [group, n, T]
        out[:, heads] = (scores.softmax(2) @ v[:, head]).transpose(0, 1)
        lse[heads] = scores.logsumexp(2)
    return out, lse


def sampled_rows(lengths, window, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to check and the first rows of their sequences: the sequences' ends, the edges of windows and tiles, and some between."""
    starts = [0, *itertools.accumulate(lengths)]
    rows = {row for start, end in zip(starts, starts[1:]) for row in (start, end - 1)}
    for start, n in list(zip(starts, lengths))[:8]:
        edges = (1, 63, 64, 127, 128, *((window - 1, window, window + 1, window + 127, window + 128) if window else ()))
        rows |= {start + edge for edge in edges if edge < n}
    rows |= set(torch.linspace(0, starts[-1] - 1, 16).round().long().tolist())
    rows = torch.tensor(sorted(rows), device=device)
    bounds = torch.tensor(starts, device=device)
    return rows, bounds[torch.searchsorted(bounds, rows, right=True) - 1]


def row_errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[n, ...] -> [n]: relative Frobenius error of each row, as rows that see few keys are far larger than the others."""
    difference = (actual.float() - expected.float()).flatten(1)
    return difference.norm(dim=1) / expected.float().flatten(1).norm(dim=1)


# --------------------------------------------------------------------------------------------------------- candidates


def prepared(prepare):
    """The call that `prepare` makes, or one that raises what it raised."""
    try:
        return prepare()
    except Exception as failure:  # noqa: BLE001
        caught = failure

    def call():
        raise caught

    return call


def yardsticks(sizes: Sizes, device: torch.device) -> dict[str, Candidate]:
    """A dense product and a copy, measured in every row that they are compared with."""
    generator = torch.Generator(device).manual_seed(0)
    n, half = sizes.dense, sizes.moved // 4
    a, b = (torch.empty(n, n, dtype=torch.bfloat16, device=device).normal_(generator=generator) for _ in range(2))
    product, source = torch.empty_like(a), torch.empty(half, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    copy, checked = torch.empty_like(source), torch.linspace(0, n - 1, min(n, 16), device=device).round().long()
    return {
        "dense": Candidate(lambda: torch.mm(a, b.T, out=product), lambda c: relative_error(c[checked], a[checked].float() @ b.float().T),
                           6 * n * n, 2 * n**3, poison(product)),
        "copy": Candidate(lambda: copy.copy_(source), lambda c: 0.0 if torch.equal(c, source) else math.inf, 4 * half, 0, poison(copy)),
    }


def prompt_candidates(sizes: Sizes, row: Prompt, compiler, device: torch.device) -> dict[str, Candidate]:
    total, generator = sum(row.lengths), torch.Generator(device).manual_seed(len(row.lengths))
    q, k, v = (torch.empty(total, h, sizes.head_dim, dtype=torch.bfloat16, device=device).normal_(generator=generator)
               for h in (sizes.heads, sizes.key_heads, sizes.key_heads))
    out, (rows, starts) = torch.empty_like(q), sampled_rows(row.lengths, row.window, device)
    packed = {}
    if row.kind == "packed":
        bounds = torch.tensor([0, *itertools.accumulate(row.lengths)], dtype=torch.int32, device=device)
        packed = dict(cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=max(row.lengths), max_seqlen_k=max(row.lengths))

    @functools.cache
    def expected(window):
        return attend_rows(q[rows].float(), k.float(), v.float(), rows, starts, window)[0]

    def candidate(call, window, before=poison()):
        pairs = sum(visited_pairs(n, window) for n in row.lengths)
        return Candidate(call, lambda result: float(row_errors(result[rows], expected(window)).max()),
                         2 * (2 * q.numel() + 2 * k.numel()), 4 * sizes.head_dim * sizes.heads * pairs, before, TOLERANCE)

    def ours():
        return mixtral_ext.sliding_window_attention(q, k, v, window=row.window, **packed, out=(out, None))[0]

    peers = attention_peers.prompt_peers(compiler, q, k, v, row.lengths, row.window)
    return {OURS: candidate(ours, row.window, poison(out))} | {
        name: candidate(prepared(prepare), window) for name, (prepare, window) in peers.items()}


def cache_copies(sizes: Sizes, row: Decode) -> tuple[int, int]:
    """-> bytes of the row's caches, and how many copies of them there are: 2 at least."""
    size = 4 * row.batch * row.capacity * sizes.key_heads * sizes.head_dim
    return size, max(2, -(-sizes.rotated // size))


def decode_candidates(sizes: Sizes, row: Decode, compiler, device: torch.device) -> dict[str, Candidate]:
    """One step. The peers' caches are ours with the new token in its place: which slot it has is nothing to a softmax."""
    generator = torch.Generator(device).manual_seed(row.batch)

    def normal(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(generator=generator)

    b, d, slot = row.batch, sizes.head_dim, row.length % row.capacity
    q, k, v = normal(b, sizes.heads, d), normal(b, sizes.key_heads, d), normal(b, sizes.key_heads, d)
    size, copies = cache_copies(sizes, row)
    caches = [tuple(normal(b, row.capacity, sizes.key_heads, d) for _ in "kv")]
    caches += [tuple(cache.clone() for cache in caches[0]) for _ in range(copies - 1)]
    positions = torch.full((b,), row.length, device=device)
    turned_q, turned_k = (x.bfloat16() for x in reference.apply_rope(q.float(), k.float(), positions, THETA))

    def store():
        for k_cache, v_cache in caches:
            k_cache[:, slot], v_cache[:, slot] = turned_k, v

    store()
    checked = torch.linspace(0, b - 1, min(b, 8), device=device).round().long()
    last, start = (torch.tensor([n], device=device) for n in (row.keys - 1, 0))
    expected = torch.cat([attend_rows(turned_q[i:i + 1].float(), *(cache[i, :row.keys].float() for cache in caches[0]), last, start, None)[0]
                          for i in checked.tolist()])
    common = dict(bytes=4 * b * row.keys * sizes.key_heads * d, flops=4 * b * row.keys * sizes.heads * d, tolerance=TOLERANCE, copies=copies)
    out, lengths = torch.empty_like(q), positions.int()
    arguments = dict(cu_seqlens_q=torch.arange(b + 1, dtype=torch.int32, device=device), cache_lengths=lengths, window=row.window,
                     max_seqlen_q=1, max_cache_length=row.length, rope_theta=THETA, out=(out, None))
    turn = itertools.cycle(caches)  # begins with the copy whose slot is poisoned and then checked

    def ours():
        return mixtral_ext.rolling_attention(q, k, v, *next(turn), **arguments)[0]

    def error(result):
        return float(row_errors(result[checked], expected).max())

    def our_error(result):
        k_cache, v_cache = caches[0]
        stored = relative_error(k_cache[:, slot], turned_k) if torch.equal(v_cache[:, slot], v) else math.inf
        return max(error(result), stored)

    def rotation():
        turn = itertools.cycle(caches)
        return lambda: [cache[:, :row.keys] for cache in next(turn)]

    peers = attention_peers.decode_peers(compiler, turned_q, rotation())
    return {OURS: Candidate(ours, our_error, before=poison(out, *(cache[:, slot] for cache in caches[0])), **common)} | {
        name: Candidate(prepared(prepare), error, before=store, **common) for name, prepare in peers.items()}


# ---------------------------------------------------------------------------------------------------------- measuring


def comparison(results: dict[str, dict], key: str, yardstick: str) -> dict[str, dict]:
    """times: each candidate's over ours; share: of the yardstick's rate that each reaches."""
    done = {name: result for name, result in results.items() if "us" in result}
    base = done.get(OURS, {}).get("us")
    rate = done.get(yardstick, {}).get(key)
    return {"times": {name: r["us"] / base for name, r in done.items() if name not in (OURS, yardstick)} if base else {},
            "share": {name: r[key] / rate for name, r in done.items() if name != yardstick} if rate else {}}


def too_large(sizes: Sizes, row, device: torch.device) -> str | None:
    """Why the caches of a decode row do not fit, if so."""
    if row.kind != "decode":
        return None
    size, copies = cache_copies(sizes, row)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**64
    needed = copies * size + 2**32  # a peer's workspace
    return f"{copies} copies of {size / 1e9:.1f} GB of caches do not fit into {free / 1e9:.1f} GB" if needed > free else None


def peer_versions() -> dict[str, str]:
    """Of the libraries behind the peers that are installed."""
    found = {"cudnn": str(torch.backends.cudnn.version())}
    for name in ("triton", "nvidia-cudnn-frontend", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@torch.no_grad()
def run(sizes: Sizes, rows: list, device: str, budget: float = 0.15, compiling: float = 200, save=lambda results: None, say=print) -> dict:
    """All rows; `save` gets the results so far after each. compiling: seconds that FlexAttention may be compiled for."""
    place = torch.device(device)
    described = machine.describe()
    described["versions"] |= peer_versions()
    results = {"machine": described, "sizes": asdict(sizes), "gpu": {"before": gpu_state(place)}, "rows": []}
    start, load, compiler = time.perf_counter(), watch(place), attention_peers.Flex(compiling)
    measured_beside = yardsticks(sizes, place)
    for row in rows:
        key, yardstick = ("tb_s", "copy") if row.kind == "decode" else ("tflop_s", "dense")
        entry = {"kind": row.kind} | asdict(row)
        try:
            gc.collect()  # exceptions of the row before hold its tensors
            if place.type == "cuda":
                torch.cuda.empty_cache()
            if reason := too_large(sizes, row, place):
                entry["skipped"] = reason
            else:
                make = decode_candidates if row.kind == "decode" else prompt_candidates
                candidates = make(sizes, row, compiler, place) | {yardstick: measured_beside[yardstick]}
                entry["candidates"] = measure(candidates, place, budget)
                del candidates
        except Exception as failure:  # noqa: BLE001
            entry["candidates"] = {OURS: {"failed": first_line(failure)}}
        entry |= comparison(entry.get("candidates", {}), key, yardstick)
        results["rows"].append(entry)
        save(results)
        say(f"{time.perf_counter() - start:4.0f} s, {row.kind} {row.name}: {progress(entry)}")
    results["gpu"] |= {"during": load(), "after": gpu_state(place)}
    results["compiling_s"] = compiler.seconds
    save(results)
    return results


def progress(entry: dict) -> str:
    if "skipped" in entry:
        return entry["skipped"]
    found = entry["candidates"]
    times = [f"{name} {result['us']:.1f}" for name, result in found.items() if "us" in result]
    ours = [f"ours: {found[OURS]['failed']}"] if "failed" in found[OURS] else []
    return ", ".join([*ours, *times]) + f" us; {len(found) - len(times)} not timed"


def broken(results: dict) -> list[str]:
    """Rows in which ours failed."""
    return [row["name"] for row in results["rows"] if "failed" in row.get("candidates", {}).get(OURS, {})]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixtral_bench.gpu_attention", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("build/gpu-check/attention.json"), metavar="FILE", help="default %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="of prompts (default: 1024 to 65536)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="B", help="of decoding (default: 1 to 128)")
    parser.add_argument("--compiling", type=float, default=200, metavar="SECONDS", help="for FlexAttention (default %(default)s)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the tables of earlier results, write them and a plot beside them")
    options = parser.parse_args(arguments)
    if options.report:
        write_report(options.report, table, plot)
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = all_rows(Sizes(), options.kinds, options.lengths, batches=options.batches)
    results = run(Sizes(), rows, "cuda", compiling=options.compiling,
                  save=lambda r: options.json.write_text(json.dumps(r, indent=1) + "\n"))
    print(table(results))
    if failed := broken(results):
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
