"""python -m mixtral_model bench: what it counts, what it compares with, and what it refuses to time."""
import dataclasses
import json
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mixtral_model import Model, ModelError, bench, transformers_peer
from mixtral_model.__main__ import main
from mixtral_model.random_weights import MODELS, random_weights
from model_checkpoints import VOCAB, WINDOW, edit_json, load_peer, one_thread, tiny, write  # noqa: F401

KINDS = {"mixtral": dict(), "no window": dict(window=None), "mistral": dict(kind="mistral"), "tied": dict(kind="mistral", tie_word_embeddings=True)}
LIMITS = {"copy_tb_s": 0.010, "read_tb_s": 0.020, "bf16_tflop_s": 1.0, "f32_tflop_s": 0.1}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    module = types.SimpleNamespace(describe=lambda device: {"device": device.type, "name": "a machine"}, limits=lambda device, quick: dict(LIMITS),
                                   state=lambda device: {"load": "0"}, watch=lambda device: lambda: {"clock": "1"})
    monkeypatch.setitem(sys.modules, "mixtral_bench.machine", module)
    import mixtral_bench
    monkeypatch.setattr(mixtral_bench, "machine", module, raising=False)


@pytest.fixture(params=KINDS)
def checkpoint(request, tmp_path):
    return write(tmp_path / "model", tiny(**KINDS[request.param]))


def _run(tmp_path, *arguments):
    main(["bench", *map(str, arguments), "--json", str(tmp_path / "results.json")])
    return json.loads((tmp_path / "results.json").read_text())


def test_all_of_it(checkpoint, tmp_path, capsys, device):
    dtype = "f32" if device == "cpu" else "bf16"
    report = _run(tmp_path, "--checkpoint", checkpoint, "--device", device, "--dtype", dtype, "--batch", 1, 3, "--prompt-tokens", 40, "--new-tokens", 6)
    model = Model.load(checkpoint, bench.DTYPES[dtype])
    c, size = model.config, model.weights.embed.dtype.itemsize
    assert report["kind"] == "model" and report["machine"]["name"] == "a machine" and report["state"]["during"] == {"clock": "1"}
    assert report["model"] == {"name": "model", "layers": 2, "of_layers": 2, "dtype": dtype, "parameters": c.parameters(), "random": False}
    assert sum(report["memory"]["weights"].values()) == c.parameters() * size
    assert report["memory"]["cache"] == 3 * c.cache_bytes(WINDOW if c.window else 40 + bench.WARM_UP + 6 + bench.PROFILED, size)
    assert [(row["what"], row["batch"], row["tokens"], row["context"]) for row in report["rows"]] == [
        ("prefill", 1, 40, 0), ("decode", 1, 1, 40), ("decode", 3, 3, 40)]
    for row in report["rows"]:
        low, high = row["ours"]["us_range"]
        assert 0 < low <= row["ours"]["us_a_step"] <= high
        assert row["ours"]["tokens_s"] == pytest.approx(1e6 * row["tokens"] / row["ours"]["us_a_step"])
        assert row["limit_us"] == pytest.approx(1e6 * max(row["bytes"] / 0.020e12, row["flops"] / (1e11 if dtype == "f32" else 1e12)))
        assert row["share"] == pytest.approx(row["limit_us"] / row["ours"]["us_a_step"])
        assert row["ops_us"] > 0 and row["ops_share"] == pytest.approx(row["ops_us"] / row["ours"]["us_a_step"])
        assert all(peer["tokens_s"] > 0 for peer in row["peers"].values() if "failed" not in peer)
        assert any(name.endswith(" eager") and "tokens_s" in peer for name, peer in row["peers"].items())
    output = capsys.readouterr().out
    assert "model, 2 of 2 layers" in output and "decode, batch 3, 40 in the cache: " in output and "transformers" in output and "not run" not in output
    if device == "cuda":
        assert report["memory"]["peak"] > sum(report["memory"]["weights"].values()) and report["launches"]["per_layer"] >= 9
        assert sum(report["launches"]["by_name"].values()) == report["launches"]["per_step"] > 2 * report["launches"]["per_layer"]
    else:
        assert report["memory"]["peak"] is None and report["launches"]["per_layer"] is None


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
    assert report["check"] is None and report["peers"] == {"transformers": "absent: not asked for"}


