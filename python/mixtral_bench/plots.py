"""Plots of a result file as SVG: roofline; expert layer against tokens; attention against length, O(n W) beside O(n^2); decode bandwidth against
batch. A plot whose rows the file lacks is left out. Needs matplotlib; `names` does not."""

from collections import Counter
from pathlib import Path

from mixtral_bench import files
from mixtral_bench.files import OURS, SORTING

WIDTH = 5.2  # inches of a panel
STYLE = {"svg.hashsalt": "mixtral_bench", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 7, "axes.grid": True,
         "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
MARKERS = "osD^vP*X<>"


def names(results: dict) -> dict[str, str]:
    """Name of each plot that this file gives -> its title."""
    if results["kind"] != "ops":
        return {}
    found = {"roofline": (roofline_rows(results), "Roofline"), "experts": (expert_panels(results), "Expert layer: time against tokens"),
             "attention": (prompt_panels(results), "Attention: time against length"),
             "decode": (decode_panels(results), "Decode: bandwidth against batch")}
    return {name: title for name, (rows, title) in found.items() if rows}


def write(results: dict, stem) -> list[Path]:
    """STEM-NAME.svg for each plot -> the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {"roofline": draw_roofline, "experts": draw_experts, "attention": draw_attention, "decode": draw_decode}
    written = []
    for name, title in names(results).items():
        with matplotlib.rc_context(STYLE):
            figure = drawn[name](results, pyplot)
            machine = results["machine"]
            figure.suptitle(f"{title}. {machine['name']}, {machine['date'][:10]}, commit {machine['commit']}", fontsize=9)
            path = Path(f"{stem}-{name}.svg")
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
        path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
        written.append(path)
    return written


def panels(pyplot, count: int, height: float = 4.2, **kwargs):
    figure, axes = pyplot.subplots(1, count, figsize=(WIDTH * count, height), layout="constrained", squeeze=False, **kwargs)
    return figure, list(axes[0])


def styles(rows: list[dict]) -> dict[str, dict]:
    """Line of each candidate: ours thick, each peer with a colour and a marker of its own, one that does more than asked dotted."""
    found = list(dict.fromkeys(name for row in rows for name in files.timed(row)))
    peers = list(dict.fromkeys(name.removesuffix(", no window") for name in found if name not in (OURS, SORTING)))
    look = {}
    for name in found:
        if name in (OURS, SORTING):
            look[name] = dict(color="red", marker="o", markersize=4, zorder=3, linewidth=2.5 if name == OURS else 1,
                              linestyle="-" if name == OURS else "--")
        else:
            i = peers.index(name.removesuffix(", no window"))
            look[name] = dict(color=f"C{'012456789'[i % 9]}", linewidth=1, marker=MARKERS[i % len(MARKERS)], markersize=4,
                              linestyle=":" if name.endswith("no window") else "-")
    return look


def draw_lines(axes, rows: list[dict], x, y, look: dict[str, dict]) -> None:
    """One line a candidate: x(row) against y(candidate)."""
    for name, line in look.items():
        points = sorted((x(row), y(found[name])) for row in rows if name in (found := files.timed(row)))
        if points:
            axes.plot(*zip(*points), label=name, **line)


def ticks(axes, values) -> None:
    """A tick at each measured place of a logarithmic axis."""
    values = sorted(set(values))
    axes.set_xticks(values, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else str(v) for v in values])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize=7)


def plain_numbers(axis) -> None:
    """A logarithmic axis without powers: 0.05, 20, 3000; over few decades also the twos and fives."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axis.set_minor_formatter(NullFormatter())


def time_unit(results: dict) -> tuple[float, str]:
    return (1e-3, "ms") if results["machine"]["device"] == "cpu" else (1, "us")


# ------------------------------------------------------------------------------------------------------------ roofline


def roofline_rows(results: dict) -> list[dict]:
    return [row for row in results["rows"] if OURS in files.timed(row) and row["flops"] and row["bytes"]]


def draw_roofline(results: dict, pyplot):
    figure, (axes,) = panels(pyplot, 1, 4.6)
    figure.set_size_inches(7.5, 4.6)
    limits, rows = results["limits"], roofline_rows(results)
    for i, op in enumerate(dict.fromkeys(row["op"] for row in rows)):
        points = [(row["flops"] / row["bytes"], row["candidates"][OURS]["tflop_s"]) for row in rows if row["op"] == op]
        axes.plot(*zip(*points), linestyle="none", marker=MARKERS[i], markersize=5, alpha=0.7, label=op)
    places = [row["flops"] / row["bytes"] for row in rows]
    memory, compute = files.bandwidth(limits), files.product(limits, "bf16")
    low, high = min(places) / 2, max([*places, compute / memory if memory and compute else 0]) * 2
    if memory:
        kind = "read" if memory == limits.get("read_tb_s") else "copy"
        until = min(high, compute / memory) if compute else high
        axes.plot([low, until], [low * memory, until * memory], color="black", linewidth=1, label=f"{kind}: {rate(memory)}")
    if compute:
        axes.plot([max(low, compute / memory if memory else low), high], [compute, compute], color="black", linewidth=1, linestyle="--",
                  label=f"matrix product: {compute:.3g} TFLOP/s")
    axes.set(xscale="log", yscale="log", xlabel="FLOP/byte", ylabel="TFLOP/s")
    plain_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.legend()
    return figure


def rate(tb_s: float) -> str:
    return f"{tb_s:.3g} TB/s" if tb_s >= 0.1 else f"{tb_s * 1e3:.3g} GB/s"


# -------------------------------------------------------------------------------------------------------- expert layer


def expert_panels(results: dict) -> dict[str, list[dict]]:
    """Shape -> its rows with random routing, of at least two numbers of tokens."""
    shapes: dict[str, list[dict]] = {}
    for row in results["rows"]:
        if row["op"] == "moe_experts" and OURS in files.timed(row) and row["sizes"].get("routing", "uniform") == "uniform":
            shapes.setdefault(f"{row['case'].partition(' ')[0]}, {row['dtype']}", []).append(row)
    return {shape: rows for shape, rows in shapes.items() if len({row["sizes"]["tokens"] for row in rows}) > 1}


def draw_experts(results: dict, pyplot):
    shapes = expert_panels(results)
    figure, axes = panels(pyplot, len(shapes), 4.6)
    figure.set_size_inches(max(7, WIDTH * len(shapes)), 4.6)
    scale, unit = time_unit(results)
    for panel, (shape, rows) in zip(axes, shapes.items()):
        draw_lines(panel, rows, lambda row: row["sizes"]["tokens"], lambda c: c["us"] * scale, styles(rows))
        floor = sorted((row["sizes"]["tokens"], row["limit_us"] * scale) for row in rows if "limit_us" in row)
        if floor:
            panel.plot(*zip(*floor), color="black", linestyle="--", linewidth=1, label="limit, as measured here")
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=shape)
        ticks(panel, [row["sizes"]["tokens"] for row in rows])
        plain_numbers(panel.yaxis)
        panel.legend()
    return figure


