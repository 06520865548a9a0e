"""Shape of a Mistral or Mixtral model, read from config.json (transformers) or params.json (Mistral's own format)."""
import json
import math
from dataclasses import dataclass
from pathlib import Path


class ModelError(ValueError):
    """A checkpoint, configuration or request that cannot be served; the message is meant for the user."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes are in elements; num_experts 0 means a dense Mistral."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    consolidated: bool           # Mistral's own weight layout: other names, and rope turns the pairs (2i, 2i+1), not (i, i + D/2)
    window: int | None           # a query sees this many keys, itself included; None is plain causal
    max_positions: int           # longest sequence when there is no window
    num_experts: int = 0
    top_k: int = 0
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"config: num_heads: expected a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}")
        if self.head_dim not in (64, 128):
            raise ModelError(f"config: head_dim: expected 64 or 128, got {self.head_dim}")
        if self.num_experts > 256:
            raise ModelError(f"config: experts: expected at most 256, got {self.num_experts}")
        if self.num_experts and self.top_k > min(8, self.num_experts):
            raise ModelError(f"config: experts per token: expected 1 to {min(8, self.num_experts)}, got {self.top_k}")

    def parameters(self, active: bool = False) -> int:
        """Number of weights; active: only those a token passes through (top_k of the experts, all of the rest)."""
        h, d = self.hidden_size, self.head_dim
        attention = 2 * h * d * (self.num_heads + self.num_kv_heads)
        experts = (self.top_k if active else self.num_experts) if self.num_experts else 1
        layer = attention + 2 * h + h * self.num_experts + experts * 3 * h * self.intermediate_size
        return self.num_layers * layer + h + (1 if self.tie_embeddings else 2) * self.vocab_size * h

    def cache_bytes(self, positions: int, element_size: int) -> int:
        """Bytes of keys and values that one sequence keeps for so many positions."""
        return 2 * self.num_layers * positions * self.num_kv_heads * self.head_dim * element_size


def read_config(directory: str | Path) -> ModelConfig:
    """The configuration in a checkpoint directory. With both files there, config.json wins if weights in the
    transformers layout lie beside it or no consolidated ones do."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such directory")
    transformers, consolidated = directory / "config.json", directory / "params.json"
    if consolidated.is_file() and (not transformers.is_file() or
                                   not any(directory.glob("model*.safetensors*")) and any(directory.glob("consolidated*"))):
        return _from_params(read_json(consolidated), consolidated)
    if not transformers.is_file():
        raise ModelError(f"{directory}: neither config.json nor params.json is there")
    generation = directory / "generation_config.json"
    return _from_transformers(read_json(transformers), transformers, read_json(generation) if generation.is_file() else {})


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


_NEEDED = object()


class _Reader:
    """Typed access to a JSON object, with errors that name file and key. A default stands for a key that is missing or null."""

    def __init__(self, content: dict, path: Path):
        self.content, self.path = content, path

    def integer(self, key: str, default=_NEEDED, least: int = 1) -> int | None:
        number = self._number(key, default, f"an integer of at least {least}", lambda x: x.is_integer() and x >= least)
        return None if number is None else int(number)

    def positive(self, key: str, default=_NEEDED) -> float:
        return self._number(key, default, "a number from 1e-30 to 1e30", lambda x: 1e-30 <= x <= 1e30)

    def _number(self, key, default, expected, accepts) -> float | None:
        value = self.content.get(key)
        if value is None:
            if default is _NEEDED:
                raise ModelError(f"{self.path}: {key} is missing")
            return default
        try:
            number = float(value)  # it may be a string such as "4096"
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not accepts(number):
            raise self._error(key, expected, value)
        return number

    def flag(self, key: str) -> bool:
        value = self.content.get(key)
        if value not in (None, False, True):
            raise self._error(key, "true or false", value)
        return bool(value)

    def object(self, key: str) -> dict:
        value = self.content.get(key) or {}
        if not isinstance(value, dict):
            raise self._error(key, "an object", value)
        return value

    def supports(self, **only) -> None:
        """Refuses every other value of these keys than the one given, null or none at all."""
        for key, value in only.items():
            if self.content.get(key) not in (None, value):
                raise self._error(key, f"{json.dumps(value)} (nothing else is supported)", self.content[key])

    def _error(self, key, expected, got) -> ModelError:
        return ModelError(f"{self.path}: {key}: expected {expected}, got {got!r}")


