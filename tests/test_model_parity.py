"""The model beside transformers (eager attention) on the same weights: tokens, logits, log-probabilities."""
import pytest
import torch

from mixtral_model import Model, generate
from mixtral_model.model import _mlp_by_experts, _mlp_by_torch
from mixtral_model.weights import Layer
from model_checkpoints import DENSE_LAYOUTS, LAYOUTS, VOCAB, WINDOW, edit_json, load_peer, one_thread, tiny, write  # noqa: F401
from op_calls import relative_error

NEW = 12


def _prompt(length, seed=1):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _their_logits(peer, tokens):
    return peer(torch.tensor([tokens])).logits[0]


@torch.no_grad()
def _their_tokens(peer, prompt, count=NEW):
    out = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                        max_new_tokens=count, do_sample=False, pad_token_id=0,
                        use_cache=peer.config.sliding_window != 1)  # its sliding cache keeps too much for a window of 1 (5.23)
    return out[0, len(prompt):].tolist()


def _our_logits(model, tokens, chunk):
    cache = model.new_cache(1, len(tokens))
    return model.logits(torch.cat([model.forward([tokens[i:i + chunk]], cache, [0]) for i in range(0, len(tokens), chunk)]))


def _assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind, layout", [("mixtral", layout) for layout in LAYOUTS] + [("mistral", layout) for layout in DENSE_LAYOUTS])
def test_every_layout(tmp_path, kind, layout):
    peer = tiny(kind)
    model = Model.load(write(tmp_path, peer, layout))
    prompt = _prompt(3 * WINDOW)
    _assert_close(_our_logits(model, prompt, 10), _their_logits(peer, prompt))
    assert generate(model, [prompt], NEW)[0].token_ids == _their_tokens(peer, prompt)


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
@pytest.mark.parametrize("window", [1, WINDOW, None])
def test_lengths_and_chunks(tmp_path, kind, window):
    peer = tiny(kind, window)
    model = Model.load(write(tmp_path, peer))
    for length in (1, WINDOW - NEW // 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 5):
        prompt = _prompt(length)
        logits, tokens = _their_logits(peer, prompt), _their_tokens(peer, prompt)
        for chunk in (1, 7, WINDOW, length):
            _assert_close(_our_logits(model, prompt, chunk), logits)
            assert generate(model, [prompt], NEW, chunk_size=chunk)[0].token_ids == tokens


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
def test_window_as_a_string_and_theta_in_either_place(tmp_path, kind):
    peer = tiny(kind, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    write(tmp_path, peer)
    edit_json(tmp_path / "config.json", sliding_window=str(WINDOW), rope_parameters=..., rope_theta=5e5, head_dim=64)
    prompt = _prompt(3 * WINDOW)
    _assert_close(_our_logits(Model.load(tmp_path), prompt, 9), _their_logits(peer, prompt))


def test_tied_embeddings_and_head_dim_from_the_hidden_size(tmp_path):
    peer = tiny("mistral", tie_word_embeddings=True, head_dim=None, hidden_size=256)
    write(tmp_path, peer)
    edit_json(tmp_path / "config.json", head_dim=...)
    model = Model.load(tmp_path)
    assert model.weights.head is model.weights.embed
    prompt = _prompt(2 * WINDOW)
    _assert_close(_our_logits(model, prompt, 9), _their_logits(peer, prompt))


def test_top_k_and_odd_expert_counts(tmp_path):
    for experts, top_k in ((3, 1), (5, 3)):
        peer = tiny(num_local_experts=experts, num_experts_per_tok=top_k)
        model = Model.load(write(tmp_path / str(experts), peer))
        prompt = _prompt(2 * WINDOW + 1)
        _assert_close(_our_logits(model, prompt, 8), _their_logits(peer, prompt))


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
def test_log_probabilities(tmp_path, kind):
    peer = tiny(kind)
    model = Model.load(write(tmp_path, peer))
    prompt = _prompt(2 * WINDOW + 3)
    result, = generate(model, [prompt], NEW, chunk_size=10, logprobs=True, prompt_logprobs=True)
    tokens = prompt + result.token_ids
    expected = _their_logits(peer, tokens).log_softmax(1)[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(result.prompt_logprobs + result.logprobs), expected, rtol=0, atol=2e-5)
    assert generate(model, [prompt], 0, prompt_logprobs=True)[0].prompt_logprobs == pytest.approx(result.prompt_logprobs, abs=2e-5)


def test_expert_load_counts_the_routing_of_transformers(tmp_path):
    peer = tiny()
    model = Model.load(write(tmp_path, peer))
    prompt = _prompt(3 * WINDOW)
    load = torch.zeros(2, 4, dtype=torch.int64)
    generate(model, [prompt], 1, chunk_size=7, expert_load=load)
    with torch.no_grad():
        routers = peer(torch.tensor([prompt]), output_router_logits=True).router_logits
    assert load.tolist() == [r.topk(2).indices.flatten().bincount(minlength=4).tolist() for r in routers]


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
def test_bf16_is_as_exact_as_transformers(tmp_path, kind):
    """Teacher-forced over the cache. The yardstick is transformers' model in float64 on the same rounded weights (its
    norm and softmax stay in float32, 1e-7, far below what is measured)."""
    write(tmp_path, tiny(kind).bfloat16())
    model = Model.load(tmp_path)
    assert model.weights.embed.dtype == torch.bfloat16
    prompt = _prompt(4 * WINDOW)
    theirs, exact = (_their_logits(load_peer(tmp_path, dtype), prompt).double() for dtype in (torch.bfloat16, torch.float64))
    assert (_our_logits(model, prompt, 7) - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["torch", "experts"])
def test_mlp(by, dtype):
    """Both ways against float64; a GPU takes the first, a CPU the second."""
    generator = torch.Generator().manual_seed(8)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)
    layer = Layer(attn_norm=None, wqkv=None, wo=None, mlp_norm=None, router=None, gate_up=normal(1, 2 * 96, 64), down=normal(1, 64, 96))
    x, hidden = normal(5, 64), normal(5, 64) * 8
    gate, up = (hidden.double() @ layer.gate_up[0].double().T).chunk(2, 1)
    exact = x.double() + (gate.sigmoid() * gate * up) @ layer.down[0].double().T
    if by == "torch":
        _mlp_by_torch(x, layer, hidden)
    else:
        _mlp_by_experts(x, layer, hidden, torch.tensor([0, 5], dtype=torch.int32))
    assert relative_error(x, exact) <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_dtype_override(tmp_path):
    write(tmp_path, tiny().bfloat16(), "fused")
    prompt = _prompt(2 * WINDOW)
    _assert_close(_our_logits(Model.load(tmp_path, torch.float32), prompt, 9),
                  _their_logits(load_peer(tmp_path, torch.float32), prompt))
    assert {w.dtype for w in vars(Model.load(tmp_path, torch.bfloat16).weights.layers[0]).values()} == {torch.bfloat16}
