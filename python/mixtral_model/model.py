"""The decoder: torch's norms, projections and embeddings around the ops of mixtral_ext, and its rolling cache.

Shapes: T tokens of all sequences packed, H hidden, Hq/Hk heads, D head dim, C cache slots, E experts, V vocabulary.
"""
from collections.abc import Callable
from itertools import accumulate
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mixtral_ext

from .config import ModelConfig, ModelError, read_config
from .weights import Layer, Weights, load_weights


def check_ids(name: str, ids: list[int], count: int) -> None:
    """ModelError unless ids is a list of one or more integers below count."""
    expected = f"{name}: expected a list of one or more integers from 0 to {count - 1}"
    if not isinstance(ids, (list, tuple)) or not ids:
        raise ModelError(f"{expected}, got {ids!r:.80}")
    for i in ids:
        if not isinstance(i, Integral) or not 0 <= i < count:
            raise ModelError(f"{expected}, got {i!r:.80} in it")


def check_expert_load(config: ModelConfig, expert_load: Tensor | None) -> None:
    """ModelError unless it is None or i64 [layers, E]."""
    expected = f"torch.int64 [{config.num_layers}, {config.num_experts}]"
    got = f"{expert_load.dtype} {list(expert_load.shape)}" if isinstance(expert_load, Tensor) else repr(expert_load)
    if got not in (expected, "None"):
        raise ModelError(f"expert_load: expected {expected}, got {got}")


class Cache:
    """Keys (rotated) and values of each layer and sequence, position p in slot p % C: C is the window, or max_length
    where the window does not bite within it."""

    def __init__(self, config: ModelConfig, sequences: int, max_length: int, dtype: torch.dtype,
                 device: str | torch.device = "cpu"):
        for name, value in (("sequences", sequences), ("max_length", max_length)):
            if not isinstance(value, Integral) or value < 1:
                raise ModelError(f"cache: {name}: expected an integer of at least 1, got {value!r}")
        self.window = config.window if config.window is not None and config.window < max_length else None
        self.capacity = self.positions(config, max_length)
        shape = (config.num_layers, sequences, self.capacity, config.num_kv_heads, config.head_dim)
        try:
            self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device).unbind() for _ in "kv")
        except RuntimeError:  # torch's way to say so; beyond 2^63 bytes it names only the shape
            size = config.cache_bytes(self.capacity, dtype.itemsize) * sequences
            raise ModelError(f"cache: {sequences} sequences of {self.capacity} positions take {size / 1e9:.1f} GB, "
                             "which this machine does not give") from None
        self.lengths = [0] * sequences  # tokens seen so far

    @staticmethod
    def positions(config: ModelConfig, max_length: int) -> int:
        """How many a sequence of max_length tokens takes."""
        return max_length if config.window is None else min(config.window, max_length)


