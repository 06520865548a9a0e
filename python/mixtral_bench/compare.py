"""Two result files, row by row."""

from pathlib import Path

from mixtral_bench import files
from mixtral_bench.report import bandwidth, digits, label, time

FAR = 0.05  # limits that differ by more make the machines different


def compare(a, b) -> str:
    """Markdown: what ran in both of two files of the same kind, the largest change first."""
    first, second = files.load(a), files.load(b)
    if first["kind"] != second["kind"]:
        raise ValueError(f"{a} holds {first['kind']!r} results and {b} {second['kind']!r}: only files of one kind are compared")
    lines = [f"- {letter}: `{Path(path).name}`: {r['machine']['name']}, commit {r['machine']['commit']}, {r['machine']['date']}"
             for letter, path, r in (("A", a, first), ("B", b, second))]
    if differences := unlike(first, second):
        lines += ["", f"**Not the same conditions**: {'; '.join(differences)}."]
    rows, other = by_key(first), by_key(second)
    both = [key for key in rows if key in other]
    changes = []
    for key in both:
        for name, candidate in rows[key]["timed"].items():
            if name in other[key]["timed"]:
                after = other[key]["timed"][name]
                cells = [*rows[key]["cells"], name, time(candidate["us"]), time(after["us"])]
                changes.append((after["us"] / candidate["us"], cells, overlap(candidate, after)))
    changes.sort(key=lambda change: (-max(change[0], 1 / change[0]), change[1]))
    lines += ["", "| op | case | dtype | who | A | B | B/A | |", "|---|---|---|---|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} | {ratio:.3f} | {'~' if same else ''} |" for ratio, cells, same in changes]
    lines += ["", "~: the ranges of the runs overlap. B/A below 1: B is faster."]
    if not changes:
        lines += ["", "Nothing was timed in both."]
    for letter, mine, theirs in (("A", rows, other), ("B", other, rows)):
        if alone := [", ".join(mine[key]["cells"]) for key in mine if key not in theirs]:
            lines += ["", f"Only in {letter}:", "", *(f"- {name}" for name in alone)]
    for key in both:
        for letter, mine, theirs in (("A", rows, other), ("B", other, rows)):
            if names := [name for name in mine[key]["timed"] if name not in theirs[key]["timed"]]:
                lines.append(f"- timed only in {letter}: {', '.join(mine[key]['cells'])}: {', '.join(names)}")
    return "\n".join(lines)


def by_key(results: dict) -> dict[tuple, dict]:
    """(op, case, dtype), or of a model (what, batch, tokens) -> what is shown of the row, and its candidates that ran."""
    if results["kind"] == "ops":
        return {(row["op"], row["case"], row["dtype"]): {"cells": [row["op"], label(row), row["dtype"]], "timed": files.timed(row)}
                for row in results["rows"]}
    model = results["model"]
    found = {}
    for row in results["rows"]:
        sizes = f"B={row['batch']}, {row.get('tokens', '-')} tokens, context {row.get('context', '-')}"
        cells = [f"{model['name']} {row['what']}", sizes, model["dtype"]]
        candidates = {"mixtral_model": row["ours"], **row.get("peers", {})}
        found[tuple(cells)] = {"cells": cells, "timed": {name: step for name, c in candidates.items() if (step := a_step(c))}}
    return found


def a_step(candidate: dict) -> dict | None:
    """A model's candidate as one of an op: where only tokens/s are known, the time of a token."""
    if "us_a_step" in candidate:
        return candidate | {"us": candidate["us_a_step"]}
    return {"us": 1e6 / candidate["tokens_s"]} if candidate.get("tokens_s") else None


def overlap(a: dict, b: dict) -> bool:
    """Whether the runs of both lie in ranges that meet; unknown ranges do not."""
    if "us_range" not in a or "us_range" not in b:
        return False
    return a["us_range"][0] <= b["us_range"][1] and b["us_range"][0] <= a["us_range"][1]


def unlike(a: dict, b: dict) -> list[str]:
    """What makes the two runs hard to compare."""
    one, two = a["machine"], b["machine"]
    found = [f"{key} {one.get(key)} and {two.get(key)}" for key in ("name", "threads") if one.get(key) != two.get(key)]
    if (dtypes := [dtypes_of(r) for r in (a, b)])[0] != dtypes[1]:
        found.append(f"dtype: {dtypes[0]} and {dtypes[1]}")
    for key in ("copy_tb_s", "read_tb_s", "bf16_tflop_s", "f32_tflop_s"):
        x, y = a["limits"].get(key), b["limits"].get(key)
        if x and y and abs(y / x - 1) > FAR:
            shown = [bandwidth(v) if key.endswith("tb_s") else f"{digits(v)} TFLOP/s" for v in (x, y)]
            found.append(f"{key.split('_')[0]} limit: {shown[0]} and {shown[1]}")
    versions = [r["machine"]["versions"] | r.get("peers", {}) for r in (a, b)]
    found += [f"{name} {versions[0][name]} and {versions[1][name]}" for name in sorted(set(versions[0]) & set(versions[1]))
              if name != "mixtral_ext" and versions[0][name] != versions[1][name]]
    if a.get("quick") != b.get("quick"):
        found.append("one is a quick run")
    return found


def dtypes_of(results: dict) -> str:
    return ", ".join(sorted({row["dtype"] for row in results["rows"]} if results["kind"] == "ops" else {results["model"]["dtype"]}))
