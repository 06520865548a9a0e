"""One decoding step on static buffers: on a GPU one CUDA graph, on the CPU the same function called.

Launches of a step on an H200 with torch 2.11, batch 1 (`python -m mixtral_model bench --device cuda` counts and times them):

    per layer    rms_norm 1, q k v 1, rolling_attention 3 (rotate + store, split, combine), output projection and residual 2 (cuBLAS adds up
                 parts of it), rms_norm 1, then Mixtral: router 2, moe_gate 1, moe_experts 3 (GEMM 1 + SwiGLU, GEMM 2, combine), residual 1
                 or Mistral: gate and up 1, SwiGLU 2, down and residual 2
    in all       15 a layer, Mistral 13
    per step     embedding 1, lengths 1, rms_norm 1, head 1, greedy token about 10 on [B];
                 and copies, which are no kernels: the sampled tokens to the host, random numbers to the device
"""
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .config import ModelError
from .model import Cache, Model, upload

WARM_UP = 2     # steps before a capture: they load kernels and make cuBLAS's handles, and are steps of the text like any other
LEAST_STEPS = 4  # fewer are not worth a capture


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """For warming up and capturing: one a device, since cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


class Graph:
    """A function of no arguments as one CUDA graph."""

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.graph = torch.cuda.CUDAGraph()
        # The outer one: where a capture fails, torch.cuda.graph leaves its own stream as the current one.
        with torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(self.graph, stream=side_stream(device)):
            function()

    def __call__(self) -> None:
        self.graph.replay()


class Decoder:
    """Decodes one token of each of B sequences a step. All that a step reads and writes has its place on the device:

        tokens   i32 [B]     what the next step reads
        lengths  i32 [B]     tokens in the cache
        live     i64 [B]     1 until the sequence's end-of-sequence token, then 0
        sampled  i64 [B]     what the last step drew; -1: its logits were not finite
        logprobs f32 [B]     of sampled, if asked for
        draws    f64 [B, 1]  from 0 to 1, one for each step, if the temperature is not 0
        logits   [B, V]      of the last step; a graph's own tensor, as are
        choices  i32 [B, K]  the experts of each layer, a list

    A static batch (`captures`, by default on a GPU) always runs whole, and its next step is under way while the host reads the tokens of
    the last one. So a sequence that has ended goes on: its length stays, its tokens are not shown and its experts not counted; it writes
    at one position of its own slot, which is the first one beyond its text and within the cache. Otherwise such sequences leave the batch.

    The cache is the decoder's from its start on: lengths advance on the device alone.
    """

    def __init__(self, model: Model, cache: Cache, steps: int, *, temperature: float = 0.0, top_p: float = 1.0,
                 generators: Sequence[torch.Generator] = (), eos_ids: Sequence[int] = (), logprobs: bool = False,
                 expert_load: Tensor | None = None, captures: Callable[[Callable, torch.device], Callable] | None = None):
        """For all sequences of the cache. steps: how many there will be at most. generators: one for each sequence, on the CPU.
        expert_load i64 [layers, E] on the model's device is increased. captures(function, device) makes what replays it."""
        batch, device = len(cache.lengths), model.device
        if cache.window is None and max(cache.lengths) + steps > cache.capacity:
            raise ModelError(f"steps: expected at most {cache.capacity - max(cache.lengths)}, for which the cache has room, got {steps}")
        if temperature and len(generators) != batch:
            raise ModelError(f"generators: expected one for each of {batch} sequences, got {len(generators)}")
        self.model, self.cache, self.temperature, self.top_p, self.expert_load = model, cache, temperature, top_p, expert_load
        self.captures = captures or (Graph if device.type == "cuda" else None)
        self.until_capture = WARM_UP if self.captures and steps >= LEAST_STEPS else -1
        self.rows, self.generators, self.with_logprobs = list(range(batch)), list(generators), logprobs
        self.replay = None  # not self.step, which would keep decoder and cache alive until Python looks for cycles
        self.left = steps
        self.done = 0  # tokens drawn, of each sequence

        self.tokens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.lengths = upload(cache.lengths, torch.int32, device)
        self.slots = upload(self.rows, torch.int32, device)
        self.bounds = upload(range(batch + 1), torch.int32, device)
        self.live = torch.ones(batch, dtype=torch.int64, device=device)
        self.sampled = torch.zeros(batch, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(batch, device=device)
        self.draws = torch.zeros(batch, 1, dtype=torch.float64, device=device)
        self.eos_ids = upload([i for i in eos_ids if 0 <= i < model.config.vocab_size], torch.int64, device)
        # On the host two of each, in turn: one is read while a step fills the other.
        pinned = device.type == "cuda"
        self.host = [tuple(torch.zeros(t.shape, dtype=t.dtype, pin_memory=pinned) for t in (self.sampled, self.logprobs, self.draws))
                     for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if pinned else None

    @property
    def overlaps(self) -> bool:
        return self.captures is not None

    @torch.inference_mode()
    def first(self, hidden: Tensor) -> "Sent":
        """The first tokens, from the hidden states [B, H] of the prompts' last ones."""
        self._draw()
        self.pick(hidden)
        return self._send()

    @torch.inference_mode()
    def next(self, rows: list[int] | None = None) -> "Sent":
        """One step more, of these sequences alone (all of them if the batch is static)."""
        if not self.left:
            raise ModelError("steps: expected no more than the decoder was made for, got one more")
        if rows is not None and rows != self.rows:
            if self.overlaps:
                raise ModelError(f"rows: expected {self.rows} or None, since a static batch runs whole, got {rows}")
            self._keep(rows)
        self.left -= 1
        self._draw()
        if self.until_capture == 0:
            self.replay = self.captures(self.step, self.model.device)
        self.until_capture -= 1
        if self.until_capture >= 0 and self.events:
            self._warm_up()
        else:
            (self.replay or self.step)()
        return self._send()

    def step(self) -> None:
        """What a graph captures: tokens through the model, one more sampled."""
        self.choices = []
        # The longest cache is a plain number, which a graph keeps: unknown, so what the capacity holds counts.
        hidden = self.model.run(self.cache, self.tokens, self.lengths, self.slots, self.bounds, 1, None, self.expert_load, self.live, self.choices)
        self.lengths.add_(self.live)
        self.pick(hidden)

    def pick(self, hidden: Tensor) -> None:
        self.logits = self.model.logits(hidden)
        sample(self.logits, self.temperature, self.top_p, self.draws, out=self.sampled)
        tokens = self.sampled.clamp(min=0)
        self.tokens.copy_(tokens)
        self.live.mul_((tokens[:, None] != self.eos_ids).all(1))
        if self.with_logprobs:
            self.logprobs.copy_(token_logprobs(self.logits, tokens))

    def _draw(self) -> None:
        """Brings the next random number of each sequence to the device."""
        if self.temperature:
            host = self.host[self.done % 2][2][:len(self.rows)]
            for row, generator in zip(host, self.generators):
                row.uniform_(generator=generator)
            self.draws.copy_(host, non_blocking=True)

    def _send(self) -> "Sent":
        """Starts the copy of the last step's results to the host."""
        at = self.done % 2
        self.done += 1
        tokens, logprobs = (buffer[:len(self.rows)] for buffer in self.host[at][:2])
        tokens.copy_(self.sampled, non_blocking=True)
        if self.with_logprobs:
            logprobs.copy_(self.logprobs, non_blocking=True)
        if self.events:
            self.events[at].record(torch.cuda.current_stream(self.model.device))
        return Sent(self.rows, tokens, logprobs if self.with_logprobs else None, self.events[at] if self.events else None)

    def _keep(self, rows: list[int]) -> None:
        at = [self.rows.index(row) for row in rows]
        for name in ("tokens", "lengths", "slots", "live", "sampled", "logprobs", "draws"):
            setattr(self, name, getattr(self, name)[at])
        self.bounds = self.bounds[:len(rows) + 1]
        self.rows, self.generators = rows, [self.generators[i] for i in at] if self.generators else []

    def _warm_up(self) -> None:
        """A step on another stream, as torch.cuda.graphs asks before a capture."""
        current, side = torch.cuda.current_stream(self.model.device), side_stream(self.model.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.step()
        current.wait_stream(side)


class Sent:
    """Tokens on their way to the host. To be read before the step after the next one is asked for."""

    def __init__(self, rows: list[int], tokens: Tensor, logprobs: Tensor | None, event):
        self.rows, self.tokens, self.logprobs, self.event = rows, tokens, logprobs, event

    def read(self) -> Iterator[tuple[int, int, float | None]]:
        """Sequence, token (-1: see Decoder) and log-probability (None if not asked for) of each; waits for them."""
        if self.event:
            self.event.synchronize()
        return zip(self.rows, self.tokens.tolist(), itertools.repeat(None) if self.logprobs is None else self.logprobs.tolist())


def sample(logits: Tensor, temperature: float, top_p: float, draws: Tensor, out: Tensor | None = None) -> Tensor:
    """One token i64 [N] for each row of logits [N, V], -1 where they are not finite. draws f64 [N, 1]: numbers from 0 to 1.
    top_p keeps the smallest set of likeliest tokens that reaches it."""
    largest, tokens = logits.max(1)
    if temperature != 0:
        # The largest becomes 0 before the division, and CUDA would multiply by the reciprocal of a number: no temperature overflows.
        probabilities = ((logits.double() - largest[:, None]) / torch.full_like(largest[:, None], temperature, dtype=torch.float64)).softmax(1)
        order = None
        if top_p < 1:
            probabilities, order = probabilities.sort(dim=1, descending=True, stable=True)
        cumulative = probabilities.cumsum(1)
        total = cumulative[:, -1:]
        if order is not None:
            kept = (cumulative - probabilities < top_p).sum(1, keepdim=True)
            total = cumulative.gather(1, kept.clamp(min=1) - 1)  # none where all is NaN
        picked = torch.searchsorted(cumulative, draws * total, right=True)  # inverse of the distribution function
        picked.clamp_(max=logits.shape[1] - 1)  # NaN is beyond all
        tokens = (picked if order is None else order.gather(1, picked))[:, 0]
    sound = largest.abs() < math.inf  # a NaN anywhere is the largest
    return torch.where(sound, tokens, torch.full_like(tokens, -1), out=out)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log-probability f32 [N] of tokens [N] under logits [N, V]."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


def score(model: Model, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Natural log-probability f32 [N] of tokens [N] after the hidden states [N, H]; 256 rows of logits at a time bound the memory."""
    return torch.cat([token_logprobs(model.logits(h), t) for h, t in zip(hidden.split(256), tokens.split(256))])
