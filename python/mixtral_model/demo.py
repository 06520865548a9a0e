"""The main job without a checkpoint at hand: a small seeded Mixtral reads a long English text and goes on, beside
transformers on the same files. The weights are random, so the new text means nothing; routing, window, cache, tokens
and speed are those of any model of this size."""
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import ModelError, read_config
from .generate import Speed, generate
from .model import Model
from .output import new_figure, plots_are_possible, save_figure
from .tokenizer import TextStream, Tokenizer
from .weights import DTYPES, find_device

CONFIG = dict(architectures=["MixtralForCausalLM"], model_type="mixtral", vocab_size=32000, hidden_size=512,
              intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
              num_local_experts=8, num_experts_per_tok=2, sliding_window=256, max_position_embeddings=32768,
              rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, hidden_act="silu",
              tie_word_embeddings=False, dtype="float32", bos_token_id=1, eos_token_id=None)
PROMPT_TOKENS = 2048  # eight windows
NEW_TOKENS = 64


def demo(output: str | Path, device: str = "cpu") -> None:
    output, device = Path(output), find_device(device)
    first, *more = ("f32", "bf16") if device.type == "cpu" else ("bf16",)
    directory = output / "checkpoint"
    write_checkpoint(directory)
    config, tokenizer = read_config(directory), Tokenizer(directory)
    prompt = tokenizer.encode(_text())[:PROMPT_TOKENS]
    windows = f"{len(prompt) / config.window:.0f} windows"
    print(f"A seeded Mixtral in {directory}: {config.parameters() / 1e6:.0f} M parameters, "
          f"{config.parameters(active=True) / 1e6:.0f} M active, window {config.window}, the tokenizer of Mixtral 8x7B.\n"
          f"It reads {len(prompt)} tokens of Python's documentation, {windows}, and goes on (random weights, so nonsense):\n")

    print("..." + tokenizer.decode(prompt[-60:]) + " >>> ", end="", flush=True)
    stream = TextStream(tokenizer, prompt)
    load = torch.zeros(config.num_layers, config.num_experts, dtype=torch.int64, device=device)
    tokens, speed = _run(directory, first, device, prompt, lambda token: print(stream.push(token), end="", flush=True), load)
    print(stream.flush() + "\n")
    load = load.cpu()
    _show_load(load, output)
    print()

    size = DTYPES[first].itemsize
    rows = [("prompt read through the window", f"{len(prompt)} tokens, {windows}", ""),
            (f"key/value cache, {first}", f"{config.cache_bytes(config.window, size) / 1e6:.1f} MB",
             f"{config.cache_bytes(len(prompt) + NEW_TOKENS, size) / 1e6:.1f} MB without a window"),
            ("busiest expert, mean over layers", f"{(load.amax(1) / load.sum(1)).mean():.1%} of the rows",
             f"{1 / config.num_experts:.1%} if even")]
    peer, failure = "", None
    speeds = {first: (speed, None)}
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no comparison (pip install 'mixtral_ext[bench]')\n")
    else:
        peer = "transformers " + transformers.__version__
        print(f"The same files and prompt through {peer} in {first}{', then both in bf16' if more else ''} ...", flush=True)
        their_tokens, their_speed = _run_transformers(directory, first, device, prompt)
        speeds[first] = speed, their_speed
        for dtype in more:
            speeds[dtype] = _run(directory, dtype, device, prompt)[1], _run_transformers(directory, dtype, device, prompt)[1]
        if first == "f32":
            rows.append(("greedy tokens equal, f32", f"{sum(a == b for a, b in zip(tokens, their_tokens))} of {NEW_TOKENS}", ""))
            if tokens != their_tokens:
                failure = f"greedy tokens in f32 differ from those of {peer}"
        else:  # rounding may change the likeliest token
            ours, theirs = _bf16_errors(directory, device, prompt)
            rows.append(("median error of log-probabilities", f"{ours:.2g}", f"{theirs:.2g} (both bf16, from its f32)"))
            if not ours <= 2 * theirs:
                failure = f"log-probabilities in bf16 are more than twice as far from f32 as those of {peer}"
    for dtype, (ours, theirs) in speeds.items():
        for what in ("prefill", "decode"):
            mine, other = getattr(ours, what), getattr(theirs, what, None)
            capture = " (ours with the capture)" if what == "decode" and device.type == "cuda" else ""
            rows.append((f"{what}, {dtype}{capture}", f"{mine:.0f} tokens/s", f"{other:.0f} tokens/s (ours {mine / other:.1f}x)" if other else ""))
    _print_table(rows, peer)
    if failure:
        raise ModelError(failure)


