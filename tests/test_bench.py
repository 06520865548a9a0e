"""The benchmark's own logic on tiny shapes of the CPU: which cases it takes, what it counts, checks, leaves out and saves. No timing."""
import contextlib
import dataclasses
import json
import math
import re
import sys
import warnings

import pytest
import torch

import mixtral_ext
from mixtral_bench import __main__ as bench
from mixtral_bench import attention_ops, cases, files, machine, moe_ops, rows, timing
from mixtral_bench.cases import CASES, SHAPES
from mixtral_bench.peer import Peer, Unsupported

CPU = torch.device("cpu")
ONE_RUN = timing.Effort(0.0, 1, 1)
LIMITS = {"copy_tb_s": 0.01, "read_tb_s": 0.02, "bf16_tflop_s": 2.0}
TINY = {
    "moe_gate": dict(tokens=5), "moe_sort": dict(tokens=5), "moe_permute": dict(tokens=5, hidden=32), "moe_combine": dict(tokens=5, hidden=32),
    "grouped_gemm": dict(segments=(2, 0, 3, 1), inner=32, outer=24), "grouped_gemm_swiglu": dict(segments=(2, 0, 3, 1), inner=32, outer=24),
    "moe_experts": dict(tokens=5, hidden=64, intermediate=48, experts=8),
    "sliding_window_attention": dict(sequences=((150, 150),), window=9, heads=4, key_heads=2, head_dim=64),
    "rolling_attention": dict(chunks=(1, 1, 1), lengths=(37,) * 3, capacity=16, window=16, heads=4, key_heads=2, head_dim=64),
    "apply_rope": dict(tokens=5, heads=4, key_heads=2, head_dim=64),
}


def tiny(op, **changes):
    return dataclasses.replace(next(c for c in CASES[op] if c.large), **TINY[op] | changes)


def meter(**options):
    return timing.Meter(False, ONE_RUN, **options)


def row(case, peers=(), **options):
    return rows.make_row(case, "bf16", CPU, meter(), LIMITS, peers, rotated=2**12, **options)


# -------------------------------------------------------------------------------------------------------------- cases


def test_every_op_has_cases_of_a_model():
    for op, cases in CASES.items():
        large = [case for case in cases if case.large]
        assert large and len({case.name for case in cases}) == len(cases)
        assert all(set(case.shapes) <= set(SHAPES) and case.name.startswith(tuple(SHAPES)) for case in large), op


def test_chosen():
    names = [(case.op, case.name) for case in rows.chosen(["moe_experts"], ["mixtral-8x7b"], re.compile("T=(1|64)$"))]
    assert names == [("moe_experts", "mixtral-8x7b T=1"), ("moe_experts", "mixtral-8x7b T=64")]
    assert {case.op for case in rows.chosen()} == set(CASES)
    assert {case.op for case in rows.chosen(shapes=["mistral-7b"])} == {"sliding_window_attention", "rolling_attention", "apply_rope"}


def test_cases_have_the_models_sizes():
    by_name = {(case.op, case.name): case for case in rows.chosen()}
    layer = by_name["moe_experts", "mixtral-8x22b T=64"]
    assert (layer.hidden, layer.intermediate, layer.experts, layer.top_k) == (6144, 16384, 8, 2)
    step = by_name["rolling_attention", "mistral-7b B=16"]
    assert (step.capacity, step.window, len(step.chunks), step.rope_theta) == (4096, 4096, 16, 1e4) and step.lengths[0] % 4096 > 0
    step = by_name["rolling_attention", "mixtral-8x7b B=16"]
    assert (step.capacity, step.window) == (32768, None) and step.lengths[0] + 1 <= 32768
    for name in ("mistral-7b packed mixed", "mixtral-8x7b packed one long"):
        assert sum(n for n, _ in by_name["sliding_window_attention", name].sequences) == 16384


@pytest.mark.parametrize("routing, counts", [("balanced", [5] * 8), ("two", [0, 20, 0, 0, 0, 0, 20, 0])])
def test_routings(routing, counts):
    ids = tiny("moe_experts", tokens=20, routing=routing).inputs(torch.bfloat16)["topk_ids"]
    assert ids.flatten().bincount(minlength=8).tolist() == counts and all(len(set(token)) == 2 for token in ids.tolist())


