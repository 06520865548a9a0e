"""What make gpu-check does, without a GPU: the bench of the expert layer on tiny shapes of the CPU, its table, and how parts are run."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixtral_ext
from mixtral_bench import gpu_check, gpu_experts, gpu_timing

ROOT = Path(__file__).parents[1]
TINY = gpu_experts.Shape(hidden=64, intermediate=48, experts=8, top_k=2)
NAMES = {*gpu_experts.OURS, *gpu_experts.PEERS, "dense", "copy"}


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(gpu_timing, "MIN_RUNS", 1)
    monkeypatch.setattr(gpu_experts.machine, "describe", lambda: {"date": "2026-01-02", "commit": "abc", "versions": {"torch": "2"}})


def bench(tokens=(1, 20), routings=gpu_experts.ROUTINGS, **options):
    return gpu_experts.run(TINY, tokens, routings, "cpu", budget=0.0, say=lambda text: None, **options)


# -------------------------------------------------------------------------------------------------------------- bench


def test_all_candidates_are_right_and_counted():
    saved = []
    results = bench(save=lambda r: saved.append(json.dumps(r)))
    assert json.loads(saved[-1]) == json.loads(json.dumps(results)) and len(saved) == 7
    assert [(row["tokens"], row["routing"]) for row in results["rows"]] == [(t, r) for t in (1, 20) for r in gpu_experts.ROUTINGS]
    assert gpu_experts.broken(results) == []
    expert = 3 * 64 * 48
    for row in results["rows"]:
        assert set(row["candidates"]) == NAMES and sum(row["rows_of_experts"]) == 2 * row["tokens"]
        touched = sum(n > 0 for n in row["rows_of_experts"])
        for name, candidate in row["candidates"].items():
            assert (candidate["error"] == 0) if name == "copy" else (0 <= candidate["error"] <= 0.02), name
            assert candidate["us_range"][0] <= candidate["us"] <= candidate["us_range"][1]
            assert candidate["tb_s"] == pytest.approx(candidate["bytes"] / candidate["us"] / 1e6)
        for name in ("ours", "ours + sort", *gpu_experts.PEERS):
            assert row["candidates"][name]["flops"] == row["tokens"] * 2 * 2 * expert  # two experts of each token, 2 a weight
            assert row["candidates"][name]["bytes"] == 2 * (touched * expert + row["tokens"] * (64 + 64))
        assert row["candidates"]["copy"]["bytes"] == touched * expert * 2  # half of that read, half written
        assert {n: row["candidates"][n]["flops"] for n in ("swiglu", "down")} == {"swiglu": row["tokens"] * 8 * 64 * 48,
                                                                           "down": row["tokens"] * 4 * 64 * 48}
        assert row["times"]["ours + sort"]["torch grouped_mm"] == pytest.approx(
            row["candidates"]["torch grouped_mm"]["us"] / row["candidates"]["ours + sort"]["us"])
        assert row["copy_share"]["ours"] == pytest.approx(row["candidates"]["ours"]["tb_s"] / row["candidates"]["copy"]["tb_s"])


def test_routings():
    rows = {row["routing"]: row["rows_of_experts"] for row in bench(tokens=(20,))["rows"]}
    assert rows["balanced"] == [5] * 8 and sorted(rows["two"]) == [0] * 6 + [20, 20]
    assert len(set(rows["natural"])) > 1


@pytest.mark.parametrize("kind, text", [("wrong", "wrong result: relative error"), ("unwritten", "wrong result: relative error"),
                                        ("raises", "RuntimeError: no kernel")])
def test_what_fails_is_recorded_and_the_others_go_on(monkeypatch, kind, text):
    good = mixtral_ext.moe_experts

    def bad(*args, out):
        if kind == "raises":
            raise RuntimeError("no kernel\nmore")
        return out if kind == "unwritten" else good(*args, out=out).mul_(1.05)

    monkeypatch.setattr(mixtral_ext, "moe_experts", bad)
    results = bench(tokens=(20,), routings=("natural",))
    candidates = results["rows"][0]["candidates"]
    assert gpu_experts.broken(results) == ["ours", "ours + sort"]
    assert text in candidates["ours"]["failed"] and "more" not in candidates["ours"]["failed"]
    assert all("us" in candidates[name] for name in NAMES - {"ours", "ours + sort"})
    assert f"ours: {candidates['ours']['failed']} (1 rows, first T=20 natural)" in gpu_experts.table(results)


def test_a_row_that_cannot_be_made_is_recorded(monkeypatch):
    def transformers_experts(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu_experts, "transformers_experts", transformers_experts)
    results = bench(tokens=(20,))
    assert all(c == {"failed": "OutOfMemoryError: too large"} for row in results["rows"] for c in row["candidates"].values())
    assert "too large" in gpu_experts.table(results)


def test_table(tmp_path, capsys):
    """Of all rows it has at most 60 lines; numbers are the JSON's."""
    results = bench()
    results["rows"] *= 6  # as many as of the full bench
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(results))
    gpu_experts.main(["--report", str(file)])
    text = capsys.readouterr().out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert text.splitlines() == file.with_suffix(".md").read_text().splitlines() and len(text.splitlines()) <= 60
    head, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len(body) == 37 and all(len(cells) == len(head) for cells in body)
    for row, cells in zip(results["rows"], body[1:]):
        cells = dict(zip(head, cells))
        assert (int(cells["T"]), cells["routing"]) == (row["tokens"], row["routing"])
        for name, column in (("ours", "ours"), ("ours + sort", "+ sort"), ("transformers eager", "transformers eager")):
            assert float(cells[column].split()[0]) == pytest.approx(row["candidates"][name]["us"], abs=0.51, rel=1e-3)
        assert f"({row['times']['ours + sort']['transformers eager']:.2f}x)" in cells["transformers eager"]


