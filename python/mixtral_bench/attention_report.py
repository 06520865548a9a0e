"""Tables and plot of what gpu_attention measured."""

from pathlib import Path

from mixtral_bench.gpu_timing import header, shown_us

OURS = "ours"
TITLES = {"prompt": "One prompt", "packed": "Packed prompts", "decode": "One decode step"}
NOTES = {
    "prompt": "TFLOP/s count the pairs of a query and a key that it sees; behind a peer's time: its time over ours, then its TFLOP/s on "
              "the pairs that it has to visit itself (\"no window\": all of the causal triangle). of dense: share of a bf16 product's rate.",
    "decode": "TB/s count the bytes of the keys and values that are seen; of copy: share of a device copy's bandwidth. Ours rotates query and "
              "key and stores the new token, the peers find both done.",
}


def table(results: dict) -> str:
    """Markdown, one line a row, one table a kind. Peers that ran nowhere have no column; every failure is listed below."""
    lines = [*header(results), "Times in us (medians) of CUDA graphs; *: of launches one by one, of what cannot be captured."]
    for kind in TITLES:
        rows = [row for row in results["rows"] if row["kind"] == kind]
        if rows:
            lines += ["", f"{TITLES[kind]}. {NOTES.get(kind, '')}".strip(), "", *rows_of(rows, kind)]
    return "\n".join(lines + ["", *failures(results["rows"])])


def rows_of(rows: list[dict], kind: str) -> list[str]:
    key, unit, yardstick = ("tb_s", "TB/s", "copy") if kind == "decode" else ("tflop_s", "TFLOP/s", "dense")
    peers = list(dict.fromkeys(name for row in rows for name, result in row.get("candidates", {}).items()
                               if "us" in result and name not in (OURS, yardstick)))
    lines = [f"| row | ours | {unit} | of {yardstick} | {''.join(f'{name} | ' for name in peers)}{yardstick} |",
             "|" + "---|" * (5 + len(peers))]
    for row in rows:
        if "skipped" in row:
            lines.append(f"| {row['name']} | not run: {row['skipped']} |" + " |" * (3 + len(peers)))
            continue
        found = row["candidates"]

        def cell(name, row=row, found=found):
            result = found.get(name, {})
            if "us" not in result:
                return "-"
            ratio = [f"{row['times'][name]:.2f}x"] if name in row["times"] else []
            return f"{shown_us(result)}{'*' if result['method'] == 'events' else ''} ({', '.join([*ratio, rate(result[key])])})"

        ours = found.get(OURS, {})
        share = f"{row['share'][OURS]:.0%}" if OURS in row["share"] else "-"
        cells = [row["name"], shown_us(ours), rate(ours[key]) if "us" in ours else "-", share, *map(cell, peers), cell(yardstick)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rate(value: float) -> str:
    return f"{value:.3g}"


def failures(rows: list[dict]) -> list[str]:
    """Which candidate was not timed, why, and where."""
    found: dict[tuple, list] = {}
    for row in rows:
        for name, result in row.get("candidates", {}).items():
            if "failed" in result:
                reason, _, error = result["failed"].partition(": relative error ")
                found.setdefault((row["kind"], name, reason), []).append(row["name"] + (f" with an error of {error}" if error else ""))
    return [f"- not timed: {kind}, {name}: {reason} ({len(where)} rows, first {where[0]})" for (kind, name, reason), where in found.items()]


def plot(results: dict, path: Path) -> None:
    """TFLOP/s against the prompt's length, TB/s against the batch, with a window and without. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if "candidates" in row and row["kind"] != "packed"]
    names = list(dict.fromkeys(name for row in rows for name, result in row["candidates"].items() if "us" in result))
    colors = {name: f"C{'012456789'[i % 9]}" for i, name in enumerate(n for n in names if n not in (OURS, "dense", "copy"))}
    colors |= {OURS: "red", "dense": "black", "copy": "black"}
    figure, panels = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    for axes, (kind, windowed) in zip(panels.flat, ((k, w) for k in ("prompt", "decode") for w in (True, False))):
        chosen = [row for row in rows if row["kind"] == kind and (row["window"] is not None) == windowed]
        key, label = ("tflop_s", "TFLOP/s on the pairs visited") if kind == "prompt" else ("tb_s", "TB/s of keys and values")
        for name in names:
            points = [(row["lengths"][0] if kind == "prompt" else row["batch"], row["candidates"][name][key])
                      for row in chosen if "us" in row["candidates"].get(name, {})]
            if points:
                axes.plot(*zip(*points), marker="o", markersize=3, label=name, color=colors[name],
                          linestyle="--" if name in ("dense", "copy") else "-", linewidth=2.5 if name == OURS else 1)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens" if kind == "prompt" else "sequences")
        axes.set_ylabel(label)
        axes.set_title(f"{TITLES[kind]}, {'window ' + str(chosen[0]['window']) if windowed and chosen else 'no window'}", fontsize=10)
        if axes.lines:
            axes.legend(fontsize=7)
    sizes = results["sizes"]
    figure.suptitle(f"{sizes['heads']}/{sizes['key_heads']} heads of {sizes['head_dim']}, bf16, {results['gpu']['before'].get('name', '')}, "
                    f"{results['machine']['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
