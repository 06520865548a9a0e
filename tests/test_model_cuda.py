"""The model in bf16 and f16, on the CPU and on a GPU, against transformers in float64 on the same rounded weights: no further from it
than twice transformers' own error in that dtype. Needs no tokenizer."""
import dataclasses
import gc

import pytest
import torch

from mixtral_model import Model, ModelError, generate
from mixtral_model.decode import sample
from model_checkpoints import DENSE_LAYOUTS, LAYOUTS, VOCAB, load_peer, one_thread, tiny, write  # noqa: F401
from op_calls import relative_error
from test_transformers import is_clear

LENGTHS = (1, 3, 4, 5, 12)  # of prompts; the window is 4
MODELS = {"mixtral": dict(window=4), "mixtral, no window": dict(window=None, max_position_embeddings=40),
          "mixtral, head dim 128": dict(window=4, head_dim=128), "mistral": dict(kind="mistral", window=4)}


class Peer:
    """transformers' model in float64 and in `dtype`, both on the CPU."""

    def __init__(self, directory, dtype):
        self.exact, self.low = load_peer(directory, torch.float64), load_peer(directory, dtype)

    @torch.no_grad()
    def routers(self, prompts):
        """Of prompts of one length -> router logits [layers, B, S, E]."""
        return torch.stack(self.exact(torch.tensor(prompts), output_router_logits=True).router_logits).unflatten(1, (len(prompts), -1))

    def is_clear(self, prompts):
        """Which prompts of one length have experts, in all of their tokens, that rounding hardly ever changes."""
        mixtral = self.exact.config.model_type == "mixtral"
        return is_clear(self.routers(prompts)).all(0).all(1).tolist() if mixtral else [True] * len(prompts)

    def prompts(self, seed=0):
        """Eight of each of LENGTHS, in turn, all clear."""
        generator = torch.Generator().manual_seed(seed)
        candidates = [torch.randint(3, VOCAB, (128, n), generator=generator).tolist() for n in LENGTHS]
        clear = [[prompt for prompt, good in zip(some, self.is_clear(some)) if good][:8] for some in candidates]
        assert min(map(len, clear)) == 8
        return [prompt for group in zip(*clear) for prompt in group]

    @torch.no_grad()
    def logits(self, prompts):
        """exact and low [tokens of all prompts, V]."""
        return [torch.cat([peer(torch.tensor([prompt])).logits[0] for prompt in prompts]) for peer in (self.exact, self.low)]


@pytest.fixture(params=MODELS)
def checkpoint(request, tmp_path):
    """Writes it in a dtype."""
    return lambda dtype: write(tmp_path, tiny(**MODELS[request.param]).to(dtype))


def our_logits(model, prompts, chunk):
    cache, rows = model.new_cache(len(prompts), max(map(len, prompts))), [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk):
        slots = [i for i, prompt in enumerate(prompts) if start < len(prompt)]
        chunks = [prompts[i][start:start + chunk] for i in slots]
        logits = model.logits(model.forward(chunks, cache, slots))
        for i, some in zip(slots, logits.split([len(c) for c in chunks])):
            rows[i].append(some)
    return torch.cat([some for of_prompt in rows for some in of_prompt]).cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits(checkpoint, dtype, device):
    directory = checkpoint(dtype)
    model, peer = Model.load(directory, device=device), Peer(directory, dtype)
    assert model.device.type == device
    prompts = peer.prompts()
    exact, low = peer.logits(prompts)
    for chunk in (1, 5, 100):
        got = our_logits(model, prompts, chunk)
        assert got.dtype == dtype and got.shape == exact.shape
        assert relative_error(got, exact) <= 2 * relative_error(low, exact) + 1e-6


def test_generate(checkpoint, device):
    """Log-probabilities of prompts and of greedy tokens; and the tokens are the likeliest ones, but for rounding."""
    directory, new = checkpoint(torch.bfloat16), 4
    model, peer = Model.load(directory, device=device), Peer(directory, torch.bfloat16)
    prompts = peer.prompts(seed=1)
    results = generate(model, prompts, new, chunk_size=5, logprobs=True, prompt_logprobs=True)
    assert all(len(result.token_ids) == new for result in results)
    texts = [prompt + result.token_ids for prompt, result in zip(prompts, results)]
    kept = [i for i, text in enumerate(texts) if peer.is_clear([text]) == [True]]
    assert len(kept) >= 10
    texts, results = [texts[i] for i in kept], [results[i] for i in kept]

    nexts = torch.tensor([token for text in texts for token in text[1:]])[:, None]
    is_new = torch.tensor([j >= len(text) - new for text in texts for j in range(1, len(text))])
    before_another = torch.tensor([j < len(text) - 1 for text in texts for j in range(len(text))])
    exact, low = (logits.double()[before_another] for logits in peer.logits(texts))
    got = torch.tensor([x for result in results for x in result.prompt_logprobs + result.logprobs])
    their_exact, their_low = (logits.log_softmax(1).gather(1, nexts)[:, 0] for logits in (exact, low))
    assert relative_error(got, their_exact) <= 2 * relative_error(their_low, their_exact) + 1e-6

    # By how much a token's exact logit is below the largest: at most our errors of these two, twice transformers' as a whole.
    below = (exact.amax(1) - exact.gather(1, nexts)[:, 0])[is_new]
    assert below.norm() <= 2 ** 0.5 * 2 * (low - exact)[is_new].norm()


