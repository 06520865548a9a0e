"""python -m mixtral_bench list|run|report|compare: see --help of each."""

import os

# A thread stays on its core. The OpenMP runtime reads this when torch is imported.
os.environ.setdefault("OMP_PROC_BIND", "true")

import argparse
import itertools
import re
import sys
from pathlib import Path

import torch

from mixtral_bench import compare, files, machine, report, timing
from mixtral_bench.cases import CASES, SHAPES

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m mixtral_bench", description="Speed of our ops beside their peers and the machine's limits.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, action, text in (("list", list_cases, "the cases and peers, and which peers are installed"), ("run", run, "measure")):
        command = commands.add_parser(name, help=text)
        command.set_defaults(action=action)
        command.add_argument("--op", nargs="+", choices=list(CASES), default=[], help="default: all")
        command.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=[], help="default: all")
        command.add_argument("--cases", type=_expression, metavar="REGEX", help="only cases whose name it finds, such as 'T=(1|4096)$'")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--peers", nargs="*", metavar="NAME", help="only these, none at all without a name; default: all that are installed")
    command.add_argument("--dtype", choices=("bf16", "f16", "f32"), default="bf16")
    command.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    command.add_argument("--limit", type=float, default=90, metavar="SECONDS",
                         help="leave out peers expected to need longer for one call (default %(default)s)")
    command.add_argument("--json", nargs="?", type=Path, const=RESULTS, metavar="FILE",
                         help="write the results after every row (default FILE: results/ of the package, named by date and device)")
    command = commands.add_parser("report", help="tables and plots of results; without FILE BENCHMARKS.md and README.md of the repository")
    command.set_defaults(action=write_report)
    command.add_argument("file", type=Path, nargs="*", help="FILE.md and FILE-*.svg are written beside it")
    command = commands.add_parser("compare", help="two runs of one machine beside each other")
    command.set_defaults(action=lambda options, _: print(compare.compare(*options.file)))
    command.add_argument("file", type=Path, nargs=2, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        options.action(options, files.command("mixtral_bench", arguments, {"--json": lambda _: "FILE"}))
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has gone (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name.partition('.')[0]} is not installed: pip install 'mixtral_ext[bench]'")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _expression(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"not a regular expression: {error}") from None


def list_cases(options: argparse.Namespace, _: str) -> None:
    from mixtral_bench import rows

    cases = rows.chosen(options.op, options.shapes, options.cases)
    for op in CASES:
        found = [case for case in cases if case.op == op]
        if found:
            peers = rows.peers_of(op, options.device, options.peers)
            missing = rows.absent(peers)
            print(f"{op}\n  peers: {', '.join(p.name + (' (absent)' if p.name in missing else '') for p in peers) or 'none'}")
            for case in found:
                print(f"  {case.name:32} {', '.join(f'{k}={_short(v)}' for k, v in rows.sizes(case).items())}")


def _short(value) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


@torch.no_grad()
def run(options: argparse.Namespace, command: str) -> None:
    from mixtral_bench import rows
    from mixtral_bench.progress import progress_bar

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: torch {torch.__version__} sees no NVIDIA GPU")
    cases = rows.chosen(options.op, options.shapes, options.cases)
    if options.quick:
        cases = [small for case in cases if (small := rows.quick(case)) is not None]
    if not cases:
        raise ValueError("no case is left: see `python -m mixtral_bench list`")
    effort = timing.QUICK if options.quick else timing.CUDA if device.type == "cuda" else timing.CPU
    peers = {op: rows.peers_of(op, device.type, options.peers) for op in dict.fromkeys(case.op for case in cases)}
    every = [peer for some in peers.values() for peer in some]
    if unknown := set(options.peers or ()) - {peer.name for peer in every}:
        raise ValueError(f"peers: unknown for these ops on {device.type}: {', '.join(sorted(unknown))}")
    missing = rows.absent(every)
    results = {"kind": "ops", "machine": machine.describe(device), "command": command, "quick": options.quick,
               "state": {"before": machine.state(device)}, "peers": rows.versions(every), "rows": []}
    path = None if options.json is None else _path(options.json, results)
    bar = progress_bar(total=len(cases), unit="row")
    bar.set_description("memory bandwidth and matrix rate")
    results["limits"] = machine.limits(device, options.quick)
    finish, meter = machine.watch(device), timing.Meter(device.type == "cuda", effort, options.limit, never_left_out=(rows.OURS,))
    try:
        for case in cases:
            present = [peer for peer in peers[case.op] if peer.name not in missing]
            row = rows.make_row(case, options.dtype, device, meter, results["limits"], present,
                                2**20 if options.quick else rows.ROTATED[device.type],
                                lambda text, case=case: bar.set_description(f"{case.op} {case.name}: {text}"))
            row["candidates"] |= {peer.name: {"absent": missing[peer.name]} for peer in peers[case.op]
                                  if peer.name in missing and rows.applies(peer, case)}
            results["rows"].append(row)
            print(_line(row), file=sys.stderr, flush=True)
            bar.update()
            _raise_limits(results, {}, options.dtype)
            if path:
                files.save(path, results)
    finally:  # interrupted, too
        bar.close()
        results["state"] |= {"during": finish(), "after": machine.state(device)}
        if path and results["rows"]:
            files.save(path, results)
    _raise_limits(results, machine.limits(device, options.quick), options.dtype)
    if path:
        files.save(path, results)
    print(report.table(results))
    if path:
        print(f"\nwrote {path}")
    broken = [f"{row['op']} {row['case']}" for row in results["rows"] if "failed" in row["candidates"].get(rows.OURS, {})]
    if broken:
        sys.exit(f"failed: {'; '.join(broken)}")


def _raise_limits(results: dict, after: dict, dtype: str) -> None:
    """A limit is what the machine can do: the best of before, after and, of the matrix product, the dense ones between."""
    limits = {name: max(rate, after.get(name, 0.0)) for name, rate in results["limits"].items()}
    dense = [c["tflop_s"] for row in results["rows"] for c in row["candidates"].values() if c.get("yardstick") and "us" in c]
    limits[f"{dtype}_tflop_s"] = max([limits.get(f"{dtype}_tflop_s", 0.0), *dense])
    results |= {"limits": limits, "rows": [timing.rated(row, limits) for row in results["rows"]]}


def _line(row: dict) -> str:
    """One row, while it goes on."""
    shown = [f"{name} {report.time(found['us'])}" if "us" in found else f"{name}: failed: {found['failed']}"
             for name, found in row["candidates"].items() if "us" in found or "failed" in found]
    return f"{row['op']} {row['case']}: {', '.join(shown)}"


def _path(given: Path, results: dict) -> Path:
    """FILE, or one of results/ that is not there yet."""
    if given != RESULTS:
        return given
    stem = f"{results['machine']['date'][:10]}-" + re.sub(r"\W+", "-", results["machine"]["name"].lower().replace("(r)", "")).strip("-")
    names = itertools.chain([f"{stem}.json"], (f"{stem}-{n}.json" for n in itertools.count(2)))
    return next(path for name in names if not (path := RESULTS / name).exists())


def write_report(options: argparse.Namespace, _: str) -> None:
    for path in report.write(options.file) if options.file else report.write_all():
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
