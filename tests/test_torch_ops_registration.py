"""What torch knows of the ops: schemas, mutation, fakes, torch.compile, autograd."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixtral_ext
from op_calls import MUTATED, OPS, as_tuple, call, case, clone, float_on, forms, outputs, same_bits, small_cases

NAMES = {"moe_gate": "plain", "moe_sort": "skips", "moe_permute": "plain", "moe_combine": "skips", "grouped_gemm": "gather",
         "grouped_gemm_swiglu": "gather", "moe_experts": "maps_skips", "sliding_window_attention": "batched_keys",
         "rolling_attention": "rope", "apply_rope": "plain"}
RESULTS = {"moe_gate": ("topk_weights", "topk_ids", "expert_offsets", "sorted_slots", "slot_rows"),
           "moe_sort": ("expert_offsets", "sorted_slots", "slot_rows"), "moe_permute": ("rows",),
           "sliding_window_attention": ("out", "lse"), "rolling_attention": ("out", "lse")}
CALLS = [(op, form) for op in OPS for form in forms(op)]
DIFFERENTIABLE = [op for op in OPS if op not in MUTATED and op != "moe_sort"]  # functional, with a float input


def arguments(op, form, device):
    """(overload, keyword arguments) of a case whose results are defined everywhere."""
    inputs = case(op, NAMES[op]).inputs(float_on(device), device)
    if form == "out":
        inputs |= dict(zip(RESULTS.get(op, ("out",)), outputs(op, inputs)))
    return getattr(getattr(torch.ops.mixtral_ext, op), "default" if form == "functional" else "out"), inputs


@pytest.mark.parametrize("op, form", CALLS)
def test_opcheck(op, form, device):
    overload, kwargs = arguments(op, form, device)
    torch.library.opcheck(overload, (), kwargs)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_opcheck_with_gradients_wanted(op, device):
    """With inputs that require grad the registration and the fake still hold (backward raises: tested below)."""
    overload, kwargs = arguments(op, "functional", device)
    kwargs = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
              for k, v in kwargs.items()}
    torch.library.opcheck(overload, (), kwargs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("op, form", CALLS)
def test_fake_equals_real(op, form, device):
    """Shape, dtype and strides of every result, also for inputs that are not contiguous."""
    if form == "out":
        overload, kwargs = arguments(op, form, device)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        assert overload(**meta) is None
        return
    names = {"plain", "padded", "e64_k8", "gather_tail", "ragged", "transposed", "batched_empty", "empty", "k3_padded", "chunks"}
    for c in (c for c in small_cases(op, device) if c.name in names):
        inputs = c.inputs(torch.bfloat16, device)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        real, fake = (as_tuple(getattr(mixtral_ext, op)(**args)) for args in (inputs, meta))
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake], c.name


@pytest.mark.parametrize("op, form", CALLS)
def test_compile(op, form, device):
    """fullgraph, static and dynamic shapes: the same bits as eager, and the same changes to the arguments."""
    f, mutated = getattr(mixtral_ext, op), MUTATED.get(op, ())

    def step(inputs, out):
        result = f(**inputs) if out is None else f(**inputs, out=out)
        return tuple(t + 0 for t in as_tuple(result))  # + 0: the graph holds more than the op

    torch._dynamo.reset()
    c = case(op, NAMES[op])
    for dynamic in (False, True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        inputs = c.inputs(float_on(device), device)
        want = call(op, inputs, form)
        inputs = {k: clone(v) if k in mutated else v for k, v in inputs.items()}
        outs = outputs(op, inputs) if form == "out" else None
        got = compiled(inputs, outs[0] if outs and len(outs) == 1 else outs)
        results = outs if form == "out" else got
        for w, g in zip(want, (*results, *(inputs[k] for k in mutated))):
            assert same_bits(w, g)
        for o, g in zip(outs or (), got):
            assert same_bits(o, g)


def test_compile_with_other_sizes(device):
    """One dynamic graph serves any number of tokens."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    layer = torch.compile(lambda logits, hidden: mixtral_ext.moe_permute(hidden, mixtral_ext.moe_gate(logits)[3], 2),
                          fullgraph=True, backend=count, dynamic=True)
    for tokens in (3, 7, 12):
        logits, hidden = torch.randn(tokens, 8, device=device), torch.randn(tokens, 64, device=device).to(float_on(device))
        slots = mixtral_ext.moe_gate(logits)[3]
        assert torch.equal(layer(logits, hidden), hidden[slots.long() // 2])
    assert len(graphs) == 1


# ----------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_backward_of_a_functional_op_raises(op, device):
    inputs = case(op, NAMES[op]).inputs(float_on(device), device)
    names = [k for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for name in names:
        leaf = inputs[name].clone().requires_grad_()
        result = as_tuple(getattr(mixtral_ext, op)(**{**inputs, name: leaf}))
        assert same_bits(result[0].detach(), call(op, inputs)[0])
        with pytest.raises(RuntimeError, match=f"mixtral_ext::{op}: no gradient is defined"):
            result[0].sum().backward()
        assert leaf.grad is None
        with torch.no_grad():
            assert not as_tuple(getattr(mixtral_ext, op)(**{**inputs, name: leaf}))[0].requires_grad


@pytest.mark.parametrize("op, form", [(op, form) for op, form in CALLS if op in MUTATED or form == "out" and op in DIFFERENTIABLE])
def test_a_mutating_op_raises_at_once(op, form, device):
    overload, kwargs = arguments(op, form, device)
    name = op if form == "functional" else f"{op}.out"
    for key in [k for k, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]:
        args = {k: clone(v) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        before = {k: clone(v) for k, v in args.items() if isinstance(v, torch.Tensor)}
        args[key].requires_grad_()
        with pytest.raises(RuntimeError, match=f"mixtral_ext::{name}: no gradient is defined"):
            overload(**args)
        assert all(same_bits(args[k].detach(), before[k]) for k in before)
        with torch.no_grad():
            overload(**args)


def test_writes_are_seen_by_autograd(device):
    """A backward that needs the values from before an in-place op raises instead of using the new ones."""
    like = dict(dtype=float_on(device), device=device)
    weight, q = torch.randn(5, 2, 64, **like, requires_grad=True), torch.randn(5, 2, 64, **like)
    loss = (weight * q).sum()
    mixtral_ext.apply_rope(q, None, torch.arange(5, device=device), 1e4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.filterwarnings("ignore:Error detected in NoBackwardBackward")
def test_compiled_backward_raises(device):
    torch._dynamo.reset()
    hidden = torch.randn(3, 64, dtype=float_on(device), device=device, requires_grad=True)
    slots = torch.arange(3, dtype=torch.int32, device=device)
    compiled = torch.compile(lambda x: mixtral_ext.moe_permute(x, slots, 1).sum(), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="mixtral_ext::moe_permute: no gradient is defined"):
        compiled(hidden).backward()
    assert hidden.grad is None


# ------------------------------------------------------------------------------------------------------------- import


def test_import_without_torch():
    """The package imports; a torch op then says what is missing."""
    code = """
import sys
sys.modules["torch"] = None            # import torch fails
import importlib.util as u
real = u.find_spec
u.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
import mixtral_ext
assert mixtral_ext.__version__
try:
    mixtral_ext.moe_gate
except ImportError as error:
    assert "no torch" in str(error) and "pip install torch" in str(error), error
else:
    raise AssertionError("no ImportError")
assert not hasattr(mixtral_ext, "no_such_name")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_without_the_library(tmp_path):
    """A tree that is not built says how to build it."""
    shutil.copytree(Path(mixtral_ext.__file__).parent, tmp_path / "mixtral_ext", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    run = subprocess.run([sys.executable, "-c", "import mixtral_ext"], env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                         capture_output=True, text=True)
    assert "ImportError" in run.stderr and "is not built" in run.stderr and "pip install --no-build-isolation ." in run.stderr


def test_version_is_the_library_s(lib):
    major, minor, patch = (int(part) for part in mixtral_ext.__version__.split("."))
    assert lib.c.mixtral_version() == major * 10000 + minor * 100 + patch
