"""What the bench's report says is what the result files hold, the repository's own included."""
import copy
import json
import re
import shutil
from pathlib import Path

import bench_results as made
import pytest

from mixtral_bench import files, plots, report, targets
from mixtral_bench.cases import CASES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "python/mixtral_bench/results"
COMMITTED = files.load_all(RESULTS)
OF_OPS, OF_MODELS = ({stem: r for stem, r in COMMITTED.items() if r["kind"] == kind} for kind in ("ops", "model"))
UNITS = {"us": 1, "ms": 1e3, "s": 1e6}


def lines_of(text):
    """The cells of each line of the tables."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]


def microseconds(text):
    number, unit = re.match(r"([\d.]+) (us|ms|s)\b", text).groups()
    return float(number) * UNITS[unit]


# --------------------------------------------------------------------------------------------------------------- files


def test_results_survive_writing_and_reading(tmp_path):
    for results in (made.ops([made.experts(8, 1000.0)]), made.model([made.step()])):
        assert files.load(made.saved(results, tmp_path / "r.json")) == results


def test_every_committed_file_is_readable():
    other = {"verified.json", "2026-11-26-h100-grouped-gemm-kernels.json"}
    assert {path.name for path in RESULTS.glob("*.json")} - other == {f"{stem}.json" for stem in COMMITTED}
    for results in COMMITTED.values():
        assert results["machine"]["name"] in report.table(results)


@pytest.mark.parametrize("change, message", [
    (lambda r: r.pop("kind"), "\"kind\" is None"),
    (lambda r: r.pop("limits"), "limits missing"),
    (lambda r: r["machine"].pop("commit"), r"machine\.commit missing"),
    (lambda r: r["rows"][0].pop("flops"), r"rows\[0\]\.flops missing"),
])
def test_other_files_are_refused(tmp_path, change, message):
    results = made.ops([made.experts(8, 1000.0)])
    change(results)
    with pytest.raises(ValueError, match=message):
        files.load(made.saved(results, tmp_path / "r.json"))


def test_what_is_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        files.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("not {")
    for read in (files.load, lambda path: files.load_all(path.parent)):
        with pytest.raises(ValueError, match="text.json: not JSON"):
            read(tmp_path / "text.json")


def test_limits_of_a_machine():
    assert files.bandwidth({"copy_tb_s": 2.0, "read_tb_s": 2.5}) == 2.5 and files.bandwidth({}) is None
    assert files.product({"bf16_tflop_s": 0.01, "f32_tflop_s": 0.09}, "bf16") == 0.09  # a CPU that has no bf16 instructions
    assert files.product({"bf16_tflop_s": 800.0, "f32_tflop_s": 50.0}, "f32") == 50.0


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("stem", OF_OPS)
def test_numbers_of_a_table_come_from_the_file(stem):
    results = COMMITTED[stem]
    shown = iter(lines_of(report.table(results)))
    ops = sorted(dict.fromkeys(row["op"] for row in results["rows"]), key=list(report.TITLES).index)
    checked = 0
    for op in ops:
        heads = next(shown)
        for row in (row for row in results["rows"] if row["op"] == op):
            cells = dict(zip(heads, next(shown)))
            ours = row["candidates"]["mixtral_ext"]
            assert cells["case"].startswith(row["case"])
            if "us" not in ours:
                assert cells["ours"] == "-" and ours["skipped"] in report.table(results)
                continue
            assert microseconds(cells["ours"]) == pytest.approx(ours["us"], rel=6e-3)
            number, unit = cells["bandwidth"].rsplit(" ", 1)
            assert number == "< 0.001" or float(number) == pytest.approx(ours["tb_s"] / {"TB/s": 1, "GB/s": 1e-3}[unit], rel=6e-3)
            assert row["flops"] == 0 or cells["TFLOP/s"] == "< 0.001" or float(cells["TFLOP/s"]) == pytest.approx(ours["tflop_s"], rel=6e-3)
            if row.get("cached"):
                assert cells["of the limit"] == "in cache" and "share" not in ours
            else:
                assert cells["of the limit"].endswith(row["bound"])
                assert ours["share"] < 0.01 or f"{ours['share']:.0%}".replace("%", " %") in cells["of the limit"]
            base = row["candidates"].get("mixtral_ext + sort", ours)["us"]
            for name, peer in row["candidates"].items():
                if "us" in peer and not name.startswith("mixtral_ext"):
                    assert microseconds(cells[name]) == pytest.approx(peer["us"], rel=6e-3)
                    assert (f"({peer['us'] / base:.2f}x)" in cells[name]) != peer.get("yardstick", False)
                    checked += 1
                elif name in cells:
                    assert cells[name] == "-"
    assert checked > 10 and next(shown, None) is None


def test_who_did_not_run_is_listed_once_with_the_number_of_rows():
    absent, failed = {"absent": "No module named 'liger_kernel'"}, {"failed": "RuntimeError: query [4, 32] is\n too | long"}
    rows = [made.experts(t, 100.0 * t, Liger=absent, eager=failed if t > 1 else {"skipped": "about 300 s a run"}, **{"torch grouped_mm": 150.0 * t})
            for t in (1, 4, 8)]
    text = report.table(made.ops(rows))
    assert text.count("- Liger: absent: No module named 'liger_kernel' (3 rows)") == 1
    assert text.count("- eager: failed: RuntimeError: query [...] is too / long (2 rows: mixtral-8x7b T=4, mixtral-8x7b T=8)") == 1
    assert text.count("- eager: skipped: about 300 s a run (1 row: mixtral-8x7b T=1)") == 1
    assert lines_of(text)[0][-1] == "torch grouped_mm" and "150 us (1.50x)" in text


@pytest.mark.parametrize("stem", OF_MODELS)
def test_numbers_of_a_model_come_from_the_file(stem):
    results = OF_MODELS[stem]
    heads, *shown = lines_of(report.table(results))
    launches = (results.get("launches") or {}).get("by_name", {})
    assert plots.names(results) == {} and len(shown) == len(results["rows"]) + (1 + len(launches) if launches else 0)
    for row, cells in zip(results["rows"], shown):
        cells = dict(zip(heads, cells))
        assert float(cells["tokens/s"]) == pytest.approx(row["ours"]["tokens_s"], rel=6e-3)
        assert microseconds(cells["a step"]) == pytest.approx(row["ours"]["us_a_step"], rel=6e-3)
        assert cells["of the limit"] == f"{row['share']:.0%}".replace("%", " %") and cells["its ops alone"] == f"{row['ops_share']:.0%}".replace("%", " %")
        for name, peer in row["peers"].items():
            if "tokens_s" not in peer:
                assert cells.get(name, "-") == "-"
                continue
            rate, ratio = re.fullmatch(r"([\d.]+) \(([\d.]+)x\)", cells[name]).groups()
            assert float(rate) == pytest.approx(peer["tokens_s"], rel=6e-3) and float(ratio) == pytest.approx(row["ours"]["tokens_s"] / peer["tokens_s"], abs=6e-3)


def test_all_absent_of_the_committed_files_are_named():
    for results in OF_OPS.values():
        text = report.table(results)
        names = {name for row in results["rows"] for name, c in row["candidates"].items() if "us" not in c}
        assert all(re.search(rf"^- {re.escape(name)}: (absent|failed|skipped): ", text, re.M) for name in names)


def test_ours_may_fail_alone():
    row = made.decode(1, 50.0, SDPA=60.0)
    row["candidates"]["mixtral_ext"] = {"failed": "RuntimeError: no memory"}
    text = report.table(made.ops([row]))
    assert "| mistral-7b B=1, C=4096, W=4096 | - |" in text and "60.0 us |" in text and "- mixtral_ext: failed: RuntimeError: no memory (1 row)" in text


def test_header_says_where_and_how():
    text = report.table(made.ops([made.experts(1, 300.0)], quick=True))
    for words in ("NVIDIA X1 (beside A CPU)", "commit abc1234", "torch 2.13.0", "`python -m mixtral_bench run --device cuda`", "not for quoting",
                  "before: clocks.sm 345", "during: clocks.sm 1980 (1500 to 1980)", "copy 3.00 TB/s, read 3.20 TB/s, bf16 product 800 TFLOP/s",
                  "liger-kernel absent: No module named 'liger_kernel'"):
        assert words in text


def test_limits_that_were_not_measured_are_left_out(tmp_path):
    rows = [*(made.experts(t, 100.0 * t) for t in (1, 8)), *(made.prompt(n, 1.0 * n, w) for n in (4096, 16384) for w in (None, 4096)), made.decode(1, 20.0)]
    for row in rows:
        del row["limit_us"], row["bound"], row["candidates"]["mixtral_ext"]["share"]
    results = made.ops(rows, limits={}, peers={}, state={})
    text = report.table(results)
    assert "measured limits: none" in text and "clocks and power: not known" in text and lines_of(text)[1][-1] == "-"
    assert "| mixtral-8x7b T=8 | 800 us |" in "\n".join(report.quotes({"x": results}))
    assert targets.gaps({"x": results}, "cuda") == [] and targets.evaluate(target("T = 1 to 16"), {"x": results}).value is None
    pytest.importorskip("matplotlib")
    assert len(plots.write(results, tmp_path / "x")) == 3


def test_spread_is_of_quartiles_then_of_the_range():
    assert report.spread({"us": 100.0, "us_quartiles": [98.0, 104.0], "us_range": [90.0, 150.0], "runs": 9}) == "±3.0 %"
    assert report.spread({"us": 100.0, "us_range": [90.0, 150.0], "runs": 9}) == "±30.0 %"
    assert report.spread({"us": 100.0, "us_range": [100.0, 100.0], "runs": 1}) == "1 run"


def test_launches_beside_graphs_are_marked():
    row = made.experts(8, 1000.0, graphed=900.0)
    row["candidates"]["eager"] = made.candidate(4000.0, row, 1000.0, method="events")
    text = report.table(made.ops([row]))
    assert "4.00 ms\\* (4.00x)" in text and "900 us (0.90x)" in text and "launches one by one" in text


def test_numbers_are_short_and_plain():
    assert [report.digits(v) for v in (0, 3e-5, 0.0132, 0.7, 7.0, 34.567, 346.2, 7954.4)] == ["0", "< 0.001", "0.0132", "0.700", "7.00", "34.6", "346", "7954"]
    assert [report.time(v) for v in (2.9, 251.2, 1482.0, 5078814.0)] == ["2.90 us", "251 us", "1.48 ms", "5.08 s"]
    assert [report.bandwidth(v) for v in (3.04, 0.0239)] == ["3.04 TB/s", "23.9 GB/s"]


def test_model_table():
    check = {"against": "transformers 5.23 in f32", "error": 0.0123, "allowed": 0.04}
    text = report.table(made.model([made.step(check=check), made.step(batch=16, us=10000.0)]))
    cells = dict(zip(*lines_of(text)[:2]))
    assert cells["tokens/s"] == "125" and cells["a step"] == "8.00 ms" and cells["of the limit"] == "80 %" and cells["its ops alone"] == "70 %"
    assert cells["transformers 5.23 eager"] == "62.5 (2.00x)" and "vLLM" not in cells
    for words in ("32 layers, 7.24 B parameters, bf16, random weights", "- vLLM: failed: RuntimeError: out of memory (2 rows)", "embed 262 MB", "peak 3.00 GB",
                  "launches a decode step: 390, a layer: 12", "| `attention_split` | 32 | 4.50 |",
                  "- error of our logits, of what is allowed: decode B=1 0.012 of 0.04 (transformers 5.23 in f32)"):
        assert words in text


# ------------------------------------------------------------------------------------------------------------- targets


def target(words):
    return next(t for t in targets.TARGETS if words in t.what)


def outcome(words, *results):
    return targets.evaluate(target(words), {f"file{i}": r for i, r in enumerate(results)})


def test_a_target_is_met_missed_or_not_measured():
    fast, slow = made.experts(4096, 4000.0, flops=2.88e12), made.experts(16384, 20000.0, flops=11.5e12)  # 720 and 575 TFLOP/s
    assert outcome("T >= 4096", made.ops([fast])).verdict == "met"
    missed = outcome("T >= 4096", made.ops([fast, slow]))  # the worst row decides
    assert (missed.verdict, missed.case) == ("missed", "mixtral-8x7b T=16384") and missed.value == pytest.approx(575.0)
    assert missed.share == pytest.approx(0.5)
    for nothing in (made.ops([fast], device="cpu"), made.ops([fast], quick=True), made.ops([made.experts(4096, 4000.0, routing="few")]), made.ops([])):
        assert outcome("T >= 4096", nothing).verdict == "not yet measured"


def test_the_newest_file_with_the_row_decides():
    old, new = (made.ops([made.experts(4096, us, flops=2.88e12)], name=name) for us, name in ((4000.0, "old"), (8000.0, "new")))
    assert outcome("T >= 4096", old, new, made.ops([])).machine == "new"


def test_a_target_above_the_machine_s_limit_is_said_to_be_so():
    row = made.experts(1, 30000.0, bytes=7e8)
    assert outcome("expert layer, T=1", made.ops([row], "cpu", limits={"read_tb_s": 0.024})).verdict == "beyond this machine's limit"
    assert outcome("expert layer, T=1", made.ops([row], "cpu", limits={"read_tb_s": 0.036})).verdict == "missed"
    assert outcome("expert layer, T=1", made.ops([made.experts(1, 20000.0, bytes=7e8)], "cpu", limits={"read_tb_s": 0.036})).verdict == "met"


def test_quantities():
    gate = made.row("moe_gate", "mixtral-8x7b T=4096", 9.0, {"tokens": 4096, "experts": 8, "top_k": 2}, dtype="f32")
    assert outcome("moe_gate", made.ops([gate])).verdict == "met"
    stages = [made.row(op, "mixtral-8x7b T=4096", us, {"tokens": 4096}) for op, us in (("moe_combine", 40.0), ("grouped_gemm_swiglu", 600.0), ("grouped_gemm", 351.0))]
    rest = outcome("gate and combine", made.ops([made.experts(4096, 990.0), gate, *stages]))
    assert rest.value == pytest.approx(49 / 1000) and rest.verdict == "met" and rest.share is None
    assert outcome("gate and combine", made.ops([made.experts(4096, 990.0), gate])).value is None
    copied = outcome("decode, 4096 keys, B >= 16", made.ops([made.decode(16, 100.0, bytes=2.4e8), made.decode(8, 100.0, bytes=1.0)]))
    assert copied.value == pytest.approx(0.8) and copied.verdict == "missed"
    mask = made.prompt(16384, 1000.0, 4096, **{"masked SDPA": 5100.0, "SDPA flash, no window": 900.0})
    assert outcome("masked SDPA", made.ops([mask], "cpu")).value == pytest.approx(5.1)
    window = made.prompt(16384, 1000.0, 4096, **{"SDPA cuDNN, no window": 1200.0, "cuDNN frontend": {"absent": "No module named 'cudnn'"}})
    assert outcome("cuDNN with the same window", made.ops([window])).verdict == "not yet measured"
    window["candidates"]["cuDNN frontend"] = made.candidate(700.0, window, 1000.0)
    assert outcome("cuDNN with the same window", made.ops([window])).value == pytest.approx(0.7)
    assert outcome("dense bf16", made.ops([], "cpu")).value == 800.0


def test_model_targets():
    results = made.model([made.step(), made.step(batch=16, share=0.1)])
    share = outcome("mistral-7b, decode, B=1, of", results)
    assert share.value == 0.8 and share.verdict == "met" and outcome("mixtral-8x7b, decode, B=1", results).verdict == "not yet measured"
    assert outcome("mistral-7b, decode: launches", results).value == 12.0
    part = made.model([made.step()], model=results["model"] | {"layers": 4})
    assert outcome("mistral-7b, decode, B=1, of", part).verdict == "not yet measured"  # not of a part of the layers
    assert outcome("its ops alone", made.model([made.step()], "cpu")).verdict == "missed"  # 0.7 of 0.9
    assert outcome("mistral-7b, decode: launches", made.model([made.step()], launches={"per_layer": None})).verdict == "not yet measured"


def test_quoted_models_are_whole_ones_in_bf16():
    whole = made.model([made.step(), made.step() | {"what": "prefill", "tokens": 512}])
    others = [made.model([made.step(us=1.0)], model=whole["model"] | change) for change in ({"layers": 4}, {"dtype": "f32"})]
    text = "\n".join(report.quotes({"a": whole} | {f"b{i}": r for i, r in enumerate(others)}))
    assert text.count("| model |") == 2
    assert "| mistral-7b decode, B=1, 4096 in the cache | 8.00 ms |" in text and "| mistral-7b prefill, B=1, 512 tokens |" in text


def test_gaps_are_the_widest_of_each_op():
    rows = [made.experts(8, 1000.0, limit_us=500.0), made.experts(16, 1000.0, limit_us=400.0), made.experts(4096, 1000.0, limit_us=900.0, bound="compute"),
            made.prompt(4096, 100.0, limit_us=30.0), made.prompt(1024, 19.0, limit_us=1.0), made.decode(1, 100.0, limit_us=1.0), made.row("moe_combine", "mixtral-8x7b T=1", 1000.0, {}, limit_us=30.0)]
    found = targets.gaps({"a": made.ops(rows), "quick": made.ops([made.prompt(4096, 100.0, limit_us=21.0)], quick=True)}, "cuda")
    assert [(g.op, g.case, round(g.share, 3)) for g in found] == [  # none of a call of 19 us, nor of a part of the expert layer
        ("rolling_attention", "mistral-7b B=1", 0.01), ("sliding_window_attention", "mixtral-8x7b T=4096", 0.3), ("moe_experts", "mixtral-8x7b T=16", 0.4)]
    assert all((RESULTS / note).is_file() for note in targets.PROFILES.values())


def test_each_row_that_is_not_measured_has_a_command():
    text = "\n".join(report.open_commands(targets.evaluate_all({})))
    assert text.count("`python -m mixtral_") == len(targets.TARGETS) == len(report.target_table(targets.evaluate_all({}))) - 2
    assert "- decode, 4096 keys, B=1 (cpu): `python -m mixtral_bench run --op rolling_attention --device cpu --json`" in text


def test_cases_and_peers_that_are_not_measured_have_a_command():
    gone = {"Liger": {"absent": "no"}, "vLLM": {"failed": "too old"}, "torch grouped_mm": 2000.0}
    found = {"a": made.ops([made.experts(8, 1000.0, **gone), made.experts(16, 1000.0)]), "quick": made.ops([made.experts(1, 1000.0)], quick=True)}
    lines = report.open_rows(found)
    assert [len([line for line in lines if f"({device})" in line]) for device in ("cpu", "cuda")] == [len(CASES)] * 2  # of every op something is left
    (of_layer,) = (line for line in lines if line.startswith("- `moe_experts`") and "(cuda)" in line)
    pattern = re.compile(re.search("--cases '(.*)'", of_layer)[1])
    missing = {case.name for case in CASES["moe_experts"] if case.large} - {"mixtral-8x7b T=8", "mixtral-8x7b T=16"}
    assert {case.name for case in CASES["moe_experts"] if pattern.search(case.name)} == missing and f" {len(missing)} cases " in of_layer
    assert "- `moe_experts`, 25 cases (cpu): `python -m mixtral_bench run --device cpu --op moe_experts --json`" in lines
    peers = report.open_peers(found)
    assert "- beside liger-kernel (cuda), with it installed: `python -m mixtral_bench run --device cuda --op moe_experts apply_rope --json`" in peers
    assert any("vllm (cuda)" in line and "moe_experts" in line for line in peers)  # it failed
    assert not any("torch" in line for line in peers)  # it is always there


# --------------------------------------------------------------------------------------------------------------- plots


@pytest.mark.parametrize("stem", OF_OPS)
def test_plots_of_a_file_hold_its_names(stem, tmp_path):
    pytest.importorskip("matplotlib")
    results = COMMITTED[stem]
    written = plots.write(results, tmp_path / stem)
    assert [path.name for path in written] == [f"{stem}-{name}.svg" for name in plots.names(results)]
    texts = {name: (tmp_path / f"{stem}-{name}.svg").read_text() for name in plots.names(results)}
    for name, text in texts.items():
        assert results["machine"]["name"] in text and results["machine"]["commit"] in text
        assert (RESULTS / f"plots/{stem}-{name}.svg").is_file()
    drawn = ("moe_experts", "sliding_window_attention", "rolling_attention")
    peers = {name for row in results["rows"] if row["op"] in drawn for name, c in files.timed(row).items() if not c.get("yardstick")}
    assert all(any(f">{name}<" in text for text in texts.values()) for name in peers)
    assert "FLOP/byte" in texts["roofline"] and "matrix product" in texts["roofline"]


def test_plots_by_kind_and_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = [made.experts(t, 200.0 * t, Liger=300.0 * t) for t in (1, 64)]
    prompts = [made.prompt(n, us, w) for w in (4096, None) for n, us in ((4096, 400.0), (16384, 2000.0))]
    results = made.ops([*sizes, *prompts, *(made.decode(b, 20.0 * b, SDPA=30.0 * b) for b in (1, 16))])
    first = [path.read_bytes() for path in plots.write(results, tmp_path / "a")]
    text = dict(zip(plots.names(results), (f.decode() for f in first)))
    assert set(text) == {"roofline", "experts", "attention", "decode"}
    assert "limit, as measured here" in text["experts"] and ">Liger<" in text["experts"]
    assert "O(n W)" in text["attention"] and "O(n^2)" in text["attention"] and "slope n^2" in text["attention"]
    assert "measured copy" in text["decode"] and "measured read" in text["decode"] and "TB/s" in text["decode"]
    assert first == [path.read_bytes() for path in plots.write(results, tmp_path / "b")]


def test_a_plot_without_rows_is_left_out():
    assert set(plots.names(made.ops([made.experts(1, 100.0)]))) == {"roofline"}
    assert plots.names(made.model([made.step()])) == {}
    failed = made.experts(1, 100.0)
    failed["candidates"]["mixtral_ext"] = {"failed": "RuntimeError"}
    assert plots.names(made.ops([failed])) == {}


# ---------------------------------------------------------------------------------------------- what is in the repository


def test_benchmarks_page_is_what_the_files_give():
    assert (ROOT / "BENCHMARKS.md").read_text() == report.benchmarks(RESULTS), "run: python -m mixtral_bench report"


def test_readme_parts_are_what_the_files_give():
    text = (ROOT / "README.md").read_text()
    assert text == report.readme(text, RESULTS), "run: python -m mixtral_bench report"


def test_links_of_the_page_exist():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "BENCHMARKS.md").read_text())
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
    assert {path.name for path in (RESULTS / "plots").glob("*.svg")} == {f"{s}-{n}.svg" for s, r in COMMITTED.items() for n in plots.names(r)}


def test_verified_records_are_whole():
    records = json.loads((RESULTS / "verified.json").read_text())
    assert records and all(set(r) == {"what", "ops", "path", "device", "software", "commit", "date"} and r["ops"] for r in records)
    assert all(re.fullmatch(r"[0-9a-f]{7}", r["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", r["date"]) for r in records)


def checkout(folder):
    (folder / "python/mixtral_bench").mkdir(parents=True)
    shutil.copytree(RESULTS, folder / "python/mixtral_bench/results", ignore=shutil.ignore_patterns("plots"))
    shutil.copy(ROOT / "README.md", folder)
    return folder / "python/mixtral_bench/results"


def test_write_all_takes_in_a_new_file(tmp_path):
    pytest.importorskip("matplotlib")
    results = checkout(tmp_path)
    rows = [made.experts(t, 100.0 * t, Liger={"absent": "No module named 'liger_kernel'"}, **{"torch grouped_mm": 123.0 * t}) for t in (1, 8)]
    made.saved(made.ops(rows), results / "2027-x1.json")
    made.saved(made.model([made.step()]), results / "2027-x1-model.json")
    (results / "plots").mkdir()
    (results / "plots/gone-roofline.svg").write_text("of a file that is gone")
    written = report.write_all(tmp_path)
    page, readme = (tmp_path / "BENCHMARKS.md").read_text(), (tmp_path / "README.md").read_text()
    assert {"BENCHMARKS.md", "README.md", "2027-x1-experts.svg"} <= {path.name for path in written}
    assert not (results / "plots/gone-roofline.svg").exists() and (results / "plots/2027-x1-experts.svg").exists()
    for words in ("## NVIDIA X1, 2027-01-02", "123 us (1.23x)", "- Liger: absent:", "## The model: NVIDIA X1", "plots/2027-x1-experts.svg"):
        assert words in page
    for words in ("**NVIDIA X1**", "torch grouped_mm 1.23x", "125 tokens/s", "plots/2027-x1-experts.svg", "**AMD EPYC**"):
        assert words in readme
    assert readme.partition("<!-- benchmarks -->")[0] == (ROOT / "README.md").read_text().partition("<!-- benchmarks -->")[0]
    before = page, readme
    report.write_all(tmp_path)
    assert before == ((tmp_path / "BENCHMARKS.md").read_text(), (tmp_path / "README.md").read_text())


def test_write_all_needs_a_checkout_and_its_marks(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a checkout of the repository"):
        report.write_all(tmp_path)
    checkout(tmp_path)
    with pytest.raises(ValueError, match="expected one <!-- verified -->"):
        report.readme("<!-- benchmarks -->\n<!-- /benchmarks -->\n", RESULTS)


def test_write_of_a_file_stands_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    path = made.saved(made.ops([made.experts(t, 200.0 * t) for t in (1, 8)]), tmp_path / "run.json")
    assert {p.name for p in report.write([path])} == {"run.md", "run-roofline.svg", "run-experts.svg"}
    assert (tmp_path / "run.md").read_text() == report.table(json.loads(path.read_text())) + "\n"


def test_nothing_is_changed_by_reading():
    results = copy.deepcopy(COMMITTED)
    report.benchmarks(RESULTS), report.table(next(iter(COMMITTED.values()))), targets.evaluate_all(COMMITTED)
    assert results == COMMITTED
