"""The lines of the speed table: each of our ops beside what people use today, on the same inputs and weights."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import mixtral_ext
from mixtral_bench.cases import CASES
from mixtral_bench.machine import fits_in_memory
from mixtral_bench.measure import OURS, Row

DTYPE = torch.bfloat16
ROTATED = 2**28  # bytes of buffers that successive runs of a small case go through, so that none finds them in a cache


def rows(quick: bool = False) -> Iterator[Row]:
    """All rows, made one after the other. `quick`: an eighth of the sizes or less, to see that everything runs."""
    experts = _case("moe_experts", "mixtral_t512")
    attention = _case("sliding_window_attention", "mistral_16k")
    decode = _case("rolling_attention", "mistral_decode_b1")
    lengths = (2048, 16384)
    if quick:
        experts = dataclasses.replace(experts, hidden=512, intermediate=1792)
        attention = dataclasses.replace(attention, heads=8, key_heads=2, window=512)
        decode = dataclasses.replace(decode, capacity=512, window=512)
        lengths = (256, 2048)
    yield from expert_rows(experts, {1: 3.0, 8: 1.0, 64: 1.0, 512: 3.0})
    for length, target in zip(lengths, (1.0, 4.0)):
        yield attention_row(dataclasses.replace(attention, sequences=((length, length),)), target)
    for batch in (1, 8):
        yield decode_row(dataclasses.replace(decode, chunks=(1,) * batch, lengths=decode.lengths * batch), 2.0)


def _case(op: str, name: str):
    return next(case for case in CASES[op] if case.name == name)


def expert_rows(case, targets: dict[int, float]) -> Iterator[Row]:
    """One row for each number of tokens up to the case's, over the same weights. Peers: transformers' experts backends."""
    inputs = case.inputs(DTYPE)
    w_gate_up, w_down = inputs["w_gate_up"], inputs["w_down"]
    hidden, ids, weights = inputs["hidden"], inputs["topk_ids"].long(), inputs["topk_weights"]
    expected = _experts_f32(hidden, w_gate_up, w_down, weights, ids)
    sizes = case.hidden, case.intermediate, case.experts
    peers = {name: transformers_experts(*sizes, w_gate_up, w_down, name) for name in ("eager", "batched_mm", "grouped_mm")}
    expert_bytes = 2 * (w_gate_up[0].numel() + w_down[0].numel())

    for tokens, target in targets.items():
        if tokens > case.tokens:
            return
        routed = hidden[:tokens], ids[:tokens], weights[:tokens]

        def run_ours(_, routed=routed):
            x, chosen, scale = routed
            return mixtral_ext.moe_experts(x, w_gate_up, w_down, scale, chosen)

        candidates = {OURS: run_ours} | {
            name: lambda _, peer=peer, routed=routed: peer(*routed) for name, peer in peers.items()
        }
        skipped = {}
        if not fits_in_memory(needed := tokens * case.top_k * expert_bytes):
            skipped["batched_mm"] = f"copies {needed / 1e9:.0f} GB of weights"
            del candidates["batched_mm"]
        yield Row(
            group="moe_experts",
            name=f"moe_experts, T={tokens}",
            flops=tokens * case.top_k * expert_bytes,  # 2 a weight, which has 2 bytes
            bytes=len(routed[1].unique()) * expert_bytes,
            slowdown=tokens,
            target=target,
            expected=lambda out, tokens=tokens: (out, expected[:tokens]),
            candidates=candidates,
            skipped=skipped,
        )


def transformers_experts(hidden: int, intermediate: int, experts: int, w_gate_up, w_down, implementation: str):
    """transformers' block over these weights, which are not copied."""
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        block = MixtralExperts(config)
    block.gate_up_proj = torch.nn.Parameter(w_gate_up, requires_grad=False)
    block.down_proj = torch.nn.Parameter(w_down, requires_grad=False)
    return block


