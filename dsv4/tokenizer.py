"""Text to token ids and back, with the checkpoint's ``tokenizer.json``.

Responsible for encoding, decoding, the ids of the V4 special tokens, and streaming text out while
ids are generated (``TextStream``). Not responsible for the prompt format: that is ``chat.py``.
"""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"


def _byte_symbols() -> dict[str, int]:
    """The byte that each symbol of a byte-level vocabulary stands for.

    Bytes with a visible Latin-1 character are that character; the others, in order, are the
    characters from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    shifted = {chr(0x100 + rank): byte for rank, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | shifted


_SYMBOLS = _byte_symbols()


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer: ``backend`` read from ``file``, of which errors speak."""

    backend: tokenizers.Tokenizer
    file: str
    vocab_size: int
    """Largest id + 1, added tokens included; the model's embedding may hold a few rows more or
    less."""

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "Tokenizer":
        """Read ``directory/tokenizer.json``.

        Raises ``FileNotFoundError`` if it is not there, ``ValueError`` if it is not a byte-level
        tokenizer that the ``tokenizers`` library can read.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found; a checkpoint holds its tokenizer there")
        try:
            backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: expected a tokenizer description, found: {error}") from error
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            found = type(backend.decoder).__name__
            raise ValueError(f"{path}: field decoder: expected ByteLevel, found {found}")
        vocab = backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise ValueError(f"{path}: field vocab: expected at least one token, found none")
        return cls(backend, str(path), max(vocab.values()) + 1)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, in which special tokens are recognised; none is added.

        Raises ``ValueError`` for text that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text: expected valid Unicode, found {error}") from error
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ``ids``: invalid UTF-8 becomes U+FFFD, ids without a token are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that ``token_id`` adds to a text; empty for an id without a token."""
        token = self.backend.id_to_token(token_id) or ""
        if all(symbol in _SYMBOLS for symbol in token):
            return bytes(_SYMBOLS[symbol] for symbol in token)
        return token.encode()

    def token_id(self, token: str) -> int:
        """The id of ``token``. Raises ``ValueError`` if the vocabulary lacks it."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{self.file}: expected a token {token!r}, found none")
        return found

    @property
    def bos_id(self) -> int:
        """The id that begins every prompt."""
        return self.token_id(BOS)

    @property
    def eos_id(self) -> int:
        """The id that ends every assistant turn."""
        return self.token_id(EOS)

    @property
    def pad_id(self) -> int:
        """The id that fills rows of a batch."""
        return self.token_id(PAD)


class TextStream:
    """Generated ids to text, as early as the text is certain.

    A character appears when its last byte has arrived. Text that may turn out to be the beginning
    of a stop string is held back. ``stopped`` becomes true when a stop string is complete: the text
    then ends before it. Of several, the one completed first counts, and of those completed by the
    same character the longest, so the result does not depend on how tokens cut the text.

    The library's own incremental decoder is not used: it takes a U+FFFD that the model did write
    for half a character, withholds it and re-decodes everything since then at each step.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        assert all(stop), f"stop strings must not be empty: {stop!r}"
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._emitted: list[str] = []

    @property
    def text(self) -> str:
        """Everything that ``push`` and ``finish`` have returned so far."""
        return "".join(self._emitted)

    def push(self, token_id: int) -> str:
        """Take one id and return the text that it makes certain.

        Special tokens appear as their strings. Bytes that can no longer become valid UTF-8 appear
        as U+FFFD, as in ``Tokenizer.decode``. Empty once ``stopped``.
        """
        if self.stopped:
            return ""
        self._held += self._utf8.decode(self._tokenizer.token_bytes(token_id))
        found = [(at + len(s), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._emit(min(found)[1])
        return self._emit(len(self._held) - self._open_length())

    def finish(self) -> str:
        """Return what was held back for a stop string; half a character at the end is dropped."""
        self._utf8.reset()
        return "" if self.stopped else self._emit(len(self._held))

    def _open_length(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop):
                return length
        return 0

    def _emit(self, length: int) -> str:
        new, self._held = self._held[:length], self._held[length:]
        self._emitted.append(new)
        return new
