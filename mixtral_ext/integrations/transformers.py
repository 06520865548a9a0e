"""Drop-in for transformers 5: our expert layer and attention in their Mixtral, Mistral and models built alike.

    from mixtral_ext.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="mixtral_ext", attn_implementation="mixtral_ext")

On CUDA in bfloat16 or float16. A forward pass waits for the GPU where it checks its mask; the layers do not.

Masks: padding on the left, on the right or on both sides, full and sliding windows, any of transformers' caches. A
mask with padding between tokens (even before the window), a 4-D mask, packed sequences, bidirectional attention and
everything else our kernel would not honour is a ValueError. The rows of padding tokens hold other values than
transformers'. So pad on the left to generate: with right padding, generate() takes the first new token from a padding
row, and the step after it is refused, since its mask has padding between the prompt and the new token.

Inference only: a forward pass under autograd works, its backward raises.
"""

import inspect

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

import mixtral_ext

NAME = "mixtral_ext"


def register() -> None:
    """Make `experts_implementation="mixtral_ext"` and `attn_implementation="mixtral_ext"` known to transformers.

    Calling it again changes nothing. ImportError if the installed transformers describes masks in an older way.
    """
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("mixtral_ext: transformers: expected a release whose mask functions take q_offset (tested with 5.23)")
    ExpertsInterface.register(NAME, experts)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, key_ranges)


def experts(
    module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function: hidden [T, H], ids [T, K], weights [T, K] -> [T, H].

    An id of `num_experts` is a skip marker (expert parallelism). ValueError for experts that are not
    `down(silu(gate(x)) * up(x))` with weights `[E, 2I, H]` (`[gate; up]`) and `[E, H, I]`.
    """
    for flag, expected in (
        ("has_gate", True),
        ("has_bias", False),
        ("is_transposed", False),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
    ):
        _require(getattr(module, flag, expected) == expected, f"experts with {flag}={expected}", f"{flag}={not expected}")
    _require(
        isinstance(module.act_fn, (torch.nn.SiLU, SiLUActivation)), "the SiLU activation", type(module.act_fn).__name__
    )
    _require(type(module)._apply_gate is _default_apply_gate, "silu(gate) * up", f"the gating of {type(module).__name__}")
    return mixtral_ext.moe_experts(
        hidden_states, module.gate_up_proj, module.down_proj, top_k_weights.to(torch.float32), top_k_index
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: q [B, Hq, Sq, D], k and v [B, Hk, Sk, D] -> [B, Sq, Hq, D], no copy of any.

    `attention_mask` is what `key_ranges` made: None, or i32 [B, 1, 1, 2] of first key and number of keys.
    """
    _require(not dropout, "no dropout", f"dropout={dropout}")
    for name in ("softcap", "s_aux", "position_bias", "cache", "cu_seq_lens_q"):
        _require(kwargs.get(name) is None, f"no {name} ({_MEANING[name]})", f"{name}={_describe(kwargs.get(name))}")
    _require(not kwargs.get("output_attentions"), "output_attentions=False", "output_attentions=True")
    is_causal = kwargs.get("is_causal")
    _require(getattr(module, "is_causal", True) if is_causal is None else is_causal, "causal attention", "is_causal=False")

    k_start = k_length = None
    if attention_mask is not None:
        _require(
            attention_mask.dtype == torch.int32 and attention_mask.shape == (query.shape[0], 1, 1, 2),
            "a 2-D attention_mask of ones with padding at the ends",
            f"{_describe(attention_mask)} (prepared masks are not supported)",
        )
        k_start, k_length = (column.contiguous() for column in attention_mask[:, 0, 0].unbind(-1))
    out, _ = mixtral_ext.sliding_window_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        window=sliding_window,
        softmax_scale=scaling,
        k_start=k_start,
        k_length=k_length,
    )
    return out, None


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **_,
) -> torch.Tensor | None:
    """transformers' mask function: the keys each sequence may see, as i32 [B, 1, 1, 2] of (first key, number of keys).

    Indices count in the key tensor that the cache hands to the attention, whose key 0 is token `kv_offset`. None means
    all of its keys; never without `allow_is_causal_skip`, so that a compiled step does not have to make its own mask.

    The kernel aligns the last query with the last key of the range, so every range ends at the last query, token
    q_offset + q_length - 1: the unwritten keys of a static cache stay outside. Padding on the left moves the start.
    Padding on the right needs nothing: the tokens before it do not see it, and its own rows are not used.
    """
    plain = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    _require(
        _same_function(mask_function, plain),
        "plain causal or sliding-window attention",
        "another mask function (packed sequences, bidirectional or custom masks are not supported)",
    )
    end = q_offset + q_length - kv_offset
    if attention_mask is None:
        start, padded = torch.zeros(batch_size, device=device), False
    else:
        end = int(end)
        start = (_first_tokens(attention_mask, kv_offset + end) - kv_offset).clamp(min=0)
        padded = bool(start.any())
    # With window 1 every token sees itself alone, and a dynamic cache keeps all keys but reports none.
    if allow_is_causal_skip and (local_size == 1 or (not padded and isinstance(end, int) and end == kv_length)):
        return None
    return _pack(start, end)


def _first_tokens(attention_mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Where the ones of a mask begin in the first `tokens` columns, i64 [B]; 0 for a row of zeros.

    A mask whose ones do not lie together is refused wherever the gap is: a window that has passed it changes nothing.
    """
    _require(attention_mask.ndim == 2, "a 2-D attention_mask [B, tokens]", _describe(attention_mask))
    _require(
        attention_mask.shape[1] >= tokens,
        f"an attention_mask of {tokens} tokens (cached and new)",
        _describe(attention_mask),
    )
    seen = attention_mask[:, :tokens].bool()
    begins = torch.nn.functional.pad(seen, (1, 0))[:, :-1].logical_not() & seen  # where a run of ones begins
    _require(
        not bool((begins.sum(-1) > 1).any()),
        "an attention_mask of ones with padding at the ends",
        "padding between tokens (for decoding, pad prompts on the left)",
    )
    return begins.int().argmax(-1)


def _pack(start: torch.Tensor, end: int | torch.Tensor) -> torch.Tensor:
    """[B] and a number -> i32 [B, 1, 1, 2] of (start, end - start). 4-D, because transformers passes that shape on."""
    return torch.stack([start, end - start]).to(torch.int32).T[:, None, None, :]


def _same_function(f, g) -> bool:
    """Whether f and g run the same code over equal captured values (transformers composes its masks from closures)."""
    if isinstance(f, tuple) and isinstance(g, tuple):
        return len(f) == len(g) and all(map(_same_function, f, g))
    if inspect.isfunction(f) and inspect.isfunction(g):
        values = [tuple(cell.cell_contents for cell in h.__closure__ or ()) for h in (f, g)]
        return f.__code__ is g.__code__ and _same_function(*values)
    return type(f) is type(g) and isinstance(f, (int, str, type(None))) and f == g


_MEANING = {
    "softcap": "soft capping of the logits",
    "s_aux": "attention sinks",
    "position_bias": "an additive bias",
    "cache": "paged cache of continuous batching",
    "cu_seq_lens_q": "packed sequences",
}


def _describe(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _require(ok: bool, expected: str, got: str) -> None:
    if not ok:
        raise ValueError(f"mixtral_ext in transformers: expected {expected}, got {got}")
