"""Which tokens go to which experts, counted in plain Python from the router logits of transformers."""
import csv
import itertools
import math
import random
import sys

import pytest
import torch

from mixtral_model import Model, ModelError
from mixtral_model.__main__ import main
from mixtral_model.routing import (Routing, check_request, domain_files, expert_load, random_repetition, record, repetitions,
                                   top_tokens)
from model_checkpoints import VOCAB, WINDOW, load_peer, mixtral_tokenizer, one_thread, tiny, write  # noqa: F401
from test_model_cuda import Peer
from test_model_perplexity import caches_made

SHAPES = [(4, 2), (3, 1), (1, 1), (5, 3), (2, 2)]


def _texts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 20, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def _their_choices(peer, texts, context, top_k):
    """[layer][segment][token] -> experts, best first."""
    segments = [text[i:i + context] for text in texts for i in range(0, len(text), context)]
    routers = [peer(torch.tensor([segment]), output_router_logits=True).router_logits for segment in segments]
    return [[logits.topk(top_k).indices.tolist() for logits in layer] for layer in zip(*routers)], segments


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("experts, top_k", SHAPES)
def test_counts(tmp_path, experts, top_k, window):
    model = Model.load(write(tmp_path, tiny(window=window, num_local_experts=experts, num_experts_per_tok=top_k)))
    texts, read = _texts(50, 1, 45), []
    routing = record(model, texts, 40, 13, read.append)
    choices, segments = _their_choices(load_peer(tmp_path, torch.float32), texts, 40, top_k)
    assert routing.tokens.tolist() == sum(segments, []) and sum(read) == 96 and max(read) == 13
    assert routing.topk_ids.tolist() == [sum(layer, []) for layer in choices]

    slots, firsts = expert_load(routing, experts)
    assert slots.tolist() == [[sum(e in ids for ids in sum(layer, [])) for e in range(experts)] for layer in choices]
    assert firsts.tolist() == [[sum(e == ids[0] for ids in sum(layer, [])) for e in range(experts)] for layer in choices]

    pairs = [[pair for segment in layer for pair in itertools.pairwise(segment)] for layer in choices]
    assert int(routing.follows.sum()) == len(pairs[0]) == 39 + 9 + 39 + 4
    same_first, same_any = repetitions(routing)
    assert same_first.tolist() == [sum(a[0] == b[0] for a, b in layer) for layer in pairs]
    assert same_any.tolist() == [sum(bool(set(a) & set(b)) for a, b in layer) for layer in pairs]


@pytest.mark.parametrize("experts, top_k", SHAPES)
def test_top_tokens(tmp_path, experts, top_k):
    model = Model.load(write(tmp_path, tiny(num_local_experts=experts, num_experts_per_tok=top_k)))
    text, = _texts(200)
    routing = record(model, [text], 200, 64)
    choices, _ = _their_choices(load_peer(tmp_path, torch.float32), [text], 200, top_k)
    for layer, (ids,) in enumerate(choices):
        for e, found in enumerate(top_tokens(routing, layer, experts, 1000)):
            gets = [token for token, chosen in zip(text, ids) if e in chosen]
            expected = {}
            for token in set(gets):
                count, occurrences, rate = gets.count(token), text.count(token), len(gets) / len(text)
                if count * len(text) > occurrences * len(gets):
                    deviation = math.sqrt(occurrences * rate * (1 - rate))
                    expected[token] = count, occurrences, count / (rate * occurrences), (count - rate * occurrences) / deviation
            assert {t.token: (t.count, t.occurrences) for t in found} == {token: row[:2] for token, row in expected.items()}
            for t in found:
                assert (t.lift, t.score) == pytest.approx(expected[t.token][2:])
            assert [-t.score for t in found] == sorted(-t.score for t in found)
            assert top_tokens(routing, layer, experts, 3)[e] == found[:3]
    assert bool(found) == (experts > top_k)  # where every token goes to every expert, none is over-represented


