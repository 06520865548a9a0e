"""What `make gpu-check` runs on a machine with an NVIDIA GPU, with the Python that is there: nothing is installed, the libraries are built
only if mixtral_ext/lib has none. A part that fails or hangs does not stop the next one. Logs and results lie in --out."""

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIB = ROOT / "mixtral_ext/lib"
PYTEST = [sys.executable, "-u", "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider",
          "--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
# The first has no GPU tests and imports what such a machine need not have, the numpy module of its Python; the others are parts of their own.
NOT_COLLECTED = ["--ignore=tests/test_numpy.py", "--ignore=tests/virtual_gpu", "--ignore=tests/test_cuda_graph.py"]
TOOLS = ("memcheck", "racecheck", "synccheck")
SHOWN = 12  # failures of a part
PARTS = ("tests", "graph", "sanitizer", "moe", "attention", "model", "silicon")
OPS = {"moe": ("moe_gate", "moe_sort", "moe_permute", "moe_combine", "grouped_gemm", "grouped_gemm_swiglu", "moe_experts"),
       "attention": ("sliding_window_attention", "rolling_attention", "apply_rope")}


class Check:
    """Runs commands for --out, at most until the deadline."""

    def __init__(self, out: Path, seconds: float):
        self.out, self.start, self.deadline, self.results = out, time.monotonic(), time.monotonic() + seconds, {}
        out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", flush=True)

    def run(self, command, log: str, limit: float, shown=None, **environment) -> tuple[int, list[str]]:
        """-> exit status and lines of the output, which goes to the log, and to the terminal where `shown` matches, else a line every 10 s.
        After `limit` seconds it is killed, with what it started."""
        limit = max(1.0, min(limit, self.deadline - time.monotonic()))
        lines, spoken = [], time.monotonic()
        process = subprocess.Popen([str(x) for x in command], cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        killed = threading.Event()

        def kill():
            killed.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, kill)
        timer.start()
        with (self.out / log).open("a") as file:
            file.write(f"$ {' '.join(map(str, command))}\n")
            for line in process.stdout:
                file.write(line)
                file.flush()
                lines.append(line.rstrip())
                if shown and re.search(shown, line):
                    print(lines[-1], flush=True)
                elif time.monotonic() - spoken > 10:
                    self.say(lines[-1][:150])
                else:
                    continue
                spoken = time.monotonic()
            status = process.wait()
            timer.cancel()
            if killed.is_set():
                lines.append(f"stopped after {limit:.0f} s, the last line was: {lines[-1] if lines else '(none)'}")
                file.write(lines[-1] + "\n")
        return status, lines

    def part(self, name: str, check) -> None:
        self.say(f"{name} ...")
        start = time.monotonic()
        try:
            failures, summary = check(self)
        except Exception as error:  # noqa: BLE001
            failures, summary = [f"{type(error).__name__}: {error}"], ""
        self.results[name] = {"passed": not failures, "seconds": round(time.monotonic() - start, 1), "summary": summary, "failures": failures}
        (self.out / "summary.json").write_text(json.dumps(self.results, indent=1) + "\n")
        self.say(f"{name}: {'passed' if not failures else 'FAILED'}. {summary}")


# -------------------------------------------------------------------------------------------------------------- parts


def build(check: Check):
    """As setup.py does, for this Python, in place."""
    scripts = sysconfig.get_path("scripts")
    tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    for command in (["-S", ROOT, "-B", tree, "-G", "Ninja", "-DMIXTRAL_EXT_WITH_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"],
                    ["--build", tree, "--parallel", os.cpu_count()],
                    ["--install", tree, "--component", "python", "--prefix", LIB.parent]):
        status, lines = check.run(["cmake", *command], "build.log", 400, PATH=os.pathsep.join([scripts, os.environ.get("PATH", "")]))
        if status:
            return lines[-SHOWN:], "cmake failed, see build.log"
    return [], ""


def pytest(log: str, limit: float, *arguments: str):
    def check(check: Check):
        status, lines = check.run([*PYTEST, *arguments], log, limit, shown=r" (FAILED|ERROR) +\[")
        failures = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
        ends = [line.strip("= ") for line in lines if re.search(r"\d (passed|failed|skipped|error|deselected).* in [\d.]+s", line)]
        if status and not failures:
            failures = [f"exit status {status}", *lines[-3:]]
        return failures, ends[-1] if ends else ""

    return check


def sanitizer(check: Check):
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return ["compute-sanitizer was not found: leave the part out of PARTS, or install it"], ""
    failures, summaries = [], []
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "86", "--report-api-errors", "no", "--print-limit", "100",
                   sys.executable, "-u", "-m", "mixtral_bench.gpu_check", "--call-ops"]
        status, lines = check.run(command, "sanitizer.log", 110, shown=r"^(\w+: .*(cases|not supported)|\w+ \w+: FAILED)",
                                  PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        found = [line.strip("= ") for line in lines if "SUMMARY:" in line]
        summaries.append(f"{name}: {found[-1] if found else 'no summary'}")
        if status or not found or not re.search(r"SUMMARY: 0 (errors|hazards)", found[-1]):
            failures.append(f"{summaries[-1]} (exit status {status})")
            failures += [line for line in lines if ": FAILED" in line]
            failures += [line for line in lines if re.match(r"=+ +(Invalid|Error|Race|Warning|Barrier|Divergent|Program hit)", line)][:4]
            failures += lines[-1:]
    return failures, "; ".join(summaries)


def program(log: str, limit: float, *arguments):
    """A part that is a program of ours; {out} in its arguments is the folder for what it writes."""
    def check(check: Check):
        command = [sys.executable, "-u", "-m", *(a.replace("{out}", str(check.out.resolve())) for a in arguments)]
        status, lines = check.run(command, log, limit, shown=".", TQDM_DISABLE="1")
        return [f"exit status {status}", *lines[-1:]] if status else [], ""

    return check


def call_ops(device: str = "cuda", seconds: float = 8.0) -> bool:
    """Calls every op on its small cases (as many as take `seconds`), for a sanitizer. Inputs are made on the CPU, so that few of torch's
    own kernels run. -> whether all calls succeeded."""
    import torch

    import mixtral_ext
    from mixtral_bench.cases import CASES

    def moved(t):
        if not isinstance(t, torch.Tensor):
            return t
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)

    good = True
    for op, cases in CASES.items():
        cases = [c for c in cases if not (c.large or c.far or c.cpu_only)]
        called, start = 0, time.monotonic()
        try:
            for case, dtype in itertools.product(cases, (torch.bfloat16, torch.float16)):
                if called and time.monotonic() - start > seconds:
                    break
                getattr(mixtral_ext, op)(**{name: moved(value) for name, value in case.inputs(dtype).items()})
                if device == "cuda":
                    torch.cuda.synchronize()
                called += 1
            print(f"{op}: {called} of {2 * len(cases)} cases")
        except Exception as error:  # noqa: BLE001
            print(f"{op} {case.name}: FAILED {str(error).splitlines()[0]}")
            good = False
    return good


