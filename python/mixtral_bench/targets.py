"""What we want to reach, row by row, and what the result files say of it: reached, missed, or not yet measured and the command for that."""

from collections.abc import Callable
from dataclasses import dataclass

from mixtral_bench import files
from mixtral_bench.files import OURS


@dataclass(frozen=True)
class Target:
    """A row of the table. Among the rows of the newest file that has any, the worst one decides."""

    what: str
    device: str  # cpu or cuda
    op: str  # of the rows; "limit": the measured limits themselves; "model": rows of a model file
    rows: Callable[[dict], bool]
    measure: Callable[[dict, dict], float | None]  # results, row -> the measured quantity; None: it is not in that row
    unit: str
    wanted: float | None = None  # None: a figure without a target
    more_is_better: bool = True
    needs: str = ""  # what must be installed for it
    shapes: str = "mistral-7b"  # the model that the command of op "model" runs
    of_limit: bool = True  # whether the share of the row's own limit says anything about the quantity

    @property
    def command(self) -> str:
        if self.op == "model":
            return f"python -m mixtral_model bench --random-weights {self.shapes} --device {self.device}"
        op = "" if self.op == "limit" else f" --op {self.op}"
        return f"python -m mixtral_bench run{op} --device {self.device} --json"


# ------------------------------------------------------------------------------------------------- quantities of a row


def ours(key: str) -> Callable[[dict, dict], float | None]:
    return lambda results, row: row["candidates"].get(OURS, {}).get(key)


def of_copy(results, row):
    """Share of the bandwidth of a copy."""
    copied = results["limits"].get("copy_tb_s")
    return ours("tb_s")(results, row) / copied if copied and OURS in files.timed(row) else None


def of_dense(results, row):
    """Share of the rate of a dense product."""
    dense = results["limits"].get("bf16_tflop_s")
    return ours("tflop_s")(results, row) / dense if dense and OURS in files.timed(row) else None


def times(*words: str, without: str = "no window") -> Callable[[dict, dict], float | None]:
    """Time over ours of the fastest peer whose name has all the words."""

    def measure(results, row):
        found = [ratio for name, ratio in files.peer_ratios(row).items() if all(word in name for word in words) and without not in name]
        return min(found, default=None)

    return measure


def besides_products(results, row):
    """Share of gate and combine in the sum of the four stages of this layer."""
    us = {r["op"]: r["candidates"][OURS]["us"] for r in results["rows"] if r["case"] == row["case"] and OURS in files.timed(r)}
    stages = [us.get(op) for op in ("moe_gate", "moe_combine", "grouped_gemm_swiglu", "grouped_gemm")]
    return sum(stages[:2]) / sum(stages) if all(stages) else None


# ------------------------------------------------------------------------------------------------------------- choices


def tokens(low: int, high: int | None = None):
    """Rows of Mixtral 8x7B's expert layer with so many tokens, routed at random."""
    return lambda row: ("mixtral-8x7b" in row.get("shapes", ()) and row["sizes"].get("routing", "uniform") == "uniform"
                        and low <= row["sizes"]["tokens"] <= (high or low))


def prompt(low: int, high: int, window: int | None):
    """Rows of one whole prompt of so many tokens, 32/8 heads of 128."""
    return lambda row: (row["sizes"]["window"] == window and (row["sizes"]["heads"], row["sizes"]["head_dim"]) == (32, 128)
                        and len(row["sizes"]["sequences"]) == 1 and low <= row["sizes"]["sequences"][0][0] <= high
                        and row["sizes"]["sequences"][0][0] == row["sizes"]["sequences"][0][1])


def decode(low: int, high: int):
    """Rows of a decode step of so many sequences over 4096 keys, 32/8 heads of 128."""
    return lambda row: (set(row["sizes"]["chunks"]) == {1} and row["sizes"]["capacity"] == 4096 == row["sizes"]["window"]
                        and (row["sizes"]["heads"], row["sizes"]["head_dim"]) == (32, 128) and low <= len(row["sizes"]["chunks"]) <= high)


def one_sequence(row: dict) -> bool:
    return row["what"] == "decode" and row["batch"] == 1


def any_row(row: dict) -> bool:
    return True


