"""The attention part of make gpu-check without a GPU: what it counts and checks, its peers on tiny shapes of the CPU, its tables."""
import contextlib
import json
import math
import sys
import types

import pytest
import torch

import mixtral_ext
from mixtral_bench import attention_peers, gpu_attention, gpu_timing
from mixtral_bench.attention_report import table
from mixtral_ext import reference
from mixtral_ext.compat import flash_attn

TINY = gpu_attention.Sizes(heads=4, key_heads=2, head_dim=64, window=32, dense=64, moved=2**12, rotated=2**17, causal_capacity=128)
MIXES = {"mixed": (40, 1, 17, 30)}
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(gpu_timing, "MIN_RUNS", 1)
    monkeypatch.setattr(gpu_attention.machine, "describe", lambda: {"date": "2026-01-02", "commit": "abc", "versions": {"torch": "2"}})


def bench(kinds=gpu_attention.KINDS, lengths=(20, 100), batches=(1, 3), compiling=-1.0, **options):
    """Without FlexAttention, which takes a second a row here, unless it may be compiled."""
    rows = gpu_attention.all_rows(TINY, kinds, lengths, MIXES, batches)
    return gpu_attention.run(TINY, rows, "cpu", budget=0.0, say=lambda text: None, compiling=compiling, **options)


def row_named(results, name):
    return next(row for row in results["rows"] if row["name"] == name)


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("length", (0, 1, 5, 37))
@pytest.mark.parametrize("window", (1, 2, 36, 37, 38, None))
def test_visited_pairs(length, window):
    seen = [(q, k) for q in range(length) for k in range(length) if k <= q and (window is None or q - k < window)]
    assert gpu_attention.visited_pairs(length, window) == len(seen)


def test_what_is_counted():
    results = bench()
    assert [row["name"] for row in results["rows"]] == [
        "T=20, W=32", "T=100, W=32", "mixed of 88, W=32", "T=20, W=None", "T=100, W=None", "mixed of 88, W=None",
        "B=1, C=32, W=32", "B=3, C=32, W=32", "B=1, C=128, W=None", "B=3, C=128, W=None"]
    for row in results["rows"]:
        ours = row["candidates"]["ours"]
        if row["kind"] == "decode":
            first = 0 if row["window"] is None else row["length"] - row["window"] + 1
            keys = len(range(first, row["length"] + 1))
            assert row["length"] + 1 <= row["capacity"] if row["window"] is None else row["length"] > 2 * row["capacity"]
            assert (ours["flops"], ours["bytes"]) == (row["batch"] * keys * 4 * 4 * 64, row["batch"] * keys * 2 * 64 * 2 * 2)
            assert row["share"]["ours"] == pytest.approx(ours["tb_s"] / row["candidates"]["copy"]["tb_s"])
        else:
            pairs = sum(min(row["window"] or math.inf, p + 1) for n in row["lengths"] for p in range(n))
            assert (ours["flops"], ours["bytes"]) == (4 * 64 * 4 * pairs, 2 * 64 * sum(row["lengths"]) * (4 + 4 + 2 + 2))
            assert row["share"]["ours"] == pytest.approx(ours["tflop_s"] / row["candidates"]["dense"]["tflop_s"])
            assert row["candidates"]["dense"]["flops"] == 2 * 64**3
    without = row_named(results, "T=100, W=32")["candidates"]["SDPA flash, no window"]
    assert without["flops"] == 4 * 64 * 4 * sum(range(101))
    assert "SDPA flash" in row_named(results, "T=20, W=32")["candidates"]  # where the window holds the whole prompt


def test_caches_are_rotated():
    row = gpu_attention.all_rows(TINY, ("decode",), batches=(1,))[0]
    size, copies = gpu_attention.cache_copies(TINY, row)
    assert (size, copies) == (2 * 32 * 2 * 64 * 2, 8)
    assert gpu_attention.cache_copies(gpu_attention.Sizes(rotated=0), row)[1] == 2
    ours = gpu_attention.decode_candidates(TINY, row, attention_peers.Flex(0), CPU)["ours"]
    assert ours.copies == 8 and gpu_timing.Timer(ours, CPU).calls % 8 == 0
    seen, good = [], mixtral_ext.rolling_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtral_ext, "rolling_attention", lambda q, k, v, k_cache, v_cache, **_: seen.append(k_cache.data_ptr()) or good(
            q, k, v, k_cache, v_cache, **_))
        for _ in range(16):
            ours.call()
    assert len(set(seen)) == 8 and seen[:8] == seen[8:]