# ----------------------------------------------------------------------------------------------------------- attention


def length_of(row: dict) -> int | None:
    """Of one whole prompt."""
    sequences = row["sizes"].get("sequences", ())
    return sequences[0][0] if len(sequences) == 1 and sequences[0][0] == sequences[0][1] else None


def heads_of(row: dict) -> tuple:
    return tuple(row["sizes"][key] for key in ("heads", "key_heads", "head_dim")) + (row["dtype"],)


def most_common_heads(rows: list[dict]) -> list[dict]:
    common = Counter(map(heads_of, rows)).most_common(1)
    return [row for row in rows if heads_of(row) == common[0][0]]


def prompt_panels(results: dict) -> dict[int | None, list[dict]]:
    """Window (None: causal) -> the rows of one whole prompt; for the heads that most rows have."""
    rows = [row for row in results["rows"] if row["op"] == "sliding_window_attention" and OURS in files.timed(row) and length_of(row)]
    windows: dict[int | None, list[dict]] = {}
    for row in most_common_heads(rows):
        windows.setdefault(row["sizes"]["window"], []).append(row)
    return {window: rows for window, rows in windows.items() if len({length_of(row) for row in rows}) > 1}


def draw_attention(results: dict, pyplot):
    windows = prompt_panels(results)
    figure, axes = panels(pyplot, len(windows), 4.6, sharey=True)
    figure.set_size_inches(max(7, WIDTH * len(windows)), 4.6)
    look = styles([row for rows in windows.values() for row in rows])
    scale, unit = time_unit(results)
    for panel, (window, rows) in zip(axes, sorted(windows.items(), key=lambda item: item[0] is None)):
        draw_lines(panel, rows, length_of, lambda c: c["us"] * scale, look)
        guide(panel, rows, window, scale)
        heads, key_heads, head_dim, dtype = heads_of(rows[0])
        growth = f"window {window}: O(n W)" if window else "causal: O(n^2)"
        panel.set(xscale="log", yscale="log", xlabel="tokens", title=f"{growth}, {heads}/{key_heads} heads of {head_dim}, {dtype}")
        ticks(panel, [length_of(row) for row in rows])
        plain_numbers(panel.yaxis)
        panel.yaxis.set_tick_params(labelleft=True)
        panel.legend()
    axes[0].set_ylabel(unit)
    return figure


