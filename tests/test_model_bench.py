"""python -m mixtral_model bench: what it counts, what it compares with, and what it refuses to time."""
import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import mixtral_ext
from mixtral_model import Model, bench, timing, transformers_peer
from mixtral_model.__main__ import main
from mixtral_model.decode import Decoder
from mixtral_model.random_weights import MODELS, random_weights
from model_checkpoints import VOCAB, WINDOW, edit_json, load_peer, one_thread, pretend_a_card, tiny, write  # noqa: F401

KINDS = {"mixtral": dict(), "no window": dict(window=None), "mistral": dict(kind="mistral"), "tied": dict(kind="mistral", tie_word_embeddings=True)}
LIMITS = {"copy_tb_s": 0.010, "read_tb_s": 0.020, "bf16_tflop_s": 1.0}  # and on a CPU
F32 = 0.1


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """What measures the machine; watched: how often its clocks began and ceased to be watched."""
    watched = []

    def watch(device):
        watched.append("begins")
        return lambda: watched.append("ends") or {"clock": "1"}
    module = types.SimpleNamespace(describe=lambda device: {"device": device.type, "name": "a machine"}, state=lambda device: {"load": "0"}, watch=watch,
                                   limits=lambda device, quick: LIMITS | ({"f32_tflop_s": F32} if device.type == "cpu" else {}), watched=watched)
    monkeypatch.setitem(sys.modules, "mixtral_bench.machine", module)
    import mixtral_bench
    monkeypatch.setattr(mixtral_bench, "machine", module, raising=False)
    return module


@pytest.fixture(params=[*KINDS, "consolidated"])
def checkpoint(request, tmp_path):
    return write(tmp_path / "model", tiny(**KINDS.get(request.param, {})), "consolidated" if request.param == "consolidated" else "per-expert")


def _run(tmp_path, *arguments):
    main(["bench", *map(str, arguments), "--json", str(tmp_path / "results.json")])
    return json.loads((tmp_path / "results.json").read_text())


def _bench(config, **arguments):
    given = dict(dtype="f32", prompt_tokens=20, new_tokens=8, quick=False, context=None, batch=[3]) | arguments
    return bench.Run(config, types.SimpleNamespace(**given))


def test_all_of_it(checkpoint, tmp_path, capsys, device, monkeypatch):
    """What is compiled runs uncompiled here."""
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    dtype = "f32" if device == "cpu" else "bf16"
    report = _run(tmp_path, "--checkpoint", checkpoint, "--device", device, "--dtype", dtype, "--batch", 1, 3, "--prompt-tokens", 40, "--new-tokens", 6)
    model = Model.load(checkpoint, bench.DTYPES[dtype])
    c, size = model.config, model.weights.embed.dtype.itemsize
    assert report["kind"] == "model" and report["machine"]["name"] == "a machine" and report["state"]["during"] == {"clock": "1"}
    assert report["model"] == {"name": "model", "layers": 2, "of_layers": 2, "dtype": dtype, "parameters": c.parameters(), "random": False}
    assert sum(report["memory"]["weights"].values()) == c.parameters() * size
    assert report["memory"]["cache"] == 3 * c.cache_bytes(WINDOW if c.window else 40 + bench.WARM_UP + bench.FORCED + 1 + 6 + bench.PROFILED, size)
    assert [(row["what"], row["batch"], row["tokens"], row["context"]) for row in report["rows"]] == [
        ("prefill", 1, 40, 0), ("decode", 1, 1, 40), ("decode", 3, 3, 40)]
    for row in report["rows"]:
        low, high = row["ours"]["us_range"]
        assert 0 < low <= row["ours"]["us_a_step"] <= high
        assert row["ours"]["tokens_s"] == pytest.approx(1e6 * row["tokens"] / row["ours"]["us_a_step"])
        by_memory, by_products = 1e6 * row["bytes"] / 0.020e12, 1e6 * row["flops"] / (1e11 if dtype == "f32" else 1e12)
        assert (row["limit_us"], row["bound"]) == (pytest.approx(max(by_memory, by_products)), "memory" if by_memory > by_products else "compute")
        assert row["share"] == pytest.approx(row["limit_us"] / row["ours"]["us_a_step"])
        assert row["tb_s"] == pytest.approx(1e-6 * row["bytes"] / row["ours"]["us_a_step"])
        assert row["ops_us"] > 0 and row["ops_share"] == pytest.approx(row["ops_us"] / row["ours"]["us_a_step"])
        eager, *compiled = row["peers"].values()
        assert eager["tokens_s"] > 0 and list(row["peers"])[0].endswith(" eager")
        assert row["check"]["against"].endswith("in f32") and row["check"]["error"] <= row["check"]["allowed"]
        if row["what"] == "decode":
            assert eager["error"] <= (1e-4 if dtype == "f32" else 0.5)
        if device == "cuda" and row["what"] == "decode":
            assert "tokens_s" in compiled[0] if c.window is None and row["batch"] == 1 else "skipped" in compiled[0]
        else:
            assert not compiled
    output = capsys.readouterr().out
    assert "model, 2 of 2 layers" in output and "decode, batch 3, 40 in the cache: " in output and "transformers" in output and "not run" not in output
    assert "checked against transformers" in output and " TB/s, " in output and ("GPU busy" if device == "cuda" else "inside of ops and products") in output
    launches = report["launches"]
    if device == "cuda":
        assert report["memory"]["peak"] > sum(report["memory"]["weights"].values()) and report["memory"]["workspace and activations"] > 0
        assert launches["per_layer"] >= 9 and sum(launches["by_name"].values()) == launches["per_step"] > 2 * launches["per_layer"]
        assert not any(name.startswith("Mem") for name in launches["by_name"])
    else:
        assert report["memory"]["peak"] is None and launches == {"per_layer": None, "per_step": None, "by_name": {}, "us": {}, "copies": {}}


