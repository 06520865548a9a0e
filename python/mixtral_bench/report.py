"""Results as a Markdown table and a plot."""

from mixtral_bench.measure import OURS


def table(results: dict) -> str:
    """The whole report of one run (the dict that `--json` writes)."""
    machine, limits = results["machine"], results["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['device']} ({machine['isa']}), {machine['threads']} threads, {machine['memory_gib']} GiB; "
        f"{machine['date']}, commit {machine['commit']}; {versions}.",
        f"Command: `{results['command']}`." + (" Reduced sizes: not for quoting." if results["quick"] else ""),
        "",
        f"Measured with torch: read {limits['read_bandwidth'] / 1e9:.1f} GB/s; matrix product "
        f"f32 {limits['f32'] / 1e12:.2f} TFLOP/s, bf16 {limits['bf16'] / 1e12:.4g} TFLOP/s.",
        "",
        "| bf16 | ours | reached | best peer | speed-up | wanted | other peers |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        ours = row["candidates"][OURS]["median"]
        rate = f"{row['bytes'] / ours / 1e9:.1f} GB/s, {row['flops'] / ours / 1e12:.3g} TFLOP/s"
        best = best_peer(row)
        peers = ", ".join(
            f"{name} {_seconds(c['median']) if 'median' in c else '(not run: ' + c['skipped'] + ')'}"
            for name, c in row["candidates"].items()
            if name not in (OURS, best)
        )
        ratio = f"{row['candidates'][best]['median'] / ours:.2f}x" if best else "-"
        best_text = f"{best} {_seconds(row['candidates'][best]['median'])}" if best else "-"
        lines.append(
            f"| {row['name']} | {_seconds(ours)} | {rate} | {best_text} | {ratio} | {row['target']:g}x | {peers or '-'} |"
        )
    lines += ["", "Medians; GB/s and TFLOP/s count the bytes that must be read once and the work that the result needs."]
    return "\n".join(lines)


def best_peer(row: dict) -> str | None:
    """The fastest candidate that is not ours and ran."""
    peers = {name: c["median"] for name, c in row["candidates"].items() if name != OURS and "median" in c}
    return min(peers, key=peers.get) if peers else None


def plot(results: dict, path) -> None:
    """Time of every candidate relative to ours, one group of bars per row, as an image file. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row['name']}: {name}", c["median"] / row["candidates"][OURS]["median"], name == OURS)
        for row in results["rows"]
        for name, c in row["candidates"].items()
        if "median" in c
    ]
    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(bars) + 1.2), layout="constrained")
    axes.barh([b[0] for b in bars], [b[1] for b in bars], color=["tab:orange" if b[2] else "tab:gray" for b in bars])
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=2)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel(f"time, {OURS} = 1")
    axes.set_title(f"{results['machine']['device']}, {results['machine']['date'][:10]}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
