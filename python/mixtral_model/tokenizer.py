"""Text to token ids and back: mistral-common for tokenizer.model* and tekken.json, else tokenizer.json."""
from pathlib import Path

from .config import ModelError


class Tokenizer:
    """encode() puts the beginning-of-sequence token first; decode() drops special tokens."""

    def __init__(self, directory: str | Path, bos_id: int | None = None):
        """Takes tekken.json, tokenizer.model.v<N>, tokenizer.model or tokenizer.json, the first there is; bos_id is only for
        a tokenizer.json that does not add the token itself."""
        directory = Path(directory)
        path = next((path for pattern in ("tekken*.json", "*.model.v*", "tokenizer.model", "tokenizer.json")
                     for path in sorted(directory.glob(pattern))), None)
        if path is None:
            raise ModelError(f"{directory}: no tokenizer.model*, tekken.json or tokenizer.json")
        self.path, self.bos_id, self._chat = path, bos_id, None
        try:
            if path.name == "tokenizer.json":
                from tokenizers import Tokenizer as JsonTokenizer
                self._json = JsonTokenizer.from_file(str(path))
                self.eos_id = self._json.token_to_id("</s>")
            else:
                from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
                self._chat = MistralTokenizer.from_file(path)
                self._mistral = self._chat.instruct_tokenizer.tokenizer
                self.bos_id, self.eos_id = self._mistral.bos_id, self._mistral.eos_id
        except ImportError as error:
            raise ModelError(f"{path}: {error}: pip install 'mixtral_ext[model]'") from None
        except Exception as error:  # each library raises its own kinds for a broken file
            raise ModelError(f"{path}: not a readable tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        _check_text(text)
        if self._chat:
            return self._mistral.encode(text, bos=True, eos=False)
        ids = self._json.encode(text).ids
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def encode_chat(self, text: str) -> list[int]:
        """One user message in the instruct template that belongs to the tokenizer's version."""
        _check_text(text)
        if not self._chat:
            raise ModelError(f"{self.path}: a chat needs tokenizer.model* or tekken.json, whose version names the template")
        from mistral_common.protocol.instruct.messages import UserMessage
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        return self._chat.encode_chat_completion(ChatCompletionRequest(messages=[UserMessage(content=text)])).tokens

    def decode(self, ids: list[int]) -> str:
        if not self._chat:
            return self._json.decode(ids)
        # A model's vocabulary may be padded with ids that the tokenizer does not have.
        return self._mistral.decode([token for token in ids if token < self._mistral.n_words])


def _check_text(text: str) -> None:
    try:
        text.encode()  # fails for Python's stand-ins for bytes that are not UTF-8
    except (AttributeError, UnicodeEncodeError):
        raise ModelError(f"text: expected a str that UTF-8 can encode, got {text!r:.80}") from None


class TextStream:
    """Turns tokens that come one by one into pieces of text that add up to the text of all of them."""

    def __init__(self, tokenizer: Tokenizer, context: list[int] = ()):
        """context: the tokens before (a few are enough), which decide about a leading space."""
        self.tokenizer, self.ids, self.start, self.shown = tokenizer, list(context[-8:]), 0, len(context[-8:])

    def push(self, token: int) -> str:
        """The text that token adds; "" while it ends within a character."""
        self.ids.append(token)
        return self._advance(hold=True)

    def flush(self) -> str:
        """At the end: the text still held back, an incomplete character as U+FFFD."""
        return self._advance(hold=False)

    def _advance(self, hold: bool) -> str:
        # Text is decoded from a few tokens back, since a tokenizer drops the space before the first of a run.
        before = self.tokenizer.decode(self.ids[self.start:self.shown])
        text = self.tokenizer.decode(self.ids[self.start:])
        if hold and text.endswith("\ufffd"):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return text[len(before):]