@pytest.mark.gpu
def test_a_compiled_peer(tmp_path):
    """It really is, once."""
    report = _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny("mistral", window=None).bfloat16()), "--device", "cuda", "--batch", 2,
                  "--prompt-tokens", 20, "--new-tokens", 4, "--quick")
    (name, compiled), = [item for item in report["rows"][1]["peers"].items() if item[0].endswith(" compiled")]
    assert compiled["tokens_s"] > 0 and compiled["error"] <= bench.PEER_TOLERANCE["bf16"], compiled


def test_bytes_and_touched_experts(tmp_path):
    """By hand: one token chooses two experts in each of two layers; all of a batch's tokens alike choose the same two."""
    report = _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), "--dtype", "f32", "--batch", 1, "--prompt-tokens", 100,
                  "--new-tokens", 6, "--no-peers")
    attention, expert, others = (4 + 2 * 2) * 64 * 128 + 4 * 64 * 128, 3 * 96 * 128, 4 * 128 + 2 * 128  # router, norms
    of_step = 4 * (2 * (attention + 2 * expert + others) + 128 + VOCAB * 128 + 128)  # final norm, head, a row of the embedding
    cache = 4 * 2 * 2 * WINDOW * 2 * 64
    assert report["rows"][1]["bytes"] == of_step + cache and report["rows"][1]["experts touched a layer"] == 2
    of_prompt = 4 * (2 * (attention + 4 * expert + others) + 128 + VOCAB * 128)
    assert report["rows"][0]["bytes"] == of_prompt + 4 * 2 * 2 * 100 * 2 * 64
    assert report["peers"] == {"transformers": "absent: not asked for"} and not any(row["peers"] for row in report["rows"])
    assert report["rows"][0]["check"] is None and report["rows"][1]["check"]["against"] == "the same steps, not captured"


def test_bytes_of_a_prompt_in_chunks(tmp_path, monkeypatch):
    """Each chunk reads the experts that it chooses, none of 3 tokens all of 8; the head is read once."""
    monkeypatch.setattr(bench, "CHUNK", 3)
    model = Model.load(write(tmp_path, tiny(num_local_experts=8)))
    attention, expert, others = (4 + 2 * 2) * 64 * 128 + 4 * 64 * 128, 3 * 96 * 128, 8 * 128 + 2 * 128
    prompt, cache, touched = bench._ids(model, 20, 1), model.new_cache(1, 20), 0
    for start in range(0, 20, 3):
        load = torch.zeros(2, 8, dtype=torch.int64)
        model.forward([prompt[start:start + 3]], cache, [0], load)
        touched += int((load > 0).sum())
    expected = 4 * (7 * 2 * (attention + others) + touched * expert + 128 + VOCAB * 128) + 4 * 20 * 2 * 2 * 2 * 64
    assert _bench(model.config).prefill(model)["bytes"] == expected


