"""The decoding step: on static buffers with the next step under way it gives what sequences give that leave the batch, and it waits for nothing.

Without a GPU a function that calls the step stands in for its graph: everything else of the loop is the same code."""
import dataclasses
import functools
import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_model import Model, ModelError, generate
from mixtral_model.decode import Decoder, Graph, sample, side_stream
from mixtral_model.generate import prefill
from mixtral_model.weights import Layer, Weights
from model_checkpoints import VOCAB, WINDOW, one_thread, tiny, write  # noqa: F401
from op_calls import relative_error
from test_model_cuda import Peer

KINDS = {"window": dict(), "no window": dict(window=None, max_position_embeddings=60), "mistral": dict(kind="mistral")}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    return Model.load(write(tmp_path_factory.mktemp("model"), tiny(**KINDS[request.param])))


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    return Model.load(write(tmp_path_factory.mktemp("windowed"), tiny()))


def replays_the_call(function, device):
    return function


def capture_with(monkeypatch, captures):
    """generate() then decodes static batches on any device, which captures(function, device) makes what replays."""
    monkeypatch.setattr(sys.modules["mixtral_model.generate"], "Decoder", functools.partial(Decoder, captures=captures))


def _prompts(*lengths, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def _load(model):
    return torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.int64)


def _draw(logits, temperature, top_p, draw):
    """numpy: the inverse of the distribution function at draw."""
    p = np.exp((logits.double().numpy() - float(logits.max())) / temperature)
    order = np.argsort(-p, kind="stable")
    p = p[order] / p.sum()
    if top_p < 1:
        p = p[:int((np.cumsum(p) - p < top_p).sum())]
    elif top_p == 1:
        back = np.argsort(order)
        p, order = p[back], np.arange(len(p))  # without top_p tokens are in the order of their ids
    return int(order[np.searchsorted(np.cumsum(p), draw * p.sum(), side="right")])


def _one_by_one(model, prompt, count, eos, temperature=0.0, top_p=1.0, seed=0):
    """Prompt and tokens through Model.forward alone -> tokens, log-probabilities, expert load."""
    cache, generator, load = model.new_cache(1, len(prompt) + count), torch.Generator().manual_seed(seed), _load(model)
    tokens, logprobs, chunk = [], [], prompt
    while len(tokens) < count and (not tokens or tokens[-1] != eos):
        logits = model.logits(model.forward([chunk], cache, [0], load)[-1:])[0]
        draw = float(torch.rand(1, generator=generator, dtype=torch.float64)) if temperature else None
        tokens.append(_draw(logits, temperature, top_p, draw) if temperature else int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(0)[tokens[-1]]))
        chunk = tokens[-1:]
    return tokens, logprobs, load


