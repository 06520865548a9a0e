"""Batches, sampling, stopping, the cache, and requests that are refused."""
import pytest
import torch
from transformers.generation import TopPLogitsWarper

from mixtral_model import Model, ModelError, generate
from mixtral_model.generate import sample
from model_checkpoints import VOCAB, WINDOW, one_thread, tiny, write  # noqa: F401


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.load(write(tmp_path_factory.mktemp("mixtral"), tiny()))


@pytest.fixture(scope="module")
def windowless(tmp_path_factory):
    return Model.load(write(tmp_path_factory.mktemp("windowless"), tiny(window=None, max_position_embeddings=40)))


def _prompts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [1, 7, WINDOW, 100])
def test_unequal_batch_equals_single_runs(model, windowless, settings, chunk):
    for which, lengths in ((model, (3, 50, WINDOW, 1, WINDOW + 1)), (windowless, (3, 20, 1, 10))):
        prompts = _prompts(*lengths)
        batch = generate(which, prompts, 10, chunk_size=chunk, seed=7, logprobs=True, prompt_logprobs=True, **settings)
        for i, (prompt, result) in enumerate(zip(prompts, batch)):
            single, = generate(which, [prompt], 10, seed=7 + i, logprobs=True, prompt_logprobs=True, **settings)
            assert result.token_ids == single.token_ids
            assert result.logprobs == pytest.approx(single.logprobs, abs=2e-5)
            assert result.prompt_logprobs == pytest.approx(single.prompt_logprobs, abs=2e-5)


def test_eos_ends_one_sequence_and_not_the_others(model):
    prompts = _prompts(3, 20, 17)
    free = generate(model, prompts, 10, eos_ids=[])
    eos = free[1].token_ids[3]
    streamed = [[], [], []]
    results = generate(model, prompts, 10, eos_ids=[eos], on_token=lambda i, token: streamed[i].append(token))
    for i, (full, result) in enumerate(zip(free, results)):
        stop = full.token_ids.index(eos) + 1 if eos in full.token_ids else 10
        assert result.token_ids == streamed[i] == full.token_ids[:stop]
        assert result.finish_reason == ("eos" if eos in full.token_ids else "length")
    assert results[1].finish_reason == "eos" and len(results[1].token_ids) <= 4


def test_same_seed_same_tokens_other_seed_other_tokens(model):
    prompt, = _prompts(20)
    first, again, other = (generate(model, [prompt], 20, temperature=1.0, seed=seed)[0].token_ids for seed in (3, 3, 4))
    assert first == again != other


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf")]])
    draws = 20000
    for temperature in (0.5, 1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        counts = sample(logits.expand(draws, -1), temperature, 1.0, [generator] * draws).bincount(minlength=5)
        p = (logits[0].double() / temperature).softmax(0)
        assert ((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 2
    kept = TopPLogitsWarper(top_p)(None, logits).isfinite()[0]
    p = logits[0].double().softmax(0) * kept
    p /= p.sum()
    draws = 20000
    generator = torch.Generator().manual_seed(0)
    counts = sample(logits.expand(draws, -1), 1.0, top_p, [generator] * draws).bincount(minlength=12)
    assert not counts[~kept].any()
    assert ((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt()).all()


def test_greedy_takes_the_largest_logit_and_low_temperature_nears_it():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    generators = [torch.Generator().manual_seed(i) for i in range(6)]
    assert sample(logits, 0.0, 1.0, generators).equal(logits.argmax(1))
    for temperature in (1e-3, 1e-40, 5e-324):
        assert sample(logits, temperature, 1.0, generators).equal(logits.argmax(1))
        assert sample(logits, temperature, 0.5, generators).equal(logits.argmax(1))


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_without_a_distribution_are_refused(value, top_p):
    with pytest.raises(ModelError, match="sampling: expected finite logits"):
        sample(torch.tensor([[0.0, value, 1.0]]), 1.0, top_p, [torch.Generator()])


def test_the_cache_holds_a_window_and_no_more(model, windowless):
    c = model.config
    long, short, full = model.new_cache(2, 1000), model.new_cache(2, 10), windowless.new_cache(2, 30)
    assert [cache.capacity for cache in (long, short, full)] == [WINDOW, 10, 30]
    assert sum(t.untyped_storage().nbytes() for t in (long.keys[0], long.values[0])) == 2 * c.cache_bytes(WINDOW, 4)


def test_no_prompts_and_no_tokens(model):
    assert generate(model, [], 5) == []
    result, = generate(model, _prompts(4), 0)
    assert (result.token_ids, result.logprobs, result.finish_reason) == ([], [], "length")


@pytest.mark.parametrize("request_, message", [
    (dict(prompts=[[5], []]), "prompt 1: expected at least one token"),
    (dict(prompts=[[5, VOCAB]]), f"prompt 0: expected token ids from 0 to {VOCAB - 1}, got 5 to {VOCAB}"),
    (dict(prompts=[[-1, 5]]), "got -1 to 5"),
    (dict(temperature=-1.0), "temperature: expected 0 or more, got -1.0"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(top_p=0.0), "top_p: expected more than 0 and at most 1, got 0.0"),
    (dict(top_p=1.5), "top_p"),
    (dict(chunk_size=0), "chunk_size: expected at least 1, got 0"),
    (dict(seed=2**64), "seed: expected 0 to"),
    (dict(max_tokens=-1), "max_tokens: expected 0 or more, got -1"),
])
def test_refused_requests(model, request_, message):
    with pytest.raises(ModelError, match=message):
        generate(model, **dict(prompts=[[5]], max_tokens=3) | request_)


def test_too_long_for_the_positions_or_the_cache(model, windowless):
    prompt, = _prompts(35)
    assert len(generate(windowless, [prompt], 5)[0].token_ids) == 5
    with pytest.raises(ModelError, match="prompt 0: expected at most 40 positions .*, got 35 tokens and 6 to come"):
        generate(windowless, [prompt], 6)
    assert len(generate(model, _prompts(300), 2, chunk_size=64)[0].token_ids) == 2  # a window has no such end
    cache = windowless.new_cache(1, 4)
    windowless.forward([[5, 6, 7]], cache, [0])
    before = [t.clone() for t in cache.keys]
    with pytest.raises(ModelError, match="cache: expected at most 4 tokens a sequence, got 5"):
        windowless.forward([[5, 6]], cache, [0])
    assert cache.lengths == [3]
    for now, then in zip(cache.keys, before):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