# --------------------------------------------------------------------------------------------------------------- main


def library_hash() -> str:
    return hashlib.sha256((LIB / "libmixtral_ext.so.0").read_bytes()).hexdigest()[:12]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixtral_bench.gpu_check", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="default: all. moe, attention: the ops beside their peers; model: whole models; silicon: the virtual GPU's tests on the card")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-check"), metavar="FOLDER", help="default %(default)s")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything (default %(default)s); a part takes 9 minutes at most")
    parser.add_argument("--cases", metavar="REGEX", help="of moe and attention: only cases whose name it finds, such as 'T=(1|4096)$'")
    parser.add_argument("--models", nargs="+", default=["mistral-7b", "mixtral-8x7b"], metavar="NAME", help="of model (default: %(default)s)")
    parser.add_argument("--call-ops", action="store_true", help="only call every op, for a sanitizer")
    options = parser.parse_args(arguments)
    if options.call_ops:
        sys.exit(not call_ops())

    check = Check(options.out, options.seconds)
    for old in check.out.glob("*.log"):
        old.unlink()
    card = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"], capture_output=True, text=True)
    if card.returncode:
        sys.exit(f"gpu-check needs an NVIDIA GPU and a torch with CUDA: {card.stderr.strip().splitlines()[-1]}")
    if not (LIB / "libmixtral_ext_torch.so").exists():
        check.part("build", build)
        if not check.results["build"]["passed"]:
            sys.exit("\n".join(check.results["build"]["failures"]))
    check.say(f"{card.stdout.strip()}, libmixtral_ext.so.0 {library_hash()}, logs in {options.out}")

    cases = ["--cases", options.cases] if options.cases else []

    def ops(name):
        return program(f"{name}.log", 540, "mixtral_bench", "run", "--device", "cuda", "--op", *OPS[name], *cases, "--json", f"{{out}}/{name}.json")

    def models(check: Check):
        """Each with what time is left of the part."""
        start, found = time.monotonic(), []
        for model in options.models:
            left = 540 - (time.monotonic() - start)
            failures, _ = program("model.log", left, "mixtral_model", "bench", "--random-weights", model, "--device", "cuda",
                                  "--json", f"{{out}}/model-{model}.json")(check)
            found += [f"{model}: {failure}" for failure in failures]
        return found, ""

    parts = {
        "tests": pytest("tests.log", 240, "tests", *NOT_COLLECTED),
        "graph": pytest("graph.log", 60, "tests/test_cuda_graph.py"),
        "sanitizer": sanitizer,
        "moe": ops("moe"),
        "attention": ops("attention"),
        "model": models,
        "silicon": pytest("silicon.log", 150, "tests/virtual_gpu"),
    }
    for name in options.parts:
        check.part(name, parts[name])
    print(summary(check.results))
    sys.exit(not all(result["passed"] for result in check.results.values()))


def summary(results: dict) -> str:
    lines = [""]
    for name, result in results.items():
        lines.append(f"{name}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s. {result['summary']}")
        lines += [f"    {line[:200]}" for line in result["failures"][:SHOWN]]
        if len(result["failures"]) > SHOWN:
            lines.append(f"    and {len(result['failures']) - SHOWN} more, see the log")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
