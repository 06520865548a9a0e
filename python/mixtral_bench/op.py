"""What the bench has to know of an op, beside its cases."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """`case` is one of cases.CASES, `inputs` what its inputs() and `complete` made: the arguments by name."""

    ours: dict[str, Callable]  # name in the tables -> prepare(case, inputs) -> call; what call() returns is checked and timed
    expected: Callable  # (case, inputs) -> error of a result; made before the first call, in f32 on some of the rows
    flops: Callable  # (case, inputs) -> that the result needs
    bytes: Callable  # (case, inputs) -> that must be moved once
    tolerance: float  # of the error
    size: Callable = lambda case, element: 0  # (case, bytes of an element) -> of the inputs, where that may be more than a machine has
    complete: Callable = lambda case, inputs: inputs  # what is not part of the case but made outside the timed call
    in_place: bool = False  # a second call sees other inputs
    stored: Callable | None = None  # (case, inputs) -> error of what our call leaves in its inputs; made before it


def nbytes(*tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
