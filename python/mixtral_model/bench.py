"""python -m mixtral_model bench: how fast a whole model reads and writes, beside what the machine allows and transformers on the same weights.

A decoding step is generate()'s own: the next one is under way while the host reads the tokens. All that is said of a batch begins in one state:
`context` positions of seeded random keys and values, and seeded tokens. What a step must move are the weights that all tokens pass through, the
experts that the batch chose (counted in a second run of the same text), the head and the keys and values that it sees; the limit is that over
the measured bandwidth of the machine.

Before anything is timed its logits are compared with those of transformers in f32 on the same weights and the same cache, whose tokens go to
the experts that ours chose: so the step that is replayed on a GPU is the one that is compared.
"""
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import timing
from .config import ModelConfig, ModelError, read_config
from .decode import Decoder
from .generate import prefill
from .model import Cache, Model, upload
from .output import progress
from .random_weights import random_config, random_weights
from .weights import DTYPES, TooLarge, Weights, check_dtype, check_memory, find_device

CHUNK = 2048
SINGLE = 16      # tokens at the end of a prompt whose logits are compared, and as many after it, one by one
WARM_UP = 5      # steps before all others: on a GPU two calls, a capture and three replays
FORCED = 16      # steps whose logits are compared; all candidates read the same tokens
COUNTED = 16     # steps whose experts are counted, at most
PROFILED = 16    # steps beside those that are timed
COMPILED_BEFORE = 120  # seconds of peers after which none is compiled any more
TOLERANCE = {"f32": 1e-4, "f16": 5e-3, "bf16": 2e-2}      # of logits, where transformers itself is not further from its f32
PEER_TOLERANCE = {"f32": 1e-3, "f16": 5e-2, "bf16": 0.1}  # more in transformers itself: it computes something else
OWN_EXPERTS = 0.5    # the same where it chooses the experts: 0.03 to 0.09 of Mixtral 8x7B (results/2026-11-27-h200-mixtral-8x7b.json); unrelated logits give 1.4
ELSEWHERE = 0.1      # share of tokens that rounding may send to other experts: 0.014 to 0.017 there


def bench(arguments: Namespace) -> None:
    from mixtral_bench import files, machine
    device, dtype, config = find_device(arguments.device), DTYPES[arguments.dtype], _config(arguments)
    of_layers = random_config(arguments.random_weights).num_layers if arguments.random_weights else config.num_layers
    run = Run(config, arguments)
    name = arguments.random_weights or Path(arguments.checkpoint).resolve().name
    print(f"{name}, {config.num_layers} of {of_layers} layers, {config.parameters() / 1e9:.2f} B parameters, "
          f"{config.parameters() * dtype.itemsize / 1e9:.1f} GB in {arguments.dtype}, on {device}", flush=True)
    check_dtype(dtype, device)
    path = Path(arguments.json) if arguments.json else None
    try:
        if arguments.random_weights or device.type == "cuda":  # for a checkpoint on the CPU its layout decides
            check_memory(config, dtype, device, run.cache_positions())
        if path:  # what cannot be written ends the run here; no empty file is left of it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if path.is_file() and not path.stat().st_size:
                path.unlink()
        report = {"kind": "model", "machine": machine.describe(device), "quick": arguments.quick,
                  "command": _command(arguments.argv),
                  "state": {"before": machine.state(device)}, "limits": machine.limits(device, arguments.quick),
                  "model": {"name": name, "layers": config.num_layers, "of_layers": of_layers, "dtype": arguments.dtype,
                            "parameters": config.parameters(), "random": bool(arguments.random_weights)}, "rows": []}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        model = _model(arguments, config, dtype, device, run.cache_positions())
    except TooLarge as error:
        print(f"not run: {error}")
        return

    def save():
        if path:
            files.save(path, report)

    finish = machine.watch(device)
    try:
        peer, report["peers"] = _peer(model) if arguments.peers else (None, {"transformers": "absent: not asked for"})
        run.measure(model, peer, report, save)
    except torch.OutOfMemoryError as error:  # of a GPU that holds weights and cache, but not what a pass takes beside them
        raise ModelError(f"the memory of {device} is too small for what a pass takes beside weights and cache: {error}") from None
    finally:  # interrupted, too: a peer may compile for minutes
        report["state"] |= {"during": finish(), "after": machine.state(device)}
        if report["rows"]:
            save()
    _show(report)
    if path:
        print(f"results: {path}")


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"[:500]


