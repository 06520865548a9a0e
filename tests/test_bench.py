"""The benchmark's own logic on tiny shapes: what it counts, checks, leaves out and prints. No timing."""

import dataclasses
import json
import sys

import pytest
import torch

from mixtral_bench import __main__ as bench
from mixtral_bench import machine, measure, report, rows

NAMES = {"eager", "batched_mm", "grouped_mm", measure.OURS}


def tiny(op, name, **changes):
    return dataclasses.replace(next(c for c in rows.CASES[op] if c.name == name), **changes)


def tiny_rows(quick=False):
    experts = tiny("moe_experts", "mixtral_t512", tokens=5, hidden=64, intermediate=48, experts=4)
    attention = tiny("sliding_window_attention", "mistral_16k", sequences=((37, 37),), window=9, heads=4, key_heads=2)
    decode = tiny("rolling_attention", "mistral_decode_b1", capacity=16, window=16, heads=4, key_heads=2)
    yield from rows.expert_rows(experts, {1: 3.0, 5: 1.0, 8: 3.0})
    yield rows.attention_row(attention, 4.0)
    yield rows.decode_row(dataclasses.replace(decode, chunks=(1, 1), lengths=decode.lengths * 2), 2.0)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(rows, "ROTATED", 2**16)


def test_every_candidate_computes_the_same():
    made = list(tiny_rows())
    assert [row.name for row in made] == [
        "moe_experts, T=1",
        "moe_experts, T=5",
        "sliding_window_attention, T=37, W=9",
        "rolling_attention decode, B=2, 16 keys",
    ]
    assert set(made[0].candidates) == NAMES and set(made[2].candidates) == {measure.OURS, "masked SDPA"}
    for row in made:
        for call in row.candidates.values():
            for number in (0, 1, 7):
                part, expected = row.expected(call(number))
                assert part.shape == expected.shape and expected.dtype == torch.float32
                assert 0 < measure.relative_error(part, expected) < measure.TOLERANCE


def test_a_wrong_result_is_not_timed():
    for row in tiny_rows():
        good = row.candidates[measure.OURS]
        for name, bad in (("scaled", lambda i: good(i) * 1.05), ("NaN", lambda i: good(i) * torch.nan)):
            row.candidates = {measure.OURS: good, name: bad}
            with pytest.raises(RuntimeError, match=f"{name} is wrong"):
                measure.Meter(min_runs=1, max_runs=1).measure(row)


def test_counts():
    made = list(tiny_rows())
    one_expert = 3 * 64 * 48
    assert [row.flops for row in made[:2]] == [tokens * 2 * 2 * one_expert for tokens in (1, 5)]
    assert made[0].bytes == 2 * 2 * one_expert  # one token: two experts in bf16
    assert made[1].bytes in (2 * 3 * one_expert, 2 * 4 * one_expert)
    pairs = sum(1 for q in range(37) for k in range(37) if q - 9 < k <= q)
    assert made[2].flops == pairs * 4 * 4 * 128
    assert made[3].bytes == 2 * (2 * 16 * 2 * 128) * 2  # K and V, 2 bytes, 2 sequences
    assert made[3].flops == 2 * 16 * 4 * 4 * 128


def test_what_does_not_fit_in_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "_memory", lambda: 2 * 3 * 64 * 48 * 2 * 4)  # half of it holds the copies for one token
    first, second, *_ = tiny_rows()
    assert set(first.candidates) == NAMES
    assert set(second.candidates) == NAMES - {"batched_mm"} and "copies" in second.skipped["batched_mm"]


def scripted(monkeypatch, seconds):
    """Makes every run of a candidate take what `seconds` says for its name and the number of the run."""
    calls = []

    def timed(call, number):
        name = call(number)
        calls.append((name, number))
        return seconds[name](number), torch.ones(1)

    monkeypatch.setattr(measure, "_timed", timed)
    return calls


def scripted_row(slowdown, names=(measure.OURS, "peer"), skipped=()):
    ones = torch.ones(1)
    return measure.Row(
        group="op",
        name=f"op {slowdown}",
        flops=1.0,
        bytes=1.0,
        slowdown=slowdown,
        target=1.0,
        expected=lambda out: (out, ones),
        candidates={name: lambda number, name=name: name for name in names},
        skipped=dict(skipped),
    )


def test_runs_alternate_and_the_first_is_only_a_check(monkeypatch):
    calls = scripted(monkeypatch, {measure.OURS: [4.0, 3.0, 1.0, 2.0].__getitem__, "peer": lambda i: 0.5})
    results = measure.Meter(budget=2.0, min_runs=3, max_runs=30).measure(scripted_row(1.0))["candidates"]
    assert calls[:6] == [(measure.OURS, 0), ("peer", 0), (measure.OURS, 1), ("peer", 1), (measure.OURS, 2), ("peer", 2)]
    assert results[measure.OURS]["runs"] == [3.0, 1.0, 2.0] and results[measure.OURS]["median"] == 2.0
    assert results["peer"]["runs"] == [0.5] * 4  # until the budget is used
    assert results["peer"]["error"] == 0