def test_touched_experts_are_those_of_the_timed_steps(tmp_path, monkeypatch):
    """As many as another model of the same batch counts, step by step, in the text that decode() times."""
    model = Model.load(write(tmp_path, tiny()))
    run, timed, measure = _bench(model.config), [], timing.measure
    keys, values = run.content(model, 3)
    assert keys.shape == (3, WINDOW, 2, 64)
    cache = run.decoder(model, 3).cache
    for p in range(WINDOW):  # positions 4 to 19 of a ring of 16
        for t, given in (*((t, keys) for t in cache.keys), *((t, values) for t in cache.values)):
            t[:, (20 - WINDOW + p) % WINDOW] = given[:, p]
    chunks, counts, texts = [[i] for i in bench._ids(model, 3, 2)], [], []
    for _ in range(9):
        load = torch.zeros(2, 4, dtype=torch.int64)
        chunks = model.logits(model.forward(chunks, cache, [0, 1, 2], load)).argmax(1, keepdim=True).tolist()
        counts.append((load > 0).sum(1).double())
        texts.append([token for token, in chunks])
    assert run.touched(model, 3) == pytest.approx(torch.stack(counts[1:]).mean(0).tolist())

    def watched(step, *arguments):
        def call():
            step()
            timed.append(decoders[-1].sampled.tolist())
        return measure(call, *arguments)
    decoders, make = [], run.decoder
    run.decoder = lambda *arguments: decoders.append(make(*arguments)) or decoders[-1]
    monkeypatch.setattr(timing, "measure", watched)
    monkeypatch.setattr(bench, "PROFILED", 4)
    run.decode(model, 3)
    assert timed[:8] == texts[1:9]


def test_timed_and_profiled_calls_take_turns():
    calls = []
    cpu = torch.device("cpu")
    seconds, inside = timing.measure(lambda: calls.append(torch.autograd._profiler_enabled()) or torch.ones(9, 9) @ torch.ones(9, 9), 10, 8, cpu)
    assert calls == [False, True, False, True, False, True, False, False, True] * 2
    assert len(seconds) == 10 and inside["ops_us"] > 0
    calls.clear()
    timing.measure(lambda: calls.append(torch.autograd._profiler_enabled()), 3, 1, cpu)
    assert calls == [False, True] * 3


def test_the_limit_of_a_card(tmp_path):
    """Its limits have no product in f32."""
    model = Model.load(write(tmp_path, tiny().bfloat16()))
    row = bench._limit({"bytes": 4 * 10**9, "flops": 10**11, "ours": {"us_a_step": 4e5}}, LIMITS, model)
    assert row == pytest.approx({"limit_us": 2e5, "bound": "memory", "share": 0.5, "tb_s": 0.01, "tflop_s": 0.25})
    row = bench._limit({"bytes": 4 * 10**9, "flops": 10**12, "ours": {"us_a_step": 2e6}}, LIMITS, model)
    assert (row["limit_us"], row["bound"], row["share"]) == (pytest.approx(1e6), "compute", pytest.approx(0.5))


@pytest.mark.parametrize("intervals, covered", [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5)], 4), ([(4, 5), (1, 3)], 3), ([(1, 9), (2, 3), (8, 10)], 9)])
def test_union(intervals, covered):
    assert timing.union(intervals) == covered