def _peers_failed(failure: Exception) -> dict:
    return {"transformers": f"failed: {_said(failure)}"}


def _config(arguments: Namespace) -> ModelConfig:
    if arguments.random_weights:
        return random_config(arguments.random_weights, arguments.layers)
    if arguments.layers is not None:
        raise ModelError("layers: only --random-weights can be shortened")
    return read_config(arguments.checkpoint)


def _command(argv: list[str]) -> str:
    """Without the path of the results, and of the checkpoint its name alone."""
    from mixtral_bench import files
    return files.command("mixtral_model", argv, {"--json": lambda _: None, "--checkpoint": lambda path: Path(path).resolve().name})


def _model(arguments: Namespace, config: ModelConfig, dtype: torch.dtype, device: torch.device, cache_positions: int) -> Model:
    if arguments.random_weights:
        with progress("random weights", "layers") as on_layer:
            return random_weights(config, device, dtype, cache_positions=cache_positions, progress=on_layer)
    with progress(f"loading {arguments.checkpoint}", "tensors") as on_tensor:
        return Model.load(arguments.checkpoint, dtype, on_tensor, device, cache_positions)


def _peer(model: Model):
    """transformers' model and its version; None and why, where it is not installed or of another kind."""
    try:
        import transformers

        from .transformers_peer import build
        return build(model), {"transformers": transformers.__version__}
    except ImportError as error:
        return None, {"transformers": f"absent: {error}"}
    except Exception as failure:  # noqa: BLE001
        return None, _peers_failed(failure)


