"""python -m mixtral_model generate|inspect|demo|perplexity|routing|bench: see --help of each."""
import argparse
import dataclasses
import os
import sys

if sys.argv[1:2] == ["bench"]:  # a thread stays on its core; the OpenMP runtime reads this when torch is imported
    os.environ.setdefault("OMP_PROC_BIND", "true")

from .config import ModelError, read_config
from .generate import Speed, check_request, generate
from .model import Cache, Model
from .output import make_directory, progress
from .random_weights import MODELS, random_config
from .tokenizer import TextStream, Tokenizer
from .weights import DTYPES

DEVICE = dict(choices=("cpu", "cuda"), default="cpu", help="cuda: an NVIDIA GPU, in bf16 or f16 (default: cpu)")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="mixtral_model", description="Mistral and Mixtral on the ops of mixtral_ext")
    commands = parser.add_subparsers(required=True, metavar="generate | inspect | demo | perplexity | routing | bench")

    command = commands.add_parser("generate", help="continue one or more prompts")
    command.set_defaults(run=_generate)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="transformers or Mistral layout, safetensors")
    command.add_argument("--prompt", action="append", default=[], help="may be given several times: a batch")
    command.add_argument("--prompt-file", action="append", default=[], metavar="FILE", help="a prompt from a UTF-8 file")
    command.add_argument("--chat", action="store_true", help="wrap each prompt in the tokenizer's instruct template")
    command.add_argument("--max-tokens", type=int, default=128)
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    command.add_argument("--top-p", type=float, default=1.0)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--chunk-size", type=int, default=2048, help="prompt tokens per pass and prompt")
    command.add_argument("--logprobs", action="store_true", help="print log-probabilities of prompt and new tokens")
    command.add_argument("--dtype", choices=DTYPES, help="default: that of the checkpoint")
    command.add_argument("--device", **DEVICE)

    command = commands.add_parser("inspect", help="configuration, parameters and cache bytes; needs no weights")
    command.set_defaults(run=_inspect)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("checkpoint", nargs="?", metavar="DIR")
    what.add_argument("--random-weights", choices=MODELS, help="a published model instead")

    command = commands.add_parser("demo", help="a small seeded Mixtral on a long text, beside transformers")
    command.set_defaults(run=_demo)
    command.add_argument("--output", default="demo", metavar="DIR", help="for the checkpoint and the plot (default: demo)")
    command.add_argument("--device", **DEVICE)

    command = commands.add_parser("perplexity", help="perplexity against context length, with and without the window")
    command.set_defaults(run=_perplexity)
    _add_reading_arguments(command)
    command.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 files; no context crosses them")
    command.add_argument("--context", nargs="+", type=int, metavar="N",
                         help="in tokens (default: powers of two from 256 to 8192, as far as texts and model allow)")
    command.add_argument("--stride", type=int, metavar="N", help="tokens scored per context (default: half of the shortest)")
    command.add_argument("--window", type=int, metavar="N", help="default: that of the checkpoint, if it has one")

    command = commands.add_parser("routing", help="which tokens go to which experts, by layer and domain of text")
    command.set_defaults(run=_routing)
    _add_reading_arguments(command)
    command.add_argument("--text", nargs="+", default=[], metavar="FILE", help="UTF-8 files, each a domain of its name")
    command.add_argument("--domain", nargs="+", default=[], metavar="NAME=FILE", help="the same with a name; files of one name are one domain")
    command.add_argument("--context", type=int, metavar="N", help="texts are read in segments of N tokens (default: 4096, or what the model allows)")
    command.add_argument("--top", type=int, default=10, metavar="N", help="tokens listed per expert (default: 10)")

    command = commands.add_parser("bench", allow_abbrev=False, help="speed and memory of a whole model, beside the machine's limits and transformers")
    command.set_defaults(run=_bench)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="DIR", help="transformers or Mistral layout, safetensors")
    what.add_argument("--random-weights", choices=MODELS, help="a published model with random weights")
    command.add_argument("--layers", type=int, metavar="N", help="of --random-weights only the first N layers")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="sequences that are decoded together (default: 1 8)")
    command.add_argument("--prompt-tokens", type=int, default=2048, help="of the one prompt that is read (default: 2048)")
    command.add_argument("--context", type=int, help="tokens in the cache of a sequence when decoding begins (default: as the prompt)")
    command.add_argument("--new-tokens", type=int, default=64, help="decoding steps that are timed (default: 64)")
    command.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="transformers on the same weights (default: yes)")
    command.add_argument("--json", metavar="FILE", help="the results, written anew after each peer")
    command.add_argument("--quick", action="store_true", help="few repetitions: shows that it works, not how fast")
    command.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    command.add_argument("--device", **DEVICE)

    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(argv, argparse.Namespace(argv=argv))
    try:
        arguments.run(arguments)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # who read the output has gone (| head): end without a word, also at Python's own last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ModelError, OSError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name.partition('.')[0]} is not installed: pip install 'mixtral_ext[model]'")
    except KeyboardInterrupt:
        sys.exit(130)


def _add_reading_arguments(command) -> None:
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="transformers or Mistral layout, safetensors")
    command.add_argument("--output", metavar="DIR", help="for CSV files and plots (default: tables on the terminal alone)")
    command.add_argument("--chunk-size", type=int, default=2048, metavar="N", help="tokens per pass (default: 2048)")
    command.add_argument("--dtype", choices=DTYPES, help="default: that of the checkpoint")
    command.add_argument("--device", **DEVICE)


