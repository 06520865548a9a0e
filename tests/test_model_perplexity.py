"""Perplexity against context length beside transformers in float64, which reads every segment anew, without a cache."""
import csv
import dataclasses
import math
import sys

import pytest
import torch

from mixtral_model import Model, ModelError
from mixtral_model.__main__ import main
from mixtral_model.perplexity import DEFAULT_CONTEXTS, Plan, make_plan, measure
from model_checkpoints import VOCAB, WINDOW, load_peer, mixtral_tokenizer, one_thread, tiny, write  # noqa: F401

CONTEXTS = [6, WINDOW, WINDOW + 1, 40]


def _texts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [(f"text {i}", torch.randint(3, VOCAB, (n,), generator=generator).tolist()) for i, n in enumerate(lengths)]


@torch.no_grad()
def _their_nlls(peer, texts, context, longest, stride):
    """Of every scored token, by the definition: blocks of `stride` tokens follow one another, the first one ends with token `longest`."""
    nlls = []
    for _, text in texts:
        last = longest
        while last < len(text):
            logits = peer(torch.tensor([text[last - context:last]])).logits[0].double()
            logprobs = logits.log_softmax(1)
            nlls += [-logprobs[context - 1 - i, text[last - i]].item() for i in range(stride)]
            last += stride
    return nlls


@pytest.fixture(scope="module", params=["mixtral", "mistral"])
def checkpoint(request, tmp_path_factory):
    """Directory, and transformers' model in float64 by window."""
    directories = {window: write(tmp_path_factory.mktemp("checkpoint"), tiny(request.param, window)) for window in (WINDOW, 9, None)}
    return directories, {window: load_peer(directory, torch.float64) for window, directory in directories.items()}


@pytest.mark.parametrize("stride, chunk", [(1, 64), (4, 7), (6, 1000), (6, 20)])
def test_every_window_and_context(checkpoint, stride, chunk):
    directories, peers = checkpoint
    model, texts, read = Model.load(directories[WINDOW]), _texts(71, 41, 50), []
    plan = make_plan(model.config, texts, CONTEXTS, stride, chunk_size=chunk)
    points = measure(model, plan, read.append)
    assert [(p.window, p.context) for p in points] == [(window, context) for window in (WINDOW, None) for context in CONTEXTS]
    for p in points:
        expected = _their_nlls(peers[p.window], texts, p.context, 40, stride)
        assert p.tokens == len(expected) == plan.tokens_scored()
        assert p.nll == pytest.approx(sum(expected) / len(expected), abs=2e-5)
        assert p.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=2e-5)
    assert points[0].nll == points[4].nll and points[1].nll == points[5].nll  # the window bites from WINDOW + 1 on
    assert points[2].nll != points[6].nll and points[3].nll != points[7].nll
    assert sum(read) == plan.tokens_read()


@pytest.mark.parametrize("of_model", [WINDOW, None])
def test_another_window(checkpoint, of_model):
    directories, peers = checkpoint
    model, texts = Model.load(directories[of_model]), _texts(60)
    points = measure(model, make_plan(model.config, texts, [12, 30], window=9))
    for p, (window, context) in zip(points, [(9, 12), (9, 30), (None, 12), (None, 30)], strict=True):
        expected = _their_nlls(peers[window], texts, context, 30, 6)  # half of the shortest context
        assert (p.window, p.context, p.tokens) == (window, context, len(expected))
        assert p.nll == pytest.approx(sum(expected) / len(expected), abs=2e-5)


def test_a_model_without_a_window_has_one_curve(checkpoint):
    directories, peers = checkpoint
    model, texts = Model.load(directories[None]), _texts(50)
    points = measure(model, make_plan(model.config, texts, [20, 20, 8], 8))
    assert [(p.window, p.context) for p in points] == [(None, 8), (None, 20)]  # ascending, each once
    for p in points:
        assert p.nll == pytest.approx(sum(x := _their_nlls(peers[None], texts, p.context, 20, 8)) / len(x), abs=2e-5)


def test_segments_by_hand():
    plan = Plan([list(range(9)), list(range(10, 16))], [2, 4], 2, [None], 100)
    assert plan.segments(2) == [[2, 3, 4], [4, 5, 6], [6, 7, 8], [12, 13, 14]]
    assert plan.segments(4) == [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8], [10, 11, 12, 13, 14]]
    assert (plan.tokens_scored(), plan.tokens_read()) == (8, 4 * (2 + 4))