@pytest.mark.parametrize("load_on", ["cpu", "device"])
def test_expert_load(tmp_path, load_on, device):
    directory = write(tmp_path, tiny(window=4).bfloat16())
    peer = Peer(directory, torch.bfloat16)
    prompts = peer.prompts()
    load = torch.zeros(2, 4, dtype=torch.int64, device=device if load_on == "device" else "cpu")
    generate(Model.load(directory, device=device), prompts, 1, chunk_size=5, expert_load=load)
    chosen = torch.cat([peer.routers([prompt]).flatten(1, 2).topk(2).indices.flatten(1) for prompt in prompts], 1)
    assert load.tolist() == [layer.bincount(minlength=4).tolist() for layer in chosen]


# ------------------------------------------------------------------------------------------------------ on a GPU alone


@pytest.mark.gpu
def test_sampling_draws_what_the_cpu_draws():
    logits = torch.randn(300, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    logits[:, 7] = -torch.inf
    draws = torch.rand(300, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for temperature, top_p in ((0.0, 1.0), (0.8, 1.0), (1.0, 0.9), (5e-324, 0.5)):
        cpus, ours = (sample(logits.to(device), temperature, top_p, draws.to(device)) for device in ("cpu", "cuda"))
        assert ours.is_cuda and ours.cpu().equal(cpus)
    logits[5, 5] = torch.nan
    assert (sample(logits.cuda(), 1.0, 0.9, draws.cuda()) == -1).nonzero().tolist() == [[5]]


@pytest.mark.gpu
@pytest.mark.parametrize("kind, layout", [("mixtral", layout) for layout in LAYOUTS] + [("mistral", layout) for layout in DENSE_LAYOUTS])
def test_weights_are_the_cpus_and_take_one_tensor_more(tmp_path, kind, layout):
    """The file holds f32: conversion to bf16 costs no memory on the GPU."""
    directory = write(tmp_path, tiny(kind, hidden_size=256, intermediate_size=1024), layout)
    torch.zeros(1, device="cuda")  # there are no statistics before
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    ours, cpus = (Model.load(directory, torch.bfloat16, device=device).weights for device in ("cuda", "cpu"))
    taken, peak = (torch.cuda.memory_stats()[f"requested_bytes.all.{which}"] - before for which in ("current", "peak"))
    pairs = [(ours.embed, cpus.embed), (ours.norm, cpus.norm), (ours.head, cpus.head)]
    pairs += [(getattr(a, name), b) for a, whole in zip(ours.layers, cpus.layers) for name, b in vars(whole).items() if b is not None]
    assert len(pairs) == 3 + 2 * (7 if kind == "mixtral" else 6)
    assert all(a.is_cuda and a.dtype == torch.bfloat16 and a.cpu().equal(b) for a, b in pairs)
    sizes = [b.nbytes for _, b in pairs]
    assert taken == sum(sizes) <= peak <= taken + max(sizes)


@pytest.mark.gpu
def test_a_pass_waits_for_nothing(checkpoint):
    model = Model.load(checkpoint(torch.bfloat16), device="cuda")
    cache = model.new_cache(2, 40)
    load = torch.zeros(2, 4, dtype=torch.int64, device="cuda") if model.config.num_experts else None
    model.forward([[5, 6, 7], [8]], cache, [0, 1], load)  # warm-up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.forward([[9], [10, 11]], cache, [0, 1], load)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_what_a_gpu_does_not_hold_is_refused(tmp_path):
    directory = write(tmp_path, tiny())
    with pytest.raises(ModelError, match=r"dtype: expected torch.bfloat16 or torch.float16 on cuda, got torch.float32"):
        Model.load(directory, device="cuda")
    model = Model.load(directory, torch.bfloat16, device="cuda")
    windowless = Model(dataclasses.replace(model.config, window=None), model.weights)
    with pytest.raises(ModelError, match="cache: 1 sequences of 10000000000 positions take .* GB, which this machine does not give"):
        windowless.new_cache(1, 10**10)
