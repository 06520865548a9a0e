"""Reading checkpoint directories: every broken one is refused by name, none is copied twice."""
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MixtralConfig

from mixtral_model import Model, ModelError, read_config
from mixtral_model.__main__ import main
from mixtral_model.weights import Checkpoint, TooLarge
from model_checkpoints import LAYOUTS, edit_json, pretend_a_card, tiny, write

MIXTRAL_8X7B = dict(architectures=["MixtralForCausalLM"], model_type="mixtral", hidden_size=4096, intermediate_size=14336,
                    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, num_experts_per_tok=2, num_local_experts=8,
                    vocab_size=32000, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768, sliding_window=None,
                    hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2)
MISTRAL_7B = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5,
                  vocab_size=32000, sliding_window=4096)


@pytest.fixture(scope="module")
def peer():
    return tiny()


def _tensors(directory, change, name="model.safetensors"):
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name)


# ------------------------------------------------------------------------------------------------------ what is read


def test_every_layout_gives_the_same_weights(tmp_path, peer):
    state = peer.state_dict()
    for layout in LAYOUTS:
        model = Model.load(write(tmp_path / layout, peer, layout))
        for i, layer in enumerate(model.weights.layers):
            assert layer.gate_up.equal(state[f"model.layers.{i}.mlp.experts.gate_up_proj"]), layout
            assert layer.down.equal(state[f"model.layers.{i}.mlp.experts.down_proj"]), layout
            assert layer.router.equal(state[f"model.layers.{i}.mlp.gate.weight"]), layout
            if not layout.startswith("consolidated"):  # those turn other pairs
                assert layer.wqkv.equal(torch.cat([state[f"model.layers.{i}.self_attn.{x}_proj.weight"] for x in "qkv"])), layout


def test_both_layouts_in_one_directory(tmp_path, peer):
    """As the hub has them: the transformers files are taken; without their weights, Mistral's own."""
    write(tmp_path, peer)
    write(tmp_path, peer, "consolidated")
    assert not read_config(tmp_path).consolidated
    Model.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_config(tmp_path).consolidated
    Model.load(tmp_path)


def test_unaligned_tensors(tmp_path, peer):
    """Nothing in the format keeps a tensor at a multiple of its element size."""
    write(tmp_path, peer)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    size, = struct.unpack("<Q", content[:8])
    path.write_bytes(struct.pack("<Q", size + 1) + content[8:8 + size] + b" " + content[8 + size:])
    weights = Model.load(tmp_path).weights
    assert weights.embed.data_ptr() % 4 == 0
    assert weights.embed.equal(peer.state_dict()["model.embed_tokens.weight"])
    assert weights.layers[1].gate_up.equal(peer.state_dict()["model.layers.1.mlp.experts.gate_up_proj"])


def test_old_rotary_buffers_and_the_head_of_tied_embeddings_are_ignored(tmp_path):
    write(tmp_path, tiny("mistral", tie_word_embeddings=True))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32), "lm_head.weight": torch.ones(100, 128)}
    _tensors(tmp_path, lambda tensors: tensors.update(extra))
    weights = Model.load(tmp_path).weights
    assert weights.head is weights.embed


def test_progress_counts_every_tensor(tmp_path, peer):
    seen = []
    Model.load(write(tmp_path, peer), progress=lambda done, total: seen.append((done, total)))
    total = len(load_file(tmp_path / "model.safetensors"))
    assert seen == sorted(seen) and seen[-1] == (total, total)


def test_files_are_read_one_after_the_other(tmp_path, peer, monkeypatch):
    """Each from its start to its end, and given back before the next: nothing of a converted model stays mapped."""
    write(tmp_path, peer, "sharded")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    expected = []
    for shard in shards:
        size, = struct.unpack("<Q", shard.read_bytes()[:8])
        header = json.loads(shard.read_bytes()[8:8 + size])
        expected += sorted(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    names, mapped, tensor = [], [], Checkpoint.tensor

    def record(self, name):
        maps = Path("/proc/self/maps").read_text()
        names.append(name)
        mapped.append([i for i, shard in enumerate(shards) if str(shard) in maps])
        return tensor(self, name)

    monkeypatch.setattr(Checkpoint, "tensor", record)
    model = Model.load(tmp_path, torch.bfloat16)
    assert names == expected
    of_shard = [i for i, shard in enumerate(shards) for name in load_file(shard)]
    assert all(min(there) >= i for i, there in zip(of_shard, mapped))
    assert not any(str(shard) in Path("/proc/self/maps").read_text() for shard in shards)
    assert model.weights.layers[1].gate_up.equal(peer.state_dict()["model.layers.1.mlp.experts.gate_up_proj"].bfloat16())


def test_configuration_of_either_format(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    config = read_config(tmp_path)
    assert (config.window, config.head_dim, config.rope_theta, config.eos_ids) == (None, 128, 1e6, (2,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert read_config(tmp_path).eos_ids == (2, 7)
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL_7B))
    config = read_config(tmp_path)
    assert (config.window, config.num_experts, config.rope_theta, config.consolidated) == (4096, 0, 1e4, True)
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL_7B | {"sliding_window": None, "moe": {"num_experts": 8, "num_experts_per_tok": 2}}))
    config = read_config(tmp_path)
    assert (config.window, config.num_experts, config.top_k, config.rope_theta) == (None, 8, 2, 1e6)