def test_one_token():
    routing = Routing(torch.tensor([7]), torch.tensor([[[2, 0]]]), torch.zeros(0, dtype=torch.bool))
    assert [load.tolist() for load in expert_load(routing, 4)] == [[[1, 0, 1, 0]], [[0, 0, 1, 0]]]
    assert [x.tolist() for x in repetitions(routing)] == [[0], [0]]
    assert top_tokens(routing, 0, 4, 5) == [[]] * 4


def test_random_repetition():
    """The paper's values, and a count over all pairs of choices."""
    assert random_repetition(8, 2) == (0.125, pytest.approx(0.464, abs=5e-4))
    for experts, top_k in SHAPES + [(6, 2), (8, 3)]:
        choices = list(itertools.permutations(range(experts), top_k))
        pairs = list(itertools.product(choices, choices))
        assert random_repetition(experts, top_k) == pytest.approx((sum(a[0] == b[0] for a, b in pairs) / len(pairs),
                                                                   sum(bool(set(a) & set(b)) for a, b in pairs) / len(pairs)))


def test_forward_hands_out_the_choices_and_changes_nothing(tmp_path):
    write(tmp_path, tiny())
    model, (a, b) = Model.load(tmp_path), _texts(9, 4)
    plain = model.forward([a, b], model.new_cache(2, 9), [0, 1])
    ids = []
    assert model.forward([a, b], model.new_cache(2, 9), [0, 1], topk_ids=ids).equal(plain)
    choices, _ = _their_choices(load_peer(tmp_path, torch.float32), [a, b], 9, 2)
    assert [layer.tolist() for layer in ids] == [sum(layer, []) for layer in choices]
    assert {layer.dtype for layer in ids} == {torch.int32}


def test_bf16(tmp_path, device):
    """Texts whose routing rounding hardly changes."""
    peer = Peer(write(tmp_path, tiny(window=4).bfloat16()), torch.bfloat16)
    texts = peer.prompts()
    routing = record(Model.load(tmp_path, device=device), texts, 4096, 5)
    choices, _ = _their_choices(peer.exact, texts, 4096, 2)
    assert [[sorted(ids) for ids in layer] for layer in routing.topk_ids.tolist()] == [[sorted(ids) for ids in sum(layer, [])] for layer in choices]


def test_domains():
    assert domain_files(["a/x.txt", "b/x.md", "y"], ["z=a=b", "y=c"]) == {"x": ["a/x.txt", "b/x.md"], "y": ["y", "c"], "z": ["a=b"]}
    for item in ("python", "=file", "python="):
        with pytest.raises(ModelError, match=f"domain: expected NAME=FILE, got '{item}'"):
            domain_files([], [item])


