"""python -m mixtral_model bench: how fast a whole model reads and writes, beside what the machine allows and transformers on the same weights.

A decoding step is generate()'s own: the next one is under way while the host reads the tokens. Its cache holds random numbers. What it must
move are the weights that all tokens pass through, the experts that this batch chose (counted, not a formula), the head and the keys and values
that it sees; the limit is that over the measured bandwidth of the machine.
"""
import json
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .config import ModelConfig, ModelError, read_config
from .decode import Decoder
from .generate import prefill
from .model import Cache, Model
from .random_weights import random_config, random_weights
from .weights import TooLarge, Weights, check_dtype, check_memory, find_device

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WARM_UP = 5      # steps before those that are timed: on a GPU two calls, a capture and two replays
PROFILED = 3     # steps after them
CHECKED = 64     # tokens whose logits are compared with transformers'
TOLERANCE = {"f32": 1e-4, "f16": 5e-3, "bf16": 2e-2}
CHUNK = 2048
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "linear", "mkldnn_linear", "bmm")}


def bench(arguments: Namespace) -> None:
    from mixtral_bench import machine
    device, dtype, config = find_device(arguments.device), DTYPES[arguments.dtype], _config(arguments)
    of_layers = random_config(arguments.random_weights).num_layers if arguments.random_weights else config.num_layers
    run = Run(config, arguments)
    name = arguments.random_weights or Path(arguments.checkpoint).resolve().name
    print(f"{name}, {config.num_layers} of {of_layers} layers, {config.parameters() / 1e9:.2f} B parameters, "
          f"{config.parameters() * dtype.itemsize / 1e9:.1f} GB in {arguments.dtype}, on {device}", flush=True)
    positions = max(run.prompt_tokens, *(batch * Cache.positions(config, run.longest) for batch in run.batches))
    check_dtype(dtype, device)
    if arguments.random_weights or device.type == "cuda":  # a checkpoint on the CPU stays in its files
        try:
            check_memory(config, dtype, device, positions)
        except TooLarge as error:
            print(f"not run: {error}")
            return
    report = {"kind": "model", "machine": machine.describe(device), "command": " ".join(["python -m mixtral_model", *sys.argv[1:]]),
              "quick": arguments.quick, "state": {"before": machine.state(device)}, "limits": machine.limits(device, arguments.quick)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        model = random_weights(config, device, dtype) if arguments.random_weights else Model.load(arguments.checkpoint, dtype, device=device)
        peer, peers = _peer(model) if arguments.peers else (None, {"transformers": "absent: not asked for"})
        report |= {"peers": peers, "check": _check(model, peer, arguments.dtype) if peer else None,
                   "model": {"name": name, "layers": config.num_layers, "of_layers": of_layers, "dtype": arguments.dtype,
                             "parameters": config.parameters(), "random": bool(arguments.random_weights)}}
        finish = machine.watch(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        report |= run.measure(model, peer, f"transformers {peers['transformers']}", report["limits"])
    except torch.OutOfMemoryError as error:  # of a GPU that holds weights and cache, but not what a pass takes beside them
        raise ModelError(f"the memory of {device} is too small for what a pass takes beside weights and cache: {error}") from None
    report["state"] |= {"during": finish(), "after": machine.state(device)}
    _show(report)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
        print(f"results: {arguments.json}")


def _config(arguments: Namespace) -> ModelConfig:
    if arguments.random_weights:
        return random_config(arguments.random_weights, arguments.layers)
    if arguments.layers is not None:
        raise ModelError("layers: only --random-weights can be shortened")
    return read_config(arguments.checkpoint)


def _peer(model: Model):
    """transformers' model and its version; None and why, where it is not installed or of another kind."""
    try:
        import transformers

        from .transformers_peer import build
        return build(model), {"transformers": transformers.__version__}
    except ImportError as error:
        return None, {"transformers": f"absent: {error}"}
    except Exception as failure:  # noqa: BLE001
        return None, {"transformers": f"failed: {type(failure).__name__}: {failure}"}


@torch.inference_mode()
def _check(model: Model, peer, dtype: str) -> dict[str, float]:
    """The error of our logits and transformers', from its f32 on the same weights; refuses ours if it is larger than it may be.

    The median over positions: of a deep model with random weights some tokens get other experts by rounding alone. The last positions are
    decoded one by one."""
    from .transformers_peer import in_float32
    ids = torch.randint(model.config.vocab_size, (CHECKED,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = torch.tensor([ids], device=model.device)
    with in_float32(peer):
        exact = peer(tokens, use_cache=False).logits[0]
    cache, start = model.new_cache(1, CHECKED), CHECKED * 3 // 4
    chunks = [ids[:start]] + [[token] for token in ids[start:]]
    ours = model.logits(torch.cat([model.forward([chunk], cache, [0]) for chunk in chunks]))
    found = {name: float(((logits.float() - exact).norm(dim=1) / exact.norm(dim=1)).median())
             for name, logits in (("error", ours), ("error of transformers", peer(tokens, use_cache=False).logits[0]))}
    allowed = max(TOLERANCE[dtype], 2 * found["error of transformers"])
    if not found["error"] <= allowed:
        raise ModelError(f"our logits are wrong: expected a relative error of at most {allowed:.2g} from transformers' in f32, "
                         f"got {found['error']:.2g}")
    return found | {"allowed": allowed}


class Run:
    """What is measured: one prompt that is read, and steps of each batch."""

    def __init__(self, config: ModelConfig, arguments: Namespace):
        self.prompt_tokens, self.steps, self.quick = arguments.prompt_tokens, arguments.new_tokens, arguments.quick
        self.context = self.prompt_tokens if arguments.context is None else arguments.context
        self.batches = arguments.batch
        for name, values in (("prompt-tokens", [self.prompt_tokens]), ("new-tokens", [self.steps]), ("context", [self.context]),
                             ("batch", self.batches)):
            if min(values) < 1:
                raise ModelError(f"{name}: expected at least 1, got {min(values)}")
        self.longest = self.context + WARM_UP + self.steps + PROFILED
        if config.window is None and max(self.longest, self.prompt_tokens) > config.max_positions:
            raise ModelError(f"context: expected at most {config.max_positions} positions (the model has no window), "
                             f"got {max(self.longest, self.prompt_tokens)}")

    def measure(self, model: Model, peer, peer_name: str, limits: dict[str, float]) -> dict:
        from tqdm import tqdm
        bar = tqdm(total=(1 + len(self.batches)) * (2 if peer else 1), unit=" measurements", leave=False)

        def progress(text):
            bar.set_description(text)
            return bar

        rows = []
        progress("prefill")
        rows.append(self.prefill(model))
        bar.update()
        for batch in self.batches:
            progress(f"decode, batch {batch}")
            rows.append(self.decode(model, batch))
            bar.update()
        found = {"memory": memory(model, max(self.batches) * Cache.positions(model.config, self.longest)),
                 "launches": self.launches(model)}
        if peer:  # after ours, since it may need more memory
            for row in rows:
                progress(f"transformers, {row['what']}, batch {row['batch']}")
                self.beside(row, model, peer, peer_name)
                bar.update()
        bar.close()
        bandwidth = max(limits["copy_tb_s"], limits["read_tb_s"])
        products = limits["f32_tflop_s" if model.weights.embed.dtype == torch.float32 else "bf16_tflop_s"]
        for row in rows:
            row["limit_us"] = 1e-6 * max(row["bytes"] / bandwidth, row["flops"] / products)
            row["share"] = row["limit_us"] / row["ours"]["us_a_step"]
        return found | {"rows": rows}

    def prefill(self, model: Model) -> dict:
        prompt = _ids(model, self.prompt_tokens, 1)
        load = torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.int64, device=model.device)

        def read(expert_load=None):
            cache = model.new_cache(1, len(prompt))
            model.logits(prefill(model, cache, [prompt], CHUNK, expert_load=expert_load)).argmax().item()
        read(load)  # warm-up
        seconds = _times(read, 1 if self.quick else 3)
        chunks = -(-len(prompt) // CHUNK)
        pairs = sum(min(p + 1, model.config.window or p + 1) for p in range(len(prompt)))
        touched = (load > 0).sum(1).tolist() if model.config.num_experts else [1] * model.config.num_layers
        return {"what": "prefill", "batch": 1, "tokens": len(prompt), "context": 0, "ours": _result(seconds, len(prompt)), "peers": {},
                "bytes": chunks * weight_bytes(model, touched) + len(prompt) * model.config.cache_bytes(1, _itemsize(model)),
                "flops": flops(model, len(prompt), 1, pairs)} | _ops(read, seconds, model.device)

    def decode(self, model: Model, batch: int) -> dict:
        """After WARM_UP steps, with about half of the timed ones in the cache."""
        c = model.config
        touched = self.touched(model, batch)
        decoder = self.decoder(model, batch)
        sent = decoder.next()

        def step():
            nonlocal sent
            ahead = decoder.next()
            list(sent.read())
            sent = ahead
        for _ in range(WARM_UP - 1):
            step()
        seconds = _times(step, self.steps)
        visible = min(self.context + WARM_UP + self.steps // 2, c.window or self.longest)
        row = {"what": "decode", "batch": batch, "tokens": batch, "context": self.context, "ours": _result(seconds, batch), "peers": {},
               "bytes": weight_bytes(model, touched) + batch * (visible * c.cache_bytes(1, _itemsize(model)) + c.hidden_size * _itemsize(model)),
               "flops": flops(model, batch, batch, batch * visible),
               "experts touched a layer": statistics.mean(touched) if c.num_experts else None}
        return row | _ops(step, seconds, model.device, PROFILED)

    def decoder(self, model: Model, batch: int, **settings) -> Decoder:
        cache = model.new_cache(batch, self.longest)
        for ts in (cache.keys, cache.values):
            ts[0].normal_()
            for t in ts[1:]:
                t.copy_(ts[0])
        cache.lengths = [self.context] * batch
        decoder = Decoder(model, cache, self.longest - self.context, **settings)
        decoder.tokens.copy_(torch.tensor(_ids(model, batch, 2)))
        return decoder

    def touched(self, model: Model, batch: int) -> list[float]:
        """Experts of each layer that a step of the batch reads: means over some steps."""
        if not model.config.num_experts:
            return [1] * model.config.num_layers
        load = torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.int64, device=model.device)
        decoder = self.decoder(model, batch, expert_load=load, captures=lambda function, device: function)
        counts = []
        for _ in range(2 if self.quick else 8):
            load.zero_()
            list(decoder.next().read())
            counts.append((load > 0).sum(1).tolist())
            if len(counts) == WARM_UP + self.steps:
                break
        return [statistics.mean(of_layer) for of_layer in zip(*counts)]

    def launches(self, model: Model) -> dict | None:
        """Kernels of a step of the smallest batch; those of a layer are what the last one adds."""
        if model.device.type != "cuda":
            return {"per_layer": None, "per_step": None, "by_name": {}}

        def count(model):
            decoder = self.decoder(model, min(self.batches), captures=lambda function, device: function)
            list(decoder.next().read())
            return _inside(lambda: list(decoder.next().read()), 1, model.device)[1]
        w = model.weights
        shorter = Model(model.config, Weights(w.embed, w.norm, w.head, w.layers[:-1]))
        by_name, without_last = count(model), count(shorter)
        total = sum(by_name.values())
        return {"per_layer": total - sum(without_last.values()), "per_step": total, "by_name": by_name}

    def beside(self, row: dict, model: Model, peer, name: str) -> None:
        """transformers in the same row; what fails is said there."""
        from . import transformers_peer
        ids = torch.tensor(_ids(model, row["tokens"], 1 if row["what"] == "prefill" else 2), device=model.device)

        def eager():
            if row["what"] == "prefill":
                return lambda: transformers_peer.prefill(peer, ids.tolist(), CHUNK).argmax().item()
            return transformers_peer.decode_step(peer, model, ids, self.context, WARM_UP + self.steps, False)

        candidates = {f"{name} eager": eager}
        if model.device.type == "cuda" and row["what"] == "decode":
            candidates[f"{name} compiled"] = lambda: transformers_peer.decode_step(peer, model, ids, self.context, WARM_UP + self.steps, True)
        for key, make in candidates.items():
            try:
                call = make()
                runs = min(self.steps, 3 if self.quick else 16) if row["what"] == "decode" else 1 if self.quick else 3
                _times(call, min(WARM_UP, runs))
                row["peers"][key] = _result(_times(call, runs), row["tokens"])
            except Exception as failure:  # noqa: BLE001
                row["peers"][key] = {"failed": f"{type(failure).__name__}: {failure}"[:500]}
            call = None
            if model.device.type == "cuda":
                torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- counting


def _ids(model: Model, count: int, seed: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def _itemsize(model: Model) -> int:
    return model.weights.embed.dtype.itemsize


def parts(weights: Weights) -> dict[str, int]:
    """Bytes of the weights by what they belong to."""
    def size(*tensors):
        return sum(t.nbytes for t in tensors if t is not None)
    mlp = "mlp" if all(x.router is None for x in weights.layers) else "experts"
    return {"embed": size(weights.embed), "attention": sum(size(x.wqkv, x.wo) for x in weights.layers),
            mlp: sum(size(x.gate_up, x.down, x.router) for x in weights.layers),
            "norms": size(weights.norm) + sum(size(x.attn_norm, x.mlp_norm) for x in weights.layers),
            "head": 0 if weights.head is weights.embed else size(weights.head)}


def memory(model: Model, cache_positions: int) -> dict:
    """Bytes by part; the peak is a GPU's."""
    weights, cache = parts(model.weights), model.config.cache_bytes(cache_positions, _itemsize(model))
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    rest = None if peak is None else peak - sum(weights.values()) - cache
    return {"weights": weights, "cache": cache, "workspace and activations": rest, "peak": peak}


def weight_bytes(model: Model, touched: list[float]) -> float:
    """What a pass reads of the weights when it touches so many experts in each layer: everything but the embedding's other rows."""
    size = model.weights.norm.nbytes + model.weights.head.nbytes
    for layer, experts in zip(model.weights.layers, touched):
        size += sum(t.nbytes for t in (layer.attn_norm, layer.wqkv, layer.wo, layer.mlp_norm, layer.router) if t is not None)
        size += experts * (layer.gate_up[0].nbytes + layer.down[0].nbytes)
    return size


def flops(model: Model, tokens: int, logits: int, pairs: int) -> int:
    """Of the products and the attention, for pairs of a query and a key that it sees."""
    c = model.config
    layer = 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads) + c.hidden_size * c.num_experts
    layer += (c.top_k or 1) * 3 * c.hidden_size * c.intermediate_size
    return 2 * tokens * c.num_layers * layer + 2 * logits * c.vocab_size * c.hidden_size + 4 * pairs * c.num_layers * c.num_heads * c.head_dim


# --------------------------------------------------------------------------------------------------------------- timing


def _times(call: Callable[[], object], runs: int) -> list[float]:
    """Seconds of each; every call ends with a value on the host."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _result(seconds: list[float], tokens: int) -> dict:
    middle = statistics.median(seconds)
    return {"tokens_s": tokens / middle, "us_a_step": 1e6 * middle, "us_range": [1e6 * min(seconds), 1e6 * max(seconds)], "runs": len(seconds)}


def _ops(call: Callable[[], object], seconds: list[float], device: torch.device, runs: int = 1) -> dict:
    """The time inside, beside that of the call as it was measured without the profiler."""
    inside, _ = _inside(call, runs, device)
    return {"ops_us": inside, "ops_share": inside / (1e6 * statistics.median(seconds))}


def _inside(call: Callable[[], object], runs: int, device: torch.device) -> tuple[float, dict[str, int]]:
    """Microseconds of a call (the median) inside of our ops and the products, on a GPU of all kernels and copies, and how many of each."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if (event.device_type == DeviceType.CUDA if cuda else
                                                       event.name.startswith("mixtral_ext::") or event.name in PRODUCTS)]
    events.sort(key=lambda event: event.time_range.start)
    times = [event.time_range.elapsed_us() if cuda else event.self_cpu_time_total for event in events]
    each = len(events) // runs  # every call does the same
    counts = Counter(event.name for event in events)
    return statistics.median(sum(times[i * each:(i + 1) * each]) for i in range(runs)), {name: n // runs for name, n in counts.items()}


# -------------------------------------------------------------------------------------------------------------- showing


def _show(report: dict) -> None:
    def milliseconds(us):
        return f"{us / 1e3:.3g} ms"

    memory, check, launches = report["memory"], report["check"], report["launches"]
    for row in report["rows"]:
        ours = row["ours"]
        low, high = map(milliseconds, ours["us_range"])
        what = {"prefill": f"prefill of {row['tokens']} tokens", "decode": f"decode, batch {row['batch']}, {row['context']} in the cache"}[row["what"]]
        print(f"\n{what}: {ours['tokens_s']:.1f} tokens/s, {milliseconds(ours['us_a_step'])} ({ours['runs']} runs, {low} to {high})")
        experts = f", {row['experts touched a layer']:.1f} experts a layer" if row.get("experts touched a layer") else ""
        needed = f"{row['bytes'] / 1e9:.2f} GB, {row['flops'] / 1e9:.1f} GFLOP{experts}"
        print(f"  limit {milliseconds(row['limit_us'])} ({needed}): {row['share']:.1%} reached")
        print(f"  inside of ops and products {milliseconds(row['ops_us'])}: {row['ops_share']:.1%} of the time")
        for name, peer in row["peers"].items():
            print(f"  {name}: " + (f"{peer['tokens_s']:.1f} tokens/s (ours {ours['tokens_s'] / peer['tokens_s']:.2f}x)" if "tokens_s" in peer
                                   else f"failed: {peer['failed']}"))
    print("\nlimits: " + ", ".join(f"{name} {value:.3g}" for name, value in report["limits"].items()))
    sizes = memory["weights"] | {name: memory[name] for name in ("cache", "workspace and activations", "peak") if memory[name] is not None}
    print("memory, GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items()))
    if launches["per_step"]:
        print(f"launches: {launches['per_layer']} a layer, {launches['per_step']} a step")
        for name, count in sorted(launches["by_name"].items(), key=lambda item: -item[1]):
            print(f"  {count:5} {name:.120}")
    print(f"logits: error {check['error']:.2g}, transformers' own {check['error of transformers']:.2g} (medians, from its f32)" if check
          else f"logits: not compared, transformers is {report['peers']['transformers']}")
