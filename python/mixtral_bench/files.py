"""Result files (the schema is that of what `run` and `python -m mixtral_model bench` write): reading them, and what report, plots and targets
ask of a row."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
OURS, SORTING = "mixtral_ext", "mixtral_ext + sort"  # the second: moe_experts, which makes its own maps as its peers do
NEEDED = {"ops": ("op", "case", "dtype", "sizes", "bytes", "flops", "candidates"), "model": ("what", "batch", "ours")}


def load(path) -> dict:
    """One file; ValueError where it is not a result of the bench."""
    path = Path(path)
    try:
        results = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    kind = results.get("kind") if isinstance(results, dict) else None
    if kind not in NEEDED:
        raise ValueError(f"{path}: not a result of mixtral_bench or mixtral_model bench: \"kind\" is {kind!r}, "
                         f"expected one of {', '.join(NEEDED)}")
    missing = [key for key in ("machine", "limits", "rows") if key not in results]
    missing += [f"machine.{key}" for key in ("device", "name", "date", "commit", "versions") if key not in results.get("machine", {})]
    missing += [f"rows[{i}].{key}" for i, row in enumerate(results.get("rows", [])) for key in NEEDED[kind] if key not in row]
    if missing:
        raise ValueError(f"{path}: not a result of this bench: {', '.join(missing[:5])} missing")
    return results


def load_all(folder=RESULTS) -> dict[str, dict]:
    """Name without suffix -> results, oldest first. Other JSON (without "kind") may stand beside them."""
    found = {}
    for path in Path(folder).glob("*.json"):
        try:
            of_bench = "kind" in json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if of_bench:
            found[path.stem] = load(path)
    return dict(sorted(found.items(), key=lambda item: (item[1]["machine"]["date"], item[0])))


def save(path: Path, results: dict) -> None:
    """At once, so that a run that is stopped leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


def command(module: str, arguments: list[str], paths: dict[str, Callable[[str], str | None]]) -> str:
    """The command line that made results, without paths of the machine: paths[option](its value) is what stands there instead, None leaves
    out the option."""
    words, rest = ["python", "-m", module], list(arguments)
    while rest:
        option, equals, value = (word := rest.pop(0)).partition("=")
        if option not in paths or not (equals or rest and not rest[0].startswith("-")):
            words.append(word)
        elif (shown := paths[option](value if equals else rest.pop(0))) is not None:
            words += [option, shown]
    return shlex.join(words)


def timed(row: dict) -> dict[str, dict]:
    """The candidates that ran, ours first."""
    found = {name: c for name, c in row["candidates"].items() if "us" in c}
    return {name: found[name] for name in sorted(found, key=lambda name: name not in (OURS, SORTING))}


def base(row: dict) -> float | None:
    """Our time that peers are compared with: of the call that sorts, where there is one, as these peers sort too."""
    found = timed(row)
    return found[SORTING if SORTING in found else OURS]["us"] if OURS in found else None


def peer_ratios(row: dict) -> dict[str, float]:
    """Time of each peer that ran over ours, the fastest peer first."""
    found, ours = timed(row), base(row)
    peers = sorted((c["us"], name) for name, c in found.items() if name not in (OURS, SORTING) and not c.get("yardstick"))
    return {name: us / ours for us, name in peers} if ours else {}


def bandwidth(limits: dict) -> float | None:
    """TB/s: the better of copying and reading."""
    return max((limits[key] for key in ("copy_tb_s", "read_tb_s") if limits.get(key)), default=None)


def product(limits: dict, dtype: str) -> float | None:
    """TFLOP/s of a matrix product. Where that of f32 is faster (a CPU without bf16 instructions) it bounds bf16 too."""
    kind = "f32" if dtype == "f32" else "bf16"
    return max((limits[key] for key in {f"{kind}_tflop_s", "f32_tflop_s"} if limits.get(key)), default=None)


def limit(bytes_: float, flops: float, limits: dict, dtype: str) -> tuple[float, str] | None:
    """Microseconds that moving and computing so much takes at least, and which of them it is; None where no limit was measured."""
    rates = {"memory": (bytes_, bandwidth(limits)), "compute": (flops, product(limits, dtype))}
    bounds = {name: amount / rate * 1e-6 for name, (amount, rate) in rates.items() if rate}
    if not bounds:
        return None
    bound = max(bounds, key=bounds.get)
    return bounds[bound], bound
