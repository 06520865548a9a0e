"""What the programs of tests/c print, against the formulas on the arrays that they fill."""
import re

import numpy as np

T, E, K, H, I = 4, 8, 2, 64, 128


def numbers_of(line):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", line)]


def filled_cuda(first, *shape):
    """The fill() of example_cuda.h."""
    return ((first + np.arange(np.prod(shape))) * 7919 % 251 - 125).reshape(shape) / 256


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
    w_gate_up, w_down, lines, routing = filled_cuda(0, E, 2 * I, H), filled_cuda(0, E, H, I), text.splitlines(), []
    assert len(lines) == 2 * T
    for i, line in enumerate(lines):
        launch, t = divmod(i, T)
        ids, weights, out, bound = expert_layer(filled_cuda(12 * launch, T, E)[t], filled_cuda(12 * launch, T, H)[t], w_gate_up, w_down)
        found = numbers_of(line)
        assert found[:3] + found[4:5] == [launch, t, *ids]
        np.testing.assert_allclose([found[3], found[5]], weights, atol=6e-4)
        assert (np.abs(np.array(found[6:]) - out[:2]) <= bound[:2] + 1e-4).all(), (line, out[:2], bound[:2])
        routing.append(tuple(ids))
    assert all(a != b for a, b in zip(routing[:T], routing[T:]))


def rotated(x):
    """[position, head, D] in float64: the pair (x[i], x[i + D/2]) turns by position * 10000^(-2i/D)."""
    a, b = np.split(x, 2, axis=-1)
    turned = (a + 1j * b) * np.exp(1j * np.arange(len(x))[:, None, None] * 1e4 ** (-np.arange(a.shape[-1]) / a.shape[-1]))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention_of_one(q, k, v):
    """A query [D] over the keys that it sees, in float64 -> (out, bound): bound of what rounding q and k to bf16 after the rotation, then
    the weights, then the sum moves."""
    scores, moved = k @ q / np.sqrt(len(q)), 2.001 * 2.0**-8 * (np.abs(k) @ np.abs(q)) / np.sqrt(len(q))
    weights = np.exp(scores) / np.exp(scores).sum()
    out = weights @ v
    by_scores = np.exp(moved.max()) * (weights * np.expm1(moved)) @ np.abs(v - out)  # a weight moves by e^moved at most, so does their sum
    return out, by_scores + 2.0**-8 * (weights @ np.abs(v) + np.abs(out))


def assert_example_decode_cuda(text):
    """Of example_decode_cuda.cpp, in bf16: after every call the last query of each sequence, over the sequence as a whole."""
    window, calls, lines = 20, np.array([(7, 30), (12, 3), *8 * [(1, 1)]]), text.splitlines()
    owner = np.concatenate([np.repeat([0, 1], call) for call in calls])  # the sequence of each token
    all_q, all_k, all_v = (filled_cuda(first, len(owner), heads, 64) for first, heads in ((0, 4), (0, 2), (1, 2)))
    assert len(lines) == 2 * len(calls)
    for i, line in enumerate(lines):
        call, b = divmod(i, 2)
        position = calls[:call + 1, b].sum() - 1
        seen = slice(max(0, position - window + 1), position + 1)
        q, k, v = rotated(all_q[owner == b])[position], rotated(all_k[owner == b])[seen], all_v[owner == b][seen]
        expected, bound = np.array([attention_of_one(q[h], k[:, h // 2], v[:, h // 2]) for h in range(4)])[..., 0].T
        found = numbers_of(line)
        assert (line.split(",")[0], *found[:2]) == ("prompt" if call < 2 else "step", b, position)
        assert (np.abs(found[2:] - expected) <= bound + 1e-4).all(), (line, expected, bound)


CUDA_EXAMPLES = {"example_cuda": assert_example_cuda, "example_decode_cuda": assert_example_decode_cuda}  # check what they print
