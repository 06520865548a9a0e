"""Perplexity against context length, with the window of attention and without it.

Perplexity is exp(-mean natural log-probability) of the scored tokens. Of a text x[0], x[1], ... (x[0] is the beginning-of-
sequence token, where the tokenizer has one) blocks of n = `stride` tokens x[a], ..., x[a+n-1] are scored, one after another:
a = M-n+1, M+1, M+n+1, ... as far as the text goes, where M is the longest context. For a context of c tokens, n <= c, the model
reads the c tokens x[a+n-1-c], ..., x[a+n-2] with an empty cache before them, and its last n rows of logits score the block.

So the same tokens are scored for every context; each is predicted from c-n+1 to c tokens before it: exactly c with a stride of 1,
segments that do not overlap with a stride of c. No segment crosses from one text into another; all texts count as one.
"""
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch

from .config import ModelConfig, ModelError
from .decode import score
from .model import Model, check_ids, upload
from .output import new_figure, plots_are_possible, save_figure, write_csv

DEFAULT_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Point:
    window: int | None  # None is plain causal attention
    context: int
    tokens: int         # scored
    nll: float          # their mean negative log-probability, in nats

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 709 else math.inf


@dataclass(frozen=True)
class Plan:
    texts: list[list[int]]
    contexts: list[int]         # ascending
    stride: int
    windows: list[int | None]   # the last is None
    chunk_size: int

    def tokens_scored(self) -> int:
        return sum((len(text) - 1 - self.contexts[-1]) // self.stride + 1 for text in self.texts) * self.stride

    def tokens_read(self) -> int:
        return self.tokens_scored() // self.stride * sum(context for _, context in self.runs())

    def runs(self) -> list[tuple[int | None, int]]:
        """(window, context) of all runs; a window that reaches over the whole context hides nothing, so it is no run of its own."""
        return [(window, context) for window in self.windows for context in self.contexts if window is None or window < context]

    def segments(self, context: int) -> list[list[int]]:
        """The context + 1 tokens that end with each block."""
        return [text[end - context - 1:end] for text in self.texts for end in range(self.contexts[-1] + 1, len(text) + 1, self.stride)]

    def batch(self, context: int) -> int:
        """Segments that are read together."""
        return min(max(self.chunk_size // context, 1), self.tokens_scored() // self.stride)

    def cache_positions(self) -> int:
        """Of all segments that are read together, at most."""
        return max(self.batch(context) * min(window or context, context) for window, context in self.runs())


def make_plan(config: ModelConfig, texts: list[tuple[str, list[int]]], contexts: list[int] | None = None, stride: int | None = None,
              window: int | None = None, chunk_size: int = 2048) -> Plan:
    """texts: (name, token ids). Needs no weights; ModelError for a request that measure() could not serve.

    contexts default to those of DEFAULT_CONTEXTS that the texts and the model allow, stride to half of the shortest,
    window to that of the model; at most chunk_size tokens pass through the model at a time."""
    if not texts:
        raise ModelError("texts: expected one or more, got none")
    for name, text in texts:
        check_ids(name, text, config.vocab_size)
    longest = min(min(len(text) for _, text in texts) - 1, config.max_positions)
    if contexts is None:
        contexts = [context for context in DEFAULT_CONTEXTS if context <= longest] or [min(DEFAULT_CONTEXTS[0], config.max_positions)]
    if not contexts:
        raise ModelError("context: expected one or more, got none")
    for context in contexts:
        if not isinstance(context, Integral) or not 1 <= context <= config.max_positions:
            raise ModelError(f"context: expected integers from 1 to {config.max_positions} (the model's positions), got {context!r}")
    contexts = sorted(set(contexts))
    for name, text in texts:
        if len(text) <= contexts[-1]:
            raise ModelError(f"{name}: expected at least {contexts[-1] + 1} tokens for a context of {contexts[-1]}, got {len(text)}")
    stride = max(contexts[0] // 2, 1) if stride is None else stride
    if not isinstance(stride, Integral) or not 1 <= stride <= contexts[0]:
        raise ModelError(f"stride: expected an integer from 1 to {contexts[0]}, the shortest context, got {stride!r}")
    window = config.window if window is None else window
    for name, value in (("window", 1 if window is None else window), ("chunk_size", chunk_size)):
        if not isinstance(value, Integral) or value < 1:
            raise ModelError(f"{name}: expected an integer of at least 1, got {value!r}")
    return Plan([text for _, text in texts], contexts, stride, [None] if window is None else [window, None], chunk_size)


def measure(model: Model, plan: Plan, on_tokens: Callable[[int], None] = lambda n: None) -> list[Point]:
    """One point for each window and context of the plan; on_tokens(n) is called whenever n more tokens are read."""
    points = {}
    for window, context in plan.runs():
        windowed = Model(dataclasses.replace(model.config, window=window), model.weights)
        segments = plan.segments(context)
        batch = plan.batch(context)
        total = 0.0
        for i in range(0, len(segments), batch):
            total += _logprobs(windowed, segments[i:i + batch], plan.stride, plan.chunk_size)
            on_tokens(len(segments[i:i + batch]) * context)
        if not math.isfinite(total):
            raise ModelError(f"perplexity: expected finite log-probabilities, got a sum of {total} (are the weights sound?)")
        points[window, context] = Point(window, context, plan.tokens_scored(), -total / plan.tokens_scored())
    return [dataclasses.replace(points[window if (window, context) in points else None, context], window=window)
            for window in plan.windows for context in plan.contexts]


@torch.inference_mode()
def _logprobs(model: Model, segments: list[list[int]], count: int, chunk_size: int) -> float:
    """Sum of the log-probabilities of the last `count` tokens of each segment (all of one length)."""
    inputs = len(segments[0]) - 1
    cache = model.new_cache(len(segments), inputs)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for start in range(0, inputs, chunk_size):
        end = min(start + chunk_size, inputs)
        hidden = model.forward([segment[start:end] for segment in segments], cache, list(range(len(segments))))
        first = max(start, inputs - count)  # input i predicts token i + 1
        if first < end:
            rows = hidden.unflatten(0, (len(segments), -1))[:, first - start:].flatten(0, 1)
            nexts = upload([token for segment in segments for token in segment[first + 1:end + 1]], torch.int64, model.device)
            total += score(model, rows, nexts).sum(dtype=torch.float64)
    return total.item()


def _label(window: int | None) -> str:
    return "no window" if window is None else f"window {window}"


def show(points: list[Point], plan: Plan, output: Path | None) -> None:
    """A table; with a directory also perplexity.csv and, where matplotlib is installed, perplexity.png."""
    least = f"context - {plan.stride - 1} to " if plan.stride > 1 else ""
    print(f"perplexity of {plan.tokens_scored()} tokens, each predicted from {least}context tokens before it\n")
    curves = {_label(window): [p for p in points if p.window == window] for window in plan.windows}
    print(f"{'context':>8}" + "".join(f"{name:>16}" for name in curves))
    for row in zip(*curves.values()):
        print(f"{row[0].context:8}" + "".join(f"{p.perplexity:16.4f}" for p in row))
    if output is None:
        return
    print()
    write_csv(output / "perplexity.csv", ["window", "context", "stride", "tokens", "nll", "perplexity"],
              [(p.window, p.context, plan.stride, p.tokens, p.nll, p.perplexity) for p in points])
    if plots_are_possible():
        _plot(curves, plan, output / "perplexity.png")


def _plot(curves: dict[str, list[Point]], plan: Plan, path: Path) -> None:
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    for name, curve in curves.items():  # without the window on top, dashed: the curves are one up to the window
        axes.plot(plan.contexts, [p.perplexity for p in curve], marker="o", label=name, linestyle="--" if name == "no window" else "-")
    if plan.windows[0] is not None and plan.contexts[0] <= plan.windows[0] <= plan.contexts[-1]:
        axes.axvline(plan.windows[0], color="gray", linewidth=0.8, linestyle=":", label="context = window")
    axes.set_xscale("log", base=2)
    axes.set_xticks(plan.contexts, plan.contexts)
    axes.minorticks_off()
    axes.set(xlabel="context (tokens)", ylabel="perplexity",
             title=f"Perplexity against context length ({plan.tokens_scored()} tokens, the same at each point)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)
