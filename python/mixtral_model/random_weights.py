"""The published models with random weights, made on the device: what speed and memory depend on, where no checkpoint is at hand."""
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .config import ModelConfig, ModelError
from .model import Model
from .weights import Layer, Weights, check_dtype, check_memory, find_device

_MIXTRAL_8X7B = ModelConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                            norm_eps=1e-5, rope_theta=1e6, consolidated=False, window=None, max_positions=32768, num_experts=8, top_k=2,
                            eos_ids=(2,), bos_id=1)
_MISTRAL_7B = dataclasses.replace(_MIXTRAL_8X7B, vocab_size=32768, num_experts=0, top_k=0)  # v0.3; v0.2 has 32000 tokens
MODELS = {
    "mixtral-8x7b": _MIXTRAL_8X7B,
    "mixtral-8x22b": dataclasses.replace(_MIXTRAL_8X7B, vocab_size=32768, hidden_size=6144, intermediate_size=16384, num_layers=56,
                                         num_heads=48, max_positions=65536),  # Instruct and v0.3; the base model v0.1 has 32000 tokens
    "mistral-7b": _MISTRAL_7B,
    "mistral-7b-v0.1": dataclasses.replace(_MISTRAL_7B, vocab_size=32000, rope_theta=1e4, window=4096)}

BLOCK = 16777213  # a prime: a repeated block lies differently in every row, expert and tensor


def random_config(name: str | ModelConfig, layers: int | None = None) -> ModelConfig:
    """A model of MODELS, or any other configuration, with its first `layers` layers."""
    if isinstance(name, str) and name not in MODELS:
        raise ModelError(f"random weights: expected one of {', '.join(MODELS)}, got {name!r}")
    config = MODELS[name] if isinstance(name, str) else name
    if layers is not None and not 1 <= layers <= config.num_layers:
        raise ModelError(f"layers: expected 1 to {config.num_layers}, got {layers}")
    return dataclasses.replace(config, num_layers=layers or config.num_layers)


def random_weights(name: str | ModelConfig, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16,
                   layers: int | None = None, seed: int = 0, cache_positions: int = 0,
                   progress: Callable[[int, int], None] = lambda done, total: None) -> Model:
    """Normal weights whose variances keep activations, router logits and attention scores of order one. TooLarge if the device has no
    memory for them and a cache of so many positions. progress(done, total) counts layers."""
    config, device = random_config(name, layers), find_device(device)
    check_dtype(dtype, device)
    check_memory(config, dtype, device, cache_positions)
    normal = _Normal(dtype, device, seed)
    h, i, d, v, experts = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size, config.num_experts

    def ones():
        return torch.ones(h, dtype=dtype, device=device)

    q, kv = config.num_heads * d, config.num_kv_heads * d
    embed = normal(v, h, scale=1.0)
    head, made = embed if config.tie_embeddings else normal(v, h), []
    for layer in range(config.num_layers):
        made.append(Layer(attn_norm=ones(), wqkv=normal(q + 2 * kv, h), wo=normal(h, q), mlp_norm=ones(), gate_up=normal(experts or 1, 2 * i, h),
                          down=normal(experts or 1, h, i), router=normal(experts, h) if experts else None))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # made, not only queued
        progress(layer + 1, config.num_layers)
    return Model(config, Weights(embed=embed, norm=ones(), head=head, layers=made))


class _Normal:
    """Tensors [..., out, in] of normal numbers, by default with variance 1 / in. On a GPU all of them are drawn; on the CPU, where a GB
    takes 10 s, one block of them is repeated."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.at = 0  # in the block
        self.block = self._draw(BLOCK, 1.0) if device.type == "cpu" else None

    def _draw(self, shape, scale: float) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, scale, generator=self.generator)

    def __call__(self, *shape: int, scale: float | None = None) -> Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale
        if self.block is None:
            return self._draw(shape, scale)
        tensor = torch.empty(shape, dtype=self.dtype)
        rest = tensor.view(-1)
        while len(rest):
            part = self.block[self.at:self.at + len(rest)]
            torch.mul(part, scale, out=rest[:len(part)])
            rest, self.at = rest[len(part):], (self.at + len(part)) % BLOCK
        return tensor