def _pretend_a_profiler(monkeypatch, events):
    """One that saw (name, start, end) on a GPU, and more."""
    def event(name, start, end, kind=DeviceType.CUDA, annotation=False):
        return types.SimpleNamespace(name=name, time_range=types.SimpleNamespace(start=start, end=end), device_type=kind, is_user_annotation=annotation)

    class Profiler:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return [event("launch", 0, 99, DeviceType.CPU), event("range", 0, 99, annotation=True)] + [event(*e) for e in events]
    monkeypatch.setattr(timing, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def test_kernels_that_overlap_and_copies_are_counted(monkeypatch):
    cuda = torch.device("cuda", 0)
    _pretend_a_profiler(monkeypatch, [("gemm", 10, 14), ("norm", 13, 20), ("Memcpy DtoH (Device -> Pinned)", 19, 25), ("gemm", 30, 34), ("norm", 34, 36),
                                      ("Memcpy DtoH (Device -> Pinned)", 36, 40), ("Memset (Device)", 41, 42), ("Memset (Device)", 43, 44)])
    assert timing.inside(lambda: None, 2, cuda) == ([8], {"gemm": 1, "norm": 1}, {"Memcpy DtoH (Device -> Pinned)": 1, "Memset (Device)": 1},
                                                    {"gemm": 4, "norm": 4.5})
    seconds, inside = timing.measure(lambda: None, 5, 2, cuda)
    assert len(seconds) == 5 and inside["ops_us"] == 8
    _pretend_a_profiler(monkeypatch, [])
    assert timing.inside(lambda: None, 2, cuda) == ([], {}, {}, {})
    assert timing.measure(lambda: None, 5, 2, cuda)[1] == {"ops_us": None, "ops_share": None}


def test_launches(tmp_path, monkeypatch):
    """Those of the last layer are the difference; None where none are seen."""
    model = Model.load(write(tmp_path, tiny()))
    run = _bench(model.config)

    def inside(call, runs, device):
        call()
        kernels = decoders[-1].kernels
        assert decoders[-1].done == bench.WARM_UP + 1
        return [5.0], {"a": kernels, "b": 1}, {"Memset": 2}, {"a": 2.5, "b": 4.0}

    class Counted(Decoder):
        def step(self):
            super().step()
            self.kernels = 10 * len(self.model.weights.layers)
    decoders = []
    assert run.launches(model)["per_step"] is None
    monkeypatch.setattr(bench, "Decoder", lambda *arguments, **more: decoders.append(Counted(*arguments, **more)) or decoders[-1])
    monkeypatch.setattr(timing, "inside", inside)
    assert run.launches(model) == {"per_layer": 10, "per_step": 21, "by_name": {"a": 20, "b": 1}, "us": {"a": 2.5, "b": 4.0}, "copies": {"Memset": 2}}


def test_memory_beside_weights_and_cache(tmp_path):
    """Of the pass that takes most, which need not be the one with the largest cache."""
    model = Model.load(write(tmp_path, tiny()))
    rows = [{"peak_bytes": 1000, "cache_bytes": 10}, {"peak_bytes": 1200, "cache_bytes": 500}]
    found = bench.memory(model, rows, 400)
    assert (found["cache"], found["workspace and activations"], found["peak"]) == (500, 590, 1200)


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
def test_flops_are_those_that_torch_counts(tmp_path, kind):
    """Of transformers' model, which multiplies every query with every key."""
    peer = tiny(kind, window=None)
    model, tokens = Model.load(write(tmp_path, peer)), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        peer.set_experts_implementation("eager")
        peer(torch.arange(3, 3 + tokens)[None])
    assert bench.flops(model, tokens, tokens, tokens * tokens) == pytest.approx(counter.get_total_flops(), rel=1e-3)


# ------------------------------------------------------------------------------------------------- transformers' model


@pytest.mark.parametrize("kind, layout", [("mixtral", "fused"), ("mistral", "per-expert"), ("mixtral", "consolidated"), ("mistral", "consolidated")])
def test_the_peer_is_a_view_of_our_weights(tmp_path, kind, layout):
    original = tiny(kind)
    model = Model.load(write(tmp_path, original, layout))
    peer = transformers_peer.build(model)
    storages = {t.untyped_storage().data_ptr() for w in (model.weights, *model.weights.layers) for t in vars(w).values() if isinstance(t, torch.Tensor)}
    copied = [name for name, t in peer.named_parameters() if t.untyped_storage().data_ptr() not in storages]
    assert all(".q_proj." in name or ".k_proj." in name for name in copied) and len(copied) == (4 if layout == "consolidated" else 0)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
def test_float32_on_the_same_weights(tmp_path, kind):
    directory = write(tmp_path, tiny(kind).bfloat16())
    peer, tokens = transformers_peer.build(Model.load(directory)), torch.arange(3, 60)[None]
    before = [(t.dtype, t.data_ptr()) for t in peer.parameters()]
    with torch.no_grad(), transformers_peer.in_float32(peer):
        got = peer(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(got, load_peer(directory, torch.float32)(tokens).logits, rtol=1e-4, atol=1e-4)
    assert [(t.dtype, t.data_ptr()) for t in peer.parameters()] == before


def test_a_step_over_the_static_cache_is_one_over_the_dynamic_cache(tmp_path, monkeypatch):
    """What is compiled on a GPU."""
    model = Model.load(write(tmp_path, tiny(window=None)))
    peer, seen, logits = transformers_peer.build(model), [], []
    keys, values = _bench(model.config).content(model, 2)
    forward = type(peer).forward
    monkeypatch.setattr(type(peer), "forward", lambda self, **inputs: seen.append(inputs["input_ids"].flatten().tolist()) or forward(self, **inputs))
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    for compiled in (False, True):
        step = transformers_peer.decode_step(peer, model.config, keys, values, 20, 4, compiled)
        logits.append(torch.stack([step(torch.tensor([5, 6])), step(), step(), step(torch.tensor([7, 8]))]))
    assert len(seen) == 8 and seen[:4] == seen[4:] and (seen[0], seen[3]) == ([5, 6], [7, 8])
    assert seen[1:3] == logits[0][:2].argmax(2).tolist()
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("window, before", [(None, 30), (WINDOW, WINDOW - 4), (WINDOW, 40)])
@pytest.mark.parametrize("kind, layout", [("mixtral", "fused"), ("mistral", "per-expert"), ("mixtral", "consolidated")])
def test_reading_on_over_our_keys_and_values(tmp_path, kind, layout, window, before):
    """transformers over what our cache holds after a text says what it says after that text. One layer, since all get the same."""
    original = tiny(kind, window=window, num_hidden_layers=1)
    model = Model.load(write(tmp_path, original, layout))
    peer, text = transformers_peer.build(model), torch.randint(3, VOCAB, (2, before + 5), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, before + 5)
    model.forward(text[:, :before].tolist(), cache, [0, 1])
    at = torch.arange(before - min(before, window or before), before) % cache.capacity
    keys, values = cache.keys[0][:, at], cache.values[0][:, at]
    with torch.no_grad():
        expected = original(text).logits[:, before:]
    torch.testing.assert_close(transformers_peer.read_on(peer, model.config, keys, values, before, text[:, before:]), expected, rtol=1e-4, atol=1e-4)
    step = transformers_peer.decode_step(peer, model.config, keys, values, before, 5, False)
    torch.testing.assert_close(torch.stack([step(ids) for ids in text[:, before:].unbind(1)], 1), expected, rtol=1e-4, atol=1e-4)


def test_routed_as(tmp_path):
    """The experts are those that are given, with the weights of the router; and how many tokens would have gone elsewhere."""
    peer = transformers_peer.build(Model.load(write(tmp_path, tiny(num_hidden_layers=1))))
    peer.set_experts_implementation("eager")
    moe, x = peer.model.layers[0].mlp, torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = moe(x)
        p = torch.nn.functional.linear(x[0], moe.gate.weight).softmax(1)
        best = p.topk(2).indices
        ids = best.flip(1).int()
        ids[3] = torch.tensor([e for e in range(4) if e not in best[3].tolist()])
        with transformers_peer.routed_as(peer, [ids]) as elsewhere:
            got = moe(x)
        expected = torch.zeros(5, 128)
        for t in range(5):
            for e in ids[t].tolist():
                gate, up = (moe.experts.gate_up_proj[e] @ x[0, t]).chunk(2)
                expected[t] += p[t, e] / p[t, ids[t].long()].sum() * (moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-5)
        assert elsewhere == [pytest.approx(0.2)] and moe(x).equal(own)


# --------------------------------------------------------------------------------------------------- what is not timed


SHORT = ("--dtype", "f32", "--batch", 1, 3, "--prompt-tokens", 20, "--new-tokens", 2, "--quick")


def test_wrong_logits_are_not_timed(tmp_path, monkeypatch, machine):
    build = transformers_peer.build

    def other_weights(model):
        peer = build(model)
        model.weights.layers[1] = dataclasses.replace(model.weights.layers[1], wo=model.weights.layers[0].wo)
        return peer
    monkeypatch.setattr(transformers_peer, "build", other_weights)
    monkeypatch.setattr(timing, "times", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="our logits are wrong: expected a relative error of at most 0.0001 from transformers' in f32, got "):
        main(["bench", "--checkpoint", str(write(tmp_path, tiny())), "--dtype", "f32"])
    assert machine.watched == ["begins", "ends"]


@pytest.mark.parametrize("peers, message", [([], "from transformers' in f32"), (["--no-peers"], "from the same steps, not captured")])
@pytest.mark.parametrize("broken", ["stale", "lengths"])
def test_wrong_replays_are_not_timed(tmp_path, monkeypatch, peers, message, broken):
    """The prompt is right, and so is a step that is called; what replays it does nothing, or has another length in it."""
    def captures(step, device):
        if broken == "stale":
            return lambda: None
        return lambda: (step.__self__.lengths.add_(1), step(), step.__self__.lengths.sub_(1))
    monkeypatch.setattr(bench, "Decoder", functools.partial(Decoder, captures=captures))
    with pytest.raises(SystemExit, match=f"our logits are wrong: expected a relative error of at most 0.0001 {message}, got "):
        _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny(window=None)), *SHORT, *peers)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["prefill"]


