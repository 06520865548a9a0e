"""Attention and rotation: calls, references, bytes and FLOPs. FLOPs: 4 * D a query head and pair of a query and a key that it sees. Bytes: queries,
keys, values and results once; of a step over a cache the keys and values that a query sees."""

import itertools
import math

import torch

import mixtral_ext
from mixtral_bench.files import OURS
from mixtral_bench.op import Op, nbytes
from mixtral_bench.timing import relative_error, worst
from mixtral_ext import reference

TOLERANCE = 0.006  # of a row's relative error: kernels reach 0.0025 in bf16, and one key too many at the window of 4096 makes 0.01


def visited_pairs(queries: int, keys: int, window: int | None) -> int:
    """Pairs of one of the last `queries` positions and a key that it sees: the sum of min(window, position + 1)."""
    def up_to(n):
        full = n if window is None else min(window, n)
        return full * (full + 1) // 2 + (n - full) * full

    return up_to(keys) - up_to(keys - queries)


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


# ------------------------------------------------------------------------------------------------------------ prompts


def _prompt(case, inputs):
    return lambda: mixtral_ext.sliding_window_attention(**inputs)[0]


def _prompt_expected(case, inputs):
    q, k, v = (inputs[name] for name in "qkv")
    rows, starts = sampled_rows([n for n, _ in case.sequences], case.window, q.device)
    expected = attend_rows(q[rows].float(), k.float(), v.float(), rows, starts, case.window)[0]
    return lambda result: worst(row_errors(result[rows], expected).tolist())


def _prompt_flops(case, inputs):
    return 4 * case.head_dim * case.heads * sum(visited_pairs(n, m, case.window) for n, m in case.sequences)


# ----------------------------------------------------------------------------------------------------- over the cache


def _rolling(case, inputs):
    return lambda: mixtral_ext.rolling_attention(**inputs)[0]


def seen_keys(case) -> int:
    """Of all sequences: keys and values that some query of the chunk sees, its own included."""
    before = (length if case.window is None else min(case.window - 1, length) for length in case.lengths)
    return sum(before) + sum(case.chunks)


def _turned_chunks(case, inputs):
    """Of some sequences: number, first row, positions i64 [n], and the chunk's q, k and v in f32, rotated and rounded as the op does."""
    starts = [0, *itertools.accumulate(case.chunks)]
    for b in torch.linspace(0, len(case.chunks) - 1, min(len(case.chunks), 8)).round().long().tolist():
        positions = torch.arange(case.lengths[b], case.lengths[b] + case.chunks[b], device=inputs["q"].device)
        q, k, v = (inputs[name][starts[b]:starts[b + 1]].float() for name in "qkv")
        if case.rope_theta is not None:
            turned = reference.apply_rope(q, k, positions, case.rope_theta, case.rope_interleaved)
            q, k = (t.to(inputs["q"].dtype).float() for t in turned)
        yield b, starts[b], positions, q, k, v


def _rolling_expected(case, inputs):
    """Some queries of some sequences."""
    checks = []
    for b, start, positions, q, k, v in _turned_chunks(case, inputs):
        n, length, device = len(positions), case.lengths[b], positions.device
        ring = torch.arange(0 if case.window is None else max(0, length - case.window + 1), length, device=device) % case.capacity
        keys, values = (torch.cat([inputs[name][b, ring].float(), new]) for name, new in (("k_cache", k), ("v_cache", v)))
        rows = torch.tensor(sorted({0, n // 2, n - 1}), device=device)
        out = attend_rows(q[rows], keys, values, len(ring) + rows, torch.zeros_like(rows), case.window)[0]
        checks.append((start + rows, out))
    return lambda result: worst([error for rows, out in checks for error in row_errors(result[rows], out).tolist()])


def _rolling_stored(case, inputs):
    """The last tokens of these chunks, in the ring."""
    kept = [(b, positions[-case.capacity:] % case.capacity, {"k_cache": k[-case.capacity:], "v_cache": v[-case.capacity:]})
            for b, _, positions, _, k, v in _turned_chunks(case, inputs)]
    return lambda: worst([relative_error(inputs[name][b, slots], new) for b, slots, news in kept for name, new in news.items()])


def _rolling_flops(case, inputs):
    seen = sum(visited_pairs(n, length + n, case.window) for n, length in zip(case.chunks, case.lengths))
    return 4 * case.head_dim * case.heads * seen


def _rolling_bytes(case, inputs):
    return 2 * seen_keys(case) * nbytes(inputs["k"][0]) + 2 * nbytes(inputs["q"])


# ----------------------------------------------------------------------------------------------------------- rotation


def _rope(case, inputs):
    q, k = inputs["q"].clone(), inputs["k"].clone()

    def call():
        mixtral_ext.apply_rope(q, k, inputs["positions"], inputs["theta"], inputs["interleaved"])
        return q, k

    return call


def _rope_expected(case, inputs):
    expected = reference.apply_rope(inputs["q"].float(), inputs["k"].float(), inputs["positions"], inputs["theta"], inputs["interleaved"])
    return lambda result: worst([relative_error(a, b) for a, b in zip(result, expected)])


OPS = {
    "sliding_window_attention": Op({OURS: _prompt}, _prompt_expected, _prompt_flops,
                                   lambda case, inputs: nbytes(inputs["q"], inputs["k"], inputs["v"], inputs["q"]), TOLERANCE),
    "rolling_attention": Op({OURS: _rolling}, _rolling_expected, _rolling_flops, _rolling_bytes, TOLERANCE,
                            lambda case, element: 2 * element * len(case.chunks) * case.capacity * case.key_heads * case.head_dim,
                            in_place=True, stored=_rolling_stored),
    "apply_rope": Op({OURS: _rope}, _rope_expected, lambda case, inputs: 3 * (inputs["q"].numel() + inputs["k"].numel()),
                     lambda case, inputs: 2 * nbytes(inputs["q"], inputs["k"]), TOLERANCE, in_place=True),
}