def test_no_part_of_large_inputs_repeats_where_a_mistake_could_hide():
    """Another expert, gate for up, another sequence or head must give other numbers."""
    make = cases.Maker(torch.bfloat16, "cpu", 0)
    weights = make.normal(3, 4096, 4096)  # as many elements as a repeated block would hide
    assert weights.numel() > 2 * cases.BLOCK and not torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    for case in rows.chosen():
        for name in ("hidden", "intermediate", "inner", "outer", "heads", "key_heads", "head_dim"):
            assert math.gcd(getattr(case, name, 1), cases.BLOCK) == 1, case


def test_quick_cases_are_small():
    small = [case for case in map(rows.quick, rows.chosen()) if case]
    assert {case.op for case in small} == set(CASES)
    for case in small:
        inputs = case.inputs(torch.bfloat16)
        assert sum(t.numel() for t in inputs.values() if isinstance(t, torch.Tensor)) < 2**27, case


# ------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("queries, keys", ((0, 0), (1, 1), (5, 5), (3, 9), (1, 40), (37, 37)))
@pytest.mark.parametrize("window", (1, 2, 36, 37, 38, None))
def test_visited_pairs(queries, keys, window):
    seen = [(q, k) for q in range(keys - queries, keys) for k in range(keys) if k <= q and (window is None or q - k < window)]
    assert attention_ops.visited_pairs(queries, keys, window) == len(seen)


def test_counts():
    expert = 3 * 64 * 48
    got = {op: row(tiny(op)) for op in CASES}
    experts = got["moe_experts"]
    ids = tiny("moe_experts").inputs(torch.bfloat16)["topk_ids"]
    assert experts["flops"] == 5 * 2 * 2 * expert
    assert experts["bytes"] == 2 * (len(ids.unique()) * expert + 2 * 5 * 64)
    assert got["moe_gate"]["bytes"] == 2 * 5 * 8 + 4 * (2 * 10 + 9 + 2 * 10) and got["moe_gate"]["flops"] == 0
    assert got["moe_sort"]["bytes"] == 4 * 10 + 4 * (9 + 2 * 10)
    assert got["moe_permute"]["bytes"] == got["moe_combine"]["bytes"] == 2 * 32 * (5 + 10)
    assert got["grouped_gemm"]["flops"] == 2 * 6 * 32 * 24 and got["grouped_gemm"]["bytes"] == 2 * (3 * 32 * 24 + 6 * 32 + 6 * 24)
    assert got["grouped_gemm_swiglu"]["flops"] == 4 * 6 * 32 * 24
    assert got["grouped_gemm_swiglu"]["bytes"] == 2 * (3 * 2 * 32 * 24 + 3 * 32 + 6 * 24)  # three tokens, gathered for six rows
    pairs = sum(min(9, p + 1) for p in range(150))
    assert got["sliding_window_attention"]["flops"] == 4 * 64 * 4 * pairs
    assert got["sliding_window_attention"]["bytes"] == 2 * 150 * 64 * (4 + 2 + 2 + 4)
    assert got["rolling_attention"]["flops"] == 3 * 16 * 4 * 4 * 64
    assert got["rolling_attention"]["bytes"] == 2 * 3 * 64 * (2 * 16 * 2 + 2 * 4)
    assert got["apply_rope"]["bytes"] == 2 * 2 * 5 * 64 * 6
    for op, found in got.items():
        ours = found["candidates"][files.OURS]
        assert 0 <= ours["error"] <= rows.OPS[op].tolerance and ours["us"] > 0, op
        limit = max(found["bytes"] / 0.02e12, found["flops"] / 2e12) * 1e6
        assert found["limit_us"] == pytest.approx(limit) and ours.get("share") == (None if found.get("cached") else pytest.approx(limit / ours["us"]))
        assert ours["tb_s"] == pytest.approx(found["bytes"] / ours["us"] / 1e6) and ours["tflop_s"] == pytest.approx(found["flops"] / ours["us"] / 1e6)