@pytest.mark.parametrize("peers", [[], ["--no-peers"]])
def test_one_wrong_sequence_of_three_is_not_timed(tmp_path, monkeypatch, peers):
    def captures(step, device):
        def replay():
            step()
            step.__self__.logits[1] *= -1
        return replay
    monkeypatch.setattr(bench, "Decoder", functools.partial(Decoder, captures=captures))
    with pytest.raises(SystemExit, match="our logits are wrong"):
        _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny(window=None)), *SHORT, "--batch", 3, *peers)


@pytest.mark.parametrize("wrong", ["single tokens", "chunks"])
def test_a_prompt_wrong_in_part_is_not_timed(tmp_path, monkeypatch, wrong):
    """What follows one by one, or what is read as it will be timed."""
    run = Model.run

    def other(self, cache, ids, *rest, **more):
        hidden = run(self, cache, ids, *rest, **more)
        return -hidden if (len(ids) == 1) == (wrong == "single tokens") else hidden
    monkeypatch.setattr(Model, "run", other)
    with pytest.raises(SystemExit, match="our logits are wrong"):
        _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), *SHORT)
    assert not (tmp_path / "results.json").exists()


def test_a_prompt_shorter_than_what_is_compared(tmp_path):
    report = _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), *SHORT, "--prompt-tokens", 5)
    assert report["rows"][0]["check"]["error"] <= 1e-4 and report["rows"][0]["peers"].popitem()[1]["error"] <= 1e-3