# -------------------------------------------------------------------------------------------------------------- peers


def test_a_peer_that_is_not_there_is_listed(monkeypatch):
    for name in ("cudnn", "flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, also where it is installed
    results = bench(lengths=(100,), batches=(3,), compiling=1000.0)
    assert gpu_attention.broken(results) == []
    text = table(results)
    for kind, name, reason in (("prompt", "cuDNN frontend", "ModuleNotFoundError: import of cudnn"),
                               ("prompt", "flash-attn 2", "ModuleNotFoundError: import of flash_attn"),
                               ("packed", "flash-attn 3", "ModuleNotFoundError: import of flash_attn_interface"),
                               ("packed", "torch varlen_attn", "NotImplementedError"), ("prompt", "SDPA cuDNN", "RuntimeError"),
                               ("decode", "flash-attn 2", "ModuleNotFoundError"), ("decode", "SDPA efficient", "RuntimeError")):
        rows = [row for row in results["rows"] if row["kind"] == kind and name in row["candidates"]]
        assert all(reason in row["candidates"][name]["failed"] for row in rows)
        line = next(line for line in text.splitlines() if line.startswith(f"- not timed: {kind}, {name}: "))
        assert reason in line and line.endswith(f" ({len(rows)} rows, first {rows[0]['name']})")
    for row in results["rows"]:  # and what runs on a CPU is right
        there = {"prompt": [f"SDPA flash{', no window' if row['window'] else ''}"], "packed": [],
                 "decode": ["SDPA flash", "SDPA flash, heads as rows"]}[row["kind"]]
        assert all(0 < row["candidates"][name]["error"] <= gpu_attention.TOLERANCE for name in (*there, "FlexAttention", "ours"))


def test_the_reason_that_torch_gives_in_a_warning_is_recorded():
    import warnings

    def call():
        warnings.warn("Flash attention requires a GPU (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    results = gpu_timing.measure({"x": gpu_timing.Candidate(call, lambda result: 0.0, 1, 1)}, CPU, 0.0)
    assert results["x"]["failed"] == "RuntimeError: No available kernel. Aborting execution.; Flash attention requires a GPU"


@pytest.mark.parametrize("at", ("call", "end", None))
def test_what_cannot_be_captured_has_no_graph(monkeypatch, at):
    @contextlib.contextmanager
    def capture(graph):
        yield
        if at == "end":
            raise RuntimeError("operation failed due to a previous error during capture")

    timer = gpu_timing.Timer(gpu_timing.Candidate(lambda: None, None, 1, 1), CPU)
    if at == "call":
        timer.call = lambda: 1 / 0
    for name, value in dict(CUDAGraph=lambda: "graph", graph=capture, stream=contextlib.nullcontext, current_stream=lambda: None,
                            synchronize=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert timer._captured() == (None if at else "graph")


@pytest.mark.parametrize("bad", (lambda out: out * 1.01, lambda out: out.index_fill(0, torch.tensor([40]), 0), lambda out: out * math.nan),
                         ids=("scaled", "one row", "nan"))
def test_a_wrong_peer_is_listed_as_wrong(monkeypatch, bad):
    good = attention_peers.sdpa_causal
    monkeypatch.setattr(attention_peers, "sdpa_causal", lambda *args: lambda: bad(good(*args)()))
    results = bench(kinds=("prompt",), lengths=(41,))
    for row, name in zip(results["rows"], ("SDPA flash, no window", "SDPA flash")):
        assert "wrong result: relative error" in row["candidates"][name]["failed"]
        assert "us" in row["candidates"]["ours"] and "us" in row["candidates"]["dense"]
    assert "- not timed: prompt, SDPA flash: ArithmeticError: wrong result (1 rows, first T=41, W=None with an error of" in table(results)


@pytest.mark.parametrize("change", (-1, 1))
def test_one_key_more_or_less_at_a_window_of_4096_is_wrong(change):
    window, generator = 4096, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5000, heads, 64, generator=generator).bfloat16() for heads in (2, 1, 1))
    rows, starts = gpu_attention.sampled_rows((5000,), window, CPU)
    exact = gpu_attention.attend_rows(q[rows].float(), k.float(), v.float(), rows, starts, window)[0]
    got = gpu_attention.attend_rows(q[rows].float(), k.float(), v.float(), rows, starts, window + change)[0]
    assert gpu_attention.row_errors(got, exact).max() > gpu_attention.TOLERANCE
    ours = mixtral_ext.sliding_window_attention(q, k, v, window=window)[0]
    assert gpu_attention.row_errors(ours[rows], exact).max() < gpu_attention.TOLERANCE / 2


@pytest.mark.parametrize("kind", ("raises", "wrong", "not stored"))
def test_ours_fails_and_the_peers_go_on(monkeypatch, kind):
    good = mixtral_ext.rolling_attention

    def bad(q, k, v, k_cache, v_cache, *, out, **rest):
        if kind == "raises":
            raise RuntimeError("mixtral_rolling_attention: CUDA: refused")
        if kind == "not stored":
            k_cache, v_cache = k_cache.clone(), v_cache.clone()
        good(q, k, v, k_cache, v_cache, **rest, out=out)
        if kind == "wrong":
            out[0].mul_(1.05)
        return out

    monkeypatch.setattr(mixtral_ext, "rolling_attention", bad)
    results = bench(kinds=("decode",), batches=(1,))
    assert gpu_attention.broken(results) == ["B=1, C=32, W=32", "B=1, C=128, W=None"]
    assert all("us" in row["candidates"][name] for row in results["rows"] for name in ("SDPA flash", "copy"))
    assert "- not timed: decode, ours: " in table(results)


def with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, causal, window_size=(-1, -1)):
    """flash-attn's function without append, of keys that begin at 0: q [B, 1, Hq, D]."""
    assert k is None and v is None and causal and window_size == (-1, -1) and cache_seqlens.dtype == torch.int32
    seen = ((q[i].float(), k_cache[i, :n].float(), v_cache[i, :n].float()) for i, n in enumerate(cache_seqlens.tolist()))
    return torch.stack([reference.sliding_window_attention(*tensors)[0] for tensors in seen]).bfloat16()