class Model:
    def __init__(self, config: ModelConfig, weights: Weights):
        self.config, self.weights, self.device = config, weights, weights.embed.device

    @classmethod
    def load(cls, directory: str | Path, dtype: torch.dtype | None = None,
             progress: Callable[[int, int], None] | None = None, device: str | torch.device = "cpu", cache_positions: int = 0) -> "Model":
        """Loads a checkpoint directory (see load_weights)."""
        config = read_config(directory)
        return cls(config, load_weights(directory, config, dtype, progress, device, cache_positions))

    def new_cache(self, sequences: int, max_length: int) -> Cache:
        return Cache(self.config, sequences, max_length, self.weights.embed.dtype, self.device)

    @torch.inference_mode()
    def forward(self, chunks: list[list[int]], cache: Cache, slots: list[int], expert_load: Tensor | None = None,
                topk_ids: list[Tensor] | None = None) -> Tensor:
        """The next tokens of some sequences -> hidden states [T, H], chunk after chunk.

        chunks[b] (one or more tokens) continues the sequence in cache slot slots[b], another one for each. expert_load
        i64 [layers, E], on any device, is increased by the number of tokens each expert gets; topk_ids, a list, is extended
        by each layer's choices i32 [T, K], best first. ModelError for anything else, before the cache changes."""
        c = self.config
        check_ids("slots", slots, len(cache.lengths))
        if len(set(slots)) != len(slots) or len(slots) != len(chunks):
            raise ModelError(f"slots: expected a different one for each of {len(chunks)} chunks, got {slots}")
        for b, chunk in enumerate(chunks):
            check_ids(f"chunk {b}", chunk, c.vocab_size)
        check_expert_load(c, expert_load)
        counts = [len(chunk) for chunk in chunks]
        lengths = [cache.lengths[slot] for slot in slots]
        if cache.window is None and any(n + length > cache.capacity for n, length in zip(counts, lengths)):
            raise ModelError(f"cache: expected at most {cache.capacity} tokens a sequence, got {max(map(sum, zip(counts, lengths)))}")
        ids = [token for chunk in chunks for token in chunk]
        inputs = upload([*ids, *lengths, *slots, *accumulate(counts, initial=0)], torch.int32, self.device)
        load = None if expert_load is None else torch.zeros_like(expert_load, device=self.device)
        hidden = self.run(cache, *inputs.split([len(ids), len(slots), len(slots), len(slots) + 1]), max(counts), max(lengths), load, topk_ids=topk_ids)
        for slot, n in zip(slots, counts):
            cache.lengths[slot] += n
        if load is not None:
            expert_load += load.to(expert_load.device)
        return hidden

    @torch.inference_mode()
    def run(self, cache: Cache, ids: Tensor, lengths: Tensor, slots: Tensor, bounds: Tensor, longest: int, longest_cache: int | None,
            expert_load: Tensor | None = None, counted: Tensor | None = None,
            topk_ids: list[Tensor] | None = None) -> Tensor:
        """The layers, on the device alone: nothing waits for it and no value is read, so a CUDA graph can capture it.

        ids i32 [T] of sequences bounds i32 [B+1] in cache slots i32 [B] with lengths i32 [B] -> hidden states [T, H]. longest bounds the
        tokens of a sequence, longest_cache the lengths (None: unknown). expert_load i64 [layers, E] is increased for the experts of token t
        by counted[t] (i64 [T]; None: 1), topk_ids extended by the choices of each layer."""
        c, w = self.config, self.weights
        tokens, heads, kv_heads = len(ids), c.num_heads, c.num_kv_heads
        attention = dict(cu_seqlens_q=bounds, cache_lengths=lengths, cache_slots=slots,
                         window=cache.capacity,  # without a window it hides nothing: no position is beyond it
                         max_seqlen_q=longest, max_cache_length=longest_cache,
                         rope_theta=c.rope_theta, rope_interleaved=c.consolidated)
        all_rows = None if c.num_experts or ids.is_cuda else torch.cat([bounds[:1], bounds[-1:]])
        chosen = []

        x = F.embedding(ids, w.embed)
        for layer, keys, values in zip(w.layers, cache.keys, cache.values):
            h = F.rms_norm(x, (c.hidden_size,), layer.attn_norm, c.norm_eps)
            q, k, v = F.linear(h, layer.wqkv).view(tokens, -1, c.head_dim).split([heads, kv_heads, kv_heads], 1)
            attended, _ = mixtral_ext.rolling_attention(q, k, v, keys, values, **attention)
            x.addmm_(attended.view(tokens, -1), layer.wo.t())
            h = F.rms_norm(x, (c.hidden_size,), layer.mlp_norm, c.norm_eps)
            if layer.router is None:
                _mlp_by_torch(x, layer, h) if all_rows is None else _mlp_by_experts(x, layer, h, all_rows)
            else:
                # Routing and the sort in one op; its maps spare moe_experts the sort.
                routing = mixtral_ext.moe_gate(F.linear(h, layer.router), c.top_k)
                x += mixtral_ext.moe_experts(h, layer.gate_up, layer.down, *routing)
                chosen.append(routing[1])
        if expert_load is not None and chosen:
            ids = torch.stack(chosen).flatten(1).long()  # [layers, T * K]
            each = torch.ones_like(ids) if counted is None else counted[:, None].expand(tokens, c.top_k).flatten().expand_as(ids)
            expert_load.scatter_add_(1, ids, each)
        if topk_ids is not None:
            topk_ids += chosen
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] -> logits [N, V] in the dtype of the weights."""
        normed = F.rms_norm(hidden, (self.config.hidden_size,), self.weights.norm, self.config.norm_eps)
        return F.linear(normed, self.weights.head)


def upload(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the device, without waiting for it."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _mlp_by_torch(x: Tensor, layer: Layer, hidden: Tensor) -> None:
    """Adds Mistral's MLP of hidden [T, H] to x. On an H200 cuBLAS is faster here than the expert kernels, which do not have Hopper's matrix
    instructions, nor blocks enough for the few columns of the down projection."""
    gate, up = F.linear(hidden, layer.gate_up[0]).chunk(2, 1)
    x.addmm_(F.silu(gate).mul_(up), layer.down[0].t())


def _mlp_by_experts(x: Tensor, layer: Layer, hidden: Tensor, all_rows: Tensor) -> None:
    """The same through the expert kernels, as one expert with every row (all_rows i32 [2]: 0, T): on a Xeon with AMX a decoding step takes 0.56
    to 0.62 of transformers' time so (mixtral_bench/results/2026-11-27-xeon-amx-mistral-7b-one-kernel.json)."""
    x += mixtral_ext.grouped_gemm(mixtral_ext.grouped_gemm_swiglu(hidden, layer.gate_up, all_rows), layer.down, all_rows)
