"""Tiny seeded transformers models, and their weights written in every layout that the model loads."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, logging

logging.disable_progress_bar()

VOCAB = 100
WINDOW = 16
LAYOUTS = ["per-expert", "fused", "sharded", "stacked", "consolidated", "consolidated-stacked"]
DENSE_LAYOUTS = ["per-expert", "sharded", "consolidated"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For a test module to import: at these sizes a second thread only makes the first one wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(kind="mixtral", window=WINDOW, seed=0, **overrides):
    """transformers' model with eager attention, weights large enough that tokens, routing and attention vary."""
    sizes = dict(vocab_size=VOCAB, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=64, sliding_window=window, max_position_embeddings=256,
                 rms_norm_eps=1e-5, initializer_range=0.1, attn_implementation="eager", eos_token_id=None)
    torch.manual_seed(seed)
    if kind == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes | overrides))
    else:
        model = MixtralForCausalLM(MixtralConfig(**sizes | {"num_local_experts": 4} | overrides))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(1, 0.1)
    return model.eval()


def load_peer(directory, dtype):
    """transformers' model from a checkpoint directory; experts in the plain loop that takes every dtype."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager",
                                                experts_implementation="eager").eval()


def write(directory, model, layout="per-expert"):
    """Writes the model's weights and configuration; the first three layouts are transformers' own work."""
    directory = Path(directory)
    if layout in ("per-expert", "fused"):
        model.save_pretrained(directory, save_original_format=layout == "per-expert")
    elif layout == "sharded":
        model.save_pretrained(directory, max_shard_size="200KB")
    elif layout == "stacked":
        model.save_pretrained(directory)
        save_file(_stack(model.state_dict(), "mlp", "block_sparse_moe"), directory / "model.safetensors")
    else:
        directory.mkdir(exist_ok=True)
        _write_consolidated(directory, model, stacked=layout == "consolidated-stacked")
    return directory


def edit_json(path, **changes):
    """Changes keys of a JSON file; a value of ... removes the key."""
    content = json.loads(Path(path).read_text()) | changes
    Path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def pretend_a_card(monkeypatch, free, there):
    """An NVIDIA GPU with so many bytes of memory, of which torch holds nothing."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, there))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)


def mixtral_tokenizer(directory):
    """Puts the tokenizer of Mixtral 8x7B into a checkpoint directory."""
    from mistral_common.tokens.tokenizers import mistral
    shutil.copy(Path(mistral.__file__).parents[2] / "data" / "tokenizer.model.v1", directory)


def _stack(state, block, new_block):
    """Fused experts -> w1, w2, w3 of all experts below one another, w2 transposed."""
    out = {}
    for name, weight in state.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix(f"{block}.experts.gate_up_proj") + new_block
            gate, up = weight.chunk(2, dim=1)
            out[f"{prefix}.w1"], out[f"{prefix}.w3"] = gate.flatten(0, 1).contiguous(), up.flatten(0, 1).contiguous()
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix(f"{block}.experts.down_proj") + new_block
            out[f"{prefix}.w2"] = weight.transpose(1, 2).flatten(0, 1).contiguous()
        else:
            out[name.replace(f".{block}.", f".{new_block}.")] = weight.clone()
    return out


def _write_consolidated(directory, model, stacked):
    c = model.config
    names = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.norm": "norm", "model.layers": "layers",
             "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
             "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    state = {}
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # rows (i, i + D/2) -> (2i, 2i+1)
            weight = weight.view(-1, 2, c.head_dim // 2, c.hidden_size).transpose(1, 2).reshape(weight.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = weight.contiguous()
    if stacked:
        state = _stack(state, "mlp", "block_sparse_moe")
    for name in list(state):
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.replace("mlp.experts.gate_up_proj", "feed_forward.experts")
            gate_up, down = state.pop(name), state.pop(name.replace("gate_up", "down"))
            for e in range(c.num_local_experts):
                w1, w3 = gate_up[e].chunk(2)
                for w, tensor in {"w1": w1, "w2": down[e], "w3": w3}.items():
                    state[f"{prefix}.{e}.{w}.weight"] = tensor.contiguous()
        elif name.endswith("mlp.gate.weight"):
            state[name.replace("mlp.gate", "feed_forward.gate")] = state.pop(name)
    save_file(state, directory / "consolidated.safetensors")
    params = dict(dim=c.hidden_size, n_layers=c.num_hidden_layers, head_dim=c.head_dim, hidden_dim=c.intermediate_size,
                  n_heads=c.num_attention_heads, n_kv_heads=c.num_key_value_heads, norm_eps=c.rms_norm_eps,
                  vocab_size=c.vocab_size, rope_theta=c.rope_parameters["rope_theta"], sliding_window=c.sliding_window)
    if hasattr(c, "num_local_experts"):
        params["moe"] = {"num_experts": c.num_local_experts, "num_experts_per_tok": c.num_experts_per_tok}
    (directory / "params.json").write_text(json.dumps(params))
