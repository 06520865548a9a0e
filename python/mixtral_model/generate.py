"""Chunked prefill, decoding and sampling for a batch of prompts of any lengths."""
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from .config import ModelConfig, ModelError
from .model import Cache, Model, check_ids


@dataclass
class Completion:
    token_ids: list[int] = field(default_factory=list)          # new tokens, the end-of-sequence token included
    finish_reason: str = "length"                               # or "eos"
    logprobs: list[float] = field(default_factory=list)         # natural log of each new token's probability, if asked for
    prompt_logprobs: list[float] = field(default_factory=list)  # of prompt tokens 1, 2, ..., if asked for


def generate(model: Model, prompts: list[list[int]], max_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0, chunk_size: int = 2048, eos_ids: Iterable[int] | int | None = None, logprobs: bool = False,
             prompt_logprobs: bool = False, on_token: Callable[[int, int], None] | None = None,
             on_prefill: Callable[[int], None] | None = None, expert_load: Tensor | None = None) -> list[Completion]:
    """Continues each prompt (token ids) by up to max_tokens tokens, or to the first of eos_ids (default: the model's).

    temperature 0 is greedy. Prompt i draws from its own generator, seeded with seed + i, so its tokens do not depend on
    the rest of the batch. At most chunk_size tokens of each prompt pass through the model at a time. Log-probabilities
    are the model's own, before temperature and top_p; with max_tokens 0 a prompt is only scored.
    on_token(i, token) is called for every new token of prompt i, on_prefill(n) whenever n more prompt tokens are done.
    expert_load: see Model.forward."""
    check_request(model.config, prompts, max_tokens, temperature, top_p, seed, chunk_size)
    if not prompts:
        return []
    eos_ids = model.config.eos_ids if eos_ids is None else eos_ids
    eos_ids = list(eos_ids) if isinstance(eos_ids, Iterable) else [eos_ids]
    if not all(isinstance(token, Integral) for token in eos_ids):
        raise ModelError(f"eos_ids: expected token ids or None, got {eos_ids!r}")
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_tokens)
    results = [Completion() for _ in prompts]
    generators = [torch.Generator().manual_seed(int(seed) + i) for i in range(len(prompts))]

    hidden = _prefill(model, cache, prompts, chunk_size, results if prompt_logprobs else None, on_prefill, expert_load)
    active = list(range(len(prompts))) if max_tokens else []
    while active:
        logits = model.logits(hidden)  # [len(active), V]
        tokens = sample(logits, temperature, top_p, [generators[i] for i in active])
        scores = token_logprobs(logits, tokens).tolist() if logprobs else None
        for row, (i, token) in enumerate(zip(active, tokens.tolist())):
            results[i].token_ids.append(token)
            if logprobs:
                results[i].logprobs.append(scores[row])
            if token in eos_ids:
                results[i].finish_reason = "eos"
            if on_token:
                on_token(i, token)
        # finished sequences leave the batch
        active = [i for i in active if results[i].finish_reason == "length" and len(results[i].token_ids) < max_tokens]
        if active:
            hidden = model.forward([results[i].token_ids[-1:] for i in active], cache, active, expert_load)
    return results