def of_model(name: str, measure):
    """What `measure` finds in files of this model with all of its layers."""
    def found(results, row):
        model = results["model"]
        return measure(results, row) if model["name"] == name and model["layers"] == model["of_layers"] else None

    return found


def launches(results, row):
    return (results.get("launches") or {}).get("per_layer")


MANY = 10**9
MODELS = ("mixtral-8x7b", "mistral-7b")
TARGETS = [
    Target("expert layer, T=1", "cpu", "moe_experts", tokens(1), ours("tb_s"), "TB/s", 0.030),
    Target("expert layer, T=1: llama.cpp", "cpu", "moe_experts", tokens(1), times("llama.cpp"), "x", 1.35, needs="llama-cpp-python"),
    Target("expert layer, T=1: the fastest transformers", "cpu", "moe_experts", tokens(1), times("transformers"), "x", 5.0),
    Target("expert layer, T=8", "cpu", "moe_experts", tokens(8), ours("tb_s"), "TB/s", 0.030),
    Target("expert layer, T=64", "cpu", "moe_experts", tokens(64), ours("tflop_s"), "TFLOP/s"),
    Target("expert layer, T=512", "cpu", "moe_experts", tokens(512), ours("tflop_s"), "TFLOP/s", 3.0),
    Target("expert layer, T=512: the fastest transformers", "cpu", "moe_experts", tokens(512), times("transformers"), "x", 8.0),
    Target("attention, T=4096, causal: the fastest SDPA", "cpu", "sliding_window_attention", prompt(4096, 4096, None), times("SDPA"), "x"),
    Target("attention, T=16384, W=4096: masked SDPA", "cpu", "sliding_window_attention", prompt(16384, 16384, 4096), times("masked SDPA"),
           "x", 5.0),
    Target("attention, T=16384, causal: the fastest SDPA", "cpu", "sliding_window_attention", prompt(16384, 16384, None), times("SDPA"), "x"),
    Target("decode, 4096 keys, B=1", "cpu", "rolling_attention", decode(1, 1), ours("tb_s"), "TB/s"),
    Target("torch's dense bf16 product", "cpu", "limit", any_row, lambda results, row: row.get("bf16_tflop_s"), "TFLOP/s"),
    Target("mistral-7b, decode, B=1: its ops alone, of a step", "cpu", "model", one_sequence,
           of_model("mistral-7b", lambda results, row: row.get("ops_share")), "%", 0.90),
    Target("moe_gate, T=4096, launch included", "cuda", "moe_gate", tokens(4096), ours("us"), "us", 10.0, more_is_better=False),
    Target("expert layer, T >= 4096", "cuda", "moe_experts", tokens(4096, MANY), ours("tflop_s"), "TFLOP/s", 650.0),
    Target("expert layer, T >= 4096, of a dense product", "cuda", "moe_experts", tokens(4096, MANY), of_dense, "%", 0.90),
    Target("expert layer, T = 1 to 16, of a copy's bandwidth", "cuda", "moe_experts", tokens(1, 16), of_copy, "%", 0.88),
    Target("gate and combine, of the layer's stages", "cuda", "moe_experts", tokens(1, MANY), besides_products, "%", 0.05, more_is_better=False,
           of_limit=False),
    Target("attention, T = 16384 to 32768, W=4096", "cuda", "sliding_window_attention", prompt(16384, 32768, 4096), ours("tflop_s"),
           "TFLOP/s", 600.0),
    Target("the same: cuDNN with the same window", "cuda", "sliding_window_attention", prompt(16384, 32768, 4096), times("cuDNN"), "x", 1.0,
           needs="nvidia-cudnn-frontend"),
    Target("decode, 4096 keys, B >= 16, of a copy's bandwidth", "cuda", "rolling_attention", decode(16, MANY), of_copy, "%", 0.85),
    *(Target(f"{name}, decode: launches a layer", "cuda", "model", one_sequence, of_model(name, launches), "launches", more_is_better=False,
             shapes=name) for name in MODELS),
    *(Target(f"{name}, decode, B=1, of the bandwidth roofline", "cuda", "model", one_sequence,
             of_model(name, lambda results, row: row.get("share")), "%", 0.75, shapes=name) for name in MODELS),
]


