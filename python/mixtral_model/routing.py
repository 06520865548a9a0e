"""Which tokens go to which experts, by layer and domain of text: the routing analysis of the Mixtral paper, for any Mixtral.

The choices are those that the model itself makes (mixtral_ext.moe_gate's topk_ids of every layer) while it reads the texts. All
tokens count, the beginning-of-sequence token too. A long text is read in segments, each with an empty cache before it; two
tokens are consecutive if they are so within a segment.

Shapes: L layers, T tokens of a domain, E experts, K of them per token; a slot is one of the T*K choices of a layer.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig, ModelError
from .model import Model, check_ids
from .output import new_figure, plots_are_possible, save_figure, write_csv
from .tokenizer import Tokenizer

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class Routing:
    """Of the texts of one domain."""
    tokens: Tensor    # i64 [T]
    topk_ids: Tensor  # i64 [L, T, K], first choice first
    follows: Tensor   # bool [T-1]: token t+1 follows token t in the same segment


@dataclass(frozen=True)
class TopToken:
    token: int
    count: int        # its occurrences that the expert gets, by any of the K choices
    occurrences: int  # all of them
    lift: float       # count / expected: the token's share of what the expert gets over its share of all tokens
    score: float      # (count - expected) / standard deviation, were occurrences sent to the expert at its overall rate


def domain_files(texts: list[str], named: list[str]) -> dict[str, list[str]]:
    """Files of --text, each a domain with the file's name, and NAME=FILE of --domain; files of one name are one domain."""
    domains = {}
    for path in texts:
        domains.setdefault(Path(path).stem, []).append(path)
    for item in named:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise ModelError(f"domain: expected NAME=FILE, got {item!r}")
        domains.setdefault(name, []).append(path)
    if not domains:
        raise ModelError("no text: give --text or --domain")
    return domains


def check_request(config: ModelConfig, domains: dict[str, list[list[int]]], context: int | None, chunk_size: int, top: int) -> int:
    """The context; ModelError for what record() and show() could not serve. Needs no weights."""
    if not config.num_experts:
        raise ModelError("routing: expected a model with experts (Mixtral), got a dense one (Mistral), which routes nothing")
    for name, texts in domains.items():
        for text in texts:
            check_ids(f"domain {name}", text, config.vocab_size)
    if context is None:
        context = min(DEFAULT_CONTEXT, config.max_positions)
    for name, value, most in (("context", context, config.max_positions), ("chunk_size", chunk_size, math.inf), ("top", top, math.inf)):
        if not isinstance(value, Integral) or not 1 <= value <= most:
            expected = "an integer of at least 1" if most == math.inf else f"an integer from 1 to {most} (the model's positions)"
            raise ModelError(f"{name}: expected {expected}, got {value!r}")
    return context


def record(model: Model, texts: list[list[int]], context: int = DEFAULT_CONTEXT, chunk_size: int = 2048,
           on_tokens: Callable[[int], None] = lambda n: None) -> Routing:
    """Reads the texts in segments of at most `context` tokens, chunk_size at a time; on_tokens(n): n more tokens are read."""
    choices, follows = [], []
    for text in texts:
        for at in range(0, len(text), context):
            segment = text[at:at + context]
            cache = model.new_cache(1, len(segment))
            for start in range(0, len(segment), chunk_size):
                chunk, of_layers = segment[start:start + chunk_size], []
                model.forward([chunk], cache, [0], topk_ids=of_layers)
                choices.append(torch.stack(of_layers).cpu())
                on_tokens(len(chunk))
            follows += [False] + [True] * (len(segment) - 1)
    tokens = torch.tensor([token for text in texts for token in text])
    return Routing(tokens, torch.cat(choices, 1).long(), torch.tensor(follows[1:], dtype=torch.bool))


def expert_load(routing: Routing, experts: int) -> tuple[Tensor, Tensor]:
    """Slots of each expert, and tokens whose first choice it is: i64 [L, E] both."""
    return tuple(torch.stack([layer.flatten().bincount(minlength=experts) for layer in ids])
                 for ids in (routing.topk_ids, routing.topk_ids[:, :, :1]))


def repetitions(routing: Routing) -> tuple[Tensor, Tensor]:
    """Pairs of consecutive tokens with the same first choice, and with any of their K choices in common: i64 [L] both."""
    before, after = routing.topk_ids[:, :-1][:, routing.follows], routing.topk_ids[:, 1:][:, routing.follows]
    common = [(b[:, :, None] == a[:, None, :]).flatten(1).any(1).sum() for b, a in zip(before, after)]
    return (before[:, :, 0] == after[:, :, 0]).sum(1), torch.stack(common)


def random_repetition(experts: int, top_k: int) -> tuple[float, float]:
    """The shares that repetitions() would approach if each token drew its K experts at random: 1/E and 1 - C(E-K, K) / C(E, K)."""
    return 1 / experts, 1 - math.comb(experts - top_k, top_k) / math.comb(experts, top_k)


