"""The expert layer on an NVIDIA GPU: ours, whole and by stage, beside torch's grouped_mm, transformers' blocks, a dense product of the same
work and a copy of the same bytes. Part of `make gpu-check`; by itself: python -m mixtral_bench.gpu_experts --help."""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import silu

import mixtral_ext
from mixtral_bench import machine
from mixtral_bench.gpu_timing import Candidate, first_line, gpu_state, header, measure, poison, shown_us, watch, write_report
from mixtral_bench.measure import relative_error
from mixtral_bench.rows import transformers_experts
from mixtral_ext import reference

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096, 16384)
ROUTINGS = ("balanced", "natural", "two")
OURS = ("ours", "ours + sort", "gate", "swiglu", "down", "combine")  # the last four are parts
PEERS = ("torch grouped_mm", "transformers grouped_mm", "transformers eager")  # all sort, as "ours + sort" does
CHECKED = 16  # tokens compared with f32


@dataclass(frozen=True)
class Shape:
    """One layer of Mixtral 8x7B."""

    hidden: int = 4096
    intermediate: int = 14336
    experts: int = 8
    top_k: int = 2


# ------------------------------------------------------------------------------------------------------------- inputs


def make_weights(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """w_gate_up [E, 2I, H], w_down [E, H, I]: normal numbers, scaled so that results stay near 1."""
    generator = torch.Generator(device).manual_seed(0)
    e, i, h = shape.experts, shape.intermediate, shape.hidden
    gate_up = torch.empty(e, 2 * i, h, dtype=torch.bfloat16, device=device).normal_(0, h**-0.5, generator=generator)
    return gate_up, torch.empty(e, h, i, dtype=torch.bfloat16, device=device).normal_(0, 2 * i**-0.5, generator=generator)


def make_logits(shape: Shape, tokens: int, routing: str, generator: torch.Generator) -> torch.Tensor:
    """[T, E]. natural: random; balanced: the same number of rows for each expert; two: all tokens on two experts."""
    logits = torch.empty(tokens, shape.experts, device=generator.device).normal_(generator=generator)
    slots = torch.arange(tokens * shape.top_k, device=generator.device).view(tokens, shape.top_k)
    if routing == "balanced":
        logits.scatter_add_(1, slots % shape.experts, torch.full(slots.shape, 20.0, device=generator.device))
    elif routing == "two":
        logits[:, [1, shape.experts - 2]] += 20
    return logits


def expected(x, w_gate_up, w_down, weights, ids):
    """The layer of n tokens in f32, one expert at a time -> after SwiGLU [n, K, I], after w_down [n, K, H], result [n, H]."""
    inner = torch.zeros(*ids.shape, w_down.shape[2], device=x.device)
    rows = torch.zeros(*ids.shape, x.shape[1], device=x.device)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ w_gate_up[e].float().T).chunk(2, -1)
        inner[token, slot] = silu(gate) * up
        rows[token, slot] = inner[token, slot] @ w_down[e].float().T
    return inner, rows, (weights[..., None] * rows).sum(1)