@pytest.mark.parametrize("captures", [None, replays_the_call], ids=["leave the batch", "static"])
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.8), dict(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled", "top-p"])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 30])
def test_tokens_are_those_of_single_passes(model, captures, settings, count, monkeypatch):
    """Unequal prompts beyond the window, the ring wraps, one ends in the middle; the windowless cache is filled to its end."""
    capture_with(monkeypatch, captures)
    prompts = _prompts(3, 20, WINDOW, 30)
    free = _one_by_one(model, prompts[1], count, None, seed=8, **settings)[0]
    eos = free[len(free) // 2]
    load, expected_load, seen = _load(model), _load(model), [[] for _ in prompts]
    results = generate(model, prompts, count, chunk_size=7, seed=7, logprobs=True, eos_ids=[eos, VOCAB + 5, -1], expert_load=load,
                       on_token=lambda i, token: seen[i].append(token), **settings)
    for i, (prompt, result) in enumerate(zip(prompts, results)):
        tokens, logprobs, of_one = _one_by_one(model, prompt, count, eos, seed=7 + i, **settings)
        assert result.token_ids == seen[i] == tokens
        assert result.logprobs == pytest.approx(logprobs, abs=2e-5)
        assert result.finish_reason == ("eos" if tokens[-1] == eos else "length")
        expected_load += of_one
    assert results[1].finish_reason == "eos"
    assert load.equal(expected_load)


def test_the_next_step_is_under_way_when_a_token_is_read(windowed, monkeypatch):
    events, step = [], Decoder.step

    def captures(function, device):
        events.append("capture")
        return lambda: (events.append("replay"), function())

    monkeypatch.setattr(Decoder, "step", lambda self: (events.append("step"), step(self)))
    capture_with(monkeypatch, captures)
    generate(windowed, _prompts(5, 9), 6, on_token=lambda i, token: events.append(i))
    assert events == ["step", 0, 1, "step", 0, 1, "capture", "replay", "step", 0, 1, "replay", "step", 0, 1, "replay", "step", 0, 1, 0, 1]


@pytest.mark.parametrize("count, captured", [(1, 0), (4, 0), (5, 1)])
def test_a_few_steps_are_not_worth_a_capture(windowed, count, captured, monkeypatch):
    made = []
    capture_with(monkeypatch, lambda function, device: made.append(1) or function)
    generate(windowed, _prompts(5), count)
    assert len(made) == captured


def test_without_log_probabilities_there_are_none(windowed):
    decoder, hidden = _decoder(windowed)
    for sent in (decoder.first(hidden), decoder.next()):
        assert [(i, logprob) for i, _, logprob in sent.read()] == [(0, None), (1, None)]


@pytest.mark.parametrize("count", [3, 8])  # on a GPU too short for a capture, and captured
def test_the_cache_is_gone_after_generate(windowed, monkeypatch, count, device, tmp_path):
    """At once, not when Python looks for cycles: it may be most of a GPU's memory."""
    model = windowed if device == "cpu" else Model.load(write(tmp_path, tiny().bfloat16()), device="cuda")
    caches, new_cache = [], Model.new_cache

    def seen(*arguments):
        cache = new_cache(*arguments)
        caches.append(weakref.ref(cache))
        return cache
    monkeypatch.setattr(Model, "new_cache", seen)
    gc.collect()
    gc.disable()
    try:
        generate(model, _prompts(5), count)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


@pytest.mark.parametrize("captures", [None, replays_the_call], ids=["leave the batch", "static"])
def test_generate_after_an_exception_of_the_callers(device, windowed, captures, monkeypatch, tmp_path):
    """In the middle of a stream, with a step under way; on a GPU static is a graph."""
    model = windowed if device == "cpu" else Model.load(write(tmp_path, tiny().bfloat16()), device="cuda")
    if device == "cpu":
        capture_with(monkeypatch, captures)
    prompts, seen = _prompts(4, 20), []
    expected = generate(model, prompts, 12, logprobs=True)

    def on_token(i, token):
        seen.append((i, token))
        if len(seen) == 15:
            raise KeyError("the caller's own")
    with pytest.raises(KeyError, match="the caller's own"):
        generate(model, prompts, 12, on_token=on_token)
    assert seen == [(i, expected[i].token_ids[n]) for n in range(8) for i in range(2)][:15]
    assert generate(model, prompts, 12, logprobs=True) == expected


def test_a_short_text_in_a_long_cache(device, tmp_path):
    """A step does not know how long the texts are, only what the cache can hold; no window, no experts. In bf16 beside transformers in f64."""
    directory = write(tmp_path, tiny("mistral", window=None, max_position_embeddings=32768).bfloat16())
    model, peer, prompts, steps = Model.load(directory, device=device), Peer(directory, torch.bfloat16), _prompts(5, 300), 8
    cache = model.new_cache(2, 32768)
    hidden = prefill(model, cache, prompts, 100)
    decoder = Decoder(model, cache, steps, captures=replays_the_call if device == "cpu" else None)
    read = [[token for _, token, _ in decoder.first(hidden).read()]]
    logits = []
    for _ in range(steps):
        read.append([token for _, token, _ in decoder.next().read()])
        logits.append(decoder.logits.cpu().clone())
    texts = [prompt + [tokens[i] for tokens in read[:-1]] for i, prompt in enumerate(prompts)]
    exact, low = (torch.cat([peer_logits[len(texts[0]) - steps:len(texts[0])], peer_logits[-steps:]]) for peer_logits in peer.logits(texts))
    got = torch.stack(logits, 1).flatten(0, 1)
    assert relative_error(got, exact) <= 2 * relative_error(low, exact) + 1e-6


@pytest.mark.parametrize("settings, steps, message", [
    (dict(), 32, "steps: expected at most 31, for which the cache has room, got 32"),
    (dict(temperature=0.5), 5, "generators: expected one for each of 2 sequences, got 0"),
    (dict(temperature=0.5, generators=[torch.Generator()]), 5, "generators: expected one for each of 2 sequences, got 1"),
])
def test_what_a_decoder_refuses(settings, steps, message, tmp_path):
    model = Model.load(write(tmp_path, tiny(window=None)))
    cache = model.new_cache(2, 40)
    prefill(model, cache, _prompts(4, 9), 100)
    with pytest.raises(ModelError, match=message):
        Decoder(model, cache, steps, **settings)


def test_a_ring_takes_any_number_of_steps(windowed):
    cache = windowed.new_cache(1, 1000)
    prefill(windowed, cache, _prompts(9), 100)
    decoder = Decoder(windowed, cache, 10**6)
    assert len(list(decoder.next().read())) == 1


def test_what_a_step_refuses(windowed):
    static, hidden = _decoder(windowed)
    static.first(hidden)
    assert [i for i, _, _ in static.next([0, 1]).read()] == [0, 1]
    with pytest.raises(ModelError, match=r"rows: expected \[0, 1\] or None, since a static batch runs whole, got \[1\]"):
        static.next([1])
    leaving, hidden = _decoder(windowed, captures=None)
    leaving.first(hidden)
    for rows in [[0, 1]] + [[1]] * 18:
        assert [i for i, _, _ in leaving.next(rows).read()] == rows
    with pytest.raises(ModelError, match="steps: expected no more than the decoder was made for, got one more"):
        leaving.next()


def test_a_sequence_that_has_ended_writes_at_one_position_of_its_own(model):
    prompts = _prompts(4, 9)
    first, other = (result.token_ids[0] for result in generate(model, prompts, 1))
    assert first != other
    cache = model.new_cache(2, 9 + 12)
    hidden = prefill(model, cache, prompts, 100)
    decoder = Decoder(model, cache, 11, eos_ids=[first], captures=replays_the_call)
    decoder.first(hidden)
    before = [t.clone() for t in (*cache.keys, *cache.values)]
    for _ in range(11):
        decoder.next()
    assert decoder.live.tolist()[0] == 0 and decoder.lengths.tolist()[0] == 4
    for now, then in zip((*cache.keys, *cache.values), before):
        same = torch.isclose(now, then, rtol=0, atol=0, equal_nan=True)[0].flatten(1).all(1)  # what nobody has written may be NaN
        assert (~same).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("captures", [None, replays_the_call], ids=["leave the batch", "static"])
@pytest.mark.parametrize("settings", [dict(), dict(temperature=1.0, top_p=0.9)], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_end_in_an_error(windowed, captures, settings, monkeypatch):
    """Here those after the third token, which comes up nowhere else: what came before has been shown."""
    capture_with(monkeypatch, captures)
    for seed in range(20):
        prompts = _prompts(4, 9, seed=seed)
        free = generate(windowed, prompts, 3, eos_ids=[], **settings)
        if free[1].token_ids[2] not in free[0].token_ids + prompts[0] + prompts[1] + free[1].token_ids[:2]:
            break
    else:
        pytest.fail("no such prompts")
    embed = windowed.weights.embed.clone()
    embed[free[1].token_ids[2]] = torch.nan
    broken, seen = Model(windowed.config, dataclasses.replace(windowed.weights, embed=embed)), []
    with pytest.raises(ModelError, match="sampling: expected finite logits"):
        generate(broken, prompts, 9, eos_ids=[], on_token=lambda i, token: seen.append((i, token)), **settings)
    assert seen == [(i, free[i].token_ids[n]) for n in range(3) for i in range(2)]


def test_what_a_sequence_yields_after_its_end_is_no_error(windowed, monkeypatch):
    prompts = _prompts(4, 9)
    free, other = generate(windowed, prompts, 8, eos_ids=[])
    n = next(n for n in range(7) if free.token_ids[n] not in free.token_ids[:n] + other.token_ids
             and free.token_ids[n + 1] not in prompts[0] + prompts[1] + free.token_ids[:n + 1] + other.token_ids)
    embed = windowed.weights.embed.clone()
    embed[free.token_ids[n + 1]] = torch.nan
    broken = Model(windowed.config, dataclasses.replace(windowed.weights, embed=embed))
    capture_with(monkeypatch, replays_the_call)
    results = generate(broken, prompts, 8, eos_ids=[free.token_ids[n]])
    assert [result.token_ids for result in results] == [free.token_ids[:n + 1], other.token_ids]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_from_a_whole_vocabulary(batch, top_p, device):
    """Beside numpy in float64. On a GPU captured and replayed with other logits, as a step is, and called. Many logits in bf16 are equal."""
    generator = torch.Generator().manual_seed(6)
    logits = (3 * torch.randn(6, batch, 32000, generator=generator)).bfloat16()
    draws = torch.rand(6, batch, 1, generator=generator, dtype=torch.float64)
    given, numbers, out = logits[0].to(device), draws[0].to(device), torch.zeros(batch, dtype=torch.int64, device=device)

    def run():
        sample(given, 0.8, top_p, numbers, out=out)
    if device == "cuda":
        with torch.cuda.stream(side_stream(given.device)):
            run()
        torch.cuda.synchronize()
        run = Graph(run, given.device)
    for some, of_rows in zip(logits, draws):
        given.copy_(some)
        numbers.copy_(of_rows)
        run()
        assert out.tolist() == [_draw(row, 0.8, top_p, float(x)) for row, x in zip(some, of_rows)]
        assert sample(given, 0.8, top_p, numbers).equal(out)


# ------------------------------------------------------------------------------------------- nothing waits for the device


class OnTheDeviceAlone(TorchDispatchMode):
    """Refuses what reads a value on the host, has a shape that depends on values, or brings host data or another device's."""
    REFUSED = ("local_scalar_dense", "item", "nonzero", "masked_select", "unique", "lift_fresh", "equal", "is_nonzero", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::").lstrip("_")
        assert not name.startswith(self.REFUSED), name
        assert not (name == "repeat_interleave" and len(args) < 3), name
        assert not (name.startswith("index") and any(t is not None and t.dtype == torch.bool for t in (args[1] if isinstance(args[1], list) else ())))
        return function(*args, **(kwargs or {}))


SETTINGS = [dict(), dict(temperature=0.7), dict(temperature=0.7, top_p=0.9, logprobs=True)]


def _decoder(model, lengths=(3, 20), **settings):
    prompts = _prompts(*lengths)
    cache = model.new_cache(len(prompts), max(lengths) + 20)
    hidden = prefill(model, cache, prompts, 100)
    load = _load(model).to(model.device) if model.config.num_experts else None
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    settings = dict(eos_ids=[2, 3], generators=generators, expert_load=load, captures=replays_the_call) | settings
    return Decoder(model, cache, 19, **settings), hidden


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_reads_no_value(model, settings):
    decoder, hidden = _decoder(model, **settings)
    decoder.first(hidden)
    with torch.inference_mode(), OnTheDeviceAlone():
        decoder.step()


@pytest.mark.parametrize("bad", [lambda t: t[0].item(), lambda t: bool(t.any()), lambda t: t[t > 0], lambda t: t.nonzero(), lambda t: torch.tensor([1]),
                                 lambda t: t.repeat_interleave(t.long()), lambda t: t.unique(), lambda t: t.equal(t)])
def test_what_such_a_step_may_not_do(bad):
    with pytest.raises(AssertionError), torch.inference_mode(), OnTheDeviceAlone():
        bad(torch.ones(3))


def _index(t, at):
    """t[at] of slices, integers and None by views: torch's own indexing and copy_ want the driver of the device."""
    dim = 0
    for i in at if isinstance(at, tuple) else (at,):
        if i is None:
            t, dim = t.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            start, stop, _ = i.indices(t.shape[dim])
            t, dim = t.narrow(dim, start, stop - start), dim + 1
        else:
            t = t.select(dim, i)
    return t


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_mixes_no_devices(model, settings, monkeypatch):
    """On tensors without data that say they are on a GPU: torch refuses what needs a value, and host tensors among them."""
    decoder, _ = _decoder(model, **settings)
    monkeypatch.setattr(FakeTensor, "__getitem__", _index)
    monkeypatch.setattr(FakeTensor, "copy_", lambda to, source: torch.ops.aten.copy_(to, source))
    with FakeTensorMode(), torch.inference_mode():
        def there(value):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda") if isinstance(value, torch.Tensor) else value

        w = model.weights
        layers = [Layer(**{name: there(t) for name, t in vars(layer).items()}) for layer in w.layers]
        decoder.model = Model(model.config, Weights(there(w.embed), there(w.norm), there(w.head), layers))
        decoder.cache.keys, decoder.cache.values = ([there(t) for t in ts] for ts in (decoder.cache.keys, decoder.cache.values))
        for name, value in list(vars(decoder).items()):
            setattr(decoder, name, there(value))
        decoder.step()
        assert decoder.sampled.device.type == "cuda"
        decoder.lengths = torch.zeros(2, dtype=torch.int32)
        with pytest.raises(Exception, match="(?i)device"):
            decoder.step()


# ------------------------------------------------------------------------------------------------------ on a GPU alone


@pytest.fixture(params=KINDS)
def on_gpu(request, tmp_path):
    return Model.load(write(tmp_path, tiny(**KINDS[request.param]).bfloat16()), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_replay_is_a_call(on_gpu, settings):
    """Step by step, bits of everything that a step leaves behind; lengths differ and the ring wraps."""
    (graphed, hidden), (called, again) = _decoder(on_gpu, captures=Graph, **settings), _decoder(on_gpu, **settings)
    assert graphed.first(hidden).read() is not None and called.first(again).read() is not None
    for _ in range(19):
        assert list(graphed.next().read()) == list(called.next().read())
        for name in ("tokens", "lengths", "live", "sampled", "logprobs", "draws", "expert_load"):
            a, b = getattr(graphed, name), getattr(called, name)
            assert a is b is None or a.equal(b), name
        for a, b in zip((*graphed.cache.keys, *graphed.cache.values), (*called.cache.keys, *called.cache.values)):
            for slot, length in enumerate(called.lengths.tolist()):
                used = min(length, called.cache.capacity)
                assert a[slot, :used].equal(b[slot, :used])
    assert isinstance(graphed.replay, Graph)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.8, top_p=0.9)], ids=["greedy", "sampled"])
def test_generate_in_a_graph(on_gpu, settings, monkeypatch):
    """Unequal prompts, one ends in the middle: as with the step called, twice in a row."""
    prompts, results = _prompts(3, 20, WINDOW, 30), []
    eos = generate(on_gpu, prompts, 30, eos_ids=[], seed=7, **settings)[1].token_ids[11]
    for captures in (replays_the_call, Graph, Graph):
        capture_with(monkeypatch, captures)
        load = _load(on_gpu)
        results.append((generate(on_gpu, prompts, 30, eos_ids=[eos], seed=7, logprobs=True, expert_load=load, **settings), load.tolist()))
    assert results[0] == results[1] == results[2]
    assert results[0][0][1].finish_reason == "eos"


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
def test_replays_wait_for_nothing_and_allocate_nothing(on_gpu, settings):
    decoder, hidden = _decoder(on_gpu, captures=Graph, **settings)
    decoder.first(hidden).read()
    for _ in range(4):
        decoder.next().read()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            decoder.next().read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_logits_that_are_not_finite_end_in_an_error_on_a_gpu(on_gpu):
    on_gpu.weights.norm.fill_(torch.nan)
    for settings in SETTINGS:
        with pytest.raises(ModelError, match="sampling: expected finite logits"):
            generate(on_gpu, _prompts(3, 9), 9, **settings)


@pytest.mark.gpu
def test_reserved_memory_does_not_grow(on_gpu):
    """Each generate() captures anew; the memory of the graph before is free again by then."""
    reserved = []
    for _ in range(25):
        generate(on_gpu, _prompts(3, 20), 12)
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[5:]) <= max(reserved[:5])
