"""python -m mixtral_bench: the speed table of this machine. See --help."""

import argparse
import json
import sys
from pathlib import Path

import torch

from mixtral_bench import machine, report
from mixtral_bench.measure import Meter

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m mixtral_bench", description="Speed of our ops beside their peers.")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--json", nargs="?", type=Path, const=Path(), metavar="FILE",
                        help="write the results (default FILE: results/ of the package, named by date)")
    parser.add_argument("--limit", type=float, default=90, metavar="SECONDS",
                        help="leave out peers expected to need longer for one run (default %(default)s)")
    commands = parser.add_subparsers(dest="command", title="instead of measuring")
    reporter = commands.add_parser("report", help="table and plot of earlier results, written beside the file")
    reporter.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    try:
        run(options, " ".join(["python -m mixtral_bench", *arguments]))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name.partition('.')[0]} is not installed: pip install 'mixtral_ext[bench]'")


def run(options: argparse.Namespace, command: str) -> None:
    if options.command == "report":
        write_report(options.file)
    else:
        results = measure(options.quick, options.limit, command)
        print(report.table(results))
        if options.json is not None:
            name = results["machine"]["date"].replace(":", "") + ".json"
            path = RESULTS / name if options.json == Path() else options.json
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"\nwrote {path}")


@torch.inference_mode()
def measure(quick: bool, limit: float, command: str) -> dict:
    """Everything, with progress on stderr -> what `--json` writes."""
    from tqdm import tqdm

    from mixtral_bench.rows import rows

    meter = Meter(limit, budget=0.2) if quick else Meter(limit)
    with tqdm(total=8, unit="row", dynamic_ncols=True) as bar:

        def progress(text: str) -> None:
            bar.set_description(text)

        progress("read bandwidth and matrix peak")
        limits = {
            "read_bandwidth": machine.read_bandwidth(2**26 if quick else 2**30),
            "f32": machine.matrix_peak(torch.float32),
            "bf16": machine.matrix_peak(torch.bfloat16),
        }
        measured = []
        progress("making weights and references")
        for row in rows(quick):
            measured.append(meter.measure(row, progress))
            bar.update()
    return {"machine": machine.describe(), "command": command, "quick": quick, "limits": limits, "rows": measured}


def write_report(file: Path) -> None:
    results = json.loads(file.read_text())
    markdown = report.table(results) + "\n"
    file.with_suffix(".md").write_text(markdown)
    print(markdown)
    try:
        report.plot(results, file.with_suffix(".png"))
    except ModuleNotFoundError:
        print("no plot: matplotlib is not installed: pip install 'mixtral_ext[bench]'")


if __name__ == "__main__":
    main()