def torch_layer(x, w_gate_up, w_down, weights, ids):
    """The layer as one composes it of torch's ops: sort, gather, grouped_mm, SwiGLU, grouped_mm, weighted sum."""
    chosen, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(chosen, torch.arange(w_gate_up.shape[0], device=x.device, dtype=ids.dtype), right=True, out_int32=True)
    token = order // ids.shape[1]
    gate, up = torch.nn.functional.grouped_mm(x[token], w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = torch.nn.functional.grouped_mm(silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    return torch.zeros_like(x).index_add_(0, token, rows * weights.flatten()[order, None].to(x.dtype))


# --------------------------------------------------------------------------------------------------------- candidates


def make_candidates(shape: Shape, w_gate_up, w_down, logits, generator) -> tuple[dict[str, Candidate], list[int]]:
    """-> the candidates of one number of tokens and routing, and the rows of each expert."""
    tokens, k, h, i = len(logits), shape.top_k, shape.hidden, shape.intermediate
    slots, expert = tokens * k, 3 * i * h * 2  # rows; bytes of an expert
    x = torch.empty(tokens, h, dtype=torch.bfloat16, device=logits.device).normal_(generator=generator)
    maps = reference.moe_gate(logits, k)  # torch's, so that no candidate depends on another op of ours
    weights, ids, offsets, sorted_slots, slot_rows = maps
    counts = offsets.diff().tolist()
    touched = sum(n > 0 for n in counts)
    inner_in = reference.grouped_gemm_swiglu(x, w_gate_up, offsets, sorted_slots, k)
    rows_in = reference.grouped_gemm(inner_in, w_down, offsets)
    checked = torch.linspace(0, tokens - 1, min(tokens, CHECKED), device=x.device).round().long()
    inner_f32, rows_f32, out_f32 = expected(x[checked], w_gate_up, w_down, weights[checked], ids[checked])
    checked_rows = slot_rows[checked].long()

    out, inner, rows = torch.empty_like(x), torch.empty_like(inner_in), torch.empty_like(rows_in)
    gated = tuple(torch.empty_like(t) for t in maps)
    dense_in, dense_out = x[sorted_slots.long() // k], x.new_empty(slots, 2 * i)
    half = touched * expert // 4  # elements: half of the touched experts
    source, copy = w_gate_up.view(-1)[:half], w_gate_up.new_empty(half)
    peers = {name: transformers_experts(h, i, shape.experts, w_gate_up, w_down, name) for name in ("grouped_mm", "eager")}
    ids_i64 = ids.long()

    def dense():
        return torch.mm(dense_in, w_gate_up[0].T, out=dense_out), torch.mm(inner_in, w_down[0].T, out=rows)

    def dense_error(results):
        at = checked_rows.flatten()
        return max(relative_error(result[at], a[at].float() @ w[0].float().T)
                   for result, a, w in zip(results, (dense_in, inner_in), (w_gate_up, w_down)))

    def gate_error(results):
        same = all(torch.equal(a, b) for a, b in zip(results[1:], maps[1:]))
        return relative_error(results[0], weights) if same else math.inf

    def copy_error(result):
        return 0.0 if torch.equal(result, source) else math.inf

    def layer_error(result):
        return relative_error(result[checked], out_f32)

    layer = dict(error=layer_error, bytes=touched * expert + 4 * tokens * h, flops=slots * expert)  # 2 a weight of 2 bytes
    candidates = {
        "ours": Candidate(lambda: mixtral_ext.moe_experts(x, w_gate_up, w_down, weights, ids, offsets, sorted_slots, slot_rows, out=out),
                          **layer, before=poison(out)),
        "ours + sort": Candidate(lambda: mixtral_ext.moe_experts(x, w_gate_up, w_down, weights, ids, out=out), **layer, before=poison(out)),
        "gate": Candidate(lambda: mixtral_ext.moe_gate(logits, k, out=gated), gate_error,
                          4 * logits.numel() + 4 * sum(t.numel() for t in maps), 0, poison(*gated)),
        "swiglu": Candidate(lambda: mixtral_ext.grouped_gemm_swiglu(x, w_gate_up, offsets, sorted_slots, k, out=inner),
                            lambda result: relative_error(result[checked_rows], inner_f32),
                            touched * expert * 2 / 3 + 2 * (tokens * h + slots * i), slots * expert * 2 / 3, poison(inner)),
        "down": Candidate(lambda: mixtral_ext.grouped_gemm(inner_in, w_down, offsets, out=rows),
                          lambda result: relative_error(result[checked_rows], rows_f32),
                          touched * expert / 3 + 2 * slots * (i + h), slots * expert / 3, poison(rows)),
        "combine": Candidate(lambda: mixtral_ext.moe_combine(rows_in, slot_rows, weights, out=out), layer_error,
                             2 * h * (slots + tokens) + 8 * slots, 2 * slots * h, poison(out)),
        "torch grouped_mm": Candidate(lambda: torch_layer(x, w_gate_up, w_down, weights, ids), **layer),
        "transformers grouped_mm": Candidate(lambda: peers["grouped_mm"](x, ids_i64, weights), **layer),
        "transformers eager": Candidate(lambda: peers["eager"](x, ids_i64, weights), **layer),
        "dense": Candidate(dense, dense_error, expert + 2 * slots * (2 * h + 3 * i), slots * expert, poison(dense_out, rows)),
        "copy": Candidate(lambda: copy.copy_(source), copy_error, 4 * half, 0, poison(copy)),
    }
    return candidates, counts


# ---------------------------------------------------------------------------------------------------------- measuring


def ratios(results: dict[str, dict]) -> dict[str, dict]:
    """times: time of each candidate over ours, whole; share of the copy's bandwidth that ours reaches."""
    us = {name: result["us"] for name, result in results.items() if "us" in result}
    times = {ours: {name: us[name] / us[ours] for name in us if name in (*PEERS, "dense", "copy")} for ours in OURS[:2] if ours in us}
    copied = results["copy"].get("tb_s")
    return {"times": times, "copy_share": {name: results[name]["tb_s"] / copied for name in OURS if name in us} if copied else {}}


@torch.inference_mode()
def run(shape: Shape, tokens, routings, device: str, budget: float = 0.15, save=lambda results: None, say=print) -> dict:
    """All rows; `save` gets the results so far after each."""
    place = torch.device(device)
    results = {"machine": machine.describe(), "shape": asdict(shape), "gpu": {"before": gpu_state(place)}, "rows": []}
    weights = make_weights(shape, place)
    start, load = time.perf_counter(), watch(place)
    for n in tokens:
        for routing in routings:
            generator = torch.Generator(place).manual_seed(n)
            row = {"tokens": n, "routing": routing}
            try:
                if place.type == "cuda":
                    torch.cuda.empty_cache()
                candidates, row["rows_of_experts"] = make_candidates(shape, *weights, make_logits(shape, n, routing, generator), generator)
                row["candidates"] = measure(candidates, place, budget)
                del candidates
            except Exception as failure:  # noqa: BLE001
                row["candidates"] = {name: {"failed": first_line(failure)} for name in (*OURS, *PEERS, "dense", "copy")}
            row |= ratios(row["candidates"])
            results["rows"].append(row)
            save(results)
            shown = {name: row["candidates"][name] for name in ("ours", *PEERS, "dense")}
            times = (f"{name} {result['us']:.1f}" if "us" in result else f"{name} failed" for name, result in shown.items())
            say(f"{time.perf_counter() - start:4.0f} s, T={n} {routing}, us: {', '.join(times)}")
    results["gpu"] |= {"during": load(), "after": gpu_state(place)}
    save(results)
    return results


# ------------------------------------------------------------------------------------------------------------- report


def table(results: dict) -> str:
    """Markdown, one line a row."""
    lines = [
        *header(results),
        "Times in us (medians) of CUDA graphs; *: of launches one by one, of what waits for the device. x: the peer's time over that of "
        "`+ sort`, which sorts as these peers do (dense: over `ours`). copy: share of the bandwidth of a device copy of the same bytes.",
        "",
        "| T | routing | experts | ours | TB/s | copy | TFLOP/s | + sort | gate | swiglu | down | combine | torch grouped_mm | "
        "transformers grouped_mm | transformers eager | dense |",
        "|" + "---|" * 16,
    ]
    failures: dict[str, list] = {}
    for row in results["rows"]:
        us = {name: shown_us(result) for name, result in row["candidates"].items()}
        for name, result in row["candidates"].items():
            if "failed" in result:
                failures.setdefault(f"{name}: {result['failed']}", []).append(f"T={row['tokens']} {row['routing']}")
        for base, names in (("ours + sort", PEERS), ("ours", ("dense",))):
            for name in names:
                if name in row["times"].get(base, {}):
                    us[name] += f" ({row['times'][base][name]:.2f}x)"
                if row["candidates"][name].get("method") == "events":
                    us[name] += "*"
        ours = row["candidates"]["ours"]
        rate = [f"{ours['tb_s']:.2f}", f"{row['copy_share']['ours']:.0%}" if row["copy_share"] else "-", f"{ours['tflop_s']:.3g}"] \
            if "us" in ours else ["-"] * 3
        touched = str(sum(n > 0 for n in row["rows_of_experts"])) if "rows_of_experts" in row else "-"
        cells = [str(row["tokens"]), row["routing"], touched, us["ours"], *rate, *(us[name] for name in (*OURS[1:], *PEERS, "dense"))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"\n{what} ({len(where)} rows, first {where[0]})" for what, where in list(failures.items())[:8]]
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    """Natural routing: time, and bandwidth and rate reached, against T. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["routing"] == "natural"]
    colors = dict(zip(("ours", *PEERS, "copy", "dense"), ("tab:red", "tab:blue", "tab:cyan", "tab:gray", "black", "black")))
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, key, label in zip(panels, ("us", "tb_s", "tflop_s"), ("us", "TB/s of weights and activations", "TFLOP/s")):
        for name in ("ours", *PEERS, *(("copy",) if key == "tb_s" else ("dense",) if key == "tflop_s" else ())):
            points = [(row["tokens"], row["candidates"][name][key]) for row in rows if key in row["candidates"][name]]
            axes.plot([n for n, _ in points], [value for _, value in points], marker="o", markersize=3, label=name, color=colors[name])
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_ylabel(label)
        axes.set_yscale("log" if key == "us" else "linear")
        axes.legend()
    figure.suptitle(f"Mixtral 8x7B expert layer, bf16, natural routing, {results['gpu']['before'].get('name', '')}, "
                    f"{results['machine']['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def broken(results: dict) -> list[str]:
    """Our candidates that failed somewhere."""
    return [name for name in OURS if any("failed" in row["candidates"][name] for row in results["rows"])]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixtral_bench.gpu_experts", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("build/gpu-check/bench.json"), metavar="FILE", help="default %(default)s")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="T")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the table of earlier results, write it and a plot beside them")
    options = parser.parse_args(arguments)
    if options.report:
        write_report(options.report, table, plot)
        return
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = run(Shape(), options.tokens, options.routings, "cuda", save=lambda r: options.json.write_text(json.dumps(r, indent=1) + "\n"))
    print(table(results))
    if failed := broken(results):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