class Run:
    """What is measured: one prompt that is read, and steps of each batch."""

    def __init__(self, config: ModelConfig, arguments: Namespace):
        self.config, self.dtype = config, arguments.dtype
        self.prompt_tokens, self.steps, self.quick = arguments.prompt_tokens, arguments.new_tokens, arguments.quick
        self.context = self.prompt_tokens if arguments.context is None else arguments.context
        self.batches = arguments.batch
        for name, values in (("prompt-tokens", [self.prompt_tokens]), ("new-tokens", [self.steps]), ("context", [self.context]),
                             ("batch", self.batches)):
            if min(values) < 1:
                raise ModelError(f"{name}: expected at least 1, got {min(values)}")
        self.longest = self.context + WARM_UP + FORCED + 1 + self.steps + PROFILED
        if config.window is None and max(self.longest, self.prompt_tokens) > config.max_positions:
            raise ModelError(f"context: expected at most {config.max_positions} positions (the model has no window), "
                             f"got {max(self.longest, self.prompt_tokens)}")
        self.exact = {}  # batch -> logits [B, FORCED, V] of transformers in f32, on the CPU; None -> [1, n, V] of the prompt's last tokens

    def cache_positions(self) -> int:
        return max(Cache.positions(self.config, self.prompt_tokens), max(self.batches) * Cache.positions(self.config, self.longest))

    def measure(self, model: Model, peer, report: dict, save: Callable[[], None]) -> None:
        """Fills the report, which is saved after each row of ours and each peer."""
        from mixtral_bench.progress import progress_bar
        name = f"transformers {report['peers']['transformers']}"
        check = None
        if peer:
            try:
                check, self.exact[None] = _check_prefill(model, peer, _ids(model, self.prompt_tokens, 1), self.dtype, name)
                if not check["error of transformers"] <= PEER_TOLERANCE[self.dtype]:
                    raise RuntimeError(f"its logits are off by {check['error of transformers']:.2g} from its own in f32")
            except ModelError:
                raise
            except Exception as failure:  # noqa: BLE001
                peer, report["peers"] = None, _peers_failed(failure)
        allocated = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0  # our weights, and what the peer copied
        kinds = [] if peer is None else ["eager"] if model.device.type == "cpu" else ["eager", "compiled"]
        with progress_bar(total=(1 + len(self.batches)) * (1 + len(kinds)), unit=" measurements") as bar:
            for batch in (None, *self.batches):
                bar.set_description("prefill" if batch is None else f"decode, batch {batch}")
                row = self.prefill(model) | {"check": check} if batch is None else self.decode(model, batch, peer, name)
                report["rows"].append(row | _limit(row, report["limits"], model))
                save()
                bar.update()
            report |= {"memory": memory(model, report["rows"], allocated), "launches": self.launches(model)}
            start = time.perf_counter()
            for kind in kinds:  # after ours, since they may need more memory
                for row in report["rows"]:
                    bar.set_description(f"{name} {kind}, {row['what']}, batch {row['batch']}")
                    if kind == "eager" or row["what"] == "decode":
                        why = kind == "compiled" and self.not_compiled(row, time.perf_counter() - start)
                        row["peers"][f"{name} {kind}"] = {"skipped": why} if why else self.beside(row, model, peer, kind == "compiled")
                        save()
                    bar.update()

    def prefill(self, model: Model) -> dict:
        prompt, c, touched = _ids(model, self.prompt_tokens, 1), model.config, []
        load = torch.zeros(c.num_layers, c.num_experts, dtype=torch.int64, device=model.device)

        def count(tokens):
            touched.append((load > 0).sum(1).tolist() if c.num_experts else [1] * c.num_layers)
            load.zero_()

        def read(**counting):
            cache = model.new_cache(1, len(prompt))
            model.logits(prefill(model, cache, [prompt], CHUNK, **counting)).argmax().item()
        read(on_prefill=count, expert_load=load)  # warm-up
        _reset_peak(model.device)
        seconds, inside = timing.measure(read, 1 if self.quick else 3, 1, model.device)
        pairs = sum(min(p + 1, c.window or p + 1) for p in range(len(prompt)))
        return {"what": "prefill", "batch": 1, "tokens": len(prompt), "context": 0, "ours": timing.result(seconds, len(prompt)), "peers": {},
                "bytes": weight_bytes(model, *touched) + len(prompt) * c.cache_bytes(1, _itemsize(model)),
                "flops": flops(model, len(prompt), 1, pairs),
                "cache_bytes": c.cache_bytes(Cache.positions(c, len(prompt)), _itemsize(model)), "peak_bytes": _peak(model.device)} | inside

    def decode(self, model: Model, batch: int, peer=None, peer_name: str = "") -> dict:
        c = model.config
        touched = self.touched(model, batch)
        _reset_peak(model.device)
        decoder = self.decoder(model, batch)
        for _ in range(WARM_UP):
            list(decoder.next().read())
        peak = _peak(model.device)  # with the capture, which allocates what replays use
        check = self.check(decoder, peer, peer_name)
        self.reset(decoder)
        sent = decoder.next()

        def step():
            nonlocal sent
            ahead = decoder.next()
            list(sent.read())
            sent = ahead
        seconds, inside = timing.measure(step, self.steps, PROFILED, model.device)
        visible = min(self.context + 1 + self.steps // 2, c.window or self.longest)
        return {"what": "decode", "batch": batch, "tokens": batch, "context": self.context, "ours": timing.result(seconds, batch), "peers": {},
                "bytes": weight_bytes(model, touched) + batch * (visible * c.cache_bytes(1, _itemsize(model)) + c.hidden_size * _itemsize(model)),
                "flops": flops(model, batch, batch, batch * visible),
                "experts touched a layer": statistics.mean(touched) if c.num_experts else None, "check": check,
                "cache_bytes": batch * c.cache_bytes(decoder.cache.capacity, _itemsize(model)), "peak_bytes": peak} | inside

    # The state in which everything begins

    def content(self, model: Model, batch: int) -> tuple[Tensor, Tensor]:
        """Random keys and values [B, n, Hk, D] of the last positions before `context`, as many as a window holds; each layer gets the same."""
        c = model.config
        generator = torch.Generator(model.device).manual_seed(batch)
        shape = batch, min(self.context, c.window or self.context), c.num_kv_heads, c.head_dim
        return tuple(torch.empty(shape, dtype=model.weights.embed.dtype, device=model.device).normal_(generator=generator) for _ in "kv")

    def decoder(self, model: Model, batch: int, expert_load: Tensor | None = None) -> Decoder:
        cache = model.new_cache(batch, self.longest)
        cache.lengths = [self.context] * batch
        return Decoder(model, cache, self.longest - self.context, expert_load=expert_load)

    def reset(self, decoder: Decoder) -> None:
        cache, model, device, batch = decoder.cache, decoder.model, decoder.model.device, len(decoder.rows)
        keys, values = self.content(model, batch)
        slots = torch.arange(self.context - keys.shape[1], self.context, device=device) % cache.capacity
        for of_layers, given in ((cache.keys, keys), (cache.values, values)):
            for t in of_layers:
                t[:, slots] = given
        decoder.tokens.copy_(upload(_ids(model, batch, 2), torch.int32, device))
        decoder.lengths.fill_(self.context)
        decoder.live.fill_(1)

    # What is known of the steps that are timed

    @torch.inference_mode()
    def touched(self, model: Model, batch: int) -> list[float]:
        """Experts of each layer that a step reads: means over the timed steps, as far as COUNTED. The first step is not timed."""
        if not model.config.num_experts:
            return [1] * model.config.num_layers
        load = torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.int64, device=model.device)
        decoder, counts = self.decoder(model, batch, load), []
        self.reset(decoder)
        for _ in range(1 + min(self.steps, 2 if self.quick else COUNTED)):
            load.zero_()
            decoder.step()
            counts.append((load > 0).sum(1).tolist())
        return [statistics.mean(of_layer) for of_layer in zip(*counts[1:])]

    def forced(self, model: Model, batch: int) -> Tensor:
        """Tokens i64 [B, FORCED]."""
        return torch.tensor(_ids(model, batch * FORCED, 3), device=model.device).view(batch, FORCED)

    @torch.inference_mode()
    def check(self, decoder: Decoder, peer, peer_name: str) -> dict:
        """The error of the steps that will be timed, captured where they are; refuses them if it is larger than it may be."""
        model, batch = decoder.model, len(decoder.rows)
        tokens = self.forced(model, batch)

        def steps(call):
            self.reset(decoder)
            logits, choices = [], []
            for given in tokens.unbind(1):
                decoder.tokens.copy_(given)
                call()
                logits.append(decoder.logits.to(torch.float32, copy=True))  # a replay overwrites them
                choices.append([ids.clone() for ids in decoder.choices])
            return torch.stack(logits, 1), [torch.stack(of_layer, 1).flatten(0, 1) for of_layer in zip(*choices)]

        logits, choices = steps(lambda: list(decoder.next().read()))
        unchecked = {}
        if peer is not None:
            from .transformers_peer import read_on
            keys, values = self.content(model, batch)
            try:
                found, exact = _verify(peer, lambda dtype: read_on(peer, model.config, keys.to(dtype), values.to(dtype), self.context, tokens),
                                       logits, choices, self.dtype, peer_name)
                self.exact[batch] = exact.cpu()
                return found
            except ModelError:
                raise
            except Exception as failure:  # noqa: BLE001: such as too little memory for its f32
                unchecked = _peers_failed(failure)
        error, allowed = _error(logits, steps(decoder.step)[0]), TOLERANCE[self.dtype]
        if not error <= allowed:
            raise ModelError(f"our logits are wrong: expected a relative error of at most {allowed:.2g} from the same steps, not captured, got {error:.2g}")
        return {"against": "the same steps, not captured", "error": error, "allowed": allowed} | unchecked

    @torch.inference_mode()
    def launches(self, model: Model) -> dict:
        """Kernels of a step of the smallest batch, their mean times, and copies; those of a layer are what the last one adds. None where they are
        not seen."""
        def count(model):
            decoder = self.decoder(model, min(self.batches))
            if decoder.overlaps:
                decoder.captures = lambda step, device: step  # the same launches, one by one
            self.reset(decoder)
            for _ in range(WARM_UP):
                list(decoder.next().read())
            return timing.inside(lambda: list(decoder.next().read()), 1, model.device)[1:]

        kernels, copies, us = count(model)
        if not kernels:  # on the CPU there are none
            return {"per_layer": None, "per_step": None, "by_name": {}, "us": {}, "copies": {}}
        w, total = model.weights, sum(kernels.values())
        without_last = count(Model(model.config, Weights(w.embed, w.norm, w.head, w.layers[:-1])))[0]
        return {"per_layer": total - sum(without_last.values()), "per_step": total, "by_name": kernels, "us": us, "copies": copies}

    # transformers

    def not_compiled(self, row: dict, seconds: float) -> str | None:
        if self.config.window is not None:
            return "its static cache of a window counts in Python numbers, so each step would be compiled anew"
        if row["batch"] != self.batches[0]:
            return "compiled for the first batch alone, since it takes minutes"
        if seconds > COMPILED_BEFORE:
            return f"the peers had taken {seconds:.0f} s, and compiling takes minutes"
        return None

    def beside(self, row: dict, model: Model, peer, compiled: bool) -> dict:
        """transformers in the same row; what fails is said there."""
        from . import transformers_peer
        decodes = row["what"] == "decode"
        runs = (min(self.steps, 3) if decodes else 1) if self.quick else min(self.steps, 16) if decodes else 3
        found = {}
        try:
            if (row["batch"] if decodes else None) not in self.exact:
                raise RuntimeError("its own check failed")
            if decodes:
                keys, values = self.content(model, row["batch"])
                call = transformers_peer.decode_step(peer, model.config, keys, values, self.context, FORCED + WARM_UP + runs, compiled)
                del keys, values
                given = self.forced(model, row["batch"]).unbind(1)
                logits = torch.stack([call(ids).float().cpu() for ids in given], 1)
                found["error"] = _error(logits.flatten(0, 1)[None], self.exact[row["batch"]].flatten(0, 1)[None])
                allowed = OWN_EXPERTS if model.config.num_experts else PEER_TOLERANCE[self.dtype]
                if not found["error"] <= allowed:
                    raise RuntimeError(f"its logits are off by {found['error']:.2g} from its own in f32")
            else:
                prompt, exact = _ids(model, row["tokens"], 1), self.exact[None][0]
                last = transformers_peer.prefill(peer, prompt, CHUNK, len(exact)).float().cpu()
                found["error"], allowed = _error(last[None], exact[None, -len(last):]), OWN_EXPERTS if model.config.num_experts else PEER_TOLERANCE[self.dtype]
                if not found["error"] <= allowed:
                    raise RuntimeError(f"its logits are off by {found['error']:.2g} from its own in f32")
                call = lambda: transformers_peer.prefill(peer, prompt, CHUNK, 1).argmax().item()  # noqa: E731
            timing.times(call, min(WARM_UP, runs))
            return timing.result(timing.times(call, runs), row["tokens"]) | found
        except Exception as failure:  # noqa: BLE001
            return {"failed": _said(failure)}
        finally:
            call = None
            if model.device.type == "cuda":
                torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- checking