def test_default_contexts(checkpoint):
    config = dataclasses.replace(Model.load(checkpoint[0][WINDOW]).config, max_positions=32768)
    for length, expected in ((257, [256]), (1024, [256, 512]), (1025, [256, 512, 1024]), (30000, list(DEFAULT_CONTEXTS))):
        plan = make_plan(config, [("a", [1] * 40000), ("b", [1] * length)])
        assert (plan.contexts, plan.stride) == (expected, 128)
    assert make_plan(dataclasses.replace(config, max_positions=100), [("a", [1] * 400)]).contexts == [100]
    with pytest.raises(ModelError, match="b: expected at least 257 tokens for a context of 256, got 256"):
        make_plan(config, [("a", [1] * 400), ("b", [1] * 256)])


@pytest.mark.parametrize("change, message", [
    (dict(contexts=[8, 0]), r"context: expected integers from 1 to 256 \(the model's positions\), got 0"),
    (dict(contexts=[257]), "context: expected integers from 1 to 256 .* got 257"),
    (dict(contexts=[8.0]), "context: expected integers .* got 8.0"),
    (dict(contexts=[]), "context: expected one or more, got none"),
    (dict(contexts=[100]), "text 1: expected at least 101 tokens for a context of 100, got 60"),
    (dict(contexts=[8, 20], stride=9), "stride: expected an integer from 1 to 8, the shortest context, got 9"),
    (dict(contexts=[8], stride=0), "stride: expected .* got 0"),
    (dict(contexts=[8], window=0), "window: expected an integer of at least 1, got 0"),
    (dict(contexts=[8], chunk_size=-1), "chunk_size: expected an integer of at least 1, got -1"),
    (dict(texts=[]), "texts: expected one or more, got none"),
    (dict(texts=[("empty", [])]), "empty: expected a list of one or more integers from 0 to 99"),
    (dict(texts=[("odd", [5, 100])]), "odd: expected a list .* got 100 in it"),
])
def test_refused_requests(checkpoint, change, message):
    config = Model.load(checkpoint[0][WINDOW]).config
    with pytest.raises(ModelError, match=message):
        make_plan(config, **dict(texts=_texts(300, 60)) | change)


def test_memory_is_bounded(checkpoint, monkeypatch):
    """No more than chunk_size tokens in a pass, no more than 256 rows of logits."""
    model, passes, rows = Model.load(checkpoint[0][None]), [], []
    forward, logits = Model.forward, Model.logits
    monkeypatch.setattr(Model, "forward", lambda self, chunks, *more: passes.append(sum(map(len, chunks))) or forward(self, chunks, *more))
    monkeypatch.setattr(Model, "logits", lambda self, hidden: rows.append(len(hidden)) or logits(self, hidden))
    measure(model, make_plan(model.config, _texts(1000), [30, 250], 30, chunk_size=600))
    assert max(passes) == 600 and max(rows) == 256
    passes.clear()
    measure(model, make_plan(model.config, _texts(1000), [30, 250], 30, chunk_size=100))
    assert max(passes) == 100


def caches_made(monkeypatch):
    """Positions of all sequences of each cache that is made from now on, and those for which memory was asked."""
    made, asked, new_cache = [], [], Model.new_cache

    def seen(self, *arguments):
        cache = new_cache(self, *arguments)
        made.append(len(cache.lengths) * cache.capacity)
        return cache
    monkeypatch.setattr(Model, "new_cache", seen)
    monkeypatch.setattr("mixtral_model.weights.check_memory", lambda config, dtype, device, positions, mapped: asked.append(positions))
    return made, asked


@pytest.mark.parametrize("window, chunk", [(WINDOW, 30), (WINDOW, 200), (None, 30), (None, 200), (None, 10**6)])
def test_positions_that_a_plan_takes(checkpoint, monkeypatch, window, chunk):
    model = Model.load(checkpoint[0][window])
    plan = make_plan(model.config, _texts(120), [8, 40], 8, chunk_size=chunk)
    made, _ = caches_made(monkeypatch)
    measure(model, plan)
    assert plan.cache_positions() == max(made)