def test_wrong_routing_is_not_timed(tmp_path, monkeypatch):
    """The least likely experts, with the weights that they have."""
    gate = mixtral_ext.moe_gate

    def worst(logits, top_k):
        _, ids, *rest = gate(-logits, top_k)
        weights = logits.softmax(1).gather(1, ids.long())
        return weights / weights.sum(1, keepdim=True), ids, *rest
    monkeypatch.setattr(mixtral_ext, "moe_gate", worst)
    with pytest.raises(SystemExit, match="our routing is wrong: expected at most 10% of the tokens with other experts than transformers' in f32, got 100%"):
        _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), *SHORT)


def test_a_peer_that_fails_is_recorded(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")
    monkeypatch.setattr(transformers_peer, "decode_step", fail)
    arguments = ("--checkpoint", write(tmp_path / "model", tiny()), *SHORT)
    report = _run(tmp_path, *arguments)
    assert [peer for row in report["rows"] for peer in row["peers"].values()][1:] == [{"failed": "RuntimeError: no memory"}] * 2
    for broken in ("in_float32", "build"):
        monkeypatch.setattr(transformers_peer, broken, fail)
        report = _run(tmp_path, *arguments)
        assert report["peers"] == {"transformers": "failed: RuntimeError: no memory"}
        assert [row["check"] and row["check"]["against"] for row in report["rows"]] == [None] + ["the same steps, not captured"] * 2
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = _run(tmp_path, *arguments)
    assert report["peers"]["transformers"].startswith("absent: ") and report["rows"][0]["check"] is None


def test_a_peer_whose_check_fails_takes_nothing_with_it(tmp_path, monkeypatch):
    """Of the steps alone, for which it may need more memory."""
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(transformers_peer, "read_on", fail)
    report = _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), *SHORT)
    prompt, *steps = report["rows"]
    assert prompt["check"]["against"].startswith("transformers ") and all("tokens_s" in peer for peer in prompt["peers"].values())
    for row in steps:
        assert row["check"]["against"] == "the same steps, not captured" and row["check"]["transformers"] == "failed: OutOfMemoryError: no memory"
        assert [*row["peers"].values()] == [{"failed": "RuntimeError: its own check failed"}]