def top_tokens(routing: Routing, layer: int, experts: int, top: int) -> list[list[TopToken]]:
    """For each expert the tokens that it gets more often than at its overall rate, those first where chance explains it least
    (by lift alone, tokens that occur once would come first)."""
    kinds, index, occurrences = routing.tokens.unique(return_inverse=True, return_counts=True)
    total, cells = len(routing.tokens), experts * len(kinds)
    counts = (routing.topk_ids[layer] * len(kinds) + index[:, None]).flatten().bincount(minlength=cells).view(experts, -1)
    result = []
    for count, gets in zip(counts, counts.sum(1).tolist()):
        more = (count * total > gets * occurrences).nonzero()[:, 0]
        rate, n = gets / total, occurrences[more].double()
        lift, score = count[more] / (rate * n), (count[more] - rate * n) / (rate * (1 - rate) * n).sqrt()
        order = score.argsort(descending=True, stable=True)[:top]
        best = more[order]
        columns = kinds[best], count[best], occurrences[best], lift[order], score[order]
        result.append([TopToken(*row) for row in zip(*(column.tolist() for column in columns))])
    return result


def show(recorded: dict[str, Routing], config: ModelConfig, tokenizer: Tokenizer, top: int, output: Path | None) -> None:
    """Tables; with a directory also expert_load.csv, repetition.csv, top_tokens.csv and, with matplotlib, expert_load.png (three
    layers), expert_load_by_layer.png and repetition.png."""
    layers, experts = config.num_layers, config.num_experts
    random = random_repetition(experts, config.top_k)
    loads = {name: expert_load(routing, experts) for name, routing in recorded.items()}
    repeats = {name: repetitions(routing) for name, routing in recorded.items()}
    pairs = {name: int(routing.follows.sum()) for name, routing in recorded.items()}
    tops = {name: [top_tokens(routing, layer, experts, top) for layer in range(layers)] for name, routing in recorded.items()}
    text_of = _TokenTexts(tokenizer)

    _print_shares(recorded, loads, repeats, pairs, config, random)
    _print_top_tokens(tops, text_of, _three(layers))
    if output is None:
        return
    print()
    write_csv(output / "expert_load.csv",
              ["domain", "layer", "expert", "tokens", "slots", "slot_share", "first_choices", "first_choice_share"],
              [(name, layer, e, len(routing.tokens), slots, slots / routing.topk_ids[layer].numel(), firsts, firsts / len(routing.tokens))
               for name, routing in recorded.items() for layer in range(layers)
               for e, (slots, firsts) in enumerate(zip(*(load[layer].tolist() for load in loads[name])))])
    write_csv(output / "repetition.csv",
              ["domain", "layer", "pairs", "choice", "repetitions", "share", "random_share"],
              [(name, layer, pairs[name], choice, repeated, repeated / pairs[name] if pairs[name] else None, expected)
               for name in recorded for layer in range(layers)
               for choice, counts, expected in zip(("first", "any"), repeats[name], random) for repeated in [int(counts[layer])]])
    write_csv(output / "top_tokens.csv",
              ["domain", "layer", "expert", "rank", "token_id", "token", "count", "occurrences", "lift", "score"],
              [(name, layer, e, rank, t.token, text_of[t.token], t.count, t.occurrences, t.lift, t.score)
               for name, of_layers in tops.items() for layer, of_experts in enumerate(of_layers)
               for e, found in enumerate(of_experts) for rank, t in enumerate(found, 1)])
    if not plots_are_possible():
        return
    _plot_load(loads, _three(layers), config, output / "expert_load.png")
    _plot_load_by_layer(loads, config, output / "expert_load_by_layer.png")
    _plot_repetition(repeats, pairs, config, random, output / "repetition.png")