@pytest.mark.parametrize("old", (True, False), ids=("torch 2.11", "torch 2.13"))
def test_arguments_of_the_peers(monkeypatch, old):
    """flash-attn's functions with ours behind the same signature, varlen_attn with and without enable_gqa: all are right."""
    def attend(q, k, v, bounds, bounds_k, longest, longest_k, window_size, enable_gqa=old):
        assert enable_gqa and bounds.dtype == torch.int32 and isinstance(longest, int)
        return flash_attn.flash_attn_varlen_func(q, k, v, bounds, bounds_k, longest, longest_k, causal=True,
                                                 window_size=(window_size[0], -1 if window_size[0] < 0 else 0))

    def old_varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, *, window_size=(-1, -1)):
        return attend(q, k, v, bounds, bounds_k, longest, longest_k, window_size)

    def varlen_attn(q, k, v, bounds, bounds_k, longest, longest_k, *, window_size=(-1, -1), enable_gqa=False):
        return attend(q, k, v, bounds, bounds_k, longest, longest_k, window_size, enable_gqa)

    modules = {"flash_attn": flash_attn.flash_attn_func, "flash_attn_interface": lambda *a, **b: (flash_attn.flash_attn_func(*a, **b), None)}
    for name, function in modules.items():
        module = types.SimpleNamespace(flash_attn_func=function, flash_attn_varlen_func=flash_attn.flash_attn_varlen_func,
                                       flash_attn_with_kvcache=with_kvcache)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old_varlen_attn if old else varlen_attn)
    results = bench(lengths=(100,))
    for row in results["rows"]:
        for name in ("flash-attn 2", "flash-attn 3", *(() if row["kind"] == "decode" else ("torch varlen_attn",))):
            assert "us" in row["candidates"][name], row["candidates"][name]