def test_broken_weights_are_named(checkpoint):
    model = Model.load(checkpoint[0][None])
    model.weights.norm[3] = torch.nan
    with pytest.raises(ModelError, match="perplexity: expected finite log-probabilities, got a sum of nan"):
        measure(model, make_plan(model.config, _texts(50), [20]))


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
def test_bf16(tmp_path, kind, device):
    """A mean is off by no more than the root mean square of the tokens' errors, and that by twice transformers' own in bf16."""
    directories = {window: write(tmp_path / str(window), tiny(kind, window).bfloat16()) for window in (WINDOW, None)}
    model, texts = Model.load(directories[WINDOW], device=device), _texts(300)
    for p in measure(model, make_plan(model.config, texts, [8, 60], 8, chunk_size=50)):
        low, exact = (torch.tensor(_their_nlls(load_peer(directories[p.window], dtype), texts, p.context, 60, 8))
                      for dtype in (torch.bfloat16, torch.float64))
        assert abs(p.nll - exact.mean().item()) <= 2 * (low - exact).square().mean().sqrt().item()


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A checkpoint with Mixtral's tokenizer, two texts, and their tokens by sentencepiece itself."""
    pytest.importorskip("sentencepiece")
    from sentencepiece import SentencePieceProcessor
    directory = write(tmp_path_factory.mktemp("checkpoint"), tiny(vocab_size=32000))
    mixtral_tokenizer(directory)
    words = SentencePieceProcessor(model_file=str(directory / "tokenizer.model.v1"))
    texts = {"one.txt": "The window of attention slides along. " * 8, "zwei.txt": "Fünf Wörter, und naïve 你好!\n" * 5}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory, [(name, [words.bos_id(), *words.encode(text)]) for name, text in texts.items()]


def _run(directory, *arguments):
    main(["perplexity", "--checkpoint", str(directory), "--text", str(directory / "one.txt"), str(directory / "zwei.txt"), *map(str, arguments)])


def test_command(with_tokenizer, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    directory, texts = with_tokenizer
    _run(directory, "--context", 8, 32, "--stride", 4, "--output", tmp_path / "out" / "deep", "--chunk-size", 30)
    captured = capsys.readouterr()
    windowless = write(tmp_path / "windowless", tiny(vocab_size=32000, window=None))
    expected = {(window, context): _their_nlls(load_peer(path, torch.float64), texts, context, 32, 4)
                for window, path in (("16", directory), ("", windowless)) for context in (8, 32)}
    count = len(expected["16", 8])
    assert f"perplexity of {count} tokens, each predicted from context - 3 to context tokens before it" in captured.out
    assert "perplexity" in captured.err and "loading" in captured.err  # progress
    means = {key: sum(nlls) / count for key, nlls in expected.items()}
    rows = [line.split() for line in captured.out.splitlines()[3:5]]
    for context, windowed, plain in rows:
        assert float(windowed) == pytest.approx(math.exp(means["16", int(context)]), rel=3e-5)
        assert float(plain) == pytest.approx(math.exp(means["", int(context)]), rel=3e-5)
    with open(tmp_path / "out/deep/perplexity.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["window"], int(row["context"])) for row in table] == list(expected)
    for row in table:
        assert (row["stride"], row["tokens"]) == ("4", str(count))
        assert float(row["nll"]) == pytest.approx(means[row["window"], int(row["context"])], abs=2e-5)
        assert float(row["perplexity"]) == pytest.approx(math.exp(float(row["nll"])))
    assert (tmp_path / "out/deep/perplexity.png").read_bytes()[:4] == b"\x89PNG"


def test_memory_of_the_cache_is_asked_for(with_tokenizer, monkeypatch):
    made, asked = caches_made(monkeypatch)
    _run(with_tokenizer[0], "--context", 8, 32, "--chunk-size", 70)
    assert asked == [max(made)]


def test_without_matplotlib_and_without_output(with_tokenizer, tmp_path, capsys, monkeypatch):
    directory, _ = with_tokenizer
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # an import of it fails
    _run(directory, "--context", 8, "--output", tmp_path)
    assert "matplotlib is not installed: no plot (pip install 'mixtral_ext[bench]')" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["perplexity.csv"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perplexity.csv").unlink()
    _run(directory, "--context", 8, "--stride", 1, "--dtype", "bf16")
    assert "each predicted from context tokens before it" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["--context", "5000"], "context: expected integers from 1 to 256 .* got 5000"),
    (["--context", "250"], "one.txt: expected at least 251 tokens for a context of 250, got"),
    (["--context", "8", "--stride", "9"], "stride: expected an integer from 1 to 8, the shortest context, got 9"),
    (["--context", "8", "--window", "0"], "window: expected an integer of at least 1, got 0"),
    (["--context", "8", "--chunk-size", "0"], "chunk_size: expected an integer of at least 1, got 0"),
    (["--context", "8", "--device", "cuda"], "device: cuda is not there: torch .* sees 0 NVIDIA GPUs"),
    (["--text", "/nonexistent/text"], "No such file or directory: '/nonexistent/text'"),
    (["--text", "{directory}/model.safetensors"], "model.safetensors: expected UTF-8 text"),
    (["--context", "8", "--output", "{directory}/one.txt"], "File exists: '.*one.txt'"),
    (["--checkpoint", "{directory}/nowhere"], "nowhere: no such directory"),
])
def test_errors_have_a_message_and_no_traceback(with_tokenizer, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=message):
        _run(with_tokenizer[0], *[argument.format(directory=with_tokenizer[0]) for argument in arguments])
