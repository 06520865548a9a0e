"""Batches, sampling, stopping, the cache, and requests that are refused."""
import dataclasses
import re

import numpy as np
import pytest
import torch
from transformers.generation import TopPLogitsWarper

from mixtral_model import Model, ModelError, generate
from mixtral_model.decode import sample
from model_checkpoints import VOCAB, WINDOW, one_thread, tiny, write  # noqa: F401


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.load(write(tmp_path_factory.mktemp("mixtral"), tiny()))


@pytest.fixture(scope="module")
def windowless(tmp_path_factory):
    return Model.load(write(tmp_path_factory.mktemp("windowless"), tiny(window=None, max_position_embeddings=40)))


def _draws(count, seed=0):
    return torch.rand(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def test_the_models_own_eos_ends_a_sequence(model):
    prompt, = _prompts(20)
    free, = generate(model, [prompt], 10)
    eos = free.token_ids[3]
    stopping = Model(dataclasses.replace(model.config, eos_ids=(VOCAB + 1, eos)), model.weights)
    result, = generate(stopping, [prompt], 10)
    assert (result.token_ids, result.finish_reason) == (free.token_ids[:free.token_ids.index(eos) + 1], "eos")
    assert generate(stopping, [prompt], 10, eos_ids=[])[0].token_ids == free.token_ids


def test_same_seed_same_tokens_other_seed_other_tokens(model):
    prompt, = _prompts(20)
    first, again, other = (generate(model, [prompt], 20, temperature=1.0, seed=seed)[0].token_ids for seed in (3, 3, 4))
    assert first == again != other


def test_sampled_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, float("-inf")]])
    draws = 20000
    for temperature in (0.5, 1.0, 2.0):
        counts = sample(logits.expand(draws, -1), temperature, 1.0, _draws(draws)).bincount(minlength=5)
        p = (logits[0].double() / temperature).softmax(0)
        assert ((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 2
    kept = TopPLogitsWarper(top_p)(None, logits).isfinite()[0]
    p = logits[0].double().softmax(0) * kept
    p /= p.sum()
    draws = 20000
    counts = sample(logits.expand(draws, -1), 1.0, top_p, _draws(draws)).bincount(minlength=12)
    assert not counts[~kept].any()
    assert ((counts - draws * p).abs() <= 5 * (draws * p * (1 - p)).sqrt()).all()


def test_greedy_takes_the_largest_logit_and_low_temperature_nears_it():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    draws = _draws(6)
    assert sample(logits, 0.0, 1.0, draws).equal(logits.argmax(1))
    for temperature in (1e-3, 1e-40, 5e-324):
        assert sample(logits, temperature, 1.0, draws).equal(logits.argmax(1))
        assert sample(logits, temperature, 0.5, draws).equal(logits.argmax(1))


@pytest.mark.parametrize("top_p", [0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0], [float("nan")] * 3, [float("-inf")] * 3])
def test_logits_without_a_distribution_are_marked(row, temperature, top_p):
    sound = [0.0, 1.0, -1.0]
    tokens = sample(torch.tensor([row, sound]), temperature, top_p, _draws(2))
    assert tokens.tolist() == [-1, int(sample(torch.tensor([sound]), temperature, top_p, _draws(2)[1:]))]


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
    (dict(prompts=[[5], []]), f"prompt 1: expected a list of one or more integers from 0 to {VOCAB - 1}, got []"),
    (dict(prompts=[[5, VOCAB]]), f"prompt 0: expected a list of one or more integers from 0 to {VOCAB - 1}, got {VOCAB} in it"),
    (dict(prompts=[[-1, 5]]), "got -1 in it"),
    (dict(prompts=[[5, 2.0]]), "prompt 0: expected a list of one or more integers from 0 to 99, got 2.0 in it"),
    (dict(prompts=[[5, None]]), "got None in it"),
    (dict(prompts=[5, 6]), "prompt 0: expected a list of one or more integers from 0 to 99, got 5"),
    (dict(prompts=["text"]), "prompt 0: expected a list of one or more integers from 0 to 99, got 'text'"),
    (dict(prompts="text"), "prompts: expected a list of prompts, each a list of token ids, got 'text'"),
    (dict(prompts=None), "prompts: expected a list of prompts, each a list of token ids, got None"),
    (dict(prompts=torch.tensor([[5]])), "prompts: expected a list of prompts, each a list of token ids, got tensor([[5]])"),
    (dict(temperature=-1.0), "temperature: expected a finite number of at least 0, got -1.0"),
    (dict(temperature=float("nan")), "temperature: expected a finite number of at least 0, got nan"),
    (dict(temperature="hot"), "temperature: expected a finite number of at least 0, got 'hot'"),
    (dict(top_p=0.0), "top_p: expected a number above 0 and at most 1, got 0.0"),
    (dict(top_p=1.5), "top_p: expected a number above 0 and at most 1, got 1.5"),
    (dict(top_p=None), "top_p: expected a number above 0 and at most 1, got None"),
    (dict(chunk_size=0), "chunk_size: expected an integer of at least 1, got 0"),
    (dict(chunk_size=2.0), "chunk_size: expected an integer of at least 1, got 2.0"),
    (dict(seed=2**64), f"seed: expected an integer from 0 to 2**63 - 1, got {2**64}"),
    (dict(seed=0.5), "seed: expected an integer from 0 to 2**63 - 1, got 0.5"),
    (dict(max_tokens=-1), "max_tokens: expected an integer of at least 0, got -1"),
    (dict(max_tokens="9"), "max_tokens: expected an integer of at least 0, got '9'"),
    (dict(eos_ids="</s>"), "eos_ids: expected token ids or None, got ['<', '/', 's', '>']"),
    (dict(eos_ids=[2, None]), "eos_ids: expected token ids or None, got [2, None]"),
    (dict(expert_load=True), "expert_load: expected torch.int64 [2, 4], got True"),
    (dict(expert_load=torch.zeros(2, 3, dtype=torch.int64)), "expert_load: expected torch.int64 [2, 4], got torch.int64 [2, 3]"),
    (dict(expert_load=torch.zeros(2, 4)), "expert_load: expected torch.int64 [2, 4], got torch.float32 [2, 4]"),
])
def test_refused_requests(model, request_, message):
    assert issubclass(ModelError, ValueError)
    with pytest.raises(ModelError, match=re.escape(message)):
        generate(model, **dict(prompts=[[5]], max_tokens=3) | request_)