def _from_transformers(content: dict, path: Path, generation: dict) -> ModelConfig:
    model_type = content.get("model_type")
    if model_type not in ("mistral", "mixtral"):
        raise ModelError(f"{path}: unknown architecture: expected model_type mistral or mixtral, got {model_type!r} "
                         f"(architectures {content.get('architectures')})")
    mixtral = model_type == "mixtral"
    get = _Reader(content, path)
    get.supports(hidden_act="silu", attention_bias=False, mlp_bias=False, partial_rotary_factor=1, layer_types=None,
                 quantization_config=None)
    rope = get.object("rope_parameters") | get.object("rope_scaling")
    get_rope = _Reader(rope, path)
    get_rope.supports(rope_type="default", type="default", partial_rotary_factor=1)
    if unknown := sorted(rope.keys() - {"rope_type", "type", "partial_rotary_factor", "rope_theta"}):
        raise ModelError(f"{path}: rope_parameters: unknown keys: {', '.join(unknown)}")
    # Defaults are those of transformers where a key is absent; there an explicit null means something else for two of them.
    heads, hidden = get.integer("num_attention_heads"), get.integer("hidden_size")
    kv_heads = get.integer("num_key_value_heads", default=heads if "num_key_value_heads" in content else 8)
    window = get.integer("sliding_window", default=None if "sliding_window" in content or mixtral else 4096)
    eos = generation.get("eos_token_id", content.get("eos_token_id"))
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in eos):
        raise ModelError(f"{path}: eos_token_id: expected integers, got {', '.join(map(repr, eos))}")
    return ModelConfig(
        vocab_size=get.integer("vocab_size"), hidden_size=hidden, intermediate_size=get.integer("intermediate_size"),
        num_layers=get.integer("num_hidden_layers"), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=get.integer("head_dim", default=hidden // heads),
        norm_eps=get.positive("rms_norm_eps", default=1e-5 if mixtral else 1e-6),
        rope_theta=get_rope.positive("rope_theta", default=get.positive("rope_theta", default=1e6 if mixtral else 1e4)),
        consolidated=False, window=window, max_positions=get.integer("max_position_embeddings", default=131072),
        num_experts=get.integer("num_local_experts") if mixtral else 0,
        top_k=get.integer("num_experts_per_tok") if mixtral else 0,
        tie_embeddings=get.flag("tie_word_embeddings"),
        eos_ids=tuple(eos), bos_id=get.integer("bos_token_id", default=None, least=0))


_PARAMS = {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "rope_theta",
           "sliding_window", "moe", "tied_embeddings", "max_seq_len", "max_position_embeddings", "max_batch_size", "model_type"}


def _from_params(content: dict, path: Path) -> ModelConfig:
    if content.get("model_type", "transformer") != "transformer":
        raise ModelError(f"{path}: unknown architecture: expected model_type transformer, got {content['model_type']!r}")
    unknown = sorted(key for key in content.keys() - _PARAMS if content[key])  # an unknown key may change the model
    if unknown:
        raise ModelError(f"{path}: unknown keys: {', '.join(unknown)}")
    get = _Reader(content, path)
    moe = _Reader(get.object("moe"), path)
    dim, heads, window = get.integer("dim"), get.integer("n_heads"), get.integer("sliding_window", default=None)
    return ModelConfig(
        vocab_size=get.integer("vocab_size"), hidden_size=dim, intermediate_size=get.integer("hidden_dim"),
        num_layers=get.integer("n_layers"), num_heads=heads, num_kv_heads=get.integer("n_kv_heads"),
        head_dim=get.integer("head_dim", default=dim // heads), norm_eps=get.positive("norm_eps"),
        # Mistral 7B v0.1 has a window and no theta, later models the reverse
        rope_theta=get.positive("rope_theta", default=1e6 if window is None else 1e4), consolidated=True, window=window,
        max_positions=get.integer("max_position_embeddings", default=get.integer("max_seq_len", default=32768)),
        num_experts=moe.integer("num_experts") if moe.content else 0,
        top_k=moe.integer("num_experts_per_tok") if moe.content else 0,
        tie_embeddings=get.flag("tied_embeddings"))