def test_values_that_say_what_the_model_does_anyway_are_accepted(tmp_path):
    content = MIXTRAL_8X7B | dict(attention_bias=False, mlp_bias=None, partial_rotary_factor=1.0, layer_types=None, rope_scaling=None,
                                  rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 7e5, "partial_rotary_factor": 1})
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", **content)
    assert read_config(tmp_path).rope_theta == 7e5


@pytest.mark.parametrize("kind, config", [("mixtral", MixtralConfig), ("mistral", MistralConfig)])
@pytest.mark.parametrize("change", [..., None])
def test_absent_and_null_keys_mean_what_they_mean_to_transformers(tmp_path, kind, config, change):
    optional = dict(num_key_value_heads=..., sliding_window=change, rms_norm_eps=..., rope_theta=..., max_position_embeddings=...,
                    tie_word_embeddings=..., head_dim=change)
    content = MIXTRAL_8X7B | {"model_type": kind} | optional
    (tmp_path / "config.json").write_text("{}")
    edit_json(tmp_path / "config.json", **content)
    ours, theirs = read_config(tmp_path), config.from_pretrained(tmp_path)
    assert ours.num_kv_heads == theirs.num_key_value_heads == 8
    assert ours.window == theirs.sliding_window
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    edit_json(tmp_path / "config.json", num_key_value_heads=None)  # as many as heads: older releases of transformers take it
    assert read_config(tmp_path).num_kv_heads == 32


def test_parameter_counts_are_those_of_transformers(tmp_path, peer):
    for name, model in {"mixtral": peer, "mistral": tiny("mistral"), "tied": tiny("mistral", tie_word_embeddings=True)}.items():
        assert read_config(write(tmp_path / name, model)).parameters() == model.num_parameters()


@pytest.mark.parametrize("name, content, expected", [
    ("config.json", MIXTRAL_8X7B, ["46.7 B (46,702,792,704)", "12.9 B", "93.41 GB", "4.29 GB (32768 positions)"]),
    ("params.json", MISTRAL_7B, ["7.2 B (7,241,732,096)", "536.87 MB (4096 positions", "4.29 GB (32768 positions)"]),
])
def test_inspect_needs_no_weights(tmp_path, capsys, name, content, expected):
    (tmp_path / name).write_text(json.dumps(content))
    main(["inspect", str(tmp_path)])
    output = capsys.readouterr().out
    for text in expected:
        assert text in output


# ------------------------------------------------------------------------------------------------------------ memory

MEMORY = """
import sys, threading, time
import torch, mixtral_ext
from mixtral_model import Model

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

torch.zeros(1).add_(1), torch.zeros(1 << 20).sum()
before, peak, stop = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
model = Model.load(sys.argv[1], progress=lambda done, total: globals().update(peak=max(peak, anonymous())))
for layer in model.weights.layers:
    for weight in vars(layer).values():
        weight.max()
peak = max(peak, anonymous())
stop.set()
thread.join()
print(peak - before)
"""


@pytest.mark.parametrize("layout", ["per-expert", "stacked", "fused"])
def test_anonymous_memory(tmp_path, layout):
    """Fused experts are mapped, q, k and v are copied, other experts take their own size and one tensor more; all of it would be 118 MB."""
    model = tiny(hidden_size=256, intermediate_size=1024, num_local_experts=8, num_hidden_layers=4, initializer_range=0.02)
    write(tmp_path, model, layout)
    experts = 4 * 8 * 3 * 256 * 1024 * 4
    largest = 8 * 1024 * 256 * 4 if layout == "stacked" else 1024 * 256 * 4
    wqkv = 4 * (4 + 2 * 2) * 64 * 256 * 4
    result = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True, env=_environment())
    slack = 4 << 20  # the interpreter's own: handles, JSON, allocator
    assert int(result.stdout) <= slack + wqkv + (0 if layout == "fused" else experts + largest)
    assert layout == "fused" or int(result.stdout) >= experts  # what is measured is what is meant