# -------------------------------------------------------------------------------------------------------------- parts


def python(text):
    return [sys.executable, "-uc", text]


def test_output_goes_to_the_log_and_a_hanging_command_is_stopped(tmp_path, capsys):
    check = gpu_check.Check(tmp_path / "out", 60)
    status, lines = check.run(python("print('seen'); print('hidden')"), "a.log", 20, shown="seen")
    assert (status, lines, capsys.readouterr().out) == (0, ["seen", "hidden"], "seen\n")
    status, lines = check.run(python("import time; print('at 3', flush=True); time.sleep(60)"), "a.log", 2)
    assert status != 0 and lines[-1] == "stopped after 2 s, the last line was: at 3"
    assert "hidden" in (tmp_path / "out/a.log").read_text()


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    check = gpu_check.Check(tmp_path, 60)

    def raises(check):
        raise OSError("no tool")

    check.part("first", raises)
    check.part("second", lambda check: ([f"failure {i}" for i in range(20)], "20 failed"))
    check.part("third", lambda check: ([], "3 passed"))
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert [part["passed"] for part in saved.values()] == [False, False, True]
    text = gpu_check.summary(saved)
    assert "OSError: no tool" in text and "failure 11" in text and "failure 12" not in text and "and 8 more" in text


def test_pytest_part(tmp_path):
    (tmp_path / "test_it.py").write_text("""import pytest
def test_not_marked():
    assert False
@pytest.mark.gpu
def test_good():
    pass
@pytest.mark.gpu
def test_bad():
    assert 1 == 2
""")
    failures, text = gpu_check.pytest("t.log", 60, str(tmp_path / "test_it.py"))(gpu_check.Check(tmp_path / "out", 60))
    assert len(failures) == 1 and "test_bad" in failures[0] and re.match("1 failed, 1 passed, 1 deselected", text)
    failures, text = gpu_check.pytest("t.log", 60, str(tmp_path / "missing.py"))(gpu_check.Check(tmp_path / "out", 60))
    assert failures[0] == "exit status 4"


@pytest.mark.parametrize("body, good", [
    ("echo 'moe_gate: 3 of 3 cases'; echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)'", True),
    ("echo '========= ERROR SUMMARY: 0 errors'", True),
    ("echo '========= Invalid __global__ read of size 4 bytes'; echo '========= ERROR SUMMARY: 1 error'; exit 86", False),
    ("echo '========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)'", False),
    ("echo 'moe_gate plain: FAILED unspecified launch failure'; echo '========= ERROR SUMMARY: 0 errors'; exit 1", False),
    ("true", False)])
def test_sanitizer_part(tmp_path, monkeypatch, body, good):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    failures, text = gpu_check.sanitizer(gpu_check.Check(tmp_path / "out", 60))
    assert (failures == []) == good and all(f"{name}: " in text for name in gpu_check.TOOLS)
    for shown in ("Invalid __global__", "plain: FAILED"):
        assert any(shown in line for line in failures) == (shown in body)


def test_without_a_sanitizer(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    failures, _ = gpu_check.sanitizer(gpu_check.Check(tmp_path, 60))
    assert failures == ["compute-sanitizer was not found: leave the part out of PARTS, or install it"]


def test_sanitized_calls(capsys, monkeypatch):
    """Every op is called; one that fails fails the run."""
    def fails(**_):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    assert gpu_check.call_ops("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and "moe_experts: 28 of 28 cases" in lines
    for op in ("sliding_window_attention", "rolling_attention"):
        assert any(re.fullmatch(rf"{op}: (\d+) of \1 cases", line) for line in lines)
    monkeypatch.setattr(mixtral_ext, "moe_gate", fails)
    assert not gpu_check.call_ops("cpu", seconds=0.0)
    assert "moe_gate empty: FAILED CUDA error: an illegal memory access" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="gpu-check needs an NVIDIA GPU"):
        gpu_check.main(["--out", str(tmp_path)])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_passes_its_variables_on():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # that of `make test` itself

    def printed(*variables):
        done = subprocess.run(["make", "-n", "gpu-check", *variables], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.replace("\\\n", " ").split())

    assert printed().endswith("-m mixtral_bench.gpu_check --out build/gpu-check")
    line = printed("PARTS=tests bench", "OUT=/some/where", "TOKENS=1 16", "ROUTINGS=natural")
    assert line.endswith("--out /some/where --parts tests bench --tokens 1 16 --routings natural")
    line = printed("PARTS=attention", "LENGTHS=1024 4096", "BATCHES=1 2", "LIMIT=60")
    assert line.endswith("--out build/gpu-check --parts attention --lengths 1024 4096 --batches 1 2 --seconds 60")


def test_options_of_a_bench(tmp_path, monkeypatch):
    """They are those that the bench itself takes; without a GPU it ends with a failure."""
    check = gpu_check.Check(tmp_path, 60)
    commands = []
    monkeypatch.setattr(check, "run", lambda command, log, limit, shown: commands.append((command[3:], log)) or (1, ["last line"]))
    assert gpu_check.bench("gpu_attention", "attention", 9, lengths=["8"], batches=None)(check) == (["exit status 1", "last line"], "")
    assert commands == [(["mixtral_bench.gpu_attention", "--json", tmp_path / "attention.json", "--lengths", "8"], "attention.log")]


def test_the_program_behind_the_choice_of_kernels_compiles(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    source = ROOT / "python/mixtral_bench/grouped_gemm_kernels.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-I", ROOT / "csrc", "-c", "-o", tmp_path / "x.o", source]
    subprocess.run(command, check=True)