@pytest.mark.parametrize("chunk, length", [(1, 5), (7, 0), (7, 9), (7, 40), (33, 40)])
@pytest.mark.parametrize("window", (16, 9, None))
def test_a_chunk_over_the_cache_is_right_and_counted(chunk, length, window):
    case = tiny("rolling_attention", chunks=(chunk,), lengths=(length,), window=window, capacity=16 if window else 80)
    found = row(case)
    assert "us" in found["candidates"][files.OURS], found
    seen = [(q, k) for q in range(length, length + chunk) for k in range(q + 1) if window is None or q - k < window]
    assert found["flops"] == 4 * 64 * 4 * len(seen)
    assert found["bytes"] == 2 * (2 * len({k for _, k in seen}) * 2 * 64 + 2 * chunk * 4 * 64)


def test_rated():
    made = {"dtype": "bf16", "bytes": 3e6, "flops": 5e9, "candidates": {
        files.OURS: {"us": 5000.0}, files.SORTING: {"us": 6000.0}, "peer": {"us": 9000.0}, "more": {"us": 1e4, "flops": 1e10}, "gone": {"absent": "no"}}}
    got = timing.rated(made, {"copy_tb_s": 1e-3, "read_tb_s": 2e-3, "bf16_tflop_s": 2.0, "f32_tflop_s": 1.0})
    assert got["bound"] == "compute" and got["limit_us"] == pytest.approx(2500)
    shares = {name: c.get("share") for name, c in got["candidates"].items()}
    assert shares == {files.OURS: pytest.approx(0.5), files.SORTING: pytest.approx(2500 / 6000), "peer": pytest.approx(2500 / 9000), "more": None, "gone": None}
    assert got["candidates"]["peer"]["times"] == pytest.approx(1.5)  # of the one that sorts, as peers do
    assert got["candidates"]["more"]["tflop_s"] == pytest.approx(1.0) and got["candidates"]["gone"] == {"absent": "no"}
    slow = timing.rated(made, {"read_tb_s": 1e-4, "bf16_tflop_s": 2.0})
    assert slow["bound"] == "memory" and slow["limit_us"] == pytest.approx(30000)
    assert "share" not in timing.rated(made, {})["candidates"][files.OURS]


# ------------------------------------------------------------------------------------------------------------- checks


def scaled(result):
    return tuple(t * 1.05 if t.is_floating_point() else t for t in result) if isinstance(result, tuple) else result * 1.05


@pytest.mark.parametrize("op", [op for op in CASES if op not in ("moe_sort", "apply_rope", "rolling_attention")])
@pytest.mark.parametrize("bad", (scaled, "unwritten", "raises"), ids=("scaled", "unwritten", "raises"))
def test_a_wrong_result_is_recorded_and_not_timed(monkeypatch, op, bad):
    good, kept = getattr(mixtral_ext, op), []

    def function(**arguments):
        if bad == "raises":
            raise RuntimeError("no kernel\nmore")
        if bad == "unwritten":  # whatever was there before stays there: right at first
            kept.append(kept[0] if kept else good(**arguments))
            return kept[0]
        return bad(good(**arguments))

    case = tiny(op)
    monkeypatch.setattr(mixtral_ext, op, function)
    found = row(case)["candidates"][files.OURS]
    assert "us" not in found and ("RuntimeError: no kernel" == found["failed"] if bad == "raises" else "wrong result: relative error" in found["failed"])


@pytest.mark.parametrize("bad", ("scaled", "not stored", "one key less"))
def test_a_wrong_step_over_the_cache(monkeypatch, bad):
    good = mixtral_ext.rolling_attention

    def function(k_cache, v_cache, **rest):
        if bad == "not stored":
            k_cache, v_cache = k_cache.clone(), v_cache.clone()
        if bad == "one key less":
            rest["window"] -= 1
        out, lse = good(k_cache=k_cache, v_cache=v_cache, **rest)
        return (out * 1.05 if bad == "scaled" else out), lse

    monkeypatch.setattr(mixtral_ext, "rolling_attention", function)
    assert "wrong result" in row(tiny("rolling_attention"))["candidates"][files.OURS]["failed"]


