"""Results as Markdown: the tables of one file, the whole of BENCHMARKS.md, and the two parts of README.md that quote it. All numbers come
from the JSON files; nothing here is measured, and the same files give the same text."""

import json
import re
from pathlib import Path

from mixtral_bench import files, plots, targets
from mixtral_bench.files import OURS, SORTING

CONDITIONS = {  # what our time holds, and the peers' does not
    "rolling_attention": "ours rotates query and key, reads the ring and stores the new tokens; the peers find rotated queries, and keys in order, the new "
                         "ones among them",
    "apply_rope": "ours computes sines and cosines; the peers find them made",
    "sliding_window_attention": "masks of peers are made before",
}
LONG = 14  # rows; longer tables are folded
TITLES = {
    "moe_experts": "Expert layer", "sliding_window_attention": "Attention of prompts",
    "rolling_attention": "Attention of new tokens over their cache",
    "moe_gate": "Gate", "moe_sort": "Sort", "grouped_gemm_swiglu": "Gate and up projections with SwiGLU", "grouped_gemm": "Down projection",
    "moe_permute": "Gather", "moe_combine": "Combine", "apply_rope": "Rotary embedding",
}
NOTE = ("Medians; ± is half the distance of the quartiles, where they were kept, else of the extremes. Bytes and FLOPs are counted by "
        "formula: what the result needs, each byte moved once, only the visible pairs of a query and a key. The limit is the larger of bytes over "
        "the measured bandwidth and FLOPs over the measured matrix product. x is a peer's time over ours: more than 1x is slower than ours.")
ROUTINGS = {"balanced": "as many rows for each expert", "two": "all tokens on two experts", "one": "all tokens on one expert"}


# ------------------------------------------------------------------------------------------------------------- numbers


def digits(value: float, count: int = 3) -> str:
    """So many significant digits, more before the point, no exponent."""
    if value < 1e-3:
        return "< 0.001" if value else "0"
    return f"{value:.0f}" if value >= 10 ** (count - 1) else f"{value:#.{count}g}".rstrip(".")