def _environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


# -------------------------------------------------------------------------------------------------------- bad input


def _config(**changes):
    return lambda directory: edit_json(directory / "config.json", **changes)


def _text(name, text):
    return lambda directory: (directory / name).write_text(text)


BAD_CONFIGS = {
    "not JSON": (_text("config.json", "{"), r"config\.json: not readable as JSON"),
    "nested": (_text("config.json", "[" * 100000), r"config\.json: not readable as JSON"),
    "not an object": (_text("config.json", "[]"), r"config\.json: expected a JSON object, got list"),
    "no config": (lambda d: (d / "config.json").unlink(), "neither config.json nor params.json is there"),
    "architecture": (_config(model_type="llama"), "unknown architecture: expected model_type mistral or mixtral, got 'llama'"),
    "missing size": (_config(hidden_size=...), "config.json: hidden_size is missing"),
    "size of text": (_config(vocab_size="many"), "vocab_size: expected an integer of at least 1, got 'many'"),
    "size of true": (_config(vocab_size=True), "vocab_size: expected an integer of at least 1, got True"),
    "zero layers": (_config(num_hidden_layers=0), "num_hidden_layers: expected an integer of at least 1, got 0"),
    "fraction": (_config(num_hidden_layers=1.5), "num_hidden_layers: expected an integer of at least 1, got 1.5"),
    "infinite": (_config(hidden_size=float("inf")), "hidden_size: expected an integer of at least 1, got inf"),
    "zero heads": (_config(num_attention_heads=0), "num_attention_heads: expected an integer of at least 1, got 0"),
    "zero key heads": (_config(num_key_value_heads=0), "num_key_value_heads: expected an integer of at least 1, got 0"),
    "head dim": (_config(head_dim=96), "head_dim: expected 64 or 128, got 96"),
    "head groups": (_config(num_key_value_heads=3), r"num_heads: expected a multiple of num_kv_heads \(3\), got 4"),
    "window": (_config(sliding_window="none"), "sliding_window: expected an integer of at least 1, got 'none'"),
    "window zero": (_config(sliding_window=0), "sliding_window: expected an integer of at least 1, got 0"),
    "window negative": (_config(sliding_window=-1), "sliding_window: expected an integer of at least 1, got -1"),
    "windows by layer": (_config(layer_types=["full_attention", "sliding_attention"]), "layer_types: expected null .*, got .'full_attention', "),
    "top-k": (_config(num_experts_per_tok=5), "experts per token: expected 1 to 4, got 5"),
    "top-k zero": (_config(num_experts_per_tok=0), "num_experts_per_tok: expected an integer of at least 1, got 0"),
    "experts": (_config(num_local_experts=300), "experts: expected at most 256, got 300"),
    "experts zero": (_config(num_local_experts=0), "num_local_experts: expected an integer of at least 1, got 0"),
    "experts negative": (_config(num_local_experts=-1), "num_local_experts: expected an integer of at least 1, got -1"),
    "rope scaling": (_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), """rope_type: expected "default" .*, got 'yarn'"""),
    "rope scaling beside parameters": (_config(rope_scaling={"type": "linear", "factor": 2.0}), """type: expected "default" .*, got 'linear'"""),
    "rope by layer": (_config(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope_parameters: unknown keys: full_attention"),
    "partial rotation": (_config(partial_rotary_factor=0.5), r"partial_rotary_factor: expected 1 \(nothing else is supported\), got 0.5"),
    "partial rotation in rope": (_config(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5}), "partial_rotary_factor: expected 1 "),
    "rope type": (_config(rope_parameters=3), "rope_parameters: expected an object, got 3"),
    "theta": (_config(rope_parameters={"rope_theta": -1}), "rope_theta: expected a number from 1e-30 to 1e30, got -1"),
    "theta infinite": (_config(rope_parameters={"rope_theta": float("inf")}), "rope_theta: expected a number from 1e-30 to 1e30, got inf"),
    "theta beyond float32": (_config(rope_parameters={"rope_theta": 1e40}), "rope_theta: expected a number from 1e-30 to 1e30, got 1e[+]40"),
    "theta too small": (_config(rope_parameters={"rope_theta": 1e-50}), "rope_theta: expected a number from 1e-30 to 1e30, got 1e-50"),
    "norm": (_config(rms_norm_eps=0), "rms_norm_eps: expected a number from 1e-30 to 1e30, got 0"),
    "activation": (_config(hidden_act="gelu"), """hidden_act: expected "silu" .*, got 'gelu'"""),
    "attention bias": (_config(attention_bias=True), "attention_bias: expected false .*, got True"),
    "quantised": (_config(quantization_config={"bits": 4}), "quantization_config: expected null .*, got {'bits': 4}"),
    "tied embeddings": (_config(tie_word_embeddings="false"), "tie_word_embeddings: expected true or false, got 'false'"),
    "eos": (_config(eos_token_id="</s>"), "eos_token_id: expected integers, got '</s>'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configuration(tmp_path, peer, case):
    change, message = BAD_CONFIGS[case]
    write(tmp_path, peer)
    (tmp_path / "generation_config.json").unlink()
    change(tmp_path)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(quantization={"qformat_weight": "fp8"}), "params.json: unknown keys: quantization"),
    (dict(model_type="mamba"), "unknown architecture: expected model_type transformer, got 'mamba'"),
    (dict(moe={"num_experts": 8}), "num_experts_per_tok is missing"),
    (dict(moe={"num_experts": 0, "num_experts_per_tok": 2}), "params.json: num_experts: expected an integer of at least 1, got 0"),
    (dict(rope_theta="fast"), "rope_theta: expected a number from 1e-30 to 1e30, got 'fast'"),
    (dict(dim=...), "params.json: dim is missing"),
    (dict(moe=7), "moe: expected an object, got 7"),
])
def test_bad_params(tmp_path, peer, change, message):
    write(tmp_path, peer, "consolidated")
    edit_json(tmp_path / "params.json", **change)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path)


