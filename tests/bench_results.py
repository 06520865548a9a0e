"""Made-up results in the bench's schema, for the tests of what reads them."""
import json


def candidate(us, row, ours=None, **more):
    """One that ran: its rates by the row's counts."""
    return {"us": us, "us_range": [us * 0.98, us * 1.04], "us_quartiles": [us * 0.99, us * 1.01], "runs": 20, "calls": 4, "method": "graph", "error": 0.002,
            "tb_s": row["bytes"] / us / 1e6, "tflop_s": row["flops"] / us / 1e6, "share": row["limit_us"] / us, "times": us / (ours or us)} | more


def row(op, case, us, sizes, bytes=4e9, flops=8e12, limit_us=None, bound="memory", dtype="bf16", **peers):
    """`peers`: name -> us, or what is there instead."""
    made = {"op": op, "case": case, "shapes": [case.partition(" ")[0]], "dtype": dtype, "sizes": sizes, "bytes": bytes, "flops": flops,
            "limit_us": limit_us or us / 2, "bound": bound}
    made["candidates"] = {"mixtral_ext": candidate(us, made)}
    for name, value in peers.items():
        made["candidates"][name] = value if isinstance(value, dict) else candidate(value, made, us)
    return made


def experts(tokens, us, routing="uniform", **more):
    case = f"mixtral-8x7b T={tokens}" + ("" if routing == "uniform" else f" {routing}")
    return row("moe_experts", case, us, {"tokens": tokens, "hidden": 4096, "intermediate": 14336, "experts": 8, "top_k": 2, "routing": routing}, **more)


def prompt(length, us, window=None, **more):
    sizes = {"sequences": [[length, length]], "heads": 32, "key_heads": 8, "head_dim": 128, "window": window, "layout": "single"}
    return row("sliding_window_attention", f"{'mistral-7b' if window else 'mixtral-8x7b'} T={length}", us, sizes, bound="compute", **more)


def decode(batch, us, **more):
    sizes = {"chunks": [1] * batch, "lengths": [10000] * batch, "capacity": 4096, "window": 4096, "heads": 32, "key_heads": 8, "head_dim": 128}
    return row("rolling_attention", f"mistral-7b B={batch}", us, sizes, **more)


def ops(rows, device="cuda", name="NVIDIA X1", date="2027-01-02T03:04:05+00:00", **more):
    return {"kind": "ops",
            "machine": {"device": device, "name": name, "cpu": "A CPU", "isa": "AVX2", "threads": 2, "memory_gib": 8.0, "date": date, "commit": "abc1234",
                        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "mixtral_ext": "0.1.0"}},
            "command": f"python -m mixtral_bench run --device {device}", "quick": False,
            "state": {"before": {"clocks.sm": "345"}, "during": {"clocks.sm": {"median": 1980.0, "min": 1500.0, "max": 1980.0}}, "after": {}},
            "limits": {"copy_tb_s": 3.0, "read_tb_s": 3.2, "bf16_tflop_s": 800.0, "f32_tflop_s": 50.0},
            "peers": {"torch": "2.13.0", "liger-kernel": "absent: No module named 'liger_kernel'"}, "rows": rows} | more


def model(rows, device="cuda", **more):
    made = ops(rows, device)
    return made | {"kind": "model", "command": "python -m mixtral_model bench",
                   "model": {"name": "mistral-7b", "layers": 32, "of_layers": 32, "dtype": "bf16", "parameters": 7241732096, "random": True},
                   "memory": {"weights": {"embed": 262144000, "attention": 2684354560}, "cache": 16777216, "workspace and activations": 4096, "peak": 3 * 10**9},
                   "launches": {"per_layer": 12.0, "per_step": 390, "by_name": {"attention_split": 32}, "us": {"attention_split": 4.5}}} | more


def step(batch=1, us=8000.0, **more):
    return {"what": "decode", "batch": batch, "tokens": 128, "context": 4096, "bytes": 15 * 10**9, "limit_us": us * 0.8, "share": 0.8, "ops_us": us * 0.7,
            "ops_share": 0.7, "ours": {"tokens_s": batch * 1e6 / us, "us_a_step": us, "us_range": [us * 0.99, us * 1.01], "runs": 5},
            "peers": {"transformers 5.23 eager": {"tokens_s": batch * 5e5 / us}, "vLLM": {"failed": "RuntimeError: out of memory"}}} | more


def saved(results, path):
    path.write_text(json.dumps(results))
    return path