def time(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{digits(us / size)} {unit}"
    return f"{digits(us)} us"


def amount(number: float) -> str:
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{digits(number / size)} {prefix}B"
    return f"{number:.0f} B"


def bandwidth(tb_s: float) -> str:
    return f"{digits(tb_s)} TB/s" if tb_s >= 0.1 else f"{digits(tb_s * 1e3)} GB/s"


def percent(share: float) -> str:
    return "< 1 %" if 0 < share < 0.01 else f"{share:.0%}".replace("%", " %")


def spread(candidate: dict, us: str = "us") -> str:
    if candidate.get("runs") == 1:
        return "1 run"
    low, high = candidate.get("us_quartiles") or candidate.get("us_range") or (None, None)
    return f"±{(high - low) / 2 / candidate[us] * 100:.1f} %" if high is not None else ""


# ------------------------------------------------------------------------------------------------------- tables of a file


def table(results: dict) -> str:
    """The whole report of one file."""
    return "\n".join([*header(results), "", *(body(results, folded=False))])


def header(results: dict) -> list[str]:
    machine, state = results["machine"], results.get("state", {})
    device = f"{machine['name']}" + (f" (beside {machine.get('cpu', 'an unknown CPU')})" if machine["device"] == "cuda" else "")
    sizes = [f"{machine[key]} {unit}" for key, unit in (("threads", "threads"), ("memory_gib", "GiB")) if machine.get(key)]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["- " + ", ".join(part for part in (device, machine.get("isa"), *sizes) if part),
             f"- {machine['date']}, commit {machine['commit']}; {versions}",
             f"- command: `{results.get('command', 'not recorded')}`" + ("; reduced sizes: **not for quoting**" if results.get("quick") else "")]
    if "note" in results:
        lines.append(f"- {results['note']}")
    if "converted" in results:
        lines.append(f"- converted {results['converted']}; the command is that of its commit")
    lines += [f"- {when}: {shown}" for when in ("before", "during", "after") if (shown := shown_state(state.get(when, {})))]
    if not any(state.get(when) for when in ("before", "during", "after")):
        lines.append("- clocks and power: not known")
    lines.append(f"- measured limits: {shown_limits(results['limits'])}" + (f" ({results['limits_from']})" if "limits_from" in results else ""))
    if results.get("peers"):
        lines.append("- peers: " + ", ".join(f"{name} {version}" for name, version in results["peers"].items()))
    return lines


def shown_state(values: dict) -> str:
    def one(value):
        if isinstance(value, dict):
            return f"{value['median']:g} ({value['min']:g} to {value['max']:g})"
        return f"{value:g}" if isinstance(value, float) else value

    return ", ".join(f"{name} {one(value)}" for name, value in values.items())


def shown_limits(*limits: dict) -> str:
    """Of one run, or the range of several."""
    def one(name, key, show):
        values = [rates[key] for rates in limits if rates.get(key)]
        ends = dict.fromkeys(map(show, (min(values), max(values)))) if values else ()
        return [f"{name} {' to '.join(ends)}"] if values else []

    rates = [text for name, key in (("copy", "copy_tb_s"), ("read", "read_tb_s")) for text in one(name, key, bandwidth)]
    rates += [text for dtype in ("bf16", "f32") for text in one(f"{dtype} product", f"{dtype}_tflop_s", lambda rate: f"{digits(rate)} TFLOP/s")]
    return ", ".join(rates) or "none"


def body(results: dict, folded: bool) -> list[str]:
    """The tables, op by op; `folded`: long ones open at a click on GitHub."""
    if results["kind"] == "model":
        return model_tables(results)
    lines = [NOTE]
    ops = list(dict.fromkeys(row["op"] for row in results["rows"]))
    for op in sorted(ops, key=lambda op: list(TITLES).index(op) if op in TITLES else len(TITLES)):
        rows = [row for row in results["rows"] if row["op"] == op]
        dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
        made = [f"**{TITLES.get(op, op)}** (`{op}`, {dtypes})", "", *op_table(rows)]
        if folded and len(rows) > LONG:
            made = ["<details>", f"<summary>{TITLES.get(op, op)} ({op}, {dtypes}): {len(rows)} rows</summary>", "", *made[2:], "", "</details>"]
        lines += ["", *made]
    return lines


def op_table(rows: list[dict]) -> list[str]:
    """One line a row, one column for each peer that ran; who did not run, and why, is listed below."""
    ran = {name: c for row in rows for name, c in files.timed(row).items() if name not in (OURS, SORTING)}
    peers = sorted(ran, key=lambda name: bool(ran[name].get("yardstick")))
    several = len({row["dtype"] for row in rows}) > 1
    sorting = any(SORTING in files.timed(row) for row in rows)
    heads = ["case", *(["dtype"] if several else []), "ours", "±", "bytes", "bandwidth", "TFLOP/s", "of the limit",
             *(["with sort"] if sorting else []), *peers]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        found, ratios = files.timed(row), files.peer_ratios(row)
        cells = [label(row), *([row["dtype"]] if several else [])]
        if ours := found.get(OURS):
            cells += [time(ours["us"]) + mark(ours, row), spread(ours), amount(row["bytes"]), bandwidth(ours["tb_s"]),
                      digits(ours["tflop_s"]) if row["flops"] else "-",
                      "in cache" if row.get("cached") else f"{percent(ours['share'])} {row['bound']}" if "share" in ours else "-"]
        else:
            cells += ["-", "", amount(row["bytes"]), "-", "-", "-"]
        if sorting:
            cells.append(time(found[SORTING]["us"]) if SORTING in found else "-")
        for name in peers:
            ratio = f" ({ratios[name]:.2f}x)" if name in ratios else ""
            cells.append(time(found[name]["us"]) + mark(found[name], row) + ratio if name in found else "-")
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {CONDITIONS[rows[0]['op']]}"] if rows[0]["op"] in CONDITIONS else []
    if any(row.get("cached") for row in rows):
        notes.append("- in cache: the copies of these inputs are together smaller than the caches")
    if any(c.get("yardstick") for c in ran.values()):
        notes.append("- same FLOPs: torch's dense products of all rows with the weights of one expert, a yardstick")
    if routings := [f"{name}: {what}" for name, what in ROUTINGS.items() if any(row["case"].endswith(f" {name}") for row in rows)]:
        notes.append(f"- routing: random where nothing is said; {'; '.join(routings)}")
    if "Liger" in ran and rows[0]["op"] == "moe_experts":
        notes.append("- Liger: its kernels were tuned on 4096 tokens, once, as in the training that it is made for")
    if sorting and peers:
        notes.append("- x: over ours with the sort, as these peers sort too")
    if any(mark(c, row) for row in rows for c in files.timed(row).values()):
        notes.append("- \\*: launches one by one (it waits for the device or cannot be captured); the others are replays of CUDA graphs")
    if any(name.endswith("no window") for name in peers):
        notes.append("- \"no window\": that peer computes the whole causal triangle, which is more than the row needs")
    notes += not_run(rows)
    return [*lines, *([""] if notes else []), *notes]


def label(row: dict) -> str:
    """The case, and what its name leaves out."""
    sizes = row["sizes"]
    return row["case"] + "".join(f", {letter}={sizes[key]}" for letter, key in (("C", "capacity"), ("W", "window")) if sizes.get(key))


def mark(candidate: dict, row: dict) -> str:
    """A star where this one was not replayed from a graph, though another candidate of the row was."""
    mixed = any(c.get("method") == "graph" for c in files.timed(row).values())
    return "\\*" if mixed and candidate.get("method") == "events" else ""


def not_run(rows: list[dict]) -> list[str]:
    """Who has no time, why, and in how many rows."""
    found: dict[tuple, list[str]] = {}
    for row in rows:
        for name, candidate in row["candidates"].items():
            for kind in ("absent", "failed", "skipped"):
                if kind in candidate:
                    found.setdefault((name, kind, short(candidate[kind])), []).append(row["case"])
    return [f"- {name}: {kind}: {reason} ({counted(where)}{'' if len(where) == len(rows) else ': ' + listed(where)})"
            for (name, kind, reason), where in found.items()]


def counted(rows: list) -> str:
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''}"


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def short(reason: str) -> str:
    """One line, so cut that what differs from row to row (the sizes of tensors, an error's digits) does not make reasons of their own."""
    reason = re.sub(r"\s+", " ", re.sub(r"\[[\d, ]+\]", "[...]", reason)).replace("|", "/")
    head, wrong, _ = reason.partition("relative error")
    reason = head + "relative error too large" if wrong else reason
    return reason if len(reason) <= 240 else reason[:240].rsplit(" ", 1)[0] + " ..."


