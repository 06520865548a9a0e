"""Token ids equal mistral-common's for every tokenizer it carries; tokenizer.json; streaming text."""
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mistral_common", reason="needs mistral-common")
from mistral_common.protocol.instruct.messages import UserMessage  # noqa: E402
from mistral_common.protocol.instruct.request import ChatCompletionRequest  # noqa: E402
from mistral_common.tokens.tokenizers import mistral  # noqa: E402
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # noqa: E402
from tokenizers import Tokenizer as JsonTokenizer  # noqa: E402
from tokenizers import decoders, models, normalizers, processors  # noqa: E402

from mixtral_model import ModelError, TextStream, Tokenizer  # noqa: E402

DATA = Path(mistral.__file__).parents[2] / "data"
FILES = ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2", "mistral_instruct_tokenizer_240323.model.v3", "tekken_240718.json"]
TEXTS = ["Hello world", "", " leading and trailing ", "two  spaces, a\ttab and\nlines\n\n", "naïve café, Привет, 你好, 🦜🇫🇷!",
         "def f(x):\n    return x ** 2  # <s> [INST] </s>", "1234567890"]


@pytest.fixture
def directory(tmp_path):
    def make(name):
        shutil.copy(DATA / name, tmp_path)
        return tmp_path
    return make


def test_known_ids_of_mixtral_8x7b(directory):
    tokenizer = Tokenizer(directory("tokenizer.model.v1"))
    assert tokenizer.encode("Hello world") == [1, 22557, 1526]
    assert tokenizer.encode_chat("Hello world") == [1, 733, 16289, 28793, 22557, 1526, 733, 28748, 16289, 28793]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("name", FILES)
def test_ids_equal_those_of_mistral_common(directory, name):
    theirs, ours = MistralTokenizer.from_file(DATA / name), Tokenizer(directory(name))
    raw = theirs.instruct_tokenizer.tokenizer
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == [raw.bos_id] + raw.encode(text, bos=False, eos=False)
        assert ours.decode(ids) == raw.decode(ids)
        if text:
            request = ChatCompletionRequest(messages=[UserMessage(content=text)])
            assert ours.encode_chat(text) == theirs.encode_chat_completion(request).tokens


def _json_tokenizer(path, with_bos):
    """Mixtral's vocabulary as a byte-fallback BPE in a tokenizer.json, as the published ones are built."""
    from sentencepiece import SentencePieceProcessor
    model = SentencePieceProcessor(model_file=str(DATA / "tokenizer.model.v1"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    splits = [(piece[:i], piece[i:]) for piece in vocab for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
    merges = sorted(splits, key=lambda split: (-model.get_score(vocab["".join(split)]), vocab[split[0]], vocab[split[1]]))
    tokenizer = JsonTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(path))


@pytest.mark.parametrize("with_bos", [True, False])
def test_tokenizer_json_gives_the_same_ids(tmp_path, with_bos):
    _json_tokenizer(tmp_path / "tokenizer.json", with_bos)
    ours, theirs = Tokenizer(tmp_path, bos_id=1), MistralTokenizer.v1().instruct_tokenizer.tokenizer
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, bos=True, eos=False)
    assert ours.decode(ours.encode("naïve café 你好")[1:]) == "naïve café 你好"
    assert ours.eos_id == 2
    with pytest.raises(ModelError, match="tokenizer.json: a chat needs tokenizer.model"):
        ours.encode_chat("Hello")


@pytest.mark.parametrize("name", FILES)
def test_streamed_pieces_add_up(directory, name):
    tokenizer = Tokenizer(directory(name))
    for text in TEXTS:
        ids = tokenizer.encode(text)[1:]
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) == tokenizer.decode(ids)
        for cut in range(1, len(ids)):  # after a prompt, the space between belongs to the first new token
            if "\ufffd" not in tokenizer.decode(ids[:cut]):
                stream = TextStream(tokenizer, ids[:cut])
                assert tokenizer.decode(ids[:cut]) + "".join(map(stream.push, ids[cut:])) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", FILES)
def test_a_stream_that_ends_within_a_character(directory, name):
    """push() holds the bytes back, flush() gives them up: the pieces add up to the text wherever the stream ends."""
    tokenizer = Tokenizer(directory(name))
    ids = tokenizer.encode("no 🦜, 你好 ⟿")[1:]
    unfinished = 0
    for end in range(len(ids) + 1):
        stream = TextStream(tokenizer)
        text = "".join(map(stream.push, ids[:end]))
        assert "\ufffd" not in text
        held = stream.flush()
        assert text + held == tokenizer.decode(ids[:end])
        assert stream.flush() == ""
        unfinished += bool(held)
    assert unfinished


@pytest.mark.parametrize("text", [5, None, b"bytes", ["a", "list"], "x\udcff"])
def test_what_is_not_text_is_refused(directory, text):
    tokenizer = Tokenizer(directory("tokenizer.model.v1"))
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        with pytest.raises(ModelError, match=re.escape(f"text: expected a str that UTF-8 can encode, got {text!r}")):
            encode(text)


@pytest.mark.parametrize("name", FILES)
def test_ids_beyond_the_tokenizer_have_no_text(directory, name):
    tokenizer = Tokenizer(directory(name))
    ids = tokenizer.encode("Hello world")
    assert tokenizer.decode(ids[:2] + [10**6] + ids[2:]) == tokenizer.decode(ids)


def test_the_file_with_a_version_comes_first(directory):
    directory("mistral_instruct_tokenizer_240323.model.v3")
    path = directory("tokenizer.model.v1")
    (path / "tokenizer.model.v1").rename(path / "tokenizer.model")
    assert Tokenizer(path).path.name.endswith(".v3")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tekken.json"])
def test_broken_and_missing_files(tmp_path, name):
    with pytest.raises(ModelError, match=r"no tokenizer\.model\*, tekken\.json or tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / name).write_text("broken")
    with pytest.raises(ModelError, match=f"{name}: not a readable tokenizer"):
        Tokenizer(tmp_path)