def _truncate(path):
    os.truncate(path, path.stat().st_size - 1000)


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
BAD_WEIGHTS = {
    "truncated": (lambda d: _truncate(d / "model.safetensors"), r"model\.safetensors: corrupt or truncated: "),
    "garbage": (_text("model.safetensors", "garbage" * 100), r"model\.safetensors: corrupt or truncated: "),
    "empty": (_text("model.safetensors", ""), r"model\.safetensors: corrupt or truncated: "),
    "none": (lambda d: (d / "model.safetensors").unlink(), r"no model\*\.safetensors$"),
    "pickled": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only safetensors are read, not pytorch_model.bin"),
    "missing": (lambda d: _tensors(d, lambda t: (t.pop(ROUTER), t.pop(W2))),
                f"incomplete checkpoint: 2 missing tensors: {ROUTER}, {W2}$"),
    "no head": (lambda d: _tensors(d, lambda t: t.pop("lm_head.weight")), "1 missing tensors: lm_head.weight"),
    "more layers": (_config(num_hidden_layers=3), r"incomplete checkpoint: expected 3 layers, got no model\.layers\.2\.\*$"),
    "billions of layers": (_config(num_hidden_layers=10**15), r"expected 1000000000000000 layers, got no model\.layers\.2\.\*$"),
    "a layer in between": (lambda d: _tensors(d, lambda t: [t.pop(name) for name in list(t) if ".layers.0." in name]),
                           r"expected 2 layers, got no model\.layers\.0\.\*$"),
    "fewer layers": (_config(num_hidden_layers=1), "19 unknown tensors: model.layers.1.block_sparse_moe.experts.0.w1.weight, "),
    "unknown": (lambda d: _tensors(d, lambda t: t.update(surprise=torch.ones(2))), "1 unknown tensors: surprise"),
    "shape": (lambda d: _tensors(d, lambda t: t.update({W2: t[W2].T.contiguous()})),
              rf"{W2}: expected shape \[128, 96\], got \[96, 128\]"),
    "dtype": (lambda d: _tensors(d, lambda t: t.update({ROUTER: t[ROUTER].long()})), f"{ROUTER}: expected dtype F32, BF16, F16, got I64"),
    "twice": (lambda d: save_file({"model.norm.weight": torch.ones(128)}, d / "model-00002.safetensors"), "model.norm.weight is also in another file"),
    "index": (_text("model.safetensors.index.json", "{}"), "index.json: weight_map is missing"),
    "index of numbers": (_text("model.safetensors.index.json", '{"weight_map": {"a": 3}}'), "weight_map: expected names of files beside it, got 3"),
    "index of another place": (_text("model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}'),
                               r"weight_map: expected names of files beside it, got '\.\./model\.safetensors'"),
    "index of no name": (_text("model.safetensors.index.json", '{"weight_map": {"a": "."}}'), r"weight_map: expected names of files beside it, got '\.'"),
    "shard": (_text("model.safetensors.index.json", '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
              r"model-00001-of-00002\.safetensors: missing, but model\.safetensors\.index\.json names it"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights(tmp_path, peer, case):
    change, message = BAD_WEIGHTS[case]
    write(tmp_path, peer)
    change(tmp_path)
    with pytest.raises(ModelError, match=message):
        Model.load(tmp_path)


def test_no_directory(tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such directory"):
        Model.load(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16", torch.Tensor])
def test_other_dtypes_are_refused_before_anything_is_read(tmp_path, peer, dtype):
    write(tmp_path, peer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"dtype: expected torch.float32, torch.bfloat16, torch.float16 or None, got {dtype!r}"):
        Model.load(tmp_path, dtype)


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("device, message", [
    ("meta", "device: expected cpu or cuda, got 'meta'"),
    ("gpu", "device: expected cpu or cuda, got 'gpu'"),
    (None, "device: expected cpu or cuda, got None"),
    ("cuda", "device: cuda is not there: torch .* sees 0 NVIDIA GPUs"),
])
def test_other_devices_are_refused_before_anything_is_read(tmp_path, peer, monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    write(tmp_path, peer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=message):
        Model.load(tmp_path, device=device)


def test_a_gpu_takes_no_float32(tmp_path, peer, monkeypatch):
    """Neither the checkpoint's nor one that is asked for; nothing is moved before that is known."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ModelError, match="device: cuda:2 is not there: torch .* sees 2 NVIDIA GPUs"):
        Model.load(write(tmp_path, peer), device="cuda:2")
    for dtype in (None, torch.float32):
        with pytest.raises(ModelError, match="dtype: expected torch.bfloat16 or torch.float16 on cuda:1, got torch.float32"):
            Model.load(tmp_path, dtype, device=torch.device("cuda", 1))


def test_a_gpus_memory_is_checked_before_anything_is_read(tmp_path, peer, monkeypatch):
    needed = 2 * (read_config(write(tmp_path, peer)).parameters() + 1000 * 2 * 2 * 2 * 64)  # bf16; 1000 positions of 2 layers, k and v, 2 heads of 64
    pretend_a_card(monkeypatch, needed - 1, 24 * 10**9)
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("read"))
    with pytest.raises(ModelError, match="weights of 0.0 GB in torch.bfloat16 and a cache of 0.0 GB do not fit into the memory of cuda: "
                                         "24.0 GB, 0.0 GB of it free"):
        Model.load(tmp_path, torch.bfloat16, device="cuda", cache_positions=1000)
    pretend_a_card(monkeypatch, needed, 24 * 10**9)
    with pytest.raises(pytest.fail.Exception, match="read"):
        Model.load(tmp_path, torch.bfloat16, device="cuda", cache_positions=1000)


@pytest.mark.parametrize("layout, dtype, copied", [("fused", torch.float32, "wqkv"), ("per-expert", torch.float32, "experts"), ("fused", torch.bfloat16, "all")])
def test_memory_of_copies_is_checked_before_anything_is_read(tmp_path, peer, monkeypatch, layout, dtype, copied):
    """On the CPU, where what lies in the file as it is used stays there: a cache that fits alone does not beside the copies."""
    config = read_config(write(tmp_path, peer, layout))
    wqkv, experts = 2 * (4 + 2 * 2) * 64 * 128, 2 * 4 * 3 * 96 * 128  # layers, heads of 64 from 128; experts of three matrices
    size = {"wqkv": wqkv, "experts": wqkv + experts, "all": config.parameters()}[copied] * dtype.itemsize
    meminfo = tmp_path / "meminfo"
    needed = -(-(size + config.cache_bytes(1000, dtype.itemsize)) // 1024)
    monkeypatch.setattr("mixtral_model.weights.Path", lambda path: meminfo if path == "/proc/meminfo" else Path(path))
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("read"))
    meminfo.write_text(f"MemTotal: 24000000 kB\nMemAvailable: {needed - 1} kB\n")
    with pytest.raises(TooLarge, match=f"{'weights' if copied == 'all' else 'copies of weights'} of 0.0 GB in {dtype} and a cache of 0.0 GB do not "
                                       "fit into the memory of cpu: 24.6 GB, 0.0 GB of it free"):
        Model.load(tmp_path, dtype, cache_positions=1000)
    meminfo.write_text(f"MemTotal: 24000000 kB\nMemAvailable: {needed} kB\n")
    with pytest.raises(pytest.fail.Exception, match="read"):
        Model.load(tmp_path, dtype, cache_positions=1000)


def test_a_gpu_that_is_too_small(tmp_path, peer, monkeypatch):
    def tensor(self, name):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mixtral_model.weights.Checkpoint.tensor", tensor)
    with pytest.raises(ModelError, match="weights: 0.0 GB in torch.float32 do not fit into the memory of cpu"):
        Model.load(write(tmp_path, peer))