# --------------------------------------------------------------------------------------------------------- model files


def model_tables(results: dict) -> list[str]:
    model, rows = results["model"], results["rows"]
    layers = f"{model['layers']} of {model['of_layers']}" if model["layers"] != model["of_layers"] else str(model["layers"])
    weights = "random weights" if model.get("random") else "a checkpoint's weights"
    lines = [f"{model['name']}: {layers} layers, {digits(model['parameters'] / 1e9)} B parameters, {model['dtype']}, {weights}.", ""]
    peers = list(dict.fromkeys(name for row in rows for name, peer in row.get("peers", {}).items() if "tokens_s" in peer))
    heads = ["", "B", "prompt", "context", "tokens/s", "a step", "±", "bytes", "of the limit", "its ops alone", *peers]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    failures: dict[tuple, list] = {}
    for row in rows:
        ours = row["ours"]
        everyone = {"mixtral_model": ours, **row.get("peers", {})}
        for name, kind in ((n, k) for n, c in everyone.items() for k in ("absent", "failed", "skipped") if k in c):
            failures.setdefault((name, f"{kind}: {short(everyone[name][kind])}"), []).append(row)
        cells = [row["what"], str(row["batch"]), str(row.get("tokens", "-")), str(row.get("context", "-")),
                 digits(ours["tokens_s"]) if "tokens_s" in ours else "-",
                 *([time(ours["us_a_step"]), spread(ours, us="us_a_step")] if "us_a_step" in ours else ["-", ""]),
                 amount(row["bytes"]) if row.get("bytes") else "-", *(percent(row[key]) if row.get(key) else "-" for key in ("share", "ops_share"))]
        for name in peers:
            theirs = everyone.get(name, {}).get("tokens_s")
            ratio = f" ({ours['tokens_s'] / theirs:.2f}x)" if theirs and "tokens_s" in ours else ""
            cells.append(digits(theirs) + ratio if theirs else "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "- peers: tokens/s; x: ours over theirs, more than 1x is faster"]
    lines += [f"- {name}: {why} ({counted(where)})" for (name, why), where in failures.items()]
    checks = [f"{row['what']} B={row['batch']} {check['error']:.2g} of {check['allowed']:.2g} ({check['against']})" for row in rows if (check := row.get("check"))]
    if checks:
        lines.append(f"- error of our logits, of what is allowed: {'; '.join(checks)}")
    if memory := results.get("memory"):
        parts = [f"weights: {', '.join(f'{part} {amount(size)}' for part, size in memory['weights'].items())}"] if memory.get("weights") else []
        parts += [f"{name} {amount(size)}" for name, size in memory.items() if name != "weights" and size is not None]
        lines.append(f"- memory: {'; '.join(parts)}")
    if (launches := results.get("launches")) and launches.get("per_step") is not None:  # on a CPU there are none
        per_layer = launches.get("per_layer")
        lines.append(f"- launches a decode step: {launches.get('per_step', '-')}, a layer: {'-' if per_layer is None else f'{per_layer:g}'}")
        if launches.get("by_name"):
            us = launches.get("us", {})
            lines += ["", "| kernel | launches a step | us each |", "|---|---|---|"]
            lines += [f"| `{name}` | {count} | {digits(us[name]) if name in us else '-'} |" for name, count in launches["by_name"].items()]
    return lines


# ------------------------------------------------------------------------------------------------------------- targets


def figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return {"TB/s": bandwidth, "us": time, "%": percent}.get(unit, lambda v: f"{v:.2f}x" if unit == "x" else f"{digits(v)} {unit}")(value)


def wanted(target: targets.Target) -> str:
    if target.wanted is None:
        return "-"
    text = f"{target.wanted:g}x" if target.unit == "x" else f"{target.wanted:g} {target.unit}"
    if target.unit == "%":
        text = percent(target.wanted)
    elif target.unit == "TB/s" and target.wanted < 0.1:
        text = f"{target.wanted * 1e3:g} GB/s"
    return f"{'>=' if target.more_is_better else '<'} {text}"


def target_table(outcomes: list[targets.Outcome]) -> list[str]:
    lines = ["| what | wanted | measured | of the limit | | where |", "|---|---|---|---|---|---|"]
    for o in outcomes:
        where = f"{o.machine}{', ' + o.case if o.case else ''} ({o.source})" if o.source else ""
        share = percent(o.share) if o.share is not None else "-"
        lines.append(f"| {o.target.what} | {wanted(o.target)} | {figure(o.value, o.target.unit)} | {share} | {o.verdict} | {where} |")
    return lines


def open_commands(outcomes: list[targets.Outcome]) -> list[str]:
    return [f"- {o.target.what} ({o.target.device}): `{o.target.command}`" + (f", with {o.target.needs} installed" if o.target.needs else "")
            for o in outcomes if o.value is None]


# ------------------------------------------------------------------------------------------------------- BENCHMARKS.md

HEAD = """# Benchmarks

Written by `python -m mixtral_bench report` from the JSON files in [`python/mixtral_bench/results`](python/mixtral_bench/results): do not edit.
Whoever wants a number checked finds its machine, commit, date and command here, and the runs behind it in the file.

## How to reproduce

```sh
python -m mixtral_bench list                                   # ops, cases, peers, and which of them can run here
python -m mixtral_bench run --device cpu --json                # or cuda; --op, --shapes, --cases, --peers for less
python -m mixtral_model bench --random-weights mistral-7b      # the whole model; --device cuda
python -m mixtral_bench report FILE.json                       # tables and plots beside a file; without one: this page and README's parts
python -m mixtral_bench compare A.json B.json                  # two runs, row by row
```

Each candidate is checked before it is timed. Inputs are random normal numbers; successive calls go through copies of them that are together larger
than the caches; where inputs are too small for that (64 copies at most) the row says "in cache" and has no share of the limit. A peer that is not installed is listed as absent."""


def benchmarks(results_dir=files.RESULTS) -> str:
    """The whole of BENCHMARKS.md."""
    folder = Path(results_dir)
    found = files.load_all(folder)
    outcomes = targets.evaluate_all(found)
    lines = [HEAD, "", "## Targets", "",
             "Among the rows of the newest file that has any, the worst one is shown. Of the limit: of what this machine was measured to reach, by "
             "copying, reading or a matrix product; beyond 100 %: the machine can do more than was measured."]
    for device, title in (("cpu", "On a CPU"), ("cuda", "On an NVIDIA GPU")):
        lines += ["", f"### {title}", "", *target_table([o for o in outcomes if o.target.device == device])]
    lines += ["", "Host synchronisations and allocations inside the C API, wanted 0: `tests/test_layering.py` finds none in the sources, "
              "`tests/test_cuda_graph.py` captures the ops in CUDA graphs.",
              "", "### The widest gaps", ""]
    for device in ("cpu", "cuda"):
        for gap in targets.gaps(found, device):
            profile = f"[{note_title(folder / gap.note)}]({link(gap.note)})" if gap.note else "no profile yet"
            lines.append(f"- {gap.machine}: `{gap.op}`, {gap.case}: {percent(gap.share)} of its limit ({gap.bound}); {profile}")
    lines += ["", "### Not yet measured", "", *open_commands(outcomes), *open_rows(found), *open_peers(found)]
    for kind, title in (("ops", ""), ("model", "The model: ")):
        for stem, results in reversed(found.items()):
            if results["kind"] == kind:
                lines += ["", f"## {title}{results['machine']['name']}, {results['machine']['date'][:10]}", "",
                          f"[`{stem}.json`]({link(stem + '.json')})", "", *header(results), ""]
                lines += [f"![{alt}]({link(f'plots/{stem}-{name}.svg')})\n" for name, alt in plots.names(results).items()]
                lines += body(results, folded=True)
    lines += ["", "## Notes", "", *(f"- [{note_title(path)}]({link(path.name)})" for path in notes(folder))]
    lines += ["", "## Verified on", "", *verified(folder)]
    return "\n".join(lines) + "\n"


def open_rows(found: dict[str, dict]) -> list[str]:
    """Cases of the list without a time of ours: on a GPU, and on a CPU, op by op."""
    from mixtral_bench.cases import CASES

    lines = []
    for device in ("cpu", "cuda"):
        done = {(row["op"], row["case"]) for r in measured(found, device) for row in r["rows"] if OURS in files.timed(row)}
        for op, cases in CASES.items():
            missing = [case.name for case in cases if case.large and (op, case.name) not in done]
            if missing:
                only = "" if len(missing) == sum(case.large for case in cases) else f" --cases '^({expression(missing)})$'"
                lines.append(f"- `{op}`, {len(missing)} case{'s' if len(missing) > 1 else ''} ({device}): `python -m mixtral_bench run --device {device} --op {op}{only} --json`")
    return lines


def expression(names: list[str]) -> str:
    """A regular expression for these names, each of which is a model and a size."""
    by_model: dict[str, list[str]] = {}
    for name in names:
        model, _, rest = name.partition(" ")
        by_model.setdefault(model, []).append(rest)
    return "|".join(f"{model} ({'|'.join(rests)})" for model, rests in by_model.items())


def open_peers(found: dict[str, dict]) -> list[str]:
    """Ops that no machine of the kind timed beside a peer that is a package of its own."""
    from mixtral_bench.attention_peers import PEERS as ATTENTION
    from mixtral_bench.moe_peers import PEERS as MOE

    lines = []
    for device in ("cpu", "cuda"):
        done = {(row["op"], name) for r in measured(found, device) for row in r["rows"] for name in files.timed(row)}
        missing: dict[str, list] = {}
        for op, peers in (MOE | ATTENTION).items():
            for peer in peers:
                if device in peer.devices and peer.package and (op, peer.name) not in done:
                    missing.setdefault(peer.package, []).append(op)
        lines += [f"- beside {package} ({device}), with it installed: `python -m mixtral_bench run --device {device} --op {' '.join(dict.fromkeys(ops))} --json`"
                  for package, ops in missing.items()]
    return lines


def measured(found: dict[str, dict], device: str) -> list[dict]:
    return [r for r in found.values() if r["kind"] == "ops" and r["machine"]["device"] == device and not r.get("quick")]


def notes(folder: Path) -> list[Path]:
    """Written by hand: the tables of a file stand beside its JSON."""
    return [path for path in sorted(folder.glob("*.md")) if not path.with_suffix(".json").exists()]


def link(name: str) -> str:
    return f"python/mixtral_bench/results/{name}"


def note_title(path: Path) -> str:
    return next(line.lstrip("# ").strip() for line in path.read_text().splitlines() if line.startswith("#"))


def verified(folder: Path) -> list[str]:
    """What ran where, from verified.json."""
    records = json.loads((folder / "verified.json").read_text())
    lines = ["| what | ops | path | on | commit | date |", "|---|---|---|---|---|---|"]
    for r in records:
        ops = ", ".join(op if op in ("all", "-") else f"`{op}`" for op in r["ops"])
        lines.append(f"| {r['what']} | {ops} | {r['path']} | {r['device']}, {r['software']} | {r['commit']} | {r['date']} |")
    return lines


# --------------------------------------------------------------------------------------------------- parts of README.md

QUOTED = {  # op -> the cases that the README quotes
    "moe_experts": [f"mixtral-8x7b T={t}" for t in (1, 8, 64, 512, 4096)],
    "sliding_window_attention": ["mixtral-8x7b T=4096", "mistral-7b T=16384", "mistral-7b T=32768", "mistral-7b T=65536"],
    "rolling_attention": ["mistral-7b B=1", "mistral-7b B=16", "mistral-7b B=64", "mixtral-8x7b B=32"],
}


def quotes(found: dict[str, dict]) -> list[str]:
    """README's table: for each machine the most quoted rows of its newest file, and the models that ran there."""
    lines = []
    for name in dict.fromkeys(results["machine"]["name"] for results in reversed(found.values())):
        here = {stem: r for stem, r in found.items() if r["machine"]["name"] == name and not r.get("quick")}
        rows = {}  # op, case -> row and its file; a newer file overwrites
        for stem, results in here.items():
            if results["kind"] == "ops":
                rows |= {(row["op"], row["case"]): (row, stem) for row in results["rows"]
                         if OURS in files.timed(row) and row["case"] in QUOTED.get(row["op"], ()) and row["dtype"] == "bf16"}
        models = {(r["model"]["name"], row["what"], row["batch"], passage(row)): (row, stem) for stem, r in here.items() if r["kind"] == "model"
                  if (r["model"]["layers"], r["model"]["dtype"]) == (r["model"]["of_layers"], "bf16") for row in r["rows"] if "tokens_s" in row["ours"]}
        if not rows and not models:
            continue
        sources = dict.fromkeys(stem for _, stem in [*rows.values(), *models.values()])
        lines += ["", f"**{name}**; {said_of([here[stem] for stem in sources])}.", "",
                  "| op | case | ours | reached | of the limit | peers: time over ours |", "|---|---|---|---|---|---|"]
        for op, cases in QUOTED.items():
            lines += [quote(rows[op, case][0]) for case in cases if (op, case) in rows]
        lines += [quote_model(model, row) for (model, *_), (row, _) in models.items()]
    return [*lines[1:], "", "Peers of the expert layer sort themselves and are compared with our call that does so too; more than 1x is slower than "
            "ours. \"no window\": that peer computes the whole causal triangle. Beyond 100 % of the limit: the row only reads, which is faster "
            "than the copy that was measured."]


def said_of(runs: list[dict]) -> str:
    """Date, commits and software of some runs of one machine, the limits that they measured, clocks."""
    commits: dict[tuple, dict] = {}
    for run in runs:
        versions = run["machine"]["versions"] | run.get("peers", {})
        software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name, "absent") != "absent")
        commits.setdefault((run["machine"]["date"][:10], software), {})[run["machine"]["commit"]] = None
    said = [f"{date}, commit{'s' if len(of_runs) > 1 else ''} {', '.join(of_runs)}, {software}" for (date, software), of_runs in commits.items()]
    clocks = [clock["median"] for run in runs if isinstance(clock := run.get("state", {}).get("during", {}).get("clocks.sm"), dict)]
    ends = " to ".join(dict.fromkeys(f"{end:g}" for end in (min(clocks), max(clocks)))) if clocks else ""
    return "; ".join([*said, shown_limits(*(run["limits"] for run in runs)), *([f"{ends} MHz"] if ends else [])])