def write_checkpoint(directory: Path) -> None:
    """A random Mixtral with the names and layout that transformers writes, and the tokenizer that mistral-common carries.
    Variances are chosen so that activations, router logits and attention scores are of order one."""
    from mistral_common.tokens.tokenizers import mistral
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):  # [out, in]
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    h, i, v, d = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"], CONFIG["head_dim"]
    q, kv = CONFIG["num_attention_heads"] * d, CONFIG["num_key_value_heads"] * d
    tensors = {"model.embed_tokens.weight": normal(v, h) * h ** 0.5, "model.norm.weight": torch.ones(h), "lm_head.weight": normal(v, h)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(h)
        tensors[f"{prefix}block_sparse_moe.gate.weight"] = normal(CONFIG["num_local_experts"], h)
        for expert in range(CONFIG["num_local_experts"]):
            for name, shape in {"w1": (i, h), "w2": (h, i), "w3": (i, h)}.items():
                tensors[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"] = normal(*shape)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    shutil.copyfile(Path(mistral.__file__).parents[2] / "data" / "tokenizer.model.v1", directory / "tokenizer.model.v1")


def _text() -> str:
    from pydoc_data.topics import topics
    return "\n".join(topics[name] for name in sorted(topics))


def _warm_up(prompt, device):
    return prompt if device.type == "cuda" else prompt[:8]  # a GPU loads a kernel when it first runs


def _run(directory, dtype, device, prompt, show=lambda token: None, load=None) -> tuple[list[int], Speed]:
    """Our greedy tokens and speed, after a warm-up."""
    model = Model.load(directory, DTYPES[dtype], device=device)
    generate(model, [_warm_up(prompt, device)], 2)
    speed = Speed([prompt])

    def on_token(_, token):
        speed.token()
        show(token)
    return generate(model, [prompt], NEW_TOKENS, on_token=on_token, expert_load=load)[0].token_ids, speed


def _load_transformers(directory, dtype, device, **options):
    from transformers import AutoModelForCausalLM, logging
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype], **options).to(device).eval()


@torch.inference_mode()
def _run_transformers(directory, dtype, device, prompt) -> tuple[list[int], Speed]:
    """The same through transformers' model, called directly: its generate() would only add to each step."""
    from transformers import DynamicCache
    model = _load_transformers(directory, dtype, device)

    def run(ids, count):
        tokens, cache, speed = [], DynamicCache(config=model.config), Speed([ids])
        while len(tokens) < count:
            logits = model(torch.tensor([ids], device=device), past_key_values=cache, logits_to_keep=1).logits
            tokens.append(int(logits[0, -1].argmax()))
            ids = tokens[-1:]
            speed.token()
        return tokens, speed
    run(_warm_up(prompt, device), 2)
    return run(prompt, NEW_TOKENS)


@torch.inference_mode()
def _bf16_errors(directory, device, prompt) -> list[float]:
    """How far a log-probability of the prompt's tokens in bf16, ours and transformers', is from transformers' in f32: the
    median, for rounding gives a few tokens other experts."""
    ours = generate(Model.load(directory, torch.bfloat16, device=device), [prompt], 0, prompt_logprobs=True)[0].prompt_logprobs

    def theirs(dtype):
        model = _load_transformers(directory, dtype, device, experts_implementation="eager")
        tokens = torch.tensor([prompt], device=device)
        return model(tokens).logits[0, :-1].float().log_softmax(1).gather(1, tokens[0, 1:, None])[:, 0].cpu()
    exact = theirs("f32")
    return [float((x - exact).abs().median()) for x in (torch.tensor(ours), theirs("bf16"))]


def _show_load(load: Tensor, output: Path) -> None:
    """The share of rows that each expert got: a table, and a plot where matplotlib is installed."""
    share = load / load.sum(1, keepdim=True)
    print("expert load, % of rows  " + "".join(f"{f'e{e}':>6}" for e in range(load.shape[1])))
    for layer, row in enumerate(share):
        print(f"{f'layer {layer}':24}" + "".join(f"{100 * x:6.1f}" for x in row.tolist()))
    if not plots_are_possible():
        return
    figure = new_figure(8, 3.2)
    axes = figure.add_subplot()
    layers, experts = share.shape
    width = 0.8 / layers
    for layer, row in enumerate(share):
        at = torch.arange(experts) + (layer - (layers - 1) / 2) * width
        axes.bar(at.tolist(), (100 * row).tolist(), width, label=f"layer {layer}")
    axes.axhline(100 / experts, color="black", linewidth=0.8, linestyle="--", label="even")
    axes.set(xlabel="expert", ylabel="% of rows", xticks=range(experts), title="Expert load while reading and generating")
    figure.legend(ncols=layers + 1, fontsize="small", loc="outside lower center")
    save_figure(figure, output / "expert_load.png")


def _print_table(rows: list[tuple[str, str, str]], peer: str) -> None:
    rows = [("what was shown", "mixtral_ext", peer), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    rows.insert(1, tuple("-" * width for width in widths))
    print("\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows))