@pytest.mark.parametrize("change", (-1, 1))
def test_one_key_more_or_less_at_a_window_of_4096_is_wrong(change):
    case = tiny("sliding_window_attention", sequences=((5000, 5000),), window=4096, heads=2, key_heads=1)
    inputs = case.inputs(torch.bfloat16)
    error = rows.OPS["sliding_window_attention"].expected(case, inputs)
    attend = mixtral_ext.sliding_window_attention
    assert error(attend(**inputs)[0]) < attention_ops.TOLERANCE / 2 < attention_ops.TOLERANCE < error(attend(**inputs | {"window": 4096 + change})[0])


def test_rows_that_are_checked_cover_edges():
    checked, starts = attention_ops.sampled_rows((300, 1, 200), 64, CPU)
    assert {0, 63, 64, 65, 299, 300, 301, 500} <= set(checked.tolist())
    assert all(start == max(s for s in (0, 300, 301) if s <= r) for r, start in zip(checked.tolist(), starts.tolist()))


# ------------------------------------------------------------------------------------------------------------- timing


def scripted(monkeypatch, seconds):
    """Every call of a candidate takes what `seconds` says for its name; -> the names, call by call."""
    calls, clock = [], [0.0]

    def make(name):
        def call():
            calls.append(name)
            clock[0] += seconds[name]
            return torch.ones(1)

        return lambda: timing.Candidate([call], lambda result: 0.0, 0.1)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    return calls, {name: make(name) for name in seconds}


def test_runs_alternate_and_the_budget_ends_them(monkeypatch):
    calls, candidates = scripted(monkeypatch, {"a": 0.6, "b": 0.1})
    got = timing.Meter(False, timing.Effort(1.05, 3, 30)).measure("op", 1.0, candidates)
    assert (got["a"]["runs"], got["b"]["runs"]) == (3, 11) and got["a"]["us"] == pytest.approx(6e5) and got["b"]["us_range"] == pytest.approx([1e5, 1e5])
    timed = calls[calls.index("b") + 4:]  # after two checked calls and two of the timer
    assert timed[:6] == ["a", "b"] * 3 and set(timed[6:]) == {"b"}


def test_short_calls_are_timed_in_batches(monkeypatch):
    calls, candidates = scripted(monkeypatch, {"a": 1e-4})
    got = timing.Meter(False, ONE_RUN).measure("op", 1.0, candidates)
    assert got["a"]["calls"] == 10 and got["a"]["us"] == pytest.approx(100)


def test_slow_candidates_run_once_and_then_not_at_all(monkeypatch):
    calls, candidates = scripted(monkeypatch, {"ours": 10.0, "peer": 20.0})
    one = timing.Meter(False, ONE_RUN, limit=90.0, never_left_out=("ours",))
    first = one.measure("op", 1.0, candidates)
    assert calls == ["ours", "peer"] and first["peer"]["us"] == pytest.approx(2e7) and first["peer"]["runs"] == 1
    later = one.measure("op", 8.0, candidates)
    assert later["peer"] == {"skipped": "about 160 s a call, --limit is 90"} and later["ours"]["us"] == pytest.approx(1e7) and calls.count("peer") == 1
    assert "us" in one.measure("other", 8.0, candidates)["peer"]


def test_a_first_call_that_compiles_is_not_the_measurement_on_a_gpu(monkeypatch):
    clock, calls = [0.0], []

    def call():
        calls.append(1)
        clock[0] += 10.0 if len(calls) == 1 else 0.1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    one = timing.Meter(True, ONE_RUN)
    for in_place in (False, True):
        calls.clear()
        seconds, error = one._checked(timing.Candidate([call], lambda result: 0.001, 0.1, in_place=in_place))
        assert seconds == pytest.approx(0.1) and error == 0.001