def quote(row: dict) -> str:
    ours = row["candidates"][OURS]
    reached = bandwidth(ours["tb_s"]) if row.get("bound") == "memory" or row["op"] == "rolling_attention" else f"{digits(ours['tflop_s'])} TFLOP/s"
    ratios = files.peer_ratios(row)
    fastest = [f"{name} {ratio:.2f}x" for name, ratio in list(ratios.items())[:4]]
    peers = ", ".join([*fastest, *([f"{len(ratios) - 4} slower"] if len(ratios) > 4 else [])])
    return f"| `{row['op']}` | {label(row)} | {time(ours['us'])} | {reached} | {percent(ours['share']) if 'share' in ours else '-'} | {peers or '-'} |"


def passage(row: dict) -> str:
    """What a model reads, or has read when it begins to write."""
    return f"{row.get('tokens', '-')} tokens" if row["what"] == "prefill" else f"{row.get('context', '-')} in the cache"


def quote_model(model: str, row: dict) -> str:
    step = time(row["ours"]["us_a_step"]) if "us_a_step" in row["ours"] else "-"
    rate = row["ours"]["tokens_s"]
    peers = ", ".join(f"{name} {rate / peer['tokens_s']:.2f}x" for name, peer in row.get("peers", {}).items() if "tokens_s" in peer)
    share = percent(row["share"]) if row.get("share") else "-"
    return f"| model | {model} {row['what']}, B={row['batch']}, {passage(row)} | {step} | {digits(rate)} tokens/s | {share} | {peers or '-'} |"