def test_a_peer_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    """Its steps alone, or all of it in a dtype."""
    decode_step = transformers_peer.decode_step

    def other(*arguments):
        step = decode_step(*arguments)
        return lambda *given: step(*given).roll(1, -1)
    with monkeypatch.context() as patch:
        patch.setattr(transformers_peer, "decode_step", other)
        report = _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), *SHORT)
        failures = [peer["failed"] for row in report["rows"][1:] for peer in row["peers"].values()]
        assert len(failures) == 2 and all(f.startswith("RuntimeError: its logits are off by 1.") for f in failures)
    monkeypatch.setattr(bench, "PEER_TOLERANCE", {"bf16": 1e-4})
    report = _run(tmp_path, "--checkpoint", tmp_path / "model", *SHORT, "--dtype", "bf16")
    assert report["peers"]["transformers"].startswith("failed: RuntimeError: its logits are off by 0.0") and not any(row["peers"] for row in report["rows"])
    assert report["rows"][1]["check"]["against"] == "the same steps, not captured"


def test_results_are_written_as_they_come(tmp_path, monkeypatch):
    """After each row of ours and each peer; what cannot be written ends the run before anything is measured."""
    states, write_text = [], Path.write_text

    def seen(path, text):
        if path.stem == "results":
            states.append([len(row["peers"]) for row in json.loads(text)["rows"]])
        return write_text(path, text)
    checkpoint = write(tmp_path / "model", tiny())
    monkeypatch.setattr(Path, "write_text", seen)
    _run(tmp_path / "new" / "folder", "--checkpoint", checkpoint, *SHORT)
    assert states == [[0], [0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
    monkeypatch.setattr(sys.modules["mixtral_bench.machine"], "limits", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="Is a directory"):
        main(["bench", "--checkpoint", str(checkpoint), "--json", str(tmp_path)])


def test_what_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    model = Model.load(write(tmp_path, tiny(window=None)))
    run, peer = _bench(model.config, batch=[2, 3]), transformers_peer.build(model)
    first, second = (run.decode(model, batch, peer, "it") for batch in run.batches)
    assert run.not_compiled(first, bench.COMPILED_BEFORE - 1) is None
    assert run.not_compiled(second, 0) == "compiled for the first batch alone, since it takes minutes"
    assert run.not_compiled(first, 130.4) == "the peers had taken 130 s, and compiling takes minutes"
    assert _bench(dataclasses.replace(model.config, window=16)).not_compiled(first, 0).startswith("its static cache of a window")
    compiled = run.beside(first, model, peer, True)
    assert compiled["tokens_s"] > 0 and compiled["error"] < 1e-4


@pytest.mark.parametrize("argv, command", [
    (["bench", "--checkpoint", "/home/me/some model", "--batch", "1", "8", "--json", "/tmp/x.json", "--quick"], "bench --checkpoint 'some model' --batch 1 8 --quick"),
    (["bench", "--json=/tmp/x.json", "--random-weights", "mistral-7b", "--layers=4"], "bench --random-weights mistral-7b --layers=4"),
    (["bench", "--checkpoint=/home/me/model/"], "bench --checkpoint model")])
def test_command(argv, command):
    assert bench._command(argv) == f"python -m mixtral_model {command}"


def test_the_command_is_recorded(tmp_path):
    report = _run(tmp_path, "--checkpoint", write(tmp_path / "model", tiny()), *SHORT, "--no-peers")
    assert report["command"] == "python -m mixtral_model bench --checkpoint model --dtype f32 --batch 1 3 --prompt-tokens 20 --new-tokens 2 --quick --no-peers"


def test_copies_that_do_not_fit_are_no_error(tmp_path, monkeypatch, capsys):
    """Of a checkpoint on the CPU, which is known when its files have been looked at."""
    checkpoint = write(tmp_path / "model", tiny())
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 10 kB\n")
    monkeypatch.setattr("mixtral_model.weights.Path", lambda path: tmp_path / "meminfo" if path == "/proc/meminfo" else Path(path))
    main(["bench", "--checkpoint", str(checkpoint), "--json", str(tmp_path / "results.json")])
    assert "\nnot run: weights of 0.0 GB in torch.bfloat16 and a cache of " in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_a_card_that_is_too_small_is_no_error(monkeypatch, capsys, tmp_path):
    pretend_a_card(monkeypatch, 79 * 10**9, 80 * 10**9)
    main(["bench", "--random-weights", "mixtral-8x7b", "--device", "cuda", "--batch", "16", "--json", str(tmp_path / "results.json")])
    assert not (tmp_path / "results.json").exists()
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("mixtral-8x7b, 32 of 32 layers, 46.70 B parameters, 93.4 GB in bf16, on cuda")
    assert output[1] == ("not run: weights of 93.4 GB in torch.bfloat16 and a cache of 4.5 GB do not fit into the memory of cuda: "
                         "80.0 GB, 79.0 GB of it free")


def test_random_weights_of_some_layers(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(MODELS["mixtral-8x7b"], hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64,
                                vocab_size=500, num_layers=4)
    for module in ("mixtral_model.random_weights", "mixtral_model.__main__"):
        monkeypatch.setattr(f"{module}.MODELS", {"mixtral-8x7b": small})
    report = _run(tmp_path, "--random-weights", "mixtral-8x7b", "--layers", 3, "--batch", 2, "--prompt-tokens", 20, "--context", 70,
                  "--new-tokens", 3, "--quick")
    assert report["model"] | {"parameters": 0} == {"name": "mixtral-8x7b", "layers": 3, "of_layers": 4, "dtype": "bf16", "parameters": 0, "random": True}
    captured = capsys.readouterr()
    assert report["rows"][1]["context"] == 70 and "3 of 4 layers" in captured.out
    assert "random weights: " in captured.err and "/3 [" in captured.err  # progress
    assert all(row["check"]["error"] <= max(0.02, 2 * row["check"]["error of transformers"]) for row in report["rows"])
    assert random_weights(small, layers=3).config.parameters() == report["model"]["parameters"]


@pytest.mark.parametrize("arguments, message", [
    (["--new-tokens", "0"], "new-tokens: expected at least 1, got 0"),
    (["--batch", "4", "0"], "batch: expected at least 1, got 0"),
    (["--layers", "1"], "layers: only --random-weights can be shortened"),
    (["--context", "300"], r"context: expected at most 256 positions \(the model has no window\), got 402"),
    (["--dtype", "f32", "--device", "cuda"], "dtype: expected torch.bfloat16 or torch.float16 on cuda, got torch.float32")])
def test_refused(tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    directory = write(tmp_path, tiny(window=None))
    with pytest.raises(SystemExit, match=message):
        main(["bench", "--checkpoint", str(directory), "--prompt-tokens", "20", *arguments])
