"""Reads a checkpoint directory of safetensors into the tensors the model uses.

Experts are held as the ops want them: gate_up [E, 2I, H] (rows [gate; up]) and down [E, H, I]; a dense MLP is one expert.
A tensor that lies so in the file is memory-mapped, never copied. What is fused here (q, k and v into wqkv, 2 % of Mixtral
8x7B and 11 % of Mistral 7B, and experts in other layouts) is copied piece by piece from the mapped file, so loading never
needs more memory than the weights. Files are read one after the other, each once and from its start to its end. On a GPU
loading needs the weights and one tensor more there, and here one tensor and the mapped pages of one file, which the system
may drop.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig, ModelError, read_json


@dataclass
class Layer:
    attn_norm: Tensor      # [H]
    wqkv: Tensor           # [(Hq + 2 Hk) * D, H], rows [q; k; v]: one product instead of three
    wo: Tensor             # [H, Hq*D]
    mlp_norm: Tensor       # [H]
    gate_up: Tensor        # [E, 2I, H]
    down: Tensor           # [E, H, I]
    router: Tensor | None = None  # [E, H]; None: dense


@dataclass
class Weights:
    embed: Tensor          # [V, H]
    norm: Tensor           # [H]
    head: Tensor           # [V, H]
    layers: list[Layer]


@dataclass
class Piece:
    """A tensor of the checkpoint and the part of the target it fills."""
    name: str
    shape: tuple[int, ...]
    part: Callable[[Tensor], Tensor] | None = None  # None: it is the whole target


@dataclass
class Target:
    shape: tuple[int, ...]
    pieces: list[Piece]
    tensor: Tensor | None = None  # made when its first piece is read


class Checkpoint:
    """The tensors of a directory, by name and in the order of the files, mapped into memory."""

    def __init__(self, directory: Path, stem: str):
        from safetensors import SafetensorError, safe_open  # an extra, which only loading needs
        self.directory = directory
        index = directory / f"{stem}.safetensors.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ModelError(f"{index}: weight_map is missing")
            if bad := [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]:
                raise ModelError(f"{index}: weight_map: expected names of files beside it, got {bad[0]!r:.80}")
            paths = [directory / name for name in sorted(set(weight_map.values()))]
        else:
            paths = sorted(directory.glob(f"{stem}*.safetensors"))
        if not paths:
            others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in directory.glob(pattern))
            raise ModelError(f"{directory}: no {stem}*.safetensors" + (f"; only safetensors are read, not {others[0]}" if others else ""))
        self.files = {}
        for path in paths:
            if not path.is_file():
                raise ModelError(f"{path}: missing, but {index.name} names it")
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: corrupt or truncated: {error}") from None
            for name in file.offset_keys():
                if name in self.files:
                    raise ModelError(f"{path}: {name} is also in another file (model-parallel shards are not supported)")
                self.files[name] = file

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype."""
        header = self.files[name].get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def tensor(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor

    def forget(self, name: str) -> None:
        """A file is unmapped once all of its tensors are forgotten and none is in use."""
        del self.files[name]


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}  # safetensors writes them in capitals

