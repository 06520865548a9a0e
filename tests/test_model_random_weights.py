"""Random weights: the published sizes, sound numbers that differ everywhere, and what does not fit is refused with its size."""
import dataclasses

import pytest
import torch

from mixtral_model import ModelError, generate
from mixtral_model.__main__ import main
from mixtral_model.random_weights import MODELS, random_config, random_weights
from mixtral_model.weights import TooLarge
from model_checkpoints import one_thread, pretend_a_card  # noqa: F401

SMALL = dataclasses.replace(MODELS["mixtral-8x7b"], hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64,
                            vocab_size=500, num_layers=2, num_experts=4)


@pytest.mark.parametrize("name, parameters, cache", [  # as the model cards have them; cache bytes a position in bf16
    ("mixtral-8x7b", 46_702_792_704, 131072), ("mixtral-8x22b", 140_630_071_296, 229376),
    ("mistral-7b", 7_248_023_552, 131072), ("mistral-7b-v0.1", 7_241_732_096, 131072)])
def test_published_sizes(name, parameters, cache):
    config = random_config(name)
    assert config.parameters() == parameters
    assert config.cache_bytes(1, 2) == cache
    assert (config.window, config.rope_theta) == ((4096, 1e4) if name == "mistral-7b-v0.1" else (None, 1e6))
    assert random_config(name, 3).num_layers == 3


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, num_experts=0, top_k=0)], ids=["mixtral", "mistral"])
def test_weights(config, device):
    model = random_weights(config, device, torch.bfloat16, seed=3)
    w, again, other = model.weights, random_weights(config, device, torch.bfloat16, seed=3).weights, random_weights(config, device, torch.bfloat16).weights
    tensors = [w.embed, w.head, w.norm] + [t for layer in w.layers for t in vars(layer).values() if t is not None]
    assert sum(t.numel() for t in tensors) == config.parameters()
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.bfloat16, device)}
    for t in (w.head, *(getattr(layer, name) for layer in w.layers for name in ("wqkv", "wo", "gate_up", "down"))):
        assert float(t.float().std()) == pytest.approx(t.shape[-1] ** -0.5, rel=0.05) and abs(float(t.float().mean())) < 0.01
    assert float(w.embed.float().std()) == pytest.approx(1, rel=0.05)
    if config.num_experts:  # 4 rows of 256 in each layer
        assert float(torch.cat([layer.router for layer in w.layers]).float().std()) == pytest.approx(256 ** -0.5, rel=0.1)
    assert all((t == 1).all() for t in (w.norm, *(t for layer in w.layers for t in (layer.attn_norm, layer.mlp_norm))))
    assert w.layers[1].down.equal(again.layers[1].down) and not w.layers[1].down.equal(other.layers[1].down)
    result, = generate(model, [[5, 6, 7]], 4, logprobs=True)
    assert len(result.token_ids) == 4 and all(-20 < x < 0 for x in result.logprobs)


def test_a_repeated_block_lies_differently_everywhere(monkeypatch):
    """Two experts, layers or projections that hold the same numbers would hide a wrong index."""
    monkeypatch.setattr("mixtral_model.random_weights.BLOCK", 4093)
    first, second = random_weights(SMALL, "cpu", torch.float32).weights.layers
    q, k, v, _ = first.wqkv.split(128)  # [4 + 2 * 2 heads of 64]
    gate, up = first.gate_up.chunk(2, 1)
    pairs = [(q, k), (k, v), (gate, up), (first.wqkv, second.wqkv), (first.down, second.down)]
    pairs += [(x[e], x[f]) for x in (first.gate_up, first.down) for e in range(4) for f in range(e)]
    assert all(float((a == b).float().mean()) < 0.01 for a, b in pairs)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    pretend_a_card(monkeypatch, 79 * 10**9, 80 * 10**9)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(TooLarge, match=r"weights of 93.4 GB in torch.bfloat16 and a cache of 4.3 GB do not fit into the memory of cuda: "
                                       r"80.0 GB, 79.0 GB of it free"):
        random_weights("mixtral-8x7b", "cuda", cache_positions=32768)
    with pytest.raises(TooLarge, match=r"weights of 1\d{7}.\d GB in torch.float32 .* memory of cpu"):  # more than any machine has
        random_weights(dataclasses.replace(MODELS["mixtral-8x22b"], num_layers=10**6), "cpu", torch.float32)


@pytest.mark.parametrize("arguments, message", [
    (("mixtral-9x9b",), "random weights: expected one of mixtral-8x7b, mixtral-8x22b, mistral-7b, mistral-7b-v0.1, got 'mixtral-9x9b'"),
    (("mistral-7b", "cpu", torch.bfloat16, 33), "layers: expected 1 to 32, got 33"),
    (("mistral-7b", "cpu", torch.bfloat16, 0), "layers: expected 1 to 32, got 0"),
    (("mistral-7b", "cpu", torch.int8), "dtype: expected torch.float32, torch.bfloat16, torch.float16 or None, got torch.int8"),
    (("mistral-7b", "meta"), "device: expected cpu or cuda, got 'meta'")])
def test_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        random_weights(*arguments)


def test_inspect(capsys):
    main(["inspect", "--random-weights", "mixtral-8x7b"])
    assert "46.7 B (46,702,792,704)" in capsys.readouterr().out
    main(["inspect", "--random-weights", "mixtral-8x22b"])
    assert "140.6 B" in capsys.readouterr().out
