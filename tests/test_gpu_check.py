"""What make gpu-check does, without a GPU: how its parts are run."""
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
from mixtral_bench import gpu_check
from mixtral_bench.cases import CASES

ROOT = Path(__file__).parents[1]


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
    line = printed("PARTS=tests moe", "OUT=/some/where", "CASES=T=(1|16) two", "MODELS=mistral-7b", "LIMIT=60")
    assert line.endswith("--out /some/where --parts tests moe --cases 'T=(1|16) two' --models mistral-7b --seconds 60")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """What gpu-check would run on a machine with a GPU; of the second call a failure is reported."""
    ran = []

    def run(self, command, log, limit, shown=None, **environment):
        ran.append((" ".join(map(str, command[2:])), log, limit))
        return (1, ["last line"]) if len(ran) == 2 else (0, ["8 passed in 1.0s"])

    monkeypatch.setattr(gpu_check.Check, "run", run)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "a card\n", ""))
    return ran


def test_parts(tmp_path, commands, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        gpu_check.main(["--out", str(out), "--parts", "moe", "attention", "model", "graph", "--cases", "T=8$"])
    moe, attention, first, second, graph = commands
    assert moe == (f"-m mixtral_bench run --device cuda --op {' '.join(gpu_check.OPS['moe'])} --cases T=8$ --json {out}/moe.json", "moe.log", 540)
    assert attention[0].endswith(f"--op sliding_window_attention rolling_attention apply_rope --cases T=8$ --json {out}/attention.json")
    assert first[0] == f"-m mixtral_model bench --random-weights mistral-7b --device cuda --json {out}/model-mistral-7b.json"
    assert second[0] == f"-m mixtral_model bench --random-weights mixtral-8x7b --device cuda --json {out}/model-mixtral-8x7b.json"
    assert 0 < second[2] <= first[2] <= 540 and "tests/test_cuda_graph.py" in graph[0]
    assert end.value.code and "attention: FAILED" in capsys.readouterr().out
    saved = json.loads((out / "summary.json").read_text())
    assert {name: part["passed"] for name, part in saved.items()} == {"moe": True, "attention": False, "model": True, "graph": True}
    assert saved["attention"]["failures"] == ["exit status 1", "last line"]


def test_every_op_is_in_a_part():
    assert sorted(op for ops in gpu_check.OPS.values() for op in ops) == sorted(CASES)


@pytest.mark.parametrize("arguments", [
    ["mixtral_bench", "run", "--device", "cuda", "--op", "moe_gate", "--cases", "T=8$", "--json", "x.json"],
    ["mixtral_model", "bench", "--random-weights", "mistral-7b", "--device", "cuda", "--json", "x.json"]])
def test_what_the_parts_run_parses(monkeypatch, arguments):
    """Without a GPU it ends with a word about that."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, on which it would run")
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.search("error: device: .*(sees no|NVIDIA GPU)", done.stderr), done.stderr


def test_the_program_behind_the_choice_of_kernels_compiles(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    source = ROOT / "python/mixtral_bench/grouped_gemm_kernels.cu"
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-I", ROOT / "csrc", "-c", "-o", tmp_path / "x.o", source]
    subprocess.run(command, check=True)