def _error(logits: Tensor, exact: Tensor) -> float:
    """Relative, of [sequences, tokens, V]: the median over the tokens of the worst sequence."""
    return float(((logits.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).median(1).values.max())


def _verify(peer, run: Callable[[torch.dtype], Tensor], ours: Tensor, choices: list[Tensor], dtype: str, name: str) -> tuple[dict, Tensor]:
    """Our logits and those of run(dtype), transformers' of the same tokens [..., V], beside its f32's on the same weights; all with the experts
    that ours chose. Refuses ours if they are further away than they may be -> what was found, the logits in f32."""
    from .transformers_peer import in_float32, routed_as
    with in_float32(peer), routed_as(peer, choices) as elsewhere:
        exact = run(torch.float32)
    with routed_as(peer, choices):
        theirs = run(DTYPES[dtype])
    found = {"against": f"{name} in f32", "error": _error(ours, exact), "error of transformers": _error(theirs, exact)}
    found["allowed"] = max(TOLERANCE[dtype], 2 * min(found["error of transformers"], PEER_TOLERANCE[dtype]))
    if not found["error"] <= found["allowed"]:
        raise ModelError(f"our logits are wrong: expected a relative error of at most {found['allowed']:.2g} from transformers' in f32, "
                         f"got {found['error']:.2g}")
    if elsewhere:
        found["tokens routed elsewhere"] = statistics.mean(elsewhere)
        if not found["tokens routed elsewhere"] <= ELSEWHERE:
            raise ModelError(f"our routing is wrong: expected at most {ELSEWHERE:.0%} of the tokens with other experts than transformers' in f32, "
                             f"got {found['tokens routed elsewhere']:.0%}")
    return found, exact


@torch.inference_mode()
def _check_prefill(model: Model, peer, prompt: list[int], dtype: str, name: str) -> tuple[dict, Tensor]:
    """Of the last tokens of the prompt, which is read as it will be timed, and of SINGLE more that follow one by one -> what was found, the
    prompt's exact logits [1, n, V]."""
    ids, end, last = prompt + _ids(model, SINGLE, 0), len(prompt), min(SINGLE, len(prompt))
    cache, hidden, choices = model.new_cache(1, len(ids)), [], []
    for chunk in [*(ids[i:min(i + CHUNK, end)] for i in range(0, end, CHUNK)), *([token] for token in ids[end:])]:
        choices.append([])
        hidden.append(model.forward([chunk], cache, [0], topk_ids=choices[-1])[-last:])
    tokens, kept = torch.tensor([ids], device=model.device), last + SINGLE

    def groups(logits):  # [2, SINGLE, V], or all as one where the prompt is shorter
        logits = logits.reshape(kept, -1)
        return logits.unflatten(0, (2, SINGLE)) if last == SINGLE else logits[None]
    found, exact = _verify(peer, lambda _: groups(peer(tokens, use_cache=False, logits_to_keep=kept).logits),
                           groups(model.logits(torch.cat(hidden)[-kept:])), [torch.cat(of_layer) for of_layer in zip(*choices)], dtype, name)
    return found, exact.flatten(0, 1)[None, :last].cpu()


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


def memory(model: Model, rows: list[dict], allocated: int) -> dict:
    """Bytes by part; on a GPU also the peak of what was timed, and what it took beside its cache and what had been allocated before."""
    peaks = [(row["peak_bytes"], row["cache_bytes"]) for row in rows if row["peak_bytes"] is not None]
    return {"weights": parts(model.weights), "cache": max(row["cache_bytes"] for row in rows),
            "workspace and activations": max((peak - cache - allocated for peak, cache in peaks), default=None),
            "peak": max((peak for peak, _ in peaks), default=None)}


def weight_bytes(model: Model, *passes: list[float]) -> float:
    """What passes read of the weights, one after the other, each of which touches so many experts of each layer: head and last norm, which
    only the last token of a prompt needs, once, and of the embedding nothing."""
    size = model.weights.norm.nbytes + model.weights.head.nbytes
    for touched in passes:
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


def _limit(row: dict, limits: dict[str, float], model: Model) -> dict:
    """f16 has the rate of bf16."""
    from mixtral_bench import files
    limit, bound = files.limit(row["bytes"], row["flops"], limits, "f32" if model.weights.embed.dtype == torch.float32 else "bf16")
    step = row["ours"]["us_a_step"]
    return {"limit_us": limit, "bound": bound, "share": limit / step,
            "tb_s": 1e-6 * row["bytes"] / step, "tflop_s": 1e-6 * row["flops"] / step}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# -------------------------------------------------------------------------------------------------------------- showing


def _show(report: dict) -> None:
    def milliseconds(us):
        return f"{us / 1e3:.3g} ms"

    memory, launches, cuda = report["memory"], report["launches"], report["machine"]["device"] == "cuda"
    for row in report["rows"]:
        ours, check = row["ours"], row["check"]
        low, high = map(milliseconds, ours["us_range"])
        what = {"prefill": f"prefill of {row['tokens']} tokens", "decode": f"decode, batch {row['batch']}, {row['context']} in the cache"}[row["what"]]
        print(f"\n{what}: {ours['tokens_s']:.1f} tokens/s, {milliseconds(ours['us_a_step'])} ({ours['runs']} runs, {low} to {high})")
        experts = f", {row['experts touched a layer']:.1f} experts a layer" if row.get("experts touched a layer") else ""
        needed = f"{row['bytes'] / 1e9:.2f} GB, {row['flops'] / 1e9:.1f} GFLOP{experts}"
        print(f"  limit, by {row['bound']}, {milliseconds(row['limit_us'])} ({needed}): {row['share']:.1%} reached, "
              f"{row['tb_s']:.3g} TB/s, {row['tflop_s']:.3g} TFLOP/s")
        inside = "GPU busy" if cuda else "inside of ops and products"
        print(f"  {inside}: " + ("the profiler saw no kernel" if row["ops_us"] is None else
                                 f"{milliseconds(row['ops_us'])}, {row['ops_share']:.1%} of the time"))
        print("  logits: " + (f"error {check['error']:.2g} of {check['allowed']:.2g} allowed, checked against {check['against']}" if check
                              else f"not checked, transformers is {report['peers']['transformers']}"))
        for name, peer in row["peers"].items():
            print(f"  {name}: " + (f"{peer['tokens_s']:.1f} tokens/s (ours {ours['tokens_s'] / peer['tokens_s']:.2f}x)" if "tokens_s" in peer
                                   else "; ".join(f"{how}: {why}" for how, why in peer.items())))
    print("\nlimits: " + ", ".join(f"{name} {value:.3g}" for name, value in report["limits"].items()))
    sizes = memory["weights"] | {name: memory[name] for name in ("cache", "workspace and activations", "peak") if memory[name] is not None}
    print("memory, GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items()))
    if launches["per_step"]:
        print(f"launches: {launches['per_layer']} a layer, {launches['per_step']} a step, and {sum(launches['copies'].values())} copies")
        for name, count in sorted((launches["by_name"] | launches["copies"]).items(), key=lambda item: -item[1]):
            each = f"{launches['us'][name]:8.2f} us" if name in launches["us"] else " " * 11
            print(f"  {count:5}{each} {name:.120}")
    elif cuda:
        print("launches: the profiler saw none")