def test_what_fails_is_recorded_and_the_others_go_on():
    def raises():
        warnings.warn("Flash attention requires a GPU (Triggered internally at sdp_utils.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    def unsupported():
        raise Unsupported("no window")

    calls = []

    def later():
        calls.append(1)
        if len(calls) > 5:
            raise OSError("gone")

    got = meter().measure("op", 1.0, {
        "raises": raises, "unsupported": unsupported, "good": lambda: timing.Candidate([lambda: None], lambda result: 0.0, 0.0),
        "nan": lambda: timing.Candidate([lambda: None], lambda result: math.nan, 1.0),
        "later": lambda: timing.Candidate([later], lambda result: 0.0, 0.0)})
    assert got["raises"]["failed"] == "RuntimeError: No available kernel. Aborting execution.; Flash attention requires a GPU"
    assert got["unsupported"] == {"skipped": "no window"} and got["later"] == {"failed": "OSError: gone"} and "us" in got["good"]
    assert "wrong result: relative error nan" in got["nan"]["failed"] and list(got) == ["raises", "unsupported", "good", "nan", "later"]


def test_copies_are_gone_through_in_turn():
    seen = []
    timer = timing.Timer([lambda i=i: seen.append(i) for i in range(3)], False)
    assert timer.count == timing.MOST_CALLS
    for _ in range(3):
        timer.batch()
    assert seen == [i % 3 for i in range(len(seen))] and len(seen) > 3 * timing.MOST_CALLS


def test_a_graph_holds_all_copies(monkeypatch):
    monkeypatch.setattr(timing.Timer, "batch", lambda self: 1e-3 / 5)  # five calls a batch
    monkeypatch.setattr(timing.Timer, "_never_waits", lambda self: True)
    for graph, count in (("graph", 6), (None, 5)):
        monkeypatch.setattr(timing.Timer, "_captured", lambda self, graph=graph: graph)
        assert timing.Timer([lambda: None] * 3, True).count == count


@pytest.mark.parametrize("at", ("call", "end", None))
def test_what_cannot_be_captured_has_no_graph(monkeypatch, at):
    @contextlib.contextmanager
    def capture(graph):
        yield
        if at == "end":
            raise RuntimeError("operation failed due to a previous error during capture")

    timer = timing.Timer([lambda: None], False)
    if at == "call":
        timer.turn = iter([lambda: 1 / 0])
    for name, value in dict(CUDAGraph=lambda: "graph", graph=capture, stream=contextlib.nullcontext, current_stream=lambda: None,
                            synchronize=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert timer._captured() == (None if at else "graph")


def test_inputs_are_copied_until_they_are_larger_than_the_caches(monkeypatch):
    seen = []
    monkeypatch.setitem(rows.OPS, "moe_sort", dataclasses.replace(rows.OPS["moe_sort"], ours={
        files.OURS: lambda case, inputs: seen.append(inputs["topk_ids"]) or (lambda: mixtral_ext.moe_sort(**inputs))}))
    case = tiny("moe_sort")  # 40 bytes
    rows.make_row(case, "bf16", CPU, meter(), LIMITS, (), rotated=40 * 7)
    assert len(seen) == 7 == len({t.data_ptr() for t in seen}) and all(torch.equal(t, seen[0]) for t in seen)
    seen.clear()
    rows.make_row(case, "bf16", CPU, meter(), LIMITS, (), rotated=40 * 1000)
    assert len(seen) == rows.MOST_COPIES


def test_clone_keeps_strides():
    t = torch.arange(24.0).view(2, 12)[:, 3:7]
    copy = rows.clone({"a": t, "n": 3, "none": None})
    assert torch.equal(copy["a"], t) and copy["a"].stride() == t.stride() and (copy["n"], copy["none"]) == (3, None)


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 2 * 3 * 8 * 64 * 48 * 4 - 1)
    found = row(tiny("moe_experts"))["candidates"][files.OURS]
    assert re.fullmatch(r"inputs of .* GB, and the peers' copies, do not fit into .* GB", found["skipped"])
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 2 * 3 * 8 * 64 * 48 * 4)
    assert "us" in row(tiny("moe_experts"))["candidates"][files.OURS]


def test_a_row_that_cannot_be_made_is_recorded(monkeypatch):
    monkeypatch.setattr(type(tiny("moe_sort")), "inputs", lambda *_: 1 / 0)
    assert row(tiny("moe_sort"))["candidates"] == {files.OURS: {"failed": "ZeroDivisionError: division by zero"}}


# -------------------------------------------------------------------------------------------------------------- peers


def ours_as_peer(window):
    return lambda case, inputs: lambda: mixtral_ext.sliding_window_attention(**inputs | {"window": window})[0]