class FakeCudnn(types.SimpleNamespace):
    """The calls that cuDNN's Python frontend 1.12 to 1.32 takes; `execute` computes with torch."""

    class Node:
        def set_output(self, output):
            assert output
            return self

        def set_dim(self, dim):
            self.dim = dim
            return self

        def set_stride(self, stride):
            self.stride = stride
            return self

    def __init__(self):
        super().__init__(data_type=types.SimpleNamespace(BFLOAT16=1, HALF=2, FLOAT=3), heur_mode=types.SimpleNamespace(A=1, FALLBACK=2),
                         diagonal_alignment=types.SimpleNamespace(TOP_LEFT=1), create_handle=lambda: "handle",
                         set_stream=lambda handle, stream: None, pygraph=self.graph)

    def graph(self, handle, io_data_type, intermediate_data_type, compute_data_type):
        assert (handle, io_data_type, intermediate_data_type, compute_data_type) == ("handle", 1, 3, 3)
        done = []

        def sdpa(name, q, k, v, attn_scale, generate_stats, diagonal_alignment, diagonal_band_right_bound, diagonal_band_left_bound=None):
            assert not generate_stats and diagonal_band_right_bound == 0 and attn_scale == 1 / 8
            self.asked = (q, k, v), self.Node(), diagonal_band_left_bound
            return self.asked[1], None

        def execute(arguments, workspace, handle):
            nodes, output, window = self.asked
            assert done == ["validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"]
            for node in (*nodes, output):
                assert (node.dim, node.stride) == (list(arguments[node].shape), list(arguments[node].stride()))
            q, k, v = (arguments[node][0].transpose(0, 1).float() for node in nodes)
            arguments[output].copy_(reference.sliding_window_attention(q, k, v, window=window)[0].transpose(0, 1)[None])

        def tensor(name, dim, stride, data_type):
            return self.Node().set_dim(dim).set_stride(stride)

        steps = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")
        return types.SimpleNamespace(tensor=tensor, sdpa=sdpa, execute=execute, get_workspace_size=lambda: 0,
                                     **{name: lambda *_, name=name: done.append(name) for name in steps})


def test_cudnn_frontend(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", FakeCudnn())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(attention_peers, "cudnn_handle", lambda: sys.modules["cudnn"].create_handle())
    for row in bench(kinds=("prompt",))["rows"]:
        assert "us" in row["candidates"]["cuDNN frontend"], row["candidates"]["cuDNN frontend"]


def test_compiling_stops_at_its_limit():
    results = bench(kinds=("prompt",), compiling=0.0)
    first, *others = [row["candidates"]["FlexAttention"] for row in results["rows"]]
    assert "us" in first and all("TimeoutError: compiling for the rows before took" in other["failed"] for other in others)


def test_caches_that_do_not_fit_are_listed(monkeypatch):
    monkeypatch.setattr(gpu_attention, "too_large", lambda sizes, row, device: "2 copies do not fit" if row.batch == 3 else None)
    results = bench(kinds=("decode",))
    assert [row.get("skipped") for row in results["rows"]] == [None, "2 copies do not fit"] * 2 and gpu_attention.broken(results) == []
    assert "| B=3, C=32, W=32 | not run: 2 copies do not fit |" in table(results)


def test_how_much_fits(monkeypatch):
    row = gpu_attention.all_rows(gpu_attention.Sizes(), ("decode",), batches=(128,))[-1]
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 10**9, 80 * 10**9))
    assert gpu_attention.too_large(gpu_attention.Sizes(), row, cuda) == "2 copies of 17.2 GB of caches do not fit into 30.0 GB"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 10**9, 80 * 10**9))
    assert gpu_attention.too_large(gpu_attention.Sizes(), row, cuda) is None


# ------------------------------------------------------------------------------------------------------------- report


def result(us, tflop_s, tb_s, method="graph"):
    return {"us": us, "us_range": [us, us], "runs": 3, "calls": 1, "bytes": 1, "flops": 1, "tflop_s": tflop_s, "tb_s": tb_s, "method": method,
            "error": 0.001}


