"""transformers' model on our weights: its parameters are views of ours, so a second model costs no second copy."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .model import Model


def build(model: Model) -> nn.Module:
    """Of Mistral's own checkpoints q and k are copies: there rope turns other pairs."""
    from transformers import AutoModelForCausalLM, MistralConfig, MixtralConfig, logging
    logging.disable_progress_bar()
    c, dtype = model.config, model.weights.embed.dtype
    sizes = dict(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_layers,
                 num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
                 sliding_window=c.window, max_position_embeddings=c.max_positions, tie_word_embeddings=c.tie_embeddings,
                 rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, eos_token_id=None)
    if c.num_experts:
        config = MixtralConfig(**sizes, num_local_experts=c.num_experts, num_experts_per_tok=c.top_k)
    else:
        config = MistralConfig(**sizes)
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, tensor in _parameters(model):
        owner, _, attribute = name.rpartition(".")
        setattr(peer.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config).to(model.device)  # the one of the meta device has no angles
    unset = [name for name, t in (*peer.named_parameters(), *peer.named_buffers()) if t.is_meta]
    if unset:
        raise RuntimeError(f"transformers has parameters that we do not: {', '.join(unset[:3])}")
    return peer.eval()


def _parameters(model: Model) -> Iterator[tuple[str, Tensor]]:
    c, w = model.config, model.weights
    heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield from (("model.embed_tokens.weight", w.embed), ("model.norm.weight", w.norm), ("lm_head.weight", w.head))
    for i, layer in enumerate(w.layers):
        prefix = f"model.layers.{i}."
        for name, tensor in zip("qkv", layer.wqkv.split(heads)):
            if c.consolidated and name != "v":  # rows (2i, 2i+1) -> (i, i + D/2)
                tensor = tensor.view(-1, c.head_dim // 2, 2, c.hidden_size).transpose(1, 2).reshape(tensor.shape)
            yield f"{prefix}self_attn.{name}_proj.weight", tensor
        yield from ((f"{prefix}self_attn.o_proj.weight", layer.wo), (f"{prefix}input_layernorm.weight", layer.attn_norm),
                    (f"{prefix}post_attention_layernorm.weight", layer.mlp_norm))
        if layer.router is None:
            gate, up = layer.gate_up[0].chunk(2)
            yield from ((f"{prefix}mlp.gate_proj.weight", gate), (f"{prefix}mlp.up_proj.weight", up),
                        (f"{prefix}mlp.down_proj.weight", layer.down[0]))
        else:
            yield from ((f"{prefix}mlp.gate.weight", layer.router), (f"{prefix}mlp.experts.gate_up_proj", layer.gate_up),
                        (f"{prefix}mlp.experts.down_proj", layer.down))


@contextmanager
def in_float32(peer: nn.Module):
    """Computes in f32 on the same weights: each layer's are converted while it runs. Takes one layer, or the head, in f32 more."""
    narrow = {}

    def widen(module, *_):
        narrow[module] = [(parameter, parameter.data) for parameter in module.parameters()]
        for parameter, data in narrow[module]:
            parameter.data = data.float()

    def restore(module, *_):
        for parameter, data in narrow.pop(module):
            parameter.data = data

    modules = (peer.model.embed_tokens, *peer.model.layers, peer.model.norm, peer.lm_head)
    hooks = [hook for module in modules
             for hook in (module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True))]
    experts = peer.get_experts_implementation()
    peer.set_experts_implementation("eager")  # the loop, which takes every dtype
    try:
        yield
    finally:
        peer.set_experts_implementation(experts)
        for hook in hooks:
            hook.remove()


@contextmanager
def routed_as(peer: nn.Module, choices: list[Tensor]) -> Iterator[list[float]]:
    """Sends token t of layer l to the experts choices[l][t] (i32 [T, K]; none for a dense model), weighted by the peer's own router: rounding
    alone gives some tokens of a deep model other experts, and all that follows is another computation then. Yields a list that gets, layer
    by layer, the share of tokens which the peer itself would have sent elsewhere."""
    elsewhere = []

    def choose(ids):
        def hook(router, inputs, output):
            logits, weights, own = output
            elsewhere.append(float((ids.sort(1).values != own.sort(1).values).any(1).float().mean()))
            chosen = logits.float().softmax(1).gather(1, ids)
            return logits, (chosen / chosen.sum(1, keepdim=True)).to(weights.dtype), ids
        return hook

    hooks = [layer.mlp.gate.register_forward_hook(choose(ids.long())) for layer, ids in zip(peer.model.layers, choices)]
    try:
        yield elsewhere
    finally:
        for hook in hooks:
            hook.remove()


def _fill(cache, config: ModelConfig, keys: Tensor, values: Tensor, context: int) -> None:
    """As if `context` tokens had been read whose last keys (rotated, as ours are) and values are these [B, n, Hk, D] in each layer; what was
    before them is out of sight, and zero."""
    if config.consolidated:  # dims (2i, 2i+1) -> (i, i + D/2)
        keys = keys.unflatten(3, (-1, 2)).transpose(3, 4).flatten(3)
    keys, values = (F.pad(t.transpose(1, 2), (0, 0, context - t.shape[1], 0)) for t in (keys, values))  # [B, Hk, context, D]
    for layer in range(config.num_layers):
        cache.update(keys, values, layer)


@torch.inference_mode()
def read_on(peer: nn.Module, config: ModelConfig, keys: Tensor, values: Tensor, context: int, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of tokens [B, S] after `context` others (see _fill), in one pass."""
    from transformers import DynamicCache
    cache = DynamicCache(config=peer.config)
    _fill(cache, config, keys, values, context)
    return peer(input_ids=tokens, past_key_values=cache, use_cache=True).logits


def decode_step(peer: nn.Module, config: ModelConfig, keys: Tensor, values: Tensor, context: int, steps: int,
                compiled: bool) -> Callable[..., Tensor]:
    """A step as its generate() makes it, greedy, after `context` tokens (see _fill). Over its dynamic cache, or compiled (into CUDA graphs)
    over its static one, which holds so many steps."""
    from transformers import DynamicCache, StaticCache
    cache = StaticCache(config=peer.config, max_cache_len=context + steps) if compiled else DynamicCache(config=peer.config)
    torch.compiler.reset()  # each batch is compiled anew
    forward = torch.compile(peer, mode="reduce-overhead") if compiled else peer
    _fill(cache, config, keys, values, context)
    tokens = torch.zeros(len(keys), 1, dtype=torch.int64, device=keys.device)

    @torch.inference_mode()
    def step(given: Tensor | None = None) -> Tensor:
        """Reads the tokens given [B], or those of the step before, which come to the host -> logits [B, V]."""
        if given is not None:
            tokens.copy_(given[:, None])
        logits = forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens.copy_(logits.argmax(-1, keepdim=True))
        tokens.tolist()
        return logits
    return step


@torch.inference_mode()
def prefill(peer: nn.Module, prompt: list[int], chunk_size: int, last: int) -> Tensor:
    """Reads a prompt into a dynamic cache in chunks -> logits [n, V] of its last tokens, at most `last` and those of one chunk."""
    from transformers import DynamicCache
    cache = DynamicCache(config=peer.config)
    for start in range(0, len(prompt), chunk_size):
        ids = torch.tensor([prompt[start:start + chunk_size]], device=peer.device)
        logits = peer(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last).logits
    return logits[0]
