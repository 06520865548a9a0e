"""Routing and experts: calls, references, bytes and FLOPs. Multiplications and additions count each; a weight of an expert that has rows is
read once, an activation is read once and written once. What lies between the products of the expert layer does not count."""

import math

import torch
from torch.nn.functional import silu

import mixtral_ext
from mixtral_bench.files import OURS, SORTING
from mixtral_bench.op import Op, nbytes
from mixtral_bench.timing import relative_error
from mixtral_ext import reference

TOLERANCE = 0.02  # relative Frobenius error in bf16: roundings of several stages come to about 0.005
CHECKED = 16  # rows or tokens compared with f32


def _checked(count: int, device) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, CHECKED), device=device).round().long()


def _experts_with_rows(inputs) -> int:
    return int((inputs["expert_offsets"].diff() > 0).sum())


# ------------------------------------------------------------------------------------------------------------ routing


def _gate_expected(case, inputs):
    """The weights of the chosen logits, and the maps where a peer gives them. Which of equal logits is chosen is not looked at: ours
    takes the lower expert, as the tests of the op show, peers any."""
    logits, best = inputs["router_logits"].float(), reference.moe_gate(**inputs)

    def error(result):
        weights, ids, *maps = result
        if not ((ids >= 0) & (ids < case.experts)).all():
            return math.inf
        chosen, wanted = (logits.gather(1, i.long()).sort(1).values for i in (ids, best[1]))
        distinct = bool((ids.sort(1).values.diff() > 0).all())
        sorted_so = not maps or all(torch.equal(a, b) for a, b in zip(maps, reference.moe_sort(ids, case.experts)))
        right = distinct and torch.equal(chosen, wanted) and sorted_so
        return relative_error(weights.sort(1).values, best[0].sort(1).values) if right else math.inf

    return error


def _sort_expected(case, inputs):
    maps = reference.moe_sort(**inputs)
    return lambda result: 0.0 if all(torch.equal(a, b) for a, b in zip(result, maps)) else math.inf


def _maps_bytes(case) -> int:
    return 4 * (2 * case.tokens * case.top_k + case.experts + 1)


def _rows_expected(function):
    """moe_permute, moe_combine: all of the result in f32."""
    def expected(case, inputs):
        wide = {name: value.float() if name in ("hidden", "rows") else value for name, value in inputs.items()}
        rows = function(**wide)
        return lambda result: relative_error(result, rows)

    return expected


# ------------------------------------------------------------------------------------------------------------ experts


def _rows_of(inputs, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of some rows of a grouped product in f32, and their experts."""
    expert = torch.searchsorted(inputs["expert_offsets"].long(), rows, right=True) - 1
    source = rows
    if inputs.get("a_rows") is not None:
        source = inputs["a_rows"][rows].long() // inputs["a_rows_divisor"]
    return inputs["a"][source].float(), expert


def _gemm_expected(weights: str, swiglu: bool):
    def expected(case, inputs):
        rows = _checked(sum(case.segments), inputs["a"].device)
        a, expert = _rows_of(inputs, rows)
        products = torch.stack([x @ inputs[weights][e].float().T for x, e in zip(a, expert.tolist())])
        if swiglu:
            gate, up = products.chunk(2, -1)
            products = silu(gate) * up
        return lambda result: relative_error(result[rows], products)

    return expected


def _gemm_flops(factor: int):
    return lambda case, inputs: 2 * factor * sum(case.segments) * case.inner * case.outer


def _gemm_bytes(weights: str):
    def count(case, inputs):
        b = inputs[weights]
        rows = sum(case.segments)
        return _experts_with_rows(inputs) * nbytes(b[0]) + nbytes(inputs["a"]) + rows * case.outer * b.element_size()

    return count


def _with_maps(case, inputs):
    maps = reference.moe_sort(inputs["topk_ids"], case.experts)
    return inputs | dict(zip(("expert_offsets", "sorted_slots", "slot_rows"), maps))


def _layer_expected(case, inputs):
    """Some tokens in f32, one expert at a time."""
    tokens = _checked(case.tokens, inputs["hidden"].device)
    x, ids, weights = inputs["hidden"][tokens].float(), inputs["topk_ids"][tokens], inputs["topk_weights"][tokens]
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ inputs["w_gate_up"][e].float().T).chunk(2, -1)
        out.index_add_(0, token, weights[token, slot, None] * ((silu(gate) * up) @ inputs["w_down"][e].float().T))
    return lambda result: relative_error(result[tokens], out)


def _layer_bytes(case, inputs):
    return _experts_with_rows(inputs) * nbytes(inputs["w_gate_up"][0], inputs["w_down"][0]) + 2 * nbytes(inputs["hidden"])


def _layer(case, inputs):
    return lambda: mixtral_ext.moe_experts(**inputs)


def _layer_and_sort(case, inputs):
    first = {name: inputs[name] for name in ("hidden", "w_gate_up", "w_down", "topk_weights", "topk_ids")}
    return lambda: mixtral_ext.moe_experts(**first)


def _call(op: str):
    return {OURS: lambda case, inputs: lambda: getattr(mixtral_ext, op)(**inputs)}


OPS = {
    "moe_gate": Op(_call("moe_gate"), _gate_expected, lambda case, inputs: 0,
                   lambda case, inputs: nbytes(inputs["router_logits"]) + 4 * case.tokens * case.top_k * 2 + _maps_bytes(case), 1e-6),
    "moe_sort": Op(_call("moe_sort"), _sort_expected, lambda case, inputs: 0,
                   lambda case, inputs: nbytes(inputs["topk_ids"]) + _maps_bytes(case), 0.0),
    "moe_permute": Op(_call("moe_permute"), _rows_expected(reference.moe_permute), lambda case, inputs: 0,
                      lambda case, inputs: (1 + case.top_k) * nbytes(inputs["hidden"]), 0.0),
    "moe_combine": Op(_call("moe_combine"), _rows_expected(reference.moe_combine),
                      lambda case, inputs: 2 * inputs["rows"].numel(),
                      lambda case, inputs: nbytes(inputs["rows"]) * (1 + case.top_k) // case.top_k, TOLERANCE),
    "grouped_gemm": Op(_call("grouped_gemm"), _gemm_expected("b", False), _gemm_flops(1), _gemm_bytes("b"), TOLERANCE,
                       lambda case, element: element * len(case.segments) * case.inner * case.outer),
    "grouped_gemm_swiglu": Op(_call("grouped_gemm_swiglu"), _gemm_expected("w_gate_up", True), _gemm_flops(2), _gemm_bytes("w_gate_up"),
                              TOLERANCE, lambda case, element: 2 * element * len(case.segments) * case.inner * case.outer),
    "moe_experts": Op({OURS: _layer, SORTING: _layer_and_sort}, _layer_expected,
                      lambda case, inputs: 6 * case.tokens * case.top_k * case.hidden * case.intermediate, _layer_bytes, TOLERANCE,
                      lambda case, element: 3 * element * case.experts * case.hidden * case.intermediate, _with_maps),
}
