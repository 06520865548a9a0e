"""The decoder: torch's norms, projections and embeddings around the ops of mixtral_ext, and its rolling cache.

Shapes: T tokens of all sequences packed, H hidden, Hq/Hk heads, D head dim, C cache slots, E experts, V vocabulary.
"""
from collections.abc import Callable
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


class Cache:
    """Keys (rotated) and values of each layer and sequence, position p in slot p % C: C is the window, or max_length
    where the window does not bite within it."""

    def __init__(self, config: ModelConfig, sequences: int, max_length: int, dtype: torch.dtype,
                 device: str | torch.device = "cpu"):
        for name, value in (("sequences", sequences), ("max_length", max_length)):
            if not isinstance(value, Integral) or value < 1:
                raise ModelError(f"cache: {name}: expected an integer of at least 1, got {value!r}")
        self.window = config.window if config.window is not None and config.window < max_length else None
        self.capacity = self.window or max_length
        shape = (config.num_layers, sequences, self.capacity, config.num_kv_heads, config.head_dim)
        try:
            self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device).unbind() for _ in "kv")
        except RuntimeError:  # torch's way to say so; beyond 2^63 bytes it names only the shape
            size = config.cache_bytes(self.capacity, dtype.itemsize) * sequences
            raise ModelError(f"cache: {sequences} sequences of {self.capacity} positions take {size / 1e9:.1f} GB, "
                             "which this machine does not give") from None
        self.lengths = [0] * sequences  # tokens seen so far


class Model:
    def __init__(self, config: ModelConfig, weights: Weights):
        self.config, self.weights, self.device = config, weights, weights.embed.device

    @classmethod
    def load(cls, directory: str | Path, dtype: torch.dtype | None = None,
             progress: Callable[[int, int], None] | None = None, device: str | torch.device = "cpu") -> "Model":
        """Loads a checkpoint directory (see load_weights)."""
        config = read_config(directory)
        return cls(config, load_weights(directory, config, dtype, progress, device))

    def new_cache(self, sequences: int, max_length: int) -> Cache:
        return Cache(self.config, sequences, max_length, self.weights.embed.dtype, self.device)

    @torch.inference_mode()
    def forward(self, chunks: list[list[int]], cache: Cache, slots: list[int], expert_load: Tensor | None = None) -> Tensor:
        """The next tokens of some sequences -> hidden states [T, H], chunk after chunk.

        chunks[b] (one or more tokens) continues the sequence in cache slot slots[b], another one for each. expert_load
        i64 [layers, E], on any device, is increased by the number of tokens each expert gets. ModelError for anything else,
        before the cache changes."""
        c, w = self.config, self.weights
        check_ids("slots", slots, len(cache.lengths))
        if len(set(slots)) != len(slots) or len(slots) != len(chunks):
            raise ModelError(f"slots: expected a different one for each of {len(chunks)} chunks, got {slots}")
        for b, chunk in enumerate(chunks):
            check_ids(f"chunk {b}", chunk, c.vocab_size)
        if expert_load is not None:
            expected = f"torch.int64 [{c.num_layers}, {c.num_experts}]"
            got = f"{expert_load.dtype} {list(expert_load.shape)}" if isinstance(expert_load, Tensor) else repr(expert_load)
            if got != expected:
                raise ModelError(f"expert_load: expected {expected}, got {got}")
        counts = [len(chunk) for chunk in chunks]
        lengths = [cache.lengths[slot] for slot in slots]
        if cache.window is None and any(n + length > cache.capacity for n, length in zip(counts, lengths)):
            raise ModelError(f"cache: expected at most {cache.capacity} tokens a sequence, got {max(map(sum, zip(counts, lengths)))}")
        bounds = [0]
        for n in counts:
            bounds.append(bounds[-1] + n)
        tokens = bounds[-1]

        def ints(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        attention = dict(cu_seqlens_q=ints(bounds), cache_lengths=ints(lengths), cache_slots=ints(slots),
                         window=cache.capacity,  # without a window it hides nothing: no position is beyond it
                         max_seqlen_q=max(counts), max_cache_length=max(lengths),
                         rope_theta=c.rope_theta, rope_interleaved=c.consolidated)
        all_rows = ints([0, tokens])  # a dense MLP is one expert with every row
        loads = []

        x = F.embedding(ints([token for chunk in chunks for token in chunk]), w.embed)
        for layer, keys, values in zip(w.layers, cache.keys, cache.values):
            h = F.rms_norm(x, (c.hidden_size,), layer.attn_norm, c.norm_eps)
            q = F.linear(h, layer.wq).view(tokens, c.num_heads, c.head_dim)
            k = F.linear(h, layer.wk).view(tokens, c.num_kv_heads, c.head_dim)
            v = F.linear(h, layer.wv).view(tokens, c.num_kv_heads, c.head_dim)
            attended, _ = mixtral_ext.rolling_attention(q, k, v, keys, values, **attention)
            x += F.linear(attended.view(tokens, -1), layer.wo)
            h = F.rms_norm(x, (c.hidden_size,), layer.mlp_norm, c.norm_eps)
            if layer.router is None:
                x += _dense(layer, h, all_rows)
            else:
                # Routing and the sort in one op; its maps spare moe_experts the sort.
                routing = mixtral_ext.moe_gate(F.linear(h, layer.router), c.top_k)
                x += mixtral_ext.moe_experts(h, layer.gate_up, layer.down, *routing)
                loads.append(routing[2])
        for slot, n in zip(slots, counts):
            cache.lengths[slot] += n
        if expert_load is not None and loads:
            expert_load += torch.stack(loads).diff().to(expert_load.device)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, H] -> logits [N, V] in the dtype of the weights."""
        normed = F.rms_norm(hidden, (self.config.hidden_size,), self.weights.norm, self.config.norm_eps)
        return F.linear(normed, self.weights.head)


def _dense(layer: Layer, hidden: Tensor, all_rows: Tensor) -> Tensor:
    """Mistral's MLP through the expert kernels: one weight format for both models, SwiGLU fused into the product."""
    inner = mixtral_ext.grouped_gemm_swiglu(hidden, layer.gate_up, all_rows)
    return mixtral_ext.grouped_gemm(inner, layer.down, all_rows)
