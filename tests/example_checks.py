"""What the programs of tests/c print, against the formulas on the arrays that they fill."""
import re

import numpy as np

T, E, K, H, I = 4, 8, 2, 64, 128


def numbers_of(line):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", line)]


def expert_layer(logits, hidden, w_gate_up, w_down):
    """One token in float64 -> (ids, weights, out, bound): bound of what rounding to bf16 after SwiGLU, after the second product and after
    the sum moves."""
    ids = np.argsort(-logits, kind="stable")[:K]
    weights = np.exp(logits[ids]) / np.exp(logits[ids]).sum()
    out, moved = np.zeros(H), np.zeros(H)
    for e, weight in zip(ids, weights):
        gate, up = np.split(w_gate_up[e] @ hidden, 2)
        act = gate / (1 + np.exp(-gate)) * up
        row = w_down[e] @ act
        out += weight * row
        moved += weight * (np.abs(w_down[e]) @ np.abs(act) + np.abs(row))
    return ids, weights, out, 2.0**-9 * (moved + np.abs(out))


def assert_example(text):
    """Of example.c, which computes in f32."""
    def filled(*shape):
        count = np.arange(np.prod(shape))
        return (np.float32(count * 7919 % 1000) / np.float32(1000) - np.float32(0.5)).astype(np.float64).reshape(shape)

    logits, hidden, w_gate_up, w_down = filled(T, E), filled(T, H), filled(E, 2 * I, H), filled(E, H, I)
    lines = text.splitlines()
    assert len(lines) == T
    for t, line in enumerate(lines):
        ids, weights, out, _ = expert_layer(logits[t], hidden[t], w_gate_up, w_down)
        numbers, expected = numbers_of(line), [t, ids[0], weights[0], ids[1], weights[1], out[0], out[1]]
        np.testing.assert_allclose(numbers, expected, rtol=0, atol=6e-4)
        np.testing.assert_allclose(numbers[5:], expected[5:], rtol=1e-4)


def assert_example_cuda(text):
    """Of example_cuda.cpp, in bf16: both launches, whose routing differs for every token."""
    def filled(first, *shape):
        return ((first + np.arange(np.prod(shape))) * 7919 % 251 - 125).reshape(shape) / 256

    w_gate_up, w_down, lines, routing = filled(0, E, 2 * I, H), filled(0, E, H, I), text.splitlines(), []
    assert len(lines) == 2 * T
    for i, line in enumerate(lines):
        launch, t = divmod(i, T)
        ids, weights, out, bound = expert_layer(filled(12 * launch, T, E)[t], filled(12 * launch, T, H)[t], w_gate_up, w_down)
        found = numbers_of(line)
        assert found[:3] + found[4:5] == [launch, t, *ids]
        np.testing.assert_allclose([found[3], found[5]], weights, atol=6e-4)
        assert (np.abs(np.array(found[6:]) - out[:2]) <= bound[:2] + 1e-4).all(), (line, out[:2], bound[:2])
        routing.append(tuple(ids))
    assert all(a != b for a, b in zip(routing[:T], routing[T:]))