def check_request(config: ModelConfig, prompts: list[list[int]], max_tokens: int, temperature: float, top_p: float, seed: int,
                  chunk_size: int) -> None:
    """ModelError for arguments that generate() would refuse; needs no weights."""
    for name, value, kind, expected, accepts in (
            ("temperature", temperature, Real, "a finite number of at least 0", lambda x: 0 <= x < math.inf),
            ("top_p", top_p, Real, "a number above 0 and at most 1", lambda x: 0 < x <= 1),
            ("seed", seed, Integral, "an integer from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63),
            ("max_tokens", max_tokens, Integral, "an integer of at least 0", lambda x: x >= 0),
            ("chunk_size", chunk_size, Integral, "an integer of at least 1", lambda x: x >= 1)):
        if not isinstance(value, kind) or not accepts(value):
            raise ModelError(f"{name}: expected {expected}, got {value!r}")
    if not isinstance(prompts, (list, tuple)):
        raise ModelError(f"prompts: expected a list of prompts, each a list of token ids, got {prompts!r:.80}")
    limit = config.max_positions
    for i, prompt in enumerate(prompts):
        check_ids(f"prompt {i}", prompt, config.vocab_size)
        if config.window is None and len(prompt) + max_tokens > limit:
            raise ModelError(f"prompt {i}: expected at most {limit} positions (the model has no window), "
                             f"got {len(prompt)} tokens and {max_tokens} to come")


def _prefill(model: Model, cache: Cache, prompts, chunk_size, score_into, on_prefill, expert_load) -> Tensor:
    """Runs all prompts into the cache -> hidden states of their last tokens [B, H]."""
    last = [None] * len(prompts)
    for start in range(0, max(map(len, prompts)), chunk_size):
        slots = [i for i, prompt in enumerate(prompts) if start < len(prompt)]
        chunks = [prompts[i][start:start + chunk_size] for i in slots]
        hidden = model.forward(chunks, cache, slots, expert_load)
        for i, rows in zip(slots, hidden.split([len(chunk) for chunk in chunks])):
            if start + len(rows) == len(prompts[i]):
                last[i] = rows[-1]
            if score_into:
                next_tokens = torch.tensor(prompts[i][start + 1:start + len(rows) + 1], device=model.device)
                for r, t in zip(rows.split(256), next_tokens.split(256)):  # 256 rows of logits at a time bound the memory
                    score_into[i].prompt_logprobs += token_logprobs(model.logits(r[:len(t)]), t).tolist()
        if on_prefill:
            if hidden.is_cuda:
                torch.cuda.synchronize(hidden.device)  # done, not only queued
            on_prefill(len(hidden))
    return torch.stack(last)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural log-probability f32 [N] of tokens [N] under logits [N, V]."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


def sample(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> Tensor:
    """One token for each row of logits [N, V]. top_p keeps the smallest set of likeliest tokens that reaches it."""
    largest, tokens = logits.max(1)
    if not largest.isfinite().all():  # a NaN anywhere is the largest
        raise ModelError("sampling: expected finite logits, got NaN or infinity (are the weights sound?)")
    if temperature == 0:
        return tokens
    # The largest becomes 0 before the division, and CUDA would multiply by the reciprocal of a number: no temperature overflows.
    probabilities = ((logits.double() - largest[:, None]) / torch.full_like(largest[:, None], temperature, dtype=torch.float64)).softmax(1)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(dim=1, descending=True, stable=True)
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    if order is not None:
        kept = (cumulative - probabilities < top_p).sum(1, keepdim=True)
        total = cumulative.gather(1, kept - 1)
    draws = torch.stack([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    picked = torch.searchsorted(cumulative, draws.to(total.device) * total, right=True)  # inverse of the distribution function
    return (picked if order is None else order.gather(1, picked))[:, 0]


class Speed:
    """Times one generate(): call token() for each new one."""

    def __init__(self, prompts: list[list[int]]):
        self.prompt_tokens, self.prompts, self.new_tokens = sum(map(len, prompts)), len(prompts), 0
        self.start = self.first = self.last = time.perf_counter()

    def token(self) -> None:
        self.last = time.perf_counter()
        self.new_tokens += 1
        if self.new_tokens == 1:
            self.first = self.last

    @property
    def prefill(self) -> float:
        """Prompt tokens a second, up to the first new token (without one, up to now)."""
        first = self.first if self.new_tokens else time.perf_counter()
        return self.prompt_tokens / max(first - self.start, 1e-9)

    @property
    def decode(self) -> float:
        """New tokens a second after the first step of the batch."""
        return max(self.new_tokens - self.prompts, 0) / max(self.last - self.first, 1e-9)