def test_integers_of_numpy_and_a_single_end_token(model):
    prompt, = _prompts(9)
    free, = generate(model, [prompt], 6, eos_ids=[])
    eos = free.token_ids[2]
    result, = generate(model, [list(np.array(prompt))], np.int64(6), eos_ids=eos, chunk_size=np.int32(4))
    assert result.token_ids == free.token_ids[:free.token_ids.index(eos) + 1]


def test_the_largest_seed(model):
    """Prompt i takes seed + i, beyond 2**63 too."""
    prompt, = _prompts(9)
    tokens = [r.token_ids for r in generate(model, [prompt] * 3, 20, temperature=1.0, seed=2**63 - 1)]
    assert tokens[0] != tokens[1] != tokens[2]
    assert generate(model, [prompt], 20, temperature=1.0, seed=np.int64(2**63 - 1))[0].token_ids == tokens[0]


@pytest.mark.parametrize("length", [10**13, 10**17])  # more than an address space holds; more than 2**63 bytes
def test_a_cache_that_does_not_fit_is_refused(model, length):
    huge = Model(dataclasses.replace(model.config, window=None, max_positions=10**18), model.weights)
    with pytest.raises(ModelError, match=f"cache: 1 sequences of {length + 1} positions take .* GB, which this machine does not give"):
        generate(huge, [[5]], length)


@pytest.mark.parametrize("chunks, slots, message", [
    ([[5], []], [0, 1], "chunk 1: expected a list of one or more integers from 0 to 99, got []"),
    ([[5], [6, 100]], [0, 1], "chunk 1: expected a list of one or more integers from 0 to 99, got 100 in it"),
    ([[5], [6, -1]], [0, 1], "got -1 in it"),
    (["text", [5]], [0, 1], "chunk 0: expected a list of one or more integers from 0 to 99, got 'text'"),
    ([[5], [6]], [0, 2], "slots: expected a list of one or more integers from 0 to 1, got 2 in it"),
    ([[5], [6]], [0, -1], "slots: expected a list of one or more integers from 0 to 1, got -1 in it"),
    ([[5], [6]], [1, 1], "slots: expected a different one for each of 2 chunks, got [1, 1]"),
    ([[5], [6]], [0], "slots: expected a different one for each of 2 chunks, got [0]"),
    ([[5]], 0, "slots: expected a list of one or more integers from 0 to 1, got 0"),
    ([], [], "slots: expected a list of one or more integers from 0 to 1, got []"),
])
def test_refused_chunks_leave_the_cache_alone(model, chunks, slots, message):
    cache = model.new_cache(2, 30)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(7)
    with pytest.raises(ModelError, match=re.escape(message)):
        model.forward(chunks, cache, slots)
    assert cache.lengths == [0, 0]
    assert all((tensor == 7).all() for tensor in (*cache.keys, *cache.values))


@pytest.mark.parametrize("sizes, message", [((0, 5), "cache: sequences: expected an integer of at least 1, got 0"),
                                            ((1, -1), "cache: max_length: expected an integer of at least 1, got -1"),
                                            ((1, 2.5), "cache: max_length: expected an integer of at least 1, got 2.5")])
def test_refused_caches(model, sizes, message):
    with pytest.raises(ModelError, match=message):
        model.new_cache(*sizes)


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