def _three(layers: int) -> list[int]:
    """First, middle and last, as the paper shows."""
    return sorted({0, (layers - 1) // 2, layers - 1})


def _any_choice(top_k: int) -> str:
    return {1: "first choice", 2: "first or second choice"}.get(top_k, f"any of {top_k} choices")


class _TokenTexts(dict):
    """Token id -> its text within a text (a tokenizer drops the space before the first of a run), or <id> if it has none."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.before = tokenizer, tokenizer.encode("a")

    def __missing__(self, token: int) -> str:
        text = self.tokenizer.decode(self.before + [token])[len(self.tokenizer.decode(self.before)):]
        self[token] = text or f"<{token}>"
        return self[token]


def _print_shares(recorded, loads, repeats, pairs, config, random) -> None:
    width = max(6, *map(len, recorded))
    print(f"eK: % of the {config.top_k} slots of each token that expert K gets ({100 / config.num_experts:.1f} if even)\n"
          f"same 1st: % of consecutive tokens with the same first choice ({100 * random[0]:.1f} if random)\n"
          f"same any: % with the same expert as {_any_choice(config.top_k)} ({100 * random[1]:.1f} if random)\n")
    print(f"{'domain':{width}} {'tokens':>8} {'layer':>5} " + "".join(f"{f'e{e}':>6}" for e in range(config.num_experts)) +
          f"{'same 1st':>10}{'same any':>10}")
    for name, routing in recorded.items():
        for layer, slots in enumerate(loads[name][0]):
            shares = [f"{100 * int(repeated[layer]) / pairs[name]:10.1f}" if pairs[name] else f"{'-':>10}" for repeated in repeats[name]]
            print(f"{name:{width}} {len(routing.tokens):8} {layer:5} " + "".join(f"{100 * x:6.1f}" for x in (slots / slots.sum()).tolist()) +
                  "".join(shares))


def _print_top_tokens(tops, text_of, layers) -> None:
    print("\nthe most over-represented tokens of each expert: occurrences that it gets, of all, lift")
    for name, of_layers in tops.items():
        for layer in layers:
            print(f"\n{name}, layer {layer}")
            for e, found in enumerate(of_layers[layer]):
                print(f"  e{e}  " + "  ".join(f"{text_of[t.token]!r} {t.count}/{t.occurrences} {t.lift:.1f}x" for t in found))


def _plot_load(loads, layers, config, path) -> None:
    """Bars by domain for three layers: all slots, and first choices."""
    figure = new_figure(11, 1 + 2.2 * len(layers))
    experts, width = config.num_experts, 0.8 / len(loads)
    axes = figure.subplots(len(layers), 2, sharex=True, sharey=True, squeeze=False)
    for row, layer in zip(axes, layers):
        for column, (ax, choice) in enumerate(zip(row, (_any_choice(config.top_k), "first choice"))):
            for i, (name, load) in enumerate(loads.items()):
                at = [e + (i - (len(loads) - 1) / 2) * width for e in range(experts)]
                ax.bar(at, (100 * load[column][layer] / load[column][layer].sum()).tolist(), width, label=name)
            ax.axhline(100 / experts, color="black", linewidth=0.8, linestyle="--", label=f"even, {100 / experts:.1f} %")
            ax.set_title(f"layer {layer}, {choice}", fontsize="medium")
    for ax in axes[-1]:
        ax.set_xlabel("expert")
        ax.set_xticks(range(experts))
    for ax in axes[:, 0]:
        ax.set_ylabel("% of slots")
    for ax in axes[:, 1]:
        ax.set_ylabel("% of tokens")
    figure.suptitle("Share of tokens that each expert gets, by domain")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=min(len(loads) + 1, 6), loc="outside lower center")
    save_figure(figure, path)


def _plot_load_by_layer(loads, config, path) -> None:
    """A map of layers and experts for each domain, white where an expert gets its even share."""
    columns = min(len(loads), 4)
    rows = -(-len(loads) // columns)
    figure = new_figure(1.5 + 2.6 * columns, 1.2 + rows * (1 + 0.12 * config.num_layers))
    from matplotlib.colors import TwoSlopeNorm
    shares = [100 * slots / slots.sum(1, keepdim=True) for slots, _ in loads.values()]
    even, most = 100 / config.num_experts, max(share.max().item() for share in shares)
    norm = TwoSlopeNorm(even, vmin=0, vmax=max(2 * even, most))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for ax, name, share in zip(axes, loads, shares):
        image = ax.imshow(share.tolist(), cmap="RdBu_r", norm=norm, aspect="auto")
        ax.set(title=name, xlabel="expert", ylabel="layer")
        ax.label_outer()
        for axis in (ax.xaxis, ax.yaxis):
            axis.get_major_locator().set_params(integer=True)
    for ax in axes[len(loads):]:
        ax.set_visible(False)
    figure.suptitle(f"Share of slots by layer and expert (even: {even:.1f} %)", fontsize="medium")
    figure.colorbar(image, ax=axes.tolist(), label="% of slots")
    save_figure(figure, path)


def _plot_repetition(repeats, pairs, config, random, path) -> None:
    """A line by domain over all layers: same first choice, and any choice in common."""
    figure = new_figure(11, 4.2)
    axes = figure.subplots(1, 2)
    for ax, kind, title, expected in zip(axes, (0, 1), ("first choice", _any_choice(config.top_k)), random):
        for name, counts in repeats.items():
            if pairs[name]:
                ax.plot(range(config.num_layers), (100 * counts[kind] / pairs[name]).tolist(), marker="o", markersize=4, label=name)
        ax.axhline(100 * expected, color="black", linewidth=0.8, linestyle="--", label="random")
        ax.set(xlabel="layer", ylabel="% of consecutive tokens", title=f"same expert as {title} (random: {100 * expected:.1f} %)")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    figure.suptitle("Consecutive tokens that go to the same expert, by domain")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=min(len(repeats) + 1, 6), loc="outside lower center")
    save_figure(figure, path)