def test_default_context(tmp_path):
    config = Model.load(write(tmp_path, tiny())).config
    assert check_request(config, {"a": [[1, 2]]}, None, 1, 1) == 256
    with pytest.raises(ModelError, match="domain a: expected a list of one or more integers from 0 to 99, got 100 in it"):
        check_request(config, {"a": [[1], [100]]}, None, 1, 1)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With Mixtral's tokenizer and three texts; and sentencepiece's own tokens of them."""
    pytest.importorskip("sentencepiece")
    from sentencepiece import SentencePieceProcessor
    directory = write(tmp_path_factory.mktemp("checkpoint"), tiny(vocab_size=32000, num_hidden_layers=4))
    mixtral_tokenizer(directory)
    words = SentencePieceProcessor(model_file=str(directory / "tokenizer.model.v1"))
    rng = random.Random(0)
    texts = {"prose.txt": " ".join(rng.choices("the window of attention slides along naïve 你好 keys".split(), k=150)),
             "code.py": "".join(rng.choices(["def f(x):\n", "    return x\n", "\n"], k=60)), "empty": ""}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory, {name: [words.bos_id(), *words.encode(text)] for name, text in texts.items()}, words


def _read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_command(checkpoint, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    directory, tokens, words = checkpoint
    main(["routing", "--checkpoint", str(directory), "--text", str(directory / "prose.txt"), str(directory / "empty"),
          "--domain", f"python={directory / 'code.py'}", f"python={directory / 'prose.txt'}", "--context", "100", "--chunk-size", "30",
          "--top", "3", "--output", str(tmp_path)])
    captured = capsys.readouterr()
    assert "routing" in captured.err and "loading" in captured.err  # progress
    domains = {"prose": [tokens["prose.txt"]], "empty": [tokens["empty"]], "python": [tokens["code.py"], tokens["prose.txt"]]}
    peer = load_peer(directory, torch.float32)
    theirs = {name: _their_choices(peer, texts, 100, 2) for name, texts in domains.items()}

    load, repetition, tops = (_read(tmp_path / f"{name}.csv") for name in ("expert_load", "repetition", "top_tokens"))
    keys = [(name, layer) for name in domains for layer in range(4)]
    assert [(row["domain"], int(row["layer"]), int(row["expert"])) for row in load] == [(*key, e) for key in keys for e in range(4)]
    for row in load:
        choices = sum(theirs[row["domain"]][0][int(row["layer"])], [])
        slots = sum(int(row["expert"]) in ids for ids in choices)
        firsts = sum(int(row["expert"]) == ids[0] for ids in choices)
        assert [int(row[name]) for name in ("tokens", "slots", "first_choices")] == [len(choices), slots, firsts]
        assert [float(row[name]) for name in ("slot_share", "first_choice_share")] == pytest.approx([slots / len(choices) / 2, firsts / len(choices)])

    assert [(row["domain"], int(row["layer"]), row["choice"]) for row in repetition] == [(*key, c) for key in keys for c in ("first", "any")]
    for row in repetition:
        pairs = [pair for segment in theirs[row["domain"]][0][int(row["layer"])] for pair in itertools.pairwise(segment)]
        same = sum(a[0] == b[0] if row["choice"] == "first" else bool({*a} & {*b}) for a, b in pairs)
        assert (int(row["pairs"]), int(row["repetitions"])) == (len(pairs), same)
        assert row["share"] == "" if row["domain"] == "empty" else float(row["share"]) == pytest.approx(same / len(pairs))
        assert float(row["random_share"]) == pytest.approx({"first": 1 / 4, "any": 1 - 1 / 6}[row["choice"]])

    for row in tops:
        choices, segments = theirs[row["domain"]]
        token, everything = int(row["token_id"]), sum(segments, [])
        gets = [t for t, ids in zip(everything, sum(choices[int(row["layer"])], [])) if int(row["expert"]) in ids]
        assert (int(row["count"]), int(row["occurrences"])) == (gets.count(token), everything.count(token))
        lift = gets.count(token) / len(gets) / (everything.count(token) / len(everything))
        assert float(row["lift"]) == pytest.approx(lift) and lift > 1
        assert row["token"] == (words.decode([415, token]).removeprefix("The") or f"<{token}>")
        assert 1 <= int(row["rank"]) <= 3
    assert {row["domain"] for row in tops} == {"prose", "python"} and {row["layer"] for row in tops} == set("0123")

    assert "(25.0 if even)" in captured.out and "(25.0 if random)" in captured.out and "first or second choice (83.3 if random)" in captured.out
    lines = [line.split() for line in captured.out.splitlines() if line.startswith(("prose ", "empty ", "python "))]
    assert [(line[0], int(line[2])) for line in lines] == keys
    for i, line in enumerate(lines):
        shares = [row["slot_share"] for row in load[4 * i:4 * i + 4]] + [row["share"] or "nan" for row in repetition[2 * i:2 * i + 2]]
        assert [float(x.replace("-", "nan")) for x in line[3:]] == pytest.approx([100 * float(x) for x in shares], abs=0.051, nan_ok=True)
    assert lines[4][-2:] == ["-", "-"]  # one token, no pair
    for layer, shown in ((0, True), (1, True), (2, False), (3, True)):
        assert (f"\npython, layer {layer}\n  e0  " in captured.out) == shown
    for name in ("expert_load", "expert_load_by_layer", "repetition"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("experts, top_k, choice", [(1, 1, "first choice (100.0 if random)"), (3, 1, "first choice (33.3 if random)"),
                                                    (5, 3, "any of 3 choices (100.0 if random)")])
@pytest.mark.parametrize("text", ["", "The window of attention slides."])
def test_command_with_other_experts(tmp_path, checkpoint, capsys, experts, top_k, choice, text):
    pytest.importorskip("matplotlib")
    write(tmp_path, tiny(vocab_size=32000, num_hidden_layers=1, num_local_experts=experts, num_experts_per_tok=top_k))
    mixtral_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(text)
    main(["routing", "--checkpoint", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")])
    assert f"same expert as {choice}" in capsys.readouterr().out
    rows = _read(tmp_path / "out/expert_load.csv")
    assert len(rows) == experts and sum(float(row["slot_share"]) for row in rows) == pytest.approx(1)
    assert [row["pairs"] for row in _read(tmp_path / "out/repetition.csv")] == ["0" if text == "" else str(int(rows[0]["tokens"]) - 1)] * 2
    assert sum(path.suffix == ".png" for path in (tmp_path / "out").iterdir()) == 3


@pytest.mark.parametrize("arguments", [["--text", "empty"], ["--text", "empty", "--context", "100"], ["--text", "empty", "code.py", "--context", "10"],
                                       ["--text", "prose.txt", "empty"]])
def test_memory_of_the_cache_is_asked_for(checkpoint, monkeypatch, arguments):
    made, asked = caches_made(monkeypatch)
    monkeypatch.chdir(checkpoint[0])
    main(["routing", "--checkpoint", ".", *arguments])
    assert asked == [max(made)]


def test_without_matplotlib_and_without_output(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # an import of it fails
    command = ["routing", "--checkpoint", str(checkpoint[0]), "--text", str(checkpoint[0] / "code.py")]
    main([*command, "--output", str(tmp_path)])
    assert capsys.readouterr().out.count("matplotlib is not installed: no plot (pip install 'mixtral_ext[bench]')") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert_load.csv", "repetition.csv", "top_tokens.csv"]
    monkeypatch.chdir(tmp_path / "..")
    before = set((tmp_path / "..").iterdir())
    main(command)
    assert "code, layer 3" in capsys.readouterr().out and set((tmp_path / "..").iterdir()) == before


def test_a_dense_model_is_refused(tmp_path):
    write(tmp_path, tiny("mistral", vocab_size=32000))
    mixtral_tokenizer(tmp_path)
    (tmp_path / "text").write_text("x")
    with pytest.raises(SystemExit, match=r"routing: expected a model with experts \(Mixtral\), got a dense one \(Mistral\), which routes nothing"):
        main(["routing", "--checkpoint", str(tmp_path), "--text", str(tmp_path / "text")])


@pytest.mark.parametrize("arguments, message", [
    ([], "no text: give --text or --domain"),
    (["--domain", "code.py"], "domain: expected NAME=FILE, got 'code.py'"),
    (["--domain", "x=/nonexistent/text"], "No such file or directory: '/nonexistent/text'"),
    (["--text", "{directory}/model.safetensors"], "model.safetensors: expected UTF-8 text"),
    (["--text", "{directory}/code.py", "--context", "257"], r"context: expected an integer from 1 to 256 \(the model's positions\), got 257"),
    (["--text", "{directory}/code.py", "--chunk-size", "0"], "chunk_size: expected an integer of at least 1, got 0"),
    (["--text", "{directory}/code.py", "--top", "-1"], "top: expected an integer of at least 1, got -1"),
    (["--text", "{directory}/code.py", "--output", "{directory}/code.py"], "File exists: '.*code.py'"),
    (["--text", "{directory}/code.py", "--device", "cuda"], "device: cuda is not there: torch .* sees 0 NVIDIA GPUs"),
])
def test_errors_have_a_message_and_no_traceback(checkpoint, arguments, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=message):
        main(["routing", "--checkpoint", str(checkpoint[0]), *[argument.format(directory=checkpoint[0]) for argument in arguments]])