_TRANSFORMERS = dict(
    embed="model.embed_tokens.weight", norm="model.norm.weight", head="lm_head.weight", layer="model.layers.{}.",
    attn_norm="input_layernorm.weight", wq="self_attn.q_proj.weight", wk="self_attn.k_proj.weight",
    wv="self_attn.v_proj.weight", wo="self_attn.o_proj.weight", mlp_norm="post_attention_layernorm.weight",
    gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight")
_CONSOLIDATED = dict(
    embed="tok_embeddings.weight", norm="norm.weight", head="output.weight", layer="layers.{}.",
    attn_norm="attention_norm.weight", wq="attention.wq.weight", wk="attention.wk.weight", wv="attention.wv.weight",
    wo="attention.wo.weight", mlp_norm="ffn_norm.weight",
    gate="feed_forward.w1.weight", up="feed_forward.w3.weight", down="feed_forward.w2.weight")


def _plan(config: ModelConfig, checkpoint: Checkpoint) -> tuple[dict[str, Target], list[dict[str, Target]]]:
    """What fills each tensor of Weights and of each Layer, in the layout that the checkpoint's names show."""
    present = checkpoint.files.keys()
    names = _CONSOLIDATED if config.consolidated else _TRANSFORMERS
    h, d, v = config.hidden_size, config.head_dim, config.vocab_size

    def whole(name, *shape):
        return Target(shape, [Piece(name, shape)])

    top = {"embed": whole(names["embed"], v, h), "norm": whole(names["norm"], h)}
    if not config.tie_embeddings:
        top["head"] = whole(names["head"], v, h)
    layers = []
    for i in range(config.num_layers):
        prefix = names["layer"].format(i)
        if not any(name.startswith(prefix) for name in present):
            raise ModelError(f"{checkpoint.directory}: incomplete checkpoint: expected {config.num_layers} layers, got no {prefix}*")
        q, kv = config.num_heads * d, config.num_kv_heads * d
        layer = {key: whole(prefix + names[key], *shape) for key, shape in {"attn_norm": (h,), "wo": (h, q), "mlp_norm": (h,)}.items()}
        layer["wqkv"] = Target((q + 2 * kv, h), [Piece(prefix + names["wq"], (q, h), lambda t: t[:q]),
                                                 Piece(prefix + names["wk"], (kv, h), lambda t: t[q:q + kv]),
                                                 Piece(prefix + names["wv"], (kv, h), lambda t: t[q + kv:])])
        layers.append(layer | (_experts(config, prefix, present) if config.num_experts else _dense(config, prefix, names)))
    return top, layers


def _dense(config, prefix, names):
    i, h = config.intermediate_size, config.hidden_size
    return {"gate_up": Target((1, 2 * i, h), [Piece(prefix + names["gate"], (i, h), lambda t: t[0, :i]),
                                              Piece(prefix + names["up"], (i, h), lambda t: t[0, i:])]),
            "down": Target((1, h, i), [Piece(prefix + names["down"], (h, i))])}


def _experts(config, prefix, present):
    e, i, h = config.num_experts, config.intermediate_size, config.hidden_size
    blocks = ("feed_forward", "block_sparse_moe") if config.consolidated else ("block_sparse_moe", "mlp")
    block = next((b for b in blocks if any(f".{b}." in name for name in present)), blocks[0])
    if any(name.endswith(f"{block}.experts.gate_up_proj") for name in present):  # fused, as transformers 5 holds them
        gate_up = [Piece(f"{prefix}{block}.experts.gate_up_proj", (e, 2 * i, h))]
        down = [Piece(f"{prefix}{block}.experts.down_proj", (e, h, i))]
    elif any(name.endswith(f"{block}.w1") for name in present):  # stacked, w2 transposed
        gate_up = [Piece(f"{prefix}{block}.w1", (e * i, h), lambda t: t[:, :i]),
                   Piece(f"{prefix}{block}.w3", (e * i, h), lambda t: t[:, i:])]
        down = [Piece(f"{prefix}{block}.w2", (e * i, h), lambda t: t.transpose(1, 2))]
    else:  # per expert
        expert = prefix + block + ".experts.{}.{}.weight"
        gate_up = [piece for x in range(e) for piece in (
            Piece(expert.format(x, "w1"), (i, h), lambda t, x=x: t[x, :i]),
            Piece(expert.format(x, "w3"), (i, h), lambda t, x=x: t[x, i:]))]
        down = [Piece(expert.format(x, "w2"), (h, i), lambda t, x=x: t[x]) for x in range(e)]
    router = Piece(f"{prefix}{block}.gate.weight", (e, h))
    return {"router": Target((e, h), [router]), "gate_up": Target((e, 2 * i, h), gate_up), "down": Target((e, h, i), down)}


def _check(config: ModelConfig, checkpoint: Checkpoint, pieces: list[Piece]) -> None:
    def some(names):
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

    directory, present, expected = checkpoint.directory, checkpoint.files.keys(), {piece.name for piece in pieces}
    missing = [piece.name for piece in pieces if piece.name not in present]
    if missing:
        raise ModelError(f"{directory}: incomplete checkpoint: {len(missing)} missing tensors: {some(missing)}")
    harmless = {_TRANSFORMERS["head"], _CONSOLIDATED["head"]} if config.tie_embeddings else set()
    unknown = sorted(n for n in present - expected - harmless if not n.endswith("rotary_emb.inv_freq"))
    if unknown:
        raise ModelError(f"{directory}: {len(unknown)} unknown tensors: {some(unknown)}")
    for piece in pieces:
        shape, dtype = checkpoint.header(piece.name)
        if shape != piece.shape:
            raise ModelError(f"{directory}: {piece.name}: expected shape {list(piece.shape)}, got {list(shape)}")
        if dtype.lower() not in DTYPES:
            raise ModelError(f"{directory}: {piece.name}: expected dtype {', '.join(DTYPES).upper()}, got {dtype}")


def find_device(name: str | torch.device) -> torch.device:
    """The CPU or an NVIDIA GPU; ModelError for anything else and for a GPU that is not there."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ModelError(f"device: {device} is not there: torch {torch.__version__} sees {count} NVIDIA GPUs")
    return device


class TooLarge(ModelError):
    """Weights and cache do not fit into the memory there is."""


def check_memory(config: ModelConfig, dtype: torch.dtype, device: torch.device, cache_positions: int = 0, mapped: int = 0) -> None:
    """TooLarge unless the weights (without `mapped` of them, which stay in their files) and a cache of so many positions, of all
    sequences together, fit into the device's free memory."""
    if device.type == "cuda":
        free, there = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, for reuse
    else:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        there, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    weights, cache = (config.parameters() - mapped) * dtype.itemsize, config.cache_bytes(cache_positions, dtype.itemsize)
    if weights + cache > free:
        copies = "copies of weights" if mapped else "weights"
        raise TooLarge(f"{copies} of {weights / 1e9:.1f} GB in {dtype} and a cache of {cache / 1e9:.1f} GB do not fit into the memory of "
                       f"{device}: {there / 1e9:.1f} GB, {free / 1e9:.1f} GB of it free")


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in DTYPES.values():
        raise ModelError(f"dtype: expected {', '.join(map(str, DTYPES.values()))} or None, got {dtype!r}")
    if device.type == "cuda" and dtype == torch.float32:
        raise ModelError(f"dtype: expected torch.bfloat16 or torch.float16 on {device}, got {dtype}")


def load_weights(directory: str | Path, config: ModelConfig, dtype: torch.dtype | None = None,
                 progress: Callable[[int, int], None] | None = None, device: str | torch.device = "cpu",
                 cache_positions: int = 0) -> Weights:
    """Weights in `dtype` (f32, bf16 or f16, on CUDA one of the last two; default: that of the embedding in the file) on
    `device`. progress(done, total) counts tensors. cache_positions: for which there must be memory too.

    Every name, shape and dtype is checked before the first weight is read, and the memory; ModelError says what is wrong."""
    device = find_device(device)
    if dtype is not None:
        check_dtype(dtype, device)
    checkpoint = Checkpoint(Path(directory), "consolidated" if config.consolidated else "model")
    top, layers = _plan(config, checkpoint)
    targets = [target for group in (top, *layers) for target in group.values()]
    _check(config, checkpoint, [piece for target in targets for piece in target.pieces])
    dtype = dtype or DTYPES[checkpoint.header(top["embed"].pieces[0].name)[1].lower()]
    check_dtype(dtype, device)
    mapped = sum(math.prod(target.shape) for target in targets if device.type == "cpu" and target.pieces[0].part is None
                 and DTYPES[checkpoint.header(target.pieces[0].name)[1].lower()] == dtype)
    check_memory(config, dtype, device, cache_positions, mapped)

    wanted = {piece.name: (target, piece) for target in targets for piece in target.pieces}
    done = 0
    try:
        for name in list(checkpoint.files):
            if name in wanted:
                _read(checkpoint.tensor(name), *wanted[name], dtype, device)
                done += 1
                if progress:
                    progress(done, len(wanted))
            checkpoint.forget(name)
    except torch.OutOfMemoryError:  # of a GPU
        size = config.parameters() * dtype.itemsize
        raise ModelError(f"weights: {size / 1e9:.1f} GB in {dtype} do not fit into the memory of {device}") from None
    loaded = {key: target.tensor for key, target in top.items()}
    loaded.setdefault("head", loaded["embed"])
    return Weights(**loaded, layers=[Layer(**{key: target.tensor for key, target in layer.items()}) for layer in layers])


def _read(source: Tensor, target: Target, piece: Piece, dtype: torch.dtype, device: torch.device) -> None:
    if piece.part is None:
        target.tensor = source.view(target.shape).to(device, dtype)
        return
    if target.tensor is None:
        target.tensor = torch.empty(target.shape, dtype=dtype, device=device)
    part = piece.part(target.tensor)
    part.copy_(source.view(part.shape))