def guide(axes, rows: list[dict], window: int | None, scale: float) -> None:
    """Slope of O(n W), from the window on, or of O(n^2), under our last point."""
    lengths = sorted({length_of(row) for row in rows})
    last = next(row for row in rows if length_of(row) == lengths[-1])
    if window:
        power, first = 1, window if lengths[0] < window < lengths[-1] else lengths[0]
    else:
        power, first = 2, max(lengths[0], lengths[-1] // 16)
    end = last["candidates"][OURS]["us"] * scale / 2.5
    axes.plot([first, lengths[-1]], [end * (first / lengths[-1]) ** power, end], color="gray", linestyle="-.", linewidth=1,
              label="slope n^2" if power == 2 else "slope n")


# -------------------------------------------------------------------------------------------------------------- decode


def decode_panels(results: dict) -> dict[tuple, list[dict]]:
    """(capacity, window) -> the rows of a step of one token a sequence, for the heads that most rows have."""
    rows = [row for row in results["rows"]
            if row["op"] == "rolling_attention" and OURS in files.timed(row) and set(row["sizes"]["chunks"]) == {1}]
    caches: dict[tuple, list[dict]] = {}
    for row in most_common_heads(rows):
        caches.setdefault((row["sizes"]["capacity"], row["sizes"]["window"]), []).append(row)
    return {cache: rows for cache, rows in caches.items() if len({len(row["sizes"]["chunks"]) for row in rows}) > 1}


def draw_decode(results: dict, pyplot):
    caches = decode_panels(results)
    figure, axes = panels(pyplot, len(caches), 4.6, sharey=True)
    figure.set_size_inches(max(7, WIDTH * len(caches)), 4.6)
    limits, look = results["limits"], styles([row for rows in caches.values() for row in rows])
    slow = (files.bandwidth(limits) or 1) < 0.1  # a CPU: GB/s
    scale, unit = (1e3, "GB/s") if slow else (1, "TB/s")
    for panel, ((capacity, window), rows) in zip(axes, sorted(caches.items(), key=lambda item: item[0][0])):
        draw_lines(panel, rows, lambda row: len(row["sizes"]["chunks"]), lambda c: c["tb_s"] * scale, look)
        for key, color in (("copy_tb_s", "black"), ("read_tb_s", "gray")):
            if limits.get(key):
                panel.axhline(limits[key] * scale, color=color, linestyle="--", linewidth=1, label=f"measured {key[:4]}")
        panel.set(xscale="log", xlabel="sequences", title=f"{capacity} slots, {f'window {window}' if window else 'no window'}")
        panel.set_ylim(bottom=0)
        ticks(panel, [len(row["sizes"]["chunks"]) for row in rows])
        panel.yaxis.set_tick_params(labelleft=True)
        panel.legend()
    axes[0].set_ylabel(f"{unit} of keys and values")
    return figure