def test_a_peer_that_computes_something_else_is_checked_against_that():
    case = tiny("sliding_window_attention")
    peers = [Peer("same", ours_as_peer(9)), Peer("none, no window", ours_as_peer(None), changed={"window": None}),
             Peer("not none, no window", ours_as_peer(9), changed={"window": None})]
    found = row(case, peers)["candidates"]
    assert found["none, no window"]["flops"] == 4 * 64 * 4 * sum(range(151)) and "share" not in found["none, no window"]
    assert "us" in found["same"] and "wrong result" in found["not none, no window"]["failed"] and found["same"]["times"] > 0
    assert list(row(tiny("sliding_window_attention", window=None), peers[1:2])["candidates"]) == [files.OURS]  # there it is "none" itself


@pytest.mark.parametrize("error", (0.001, 0.1))
def test_a_yardstick_brings_its_own_check(error):
    found = row(tiny("grouped_gemm"), [Peer("dense", lambda case, inputs: (lambda: None, lambda result: error), yardstick=True)])
    dense = found["candidates"]["dense"]
    assert ("us" in dense) == (error < moe_ops.TOLERANCE) and "share" not in dense and "tb_s" not in dense
    assert files.peer_ratios(found) == {}  # it does other work than ours


def test_peers_are_right_whatever_ours_leaves_in_the_cache(monkeypatch):
    monkeypatch.setattr(mixtral_ext, "rolling_attention", lambda **_: 1 / 0)
    peers = [peer for peer in rows.peers_of("rolling_attention", "cpu", None) if peer.name.startswith("SDPA")]
    found = row(tiny("rolling_attention"), peers)["candidates"]
    assert "failed" in found[files.OURS] and peers and all("us" in found[peer.name] for peer in peers)


def test_peers_may_choose_any_of_equal_logits():
    case = tiny("moe_gate", tokens=500)
    inputs = case.inputs(torch.bfloat16)
    logits = inputs["router_logits"]
    assert any((row.sort(descending=True).values[1:3].diff() == 0).any() for row in logits)  # there are ties at the edge
    error = rows.OPS["moe_gate"].expected(case, inputs)
    weights, ids, *maps = mixtral_ext.moe_gate(**inputs)
    assert error((weights, ids, *maps)) < 1e-6
    flipped = logits.flip(1).float().topk(2, dim=1)
    theirs = (7 - flipped.indices).int()
    assert not torch.equal(theirs, ids) and error((flipped.values.softmax(1), theirs)) < 1e-6
    for bad in ((weights, ids.roll(1, 0), *maps), (weights, ids[:, :1].expand(-1, 2), *maps), (weights * 1.01, ids, *maps),
                (weights, ids, maps[0], maps[1].roll(1), maps[2])):
        assert not error(bad) < 1e-6


def test_inputs_that_stay_in_a_cache_have_no_share():
    case = tiny("moe_sort")
    for rotated, cached in ((40 * 64, False), (40 * 64 + 1, True)):
        found = rows.make_row(case, "bf16", CPU, meter(), LIMITS, (), rotated)
        assert found.get("cached", False) == cached and ("share" in found["candidates"][files.OURS]) != cached


def test_peers_on_tiny_shapes():
    """Those that a CPU has; each is right."""
    for op in CASES:
        peers = [peer for peer in rows.peers_of(op, "cpu", None) if peer.name not in ("llama.cpp", "FlexAttention")]
        for name, found in row(tiny(op), peers)["candidates"].items():
            assert "us" in found or "skipped" in found, (op, name, found)


