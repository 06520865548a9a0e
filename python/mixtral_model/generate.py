"""Chunked prefill, decoding and sampling for a batch of prompts of any lengths."""
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from .config import ModelConfig, ModelError
from .decode import Decoder, score
from .model import Cache, Model, check_expert_load, check_ids, upload


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
    expert_load: see Model.forward; increased at the end."""
    check_request(model.config, prompts, max_tokens, temperature, top_p, seed, chunk_size)
    if not prompts:
        return []
    eos_ids = model.config.eos_ids if eos_ids is None else eos_ids
    eos_ids = list(eos_ids) if isinstance(eos_ids, Iterable) else [eos_ids]
    if not all(isinstance(token, Integral) for token in eos_ids):
        raise ModelError(f"eos_ids: expected token ids or None, got {eos_ids!r}")
    check_expert_load(model.config, expert_load)
    load = None if expert_load is None else torch.zeros_like(expert_load, device=model.device)
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_tokens)
    results = [Completion() for _ in prompts]
    hidden = prefill(model, cache, prompts, chunk_size, results if prompt_logprobs else None, on_prefill, load)
    if max_tokens:
        generators = [torch.Generator().manual_seed(int(seed) + i) for i in range(len(prompts))]
        decoder = Decoder(model, cache, max_tokens - 1, temperature=temperature, top_p=top_p, generators=generators, eos_ids=eos_ids,
                          logprobs=logprobs, expert_load=load)
        _decode(decoder, hidden, max_tokens, results, eos_ids, on_token)
    if load is not None:
        expert_load += load.to(expert_load.device)
    return results


def _decode(decoder: Decoder, hidden: Tensor, max_tokens: int, results: list[Completion], eos_ids: list[int], on_token) -> None:
    sent = decoder.first(hidden)
    for left in reversed(range(max_tokens)):
        ahead = decoder.next() if left and decoder.overlaps else None  # under way while the last step's tokens are read
        # those that have ended may still be in a static batch
        read = [(i, token, logprob) for i, token, logprob in sent.read() if results[i].finish_reason != "eos"]
        if any(token < 0 for _, token, _ in read):
            raise ModelError("sampling: expected finite logits, got NaN or infinity (are the weights sound?)")
        for i, token, logprob in read:
            result = results[i]
            result.token_ids.append(token)
            if decoder.with_logprobs:
                result.logprobs.append(logprob)
            if token in eos_ids:
                result.finish_reason = "eos"
            if on_token:
                on_token(i, token)
        active = [i for i, result in enumerate(results) if result.finish_reason != "eos"]
        if not active:
            break
        if left:
            sent = ahead or decoder.next(active)


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


@torch.inference_mode()
def prefill(model: Model, cache: Cache, prompts: list[list[int]], chunk_size: int, score_into: list[Completion] | None = None,
            on_prefill: Callable[[int], None] | None = None, expert_load: Tensor | None = None) -> Tensor:
    """Runs all prompts into the cache -> hidden states of their last tokens [B, H]. Waits for the device only to tell on_prefill, and for
    scores at the end."""
    last, scores = [None] * len(prompts), [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), chunk_size):
        slots = [i for i, prompt in enumerate(prompts) if start < len(prompt)]
        chunks = [prompts[i][start:start + chunk_size] for i in slots]
        hidden = model.forward(chunks, cache, slots, expert_load)
        for i, rows in zip(slots, hidden.split([len(chunk) for chunk in chunks])):
            if start + len(rows) == len(prompts[i]):
                last[i] = rows[-1]
            if score_into:
                next_tokens = upload(prompts[i][start + 1:start + len(rows) + 1], torch.int64, model.device)
                scores[i].append(score(model, rows[:len(next_tokens)], next_tokens))
        if on_prefill:
            if hidden.is_cuda:
                torch.cuda.synchronize(hidden.device)  # done, not only queued
            on_prefill(len(hidden))
    for result, parts in zip(score_into or [], scores):
        result.prompt_logprobs = torch.cat(parts).tolist() if parts else []
    return torch.stack(last)


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