def readme(text: str, results_dir=files.RESULTS) -> str:
    """README.md with its two parts written anew."""
    folder = Path(results_dir)
    found = files.load_all(folder)
    by_size = sorted(found.items(), key=lambda item: (item[1]["machine"]["date"][:10], len(item[1]["rows"])))
    newest = {name: (stem, alt) for device in ("cpu", "cuda") for stem, r in by_size
              if r["machine"]["device"] == device and not r.get("quick")
              for name, alt in plots.names(r).items()}  # of each plot that of the newest day's largest file, a GPU's where there is one
    shown = [f"![{alt}, {found[stem]['machine']['name']}]({link(f'plots/{stem}-{name}.svg')})" for name, (stem, alt) in newest.items()]
    for name, lines in (("benchmarks", [*quotes(found), "", *shown]), ("verified", verified(folder))):
        parts = re.split(rf"(<!-- /?{name} -->)", text)
        if len(parts) != 5:
            raise ValueError(f"README.md: expected one <!-- {name} --> and one <!-- /{name} -->")
        text = "".join([*parts[:2], "\n" + "\n".join(lines) + "\n", *parts[3:]])
    return text


# -------------------------------------------------------------------------------------------------------------- writing


def write(paths) -> list[Path]:
    """For each FILE.json FILE.md and FILE-*.svg beside it -> what was written."""
    written = []
    for path in map(Path, paths):
        results = files.load(path)
        path.with_suffix(".md").write_text(table(results) + "\n")
        written += [path.with_suffix(".md"), *plots.write(results, path.with_suffix(""))]
    return written


def write_all(root=None) -> list[Path]:
    """BENCHMARKS.md, README.md's parts and the plots of the committed results -> what was written."""
    root = Path(root) if root else Path(__file__).parents[2]
    folder = root / "python/mixtral_bench/results"
    if not (root / "README.md").is_file() or not folder.is_dir():
        raise FileNotFoundError(f"{root} is not a checkout of the repository (it has no README.md or no python/mixtral_bench/results): "
                                "this writes BENCHMARKS.md there; give FILE.json to report single files")
    (folder / "plots").mkdir(exist_ok=True)
    written = [svg for stem, results in files.load_all(folder).items() for svg in plots.write(results, folder / "plots" / stem)]
    for old in set((folder / "plots").glob("*.svg")) - set(written):
        old.unlink()
    for path, text in ((root / "BENCHMARKS.md", benchmarks(folder)), (root / "README.md", readme((root / "README.md").read_text(), folder))):
        path.write_text(text)
        written.append(path)
    return written