def test_report_of_given_numbers(tmp_path, capsys):
    prompt = {"ours": result(100.0, 600.0, 1.0), "SDPA cuDNN, no window": result(400.0, 550.0, 1.0),
              "cuDNN frontend": result(120.0, 500.0, 1.0, "events"), "flash-attn 3": {"failed": "ModuleNotFoundError: none"},
              "dense": result(1400.0, 800.0, 1.0)}
    decode = {"ours": result(10.0, 1.0, 2.4), "SDPA flash": result(15.5, 1.0, 1.6), "copy": result(300.0, 0.0, 3.0)}
    rows = [
        {"kind": "prompt", "name": "T=16384, W=4096", "lengths": [16384], "window": 4096, "candidates": prompt,
         **gpu_attention.comparison(prompt, "tflop_s", "dense")},
        {"kind": "prompt", "name": "T=32768, W=4096", "lengths": [32768], "window": 4096, "times": {}, "share": {},
         "candidates": {"ours": {"failed": "RuntimeError: not supported"}}},
        {"kind": "decode", "name": "B=1, C=4096, W=4096", "batch": 1, "window": 4096, "candidates": decode,
         **gpu_attention.comparison(decode, "tb_s", "copy")},
        {"kind": "decode", "name": "B=128, C=32768, W=None", "batch": 128, "window": None, "skipped": "does not fit",
         "times": {}, "share": {}},
    ]
    file = tmp_path / "attention.json"
    file.write_text(json.dumps({
        "machine": {"date": "2026-01-02T03:04:05", "commit": "abc", "versions": {"torch": "2.11", "cudnn": "91900"}}, "rows": rows,
        "sizes": {"heads": 32, "key_heads": 8, "head_dim": 128}, "gpu": {"before": {"name": "H100"}, "during": {
            "clocks.sm": {"median": 1900, "min": 1500, "max": 1980}}}}))
    gpu_attention.main(["--report", str(file)])
    text = capsys.readouterr().out
    assert text == file.with_suffix(".md").read_text() and file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = text.splitlines()
    assert lines[0] == "name H100. While measuring: clocks.sm median 1900, 1500 to 1980."
    assert "commit abc; torch 2.11, cudnn 91900." in lines[1]
    assert "| row | ours | TFLOP/s | of dense | SDPA cuDNN, no window | cuDNN frontend | dense |" in lines
    assert "| T=16384, W=4096 | 100.0 | 600 | 75% | 400.0 (4.00x, 550) | 120.0* (1.20x, 500) | 1400 (800) |" in lines
    assert "| T=32768, W=4096 | - | - | - | - | - | - |" in lines
    assert "| B=1, C=4096, W=4096 | 10.0 | 2.4 | 80% | 15.5 (1.55x, 1.6) | 300.0 (3) |" in lines
    assert "| B=128, C=32768, W=None | not run: does not fit | | | | |" in lines
    assert "- not timed: prompt, flash-attn 3: ModuleNotFoundError: none (1 rows, first T=16384, W=4096)" in lines
    assert gpu_attention.broken(json.loads(file.read_text())) == ["T=32768, W=4096"]
    for line, after in zip(lines, lines[1:]):
        if line.startswith("|") and after.startswith("|"):
            assert line.count("|") == after.count("|")


def test_results_are_saved_row_by_row():
    saved = []
    results = bench(kinds=("packed",), save=lambda r: saved.append(json.dumps(r)))
    assert [len(json.loads(text)["rows"]) for text in saved] == [1, 2, 2] and json.loads(saved[-1]) == json.loads(json.dumps(results))


def test_rows_of_the_full_bench():
    rows = gpu_attention.all_rows(gpu_attention.Sizes())
    assert len(rows) == 2 * (7 + 2) + 2 * 8 and len({row.name for row in rows}) == len(rows)
    assert all(sum(mix) == 16384 for mix in gpu_attention.MIXES.values())
    assert {row.length for row in rows if row.kind == "decode" and row.window is None} == {32768 - 64}
    assert all(row.keys == 4096 and row.length % 4096 for row in rows if row.kind == "decode" and row.window)