def test_touched_experts_are_those_of_each_step(tmp_path):
    """As many as another model of the same batch counts, step by step."""
    model = Model.load(write(tmp_path, tiny()))
    run = bench.Run(model.config, types.SimpleNamespace(prompt_tokens=20, new_tokens=8, quick=False, context=None, batch=[3]))
    torch.manual_seed(3)
    touched = run.touched(model, 3)
    torch.manual_seed(3)
    cache = run.decoder(model, 3).cache
    chunks, counts = [[i] for i in bench._ids(model, 3, 2)], []
    for _ in range(8):
        load = torch.zeros(2, 4, dtype=torch.int64)
        chunks = model.logits(model.forward(chunks, cache, [0, 1, 2], load)).argmax(1, keepdim=True).tolist()
        counts.append((load > 0).sum(1).double())
    assert touched == pytest.approx(torch.stack(counts).mean(0).tolist())


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
    peer, seen = transformers_peer.build(model), []
    forward = type(peer).forward
    monkeypatch.setattr(type(peer), "forward", lambda self, **inputs: seen.append(inputs["input_ids"].tolist()) or forward(self, **inputs))
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    for compiled in (False, True):
        torch.manual_seed(0)
        step = transformers_peer.decode_step(peer, model, torch.tensor([5, 6]), 30, 4, compiled)
        for _ in range(4):
            step()
    assert len(seen) == 8 and seen[:4] == seen[4:]


# --------------------------------------------------------------------------------------------------- what is not timed


def test_wrong_logits_are_not_timed(tmp_path, monkeypatch):
    build = transformers_peer.build

    def other_weights(model):
        peer = build(model)
        model.weights.layers[1] = dataclasses.replace(model.weights.layers[1], wo=model.weights.layers[0].wo)
        return peer
    monkeypatch.setattr(transformers_peer, "build", other_weights)
    monkeypatch.setattr(bench.Run, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="our logits are wrong: expected a relative error of at most 0.0001 from transformers' in f32, got "):
        main(["bench", "--checkpoint", str(write(tmp_path, tiny())), "--dtype", "f32"])


def test_a_peer_that_fails_is_recorded(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")
    monkeypatch.setattr(transformers_peer, "decode_step", fail)
    arguments = ("--checkpoint", write(tmp_path / "model", tiny()), "--dtype", "f32", "--batch", 1, "--prompt-tokens", 20, "--new-tokens", 2, "--quick")
    report = _run(tmp_path, *arguments)
    assert [peer for row in report["rows"] for peer in row["peers"].values()][1:] == [{"failed": "RuntimeError: no memory"}]
    monkeypatch.setattr(transformers_peer, "build", fail)
    assert _run(tmp_path, *arguments)["peers"] == {"transformers": "failed: RuntimeError: no memory"}
    monkeypatch.setitem(sys.modules, "transformers", None)
    report = _run(tmp_path, *arguments)
    assert report["peers"]["transformers"].startswith("absent: ") and report["check"] is None


def test_a_card_that_is_too_small_is_no_error(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 10**9, 80 * 10**9))
    main(["bench", "--random-weights", "mixtral-8x7b", "--device", "cuda", "--batch", "16"])
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("mixtral-8x7b, 32 of 32 layers, 46.70 B parameters, 93.4 GB in bf16, on cuda")
    assert output[1] == ("not run: weights of 93.4 GB in torch.bfloat16 and a cache of 4.4 GB do not fit into the memory of cuda: "
                         "80.0 GB, 79.0 GB of it free")


def test_random_weights_of_some_layers(tmp_path, monkeypatch, capsys):
    small = dataclasses.replace(MODELS["mixtral-8x7b"], hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2, head_dim=64,
                                vocab_size=500, num_layers=4)
    for module in ("mixtral_model.random_weights", "mixtral_model.__main__"):
        monkeypatch.setattr(f"{module}.MODELS", {"mixtral-8x7b": small})
    report = _run(tmp_path, "--random-weights", "mixtral-8x7b", "--layers", 3, "--batch", 2, "--prompt-tokens", 20, "--context", 70,
                  "--new-tokens", 3, "--quick")
    assert report["model"] | {"parameters": 0} == {"name": "mixtral-8x7b", "layers": 3, "of_layers": 4, "dtype": "bf16", "parameters": 0, "random": True}
    assert report["rows"][1]["context"] == 70 and "3 of 4 layers" in capsys.readouterr().out
    assert report["check"]["error"] <= max(0.02, 2 * report["check"]["error of transformers"])
    assert random_weights(small, layers=3).config.parameters() == report["model"]["parameters"]


@pytest.mark.parametrize("arguments, message", [
    (["--new-tokens", "0"], "new-tokens: expected at least 1, got 0"),
    (["--batch", "4", "0"], "batch: expected at least 1, got 0"),
    (["--layers", "1"], "layers: only --random-weights can be shortened"),
    (["--context", "300"], r"context: expected at most 256 positions \(the model has no window\), got 372"),
    (["--dtype", "f32", "--device", "cuda"], "dtype: expected torch.bfloat16 or torch.float16 on cuda, got torch.float32")])
def test_refused(tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    directory = write(tmp_path, tiny(window=None))
    with pytest.raises(SystemExit, match=message):
        main(["bench", "--checkpoint", str(directory), "--prompt-tokens", "20", *arguments])