# ---------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Outcome:
    target: Target
    value: float | None = None
    share: float | None = None  # of the row's own limit
    case: str = ""
    machine: str = ""
    source: str = ""  # name of the file, without suffix
    beyond: bool = False  # more is wanted than this machine's measured limit

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not yet measured"
        wanted, better = self.target.wanted, self.target.more_is_better
        if wanted is None:
            return "-"
        if self.value >= wanted if better else self.value < wanted:
            return "met"
        return "beyond this machine's limit" if self.beyond else "missed"


def evaluate(target: Target, found: dict[str, dict]) -> Outcome:
    """`found`: results by name, oldest first, as files.load_all gives them. Quick runs do not count."""
    for source, results in reversed(found.items()):
        measured = [(value, row) for row in candidate_rows(target, results) if (value := target.measure(results, row)) is not None]
        if measured:
            value, row = (min if target.more_is_better else max)(measured, key=lambda m: m[0])
            share = row.get("share") if target.op == "model" else row.get("candidates", {}).get(OURS, {}).get("share")
            return Outcome(target, value, share if target.of_limit else None, case_of(target, row), results["machine"]["name"], source,
                           beyond_limit(target, results))
    return Outcome(target)


def candidate_rows(target: Target, results: dict) -> list[dict]:
    if results.get("quick") or results["machine"]["device"] != target.device:
        return []
    if target.op == "limit":
        return [results["limits"]]
    if (target.op == "model") != (results["kind"] == "model"):
        return []
    return [row for row in results["rows"] if row.get("op", "model") == target.op and target.rows(row)
            and (row.get("dtype", "bf16") == "bf16" or target.op == "moe_gate")]  # whose logits may be f32


def case_of(target: Target, row: dict) -> str:
    return {"limit": "", "model": f"{row.get('what')} B={row.get('batch')}"}.get(target.op, row.get("case", ""))


def beyond_limit(target: Target, results: dict) -> bool:
    limit = {"TB/s": files.bandwidth(results["limits"]), "TFLOP/s": files.product(results["limits"], "bf16")}.get(target.unit)
    return bool(limit and target.wanted and target.wanted > limit)


def evaluate_all(found: dict[str, dict]) -> list[Outcome]:
    return [evaluate(target, found) for target in TARGETS]


# ---------------------------------------------------------------------------------------------------------------- gaps

STAGES = ("moe_gate", "moe_sort", "moe_permute", "moe_combine", "grouped_gemm", "grouped_gemm_swiglu")  # parts of moe_experts
LAUNCHED = 20.0  # us: a call that takes less is launch latency, whatever its bytes
PROFILES = {  # (device, op) -> the note in results/ that holds the profile
    ("cpu", "moe_experts"): "2026-11-27-xeon-amx-gaps.md",
    ("cpu", "sliding_window_attention"): "2026-11-27-xeon-amx-gaps.md",
    ("cpu", "rolling_attention"): "2026-11-27-xeon-amx-gaps.md",
    ("cpu", "apply_rope"): "2026-11-27-xeon-amx-gaps.md",
    ("cuda", "moe_experts"): "2026-11-27-h200-gaps.md",
    ("cuda", "sliding_window_attention"): "2026-11-27-h200-gaps.md",
    ("cuda", "rolling_attention"): "2026-11-27-h200-gaps.md",
}


@dataclass(frozen=True)
class Gap:
    op: str
    case: str
    bound: str
    share: float
    machine: str
    source: str
    note: str | None


def gaps(found: dict[str, dict], device: str, count: int = 3) -> list[Gap]:
    """The rows that are farthest from their own limit: one for each op, from the newest file that has the op."""
    newest = {}
    for source, results in found.items():
        if results["kind"] == "ops" and results["machine"]["device"] == device and not results.get("quick"):
            newest |= {row["op"]: (source, results) for row in results["rows"] if OURS in files.timed(row)}
    worst: dict[str, Gap] = {}
    for op, (source, results) in newest.items():
        for row in results["rows"]:
            share = row["candidates"].get(OURS, {}).get("share")
            if row["op"] == op and op not in STAGES and share is not None and row["candidates"][OURS]["us"] >= LAUNCHED:
                gap = Gap(op, row["case"], row["bound"], share, results["machine"]["name"], source, PROFILES.get((device, op)))
                worst[op] = min(worst.get(op, gap), gap, key=lambda g: g.share)
    return sorted(worst.values(), key=lambda g: g.share)[:count]