def _experts_f32(hidden, w_gate_up, w_down, weights, ids):
    """The expert layer in f32, one expert at a time."""
    out = torch.zeros(hidden.shape)
    for e in range(w_gate_up.shape[0]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (hidden[token].float() @ w_gate_up[e].float().T).chunk(2, -1)
        out.index_add_(0, token, weights[token, slot, None] * ((silu(gate) * up) @ w_down[e].float().T))
    return out


def attention_row(case, target: float) -> Row:
    """A whole prompt with a window. Peer: SDPA with the mask prepared in its own dtype, [B, H, T, D] contiguous."""
    inputs = case.inputs(DTYPE)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    length, window = case.sequences[0][0], case.window
    batched = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
    mask = torch.ones(length, length, dtype=torch.bool).tril_().triu_(1 - window).logical_not_()
    mask = torch.zeros(length, length, dtype=DTYPE).masked_fill_(mask, -math.inf)

    # Checked rows: around the window's edges and spread over the prompt.
    checked = sorted({0, 1, window - 1, window, window + 1, length - 1, *range(0, length, max(1, length // 32))} & set(range(length)))
    expected = torch.stack([_attend_f32(q[p], k[max(0, p - window + 1) : p + 1], v[max(0, p - window + 1) : p + 1]) for p in checked])
    pairs = sum(min(p + 1, window) for p in range(length))
    return Row(
        group="sliding_window_attention",
        name=f"sliding_window_attention, T={length}, W={window}",
        flops=4 * pairs * case.heads * case.head_dim,
        bytes=2 * (q.numel() + k.numel() + v.numel()),
        slowdown=length**2,
        target=target,
        expected=lambda out: ((out[0].transpose(0, 1) if out.ndim == 4 else out)[checked], expected),
        candidates={
            OURS: lambda _: mixtral_ext.sliding_window_attention(q, k, v, window=window)[0],
            "masked SDPA": lambda _: scaled_dot_product_attention(*batched, attn_mask=mask, enable_gqa=True),
        },
    )


def decode_row(case, target: float) -> Row:
    """One new token per sequence over a full ring. Peer: SDPA over the same keys in order, [B, Hk, C, D] contiguous,
    its cache already updated; with grouped heads, and with the query heads of a group as rows as transformers does."""
    inputs = case.inputs(DTYPE)
    q, new = inputs["q"], (inputs["k"], inputs["v"])
    rings = inputs.pop("k_cache"), inputs.pop("v_cache")
    batch, length, window = len(case.chunks), case.lengths[0], case.window
    order = torch.arange(length - window + 1, length) % case.capacity
    ordered = [torch.cat([ring[:, order], x[:, None]], 1).transpose(1, 2).contiguous() for ring, x in zip(rings, new)]
    cache_bytes = 2 * (ordered[0].numel() + ordered[1].numel())
    copies = max(1, -(-ROTATED // cache_bytes))
    rings = [[x.clone() for x in rings] for _ in range(copies)]
    ordered = [[x.clone() for x in ordered] for _ in range(copies)]

    def run_ours(number):
        k_cache, v_cache = rings[number % copies]
        return mixtral_ext.rolling_attention(k_cache=k_cache, v_cache=v_cache, **inputs)[0]

    def run_sdpa(number):
        return scaled_dot_product_attention(q[:, :, None], *ordered[number % copies], enable_gqa=True)[:, :, 0]

    def run_sdpa_rows(number):
        grouped = q.reshape(batch, case.key_heads, -1, case.head_dim)
        return scaled_dot_product_attention(grouped, *ordered[number % copies]).flatten(1, 2)

    keys, values = (x.transpose(1, 2) for x in ordered[0])
    expected = torch.stack([_attend_f32(q[b], keys[b], values[b]) for b in range(batch)])
    return Row(
        group="rolling_attention",
        name=f"rolling_attention decode, B={batch}, {window} keys",
        flops=4 * batch * window * case.heads * case.head_dim,
        bytes=cache_bytes,
        slowdown=batch,
        target=target,
        expected=lambda out: (out, expected),
        candidates={OURS: run_ours, "SDPA": run_sdpa, "SDPA, heads as rows": run_sdpa_rows},
    )


def _attend_f32(q, k, v):
    """One query [Hq, D] over keys and values [m, Hk, D] -> [Hq, D]."""
    group = q.shape[0] // k.shape[1]
    k, v = (x.float().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = (k @ q.float()[..., None])[..., 0] / math.sqrt(q.shape[1])
    return (scores.softmax(-1)[:, None] @ v)[:, 0]