def _read_prompt(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: expected UTF-8 text: {error}") from None


def _load(arguments, cache_positions: int) -> Model:
    with progress(f"loading {arguments.checkpoint}", "tensors") as on_tensor:
        return Model.load(arguments.checkpoint, DTYPES.get(arguments.dtype), on_tensor, arguments.device, cache_positions)


def _generate(arguments) -> None:
    from tqdm import tqdm
    config = read_config(arguments.checkpoint)
    texts = arguments.prompt + [_read_prompt(path) for path in arguments.prompt_file]
    if not texts:
        raise ModelError("no prompt: give --prompt or --prompt-file")
    tokenizer = Tokenizer(arguments.checkpoint, config.bos_id)
    prompts = [(tokenizer.encode_chat if arguments.chat else tokenizer.encode)(text) for text in texts]
    settings = dict(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed, chunk_size=arguments.chunk_size)
    check_request(config, prompts, arguments.max_tokens, **settings)  # before the weights are read, which takes minutes

    positions = len(prompts) * Cache.positions(config, max(map(len, prompts)) + arguments.max_tokens)
    model = _load(arguments, positions)
    stream = TextStream(tokenizer, prompts[0])
    bar = tqdm(desc="prefill", total=sum(map(len, prompts)), unit=" tokens", leave=False)
    speed = Speed(prompts)

    def on_token(i: int, token: int) -> None:
        bar.close()
        speed.token()
        if len(prompts) == 1:
            print(stream.push(token), end="", flush=True)

    eos_ids = config.eos_ids or ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    results = generate(model, prompts, arguments.max_tokens, **settings, eos_ids=eos_ids, logprobs=arguments.logprobs,
                       prompt_logprobs=arguments.logprobs, on_token=on_token, on_prefill=bar.update)
    bar.close()
    if len(prompts) == 1:
        print(stream.flush())
    for i, (prompt, result) in enumerate(zip(prompts, results)):
        if len(prompts) > 1:
            print(f"[{i}] {tokenizer.decode(prompt + result.token_ids)}")
        if arguments.logprobs:
            for kind, ids, logprobs in (("prompt", prompt[1:], result.prompt_logprobs), ("new", result.token_ids, result.logprobs)):
                for token, logprob in zip(ids, logprobs):
                    print(f"{kind:6} {token:6d} {logprob:10.4f}  {tokenizer.decode([token])!r}")
    capture = " (with the capture of the step)" if model.device.type == "cuda" else ""
    print(f"{speed.prompt_tokens} prompt tokens at {speed.prefill:.1f} tokens/s, {speed.new_tokens} new tokens at "
          f"{speed.decode:.1f} tokens/s{capture}, {', '.join(result.finish_reason for result in results)}", file=sys.stderr)


def _inspect(arguments) -> None:
    config = random_config(arguments.random_weights) if arguments.random_weights else read_config(arguments.checkpoint)
    for field in dataclasses.fields(config):
        print(f"{field.name:20} {getattr(config, field.name)}")
    print()
    print(f"{'parameters':20} {_count(config.parameters())} ({config.parameters():,})")
    print(f"{'active per token':20} {_count(config.parameters(active=True))} ({config.parameters(active=True):,})")
    print(f"{'weights in bf16':20} {_size(2 * config.parameters())}")
    print("cache of one sequence in bf16")
    if config.window is not None:
        print(f"  {'with the window':18} {_size(config.cache_bytes(min(config.window, config.max_positions), 2))} "
              f"({config.window} positions, however long the text)")
    print(f"  {'without a window':18} {_size(config.cache_bytes(config.max_positions, 2))} ({config.max_positions} positions)")


def _count(n: int) -> str:
    return f"{n / 1e9:.1f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def _perplexity(arguments) -> None:
    from tqdm import tqdm

    from . import perplexity
    config = read_config(arguments.checkpoint)
    tokenizer = Tokenizer(arguments.checkpoint, config.bos_id)
    texts = [(path, tokenizer.encode(_read_prompt(path))) for path in arguments.text]
    plan = perplexity.make_plan(config, texts, arguments.context, arguments.stride, arguments.window, arguments.chunk_size)
    output = make_directory(arguments.output)
    model = _load(arguments, plan.cache_positions())
    with tqdm(desc="perplexity", total=plan.tokens_read(), unit=" tokens", leave=False) as bar:
        points = perplexity.measure(model, plan, bar.update)
    perplexity.show(points, plan, output)


def _routing(arguments) -> None:
    from tqdm import tqdm

    from . import routing
    config = read_config(arguments.checkpoint)
    tokenizer = Tokenizer(arguments.checkpoint, config.bos_id)
    domains = {name: [tokenizer.encode(_read_prompt(path)) for path in paths]
               for name, paths in routing.domain_files(arguments.text, arguments.domain).items()}
    context = routing.check_request(config, domains, arguments.context, arguments.chunk_size, arguments.top)
    output = make_directory(arguments.output)
    longest = max(len(text) for texts in domains.values() for text in texts)
    model = _load(arguments, Cache.positions(config, min(context, longest)))
    with tqdm(desc="routing", total=sum(len(text) for texts in domains.values() for text in texts), unit=" tokens", leave=False) as bar:
        recorded = {name: routing.record(model, texts, context, arguments.chunk_size, bar.update) for name, texts in domains.items()}
    routing.show(recorded, config, tokenizer, arguments.top, output)


def _demo(arguments) -> None:
    from .demo import demo
    demo(arguments.output, arguments.device)


def _bench(arguments) -> None:
    from .bench import bench
    bench(arguments)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may not have every character
    main()