def test_slow_candidates_run_once_and_then_not_at_all(monkeypatch):
    calls = scripted(monkeypatch, {measure.OURS: lambda i: 10.0, "peer": lambda i: 20.0})
    meter = measure.Meter(limit=90.0, budget=0.1, min_runs=1)
    first = meter.measure(scripted_row(1.0))["candidates"]
    assert first["peer"]["runs"] == [20.0] and calls.count(("peer", 0)) == 1 and ("peer", 1) not in calls
    for slowdown in (8.0, 64.0):
        later = meter.measure(scripted_row(slowdown))["candidates"]
        assert later["peer"] == {"skipped": f"about {20 * slowdown:.0f} s a run"}
        assert later[measure.OURS]["runs"] == [10.0]  # ours always runs
    assert calls.count(("peer", 0)) == 1


def results_of(rows_):
    return {
        "machine": machine.describe(),
        "command": "python -m mixtral_bench",
        "quick": False,
        "limits": {"read_bandwidth": 36e9, "f32": 1e12, "bf16": 5.4e12},
        "rows": rows_,
    }


def test_table(monkeypatch):
    row = {
        "group": "op",
        "name": "op, T=1",
        "flops": 2e9,
        "bytes": 1e9,
        "target": 3.0,
        "candidates": {
            "mixtral_ext": {"median": 0.05, "runs": [0.05], "error": 0.004},
            "slow": {"median": 1.5, "runs": [1.5], "error": 0.004},
            "fast": {"median": 0.2, "runs": [0.2], "error": 0.004},
            "huge": {"skipped": "copies 45 GB of weights"},
        },
    }
    alone = {**row, "name": "op, T=2", "candidates": {"mixtral_ext": row["candidates"]["mixtral_ext"]}}
    text = report.table(results_of([row, alone]))
    assert (
        "| op, T=1 | 50 ms | 20.0 GB/s, 0.04 TFLOP/s | fast 200 ms | 4.00x | 3x "
        "| slow 1.50 s, huge (not run: copies 45 GB of weights) |" in text
    )
    assert "| op, T=2 | 50 ms | 20.0 GB/s, 0.04 TFLOP/s | - | - | 3x | - |" in text
    assert "read 36.0 GB/s" in text and "f32 1.00 TFLOP/s, bf16 5.4 TFLOP/s" in text
    for part in ("device", "date", "commit", "isa"):
        assert machine.describe()[part][:10] in text
    assert torch.__version__ in text


def test_command_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(rows, "rows", tiny_rows)
    monkeypatch.setattr(machine, "read_bandwidth", lambda size: 1e9)
    monkeypatch.setattr(machine, "matrix_peak", lambda dtype: 1e9)
    file = tmp_path / "new" / "run.json"
    bench.main(["--quick", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "not for quoting" in printed and f"wrote {file}" in printed
    results = json.loads(file.read_text())
    assert [row["group"] for row in results["rows"]] == ["moe_experts"] * 2 + ["sliding_window_attention", "rolling_attention"]
    for row in results["rows"]:
        for candidate in row["candidates"].values():
            assert len(candidate["runs"]) >= 3 and min(candidate["runs"]) <= candidate["median"] <= max(candidate["runs"])
    assert {"device", "threads", "date", "commit", "versions"} <= set(results["machine"])

    bench.main(["report", str(file)])
    assert file.with_suffix(".md").read_text().strip() in printed
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_json_without_a_name_goes_to_results(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "measure", lambda quick, limit, command: results_of([]))
    bench.main(["--json"])
    (file,) = (tmp_path / "results").iterdir()
    assert file.suffix == ".json" and ":" not in file.name


def test_the_table_of_the_issue():
    """Sizes and wanted speed-ups of the real run, from the cases alone."""
    made = []

    def record(case, targets):
        made.append((case.hidden, case.intermediate, case.experts, case.top_k, targets))
        return ()

    def record_one(case, target):
        made.append((case.heads, case.key_heads, case.head_dim, case.window, target))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "expert_rows", record)
        patch.setattr(rows, "attention_row", record_one)
        patch.setattr(rows, "decode_row", record_one)
        list(rows.rows())
    attention, decode = (32, 8, 128, 4096), (32, 8, 128, 4096)
    assert made == [
        (4096, 14336, 8, 2, {1: 3.0, 8: 1.0, 64: 1.0, 512: 3.0}),
        (*attention, 1.0),
        (*attention, 4.0),
        (*decode, 2.0),
        (*decode, 2.0),
    ]


def test_machine_limits():
    assert machine.read_bandwidth(2**20) > 0
    assert machine.median_seconds(lambda: None, 3) >= 0


@pytest.mark.parametrize("module", ["tqdm", "transformers"])
def test_a_missing_extra_is_named(monkeypatch, module):
    monkeypatch.delitem(sys.modules, "mixtral_bench.rows")
    monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    with pytest.raises(SystemExit, match=rf"^error: {module} is not installed: pip install 'mixtral_ext\[bench\]'$"):
        bench.main(["--quick"])


def test_the_table_does_not_need_matplotlib(monkeypatch, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results_of([])))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench.main(["report", str(file)])
    printed = capsys.readouterr().out
    assert printed.startswith(file.with_suffix(".md").read_text())
    assert printed.endswith("no plot: matplotlib is not installed: pip install 'mixtral_ext[bench]'\n")