def test_absent_peers(monkeypatch):
    monkeypatch.setitem(sys.modules, "missing_library", None)
    peers = [Peer("a", None), Peer("b", None, module="json"), Peer("c", None, module="missing_library", package="missing-library")]
    assert list(rows.absent(peers)) == ["c"] and "ModuleNotFoundError" in rows.absent(peers)["c"]
    assert rows.versions([*peers, Peer("d", None, package="torch")]) == {"missing-library": "absent", "torch": torch.__version__}


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def small(monkeypatch):
    """Two rows, a machine of known limits, a peer that is absent and one that is wrong."""
    cases = [tiny("moe_experts"), tiny("rolling_attention")]
    monkeypatch.setattr(rows, "chosen", lambda *_: cases)
    monkeypatch.setattr(machine, "limits", lambda device, quick: LIMITS)
    monkeypatch.setattr(rows, "ROTATED", {"cpu": 2**12})
    monkeypatch.setattr(timing, "CPU", ONE_RUN)
    monkeypatch.setitem(sys.modules, "missing_library", None)
    monkeypatch.setitem(rows.PEERS, "moe_experts", [
        Peer("gone", None, module="missing_library", package="missing-library"), Peer("wrong", lambda case, inputs: lambda: inputs["hidden"]),
        Peer("GPU only", None, ("cuda",))])
    monkeypatch.setitem(rows.PEERS, "rolling_attention", [])
    return cases


def test_run(small, tmp_path, capsys, monkeypatch):
    file, saved = tmp_path / "new" / "run.json", []
    save = files.save
    monkeypatch.setattr(files, "save", lambda path, results: saved.append(len(results["rows"])) or save(path, results))
    bench.main(["run", "--device", "cpu", "--json", str(file)])
    printed = capsys.readouterr().out
    results = files.load(file)
    assert saved == [1, 2, 2, 2] and f"wrote {file}" in printed and results["command"] == "python -m mixtral_bench run --device cpu --json FILE"
    assert (results["kind"], results["limits"], results["peers"]) == ("ops", LIMITS, {"missing-library": "absent"})
    assert {"before", "during", "after"} == set(results["state"]) and set(results["machine"]) >= {"name", "isa", "threads", "date", "commit", "versions"}
    first, second = results["rows"]
    assert set(first["candidates"]) == {files.OURS, files.SORTING, "gone", "wrong"} and list(second["candidates"]) == [files.OURS]
    assert "missing_library" in first["candidates"]["gone"]["absent"] and "wrong result" in first["candidates"]["wrong"]["failed"]
    assert first["sizes"]["tokens"] == 5 and second["sizes"]["chunks"] == [1, 1, 1] and second["sizes"]["window"] == 16
    for text in ("gone", "wrong", "Expert layer"):
        assert text in printed
    bench.main(["report", str(file)])
    assert file.with_suffix(".md").read_text().strip() in printed
    bench.main(["compare", str(file), str(file)])
    assert "1.000" in capsys.readouterr().out


def test_an_interrupted_run_leaves_what_it_had(small, tmp_path, monkeypatch):
    make, made = rows.make_row, []

    def interrupted(*arguments):
        if made:
            raise KeyboardInterrupt
        made.append(make(*arguments))
        return made[0]
    monkeypatch.setattr(rows, "make_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["run", "--device", "cpu", "--json", str(tmp_path / "run.json")])
    results = files.load(tmp_path / "run.json")
    assert [row["op"] for row in results["rows"]] == ["moe_experts"] and {"before", "during", "after"} == set(results["state"])


def test_results_are_named_by_date_and_device(small, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["run", "--device", "cpu", "--peers", "--json"])
    (file,) = tmp_path.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[\w-]+\.json", file.name)
    assert list(files.load(file)["rows"][0]["candidates"]) == [files.OURS, files.SORTING]  # --peers without a name: none
    bench.main(["run", "--device", "cpu", "--peers", "--json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file.name, file.stem + "-2.json"])  # nothing is written over


@pytest.mark.parametrize("given, shown", [("run --json", "run --json"), ("run --json --op moe_sort", "run --json --op moe_sort"),
                                          ("run --json /a/b.json --quick", "run --json FILE --quick"), ("run --json=/a/b.json", "run --json FILE")])
def test_the_command_in_the_results_names_no_path(given, shown):
    assert files.command("mixtral_bench", given.split(), {"--json": lambda _: "FILE"}) == f"python -m mixtral_bench {shown}"


def test_ours_that_fails_ends_with_an_error(small, monkeypatch):
    monkeypatch.setattr(mixtral_ext, "rolling_attention", lambda **_: 1 / 0)
    with pytest.raises(SystemExit, match="^failed: rolling_attention mistral-7b B=1$"):
        bench.main(["run", "--device", "cpu"])


@pytest.mark.parametrize("arguments, text", [
    (["run", "--device", "cpu", "--cases", "no such"], "error: no case is left"),
    (["run", "--device", "cpu", "--op", "moe_gate", "--peers", "Liger"], "error: peers: unknown for these ops on cpu: Liger"),
    (["run", "--device", "cpu", "--cases", "("], "2"),
    (["report", "no/such.json"], "error: no/such.json: no such file"), (["compare", "a.json", "b.json"], "error: a.json: no such file")])
def test_errors(arguments, text):
    with pytest.raises(SystemExit, match=re.escape(text)):
        bench.main(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu():
    with pytest.raises(SystemExit, match="error: device: torch .* sees no NVIDIA GPU"):
        bench.main(["run", "--device", "cuda"])


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_list(capsys, device):
    bench.main(["list", "--device", device, "--op", "moe_experts", "rolling_attention", "--shapes", "mixtral-8x7b"])
    text = capsys.readouterr().out
    assert "torch grouped_mm" in text and ("Liger" in text) == (device == "cuda")
    assert re.search(r"mixtral-8x7b T=4096 +tokens=4096, hidden=4096, intermediate=14336", text) and "mixtral-8x22b" not in text and "moe_gate\n" not in text


def test_it_measures_without_tqdm(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import of it fails
    bench.main(["run", "--device", "cpu"])
    assert "Expert layer" in capsys.readouterr().out


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^error: matplotlib is not installed: pip install 'mixtral_ext\[bench\]'$"):
        bench.main(["report"])


def test_limits_are_the_best_of_the_run():
    dense = {"us": 1.0, "yardstick": True}
    made = {"dtype": "bf16", "bytes": 1e3, "flops": 4e6, "candidates": {files.OURS: {"us": 4.0}, "dense": dense}}
    results = {"limits": {"copy_tb_s": 1.0, "read_tb_s": 2.0, "bf16_tflop_s": 3.0}, "rows": [timing.rated(made, {})]}
    bench._raise_limits(results, {}, "bf16")  # of a run that goes on
    assert results["limits"] == {"copy_tb_s": 1.0, "read_tb_s": 2.0, "bf16_tflop_s": pytest.approx(4.0)}
    bench._raise_limits(results, {"copy_tb_s": 1.5, "read_tb_s": 1.0, "bf16_tflop_s": 2.0}, "bf16")
    assert results["limits"] == {"copy_tb_s": 1.5, "read_tb_s": 2.0, "bf16_tflop_s": pytest.approx(4.0)}
    assert results["rows"][0]["candidates"][files.OURS]["share"] == pytest.approx(0.25)


def test_results_are_saved_at_once(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.save(file, {"rows": [1]})
    monkeypatch.setattr(files.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.save(file, {"rows": [1, 2]})
    assert json.loads(file.read_text()) == {"rows": [1]}


def test_machine():
    limits = machine.limits(CPU, quick=True)
    assert set(limits) == {"copy_tb_s", "read_tb_s", "bf16_tflop_s", "f32_tflop_s"} and all(0 < value < 100 for value in limits.values())
    about = machine.describe(CPU)
    assert about["device"] == "cpu" and about["versions"]["torch"] == torch.__version__ and about["memory_gib"] > 0
    assert "load" in machine.state(CPU) and machine.watch(CPU)() == {}


def test_clocks_of_a_gpu(monkeypatch, tmp_path):
    """With a stand-in for the program that tells them."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase \"$*\" in *lms*) printf '1000, 300.5\\n1980, 700\\n[N/A], 1\\n1500, 400\\n'; exec sleep 60;; *) echo '580.1, 345, 2619, 1980, 72.3, 700, 38';; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    cuda = torch.device("cuda")
    assert machine.state(cuda) == dict(zip(machine.STATE, ("580.1", "345", "2619", "1980", "72.3", "700", "38")))
    finish = machine.watch(cuda)
    import time
    time.sleep(0.5)
    assert finish() == {"clocks.sm": {"median": 1500, "min": 1000, "max": 1980}, "power.draw": {"median": 400, "min": 300.5, "max": 700}}
