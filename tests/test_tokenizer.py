"""Encoding, decoding and streaming, on a small byte-level tokenizer made here."""

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from dsv4.tokenizer import BOS, EOS, PAD, TextStream, Tokenizer

USER = "<｜User｜>"
SPECIAL = [BOS, EOS, PAD, USER]
# Pairs of symbols, so that tokens begin or end inside the characters of "é", "中" and "😀".
MERGES = [("a", "b"), ("ab", "c"), ("ð", "Ł"), ("ĺ", "c"), ("ä", "¸"), ("Ń", "Ġ"), ("©", "Ã")]


def build() -> tokenizers.Tokenizer:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*symbols, *map("".join, MERGES)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("checkpoint")
    build().save(str(directory / "tokenizer.json"))
    return Tokenizer.from_checkpoint(directory)


def byte_ids(tok: Tokenizer, data: bytes) -> list[int]:
    """One token a byte."""
    by_byte = {tok.token_bytes(index): index for index in range(256)}
    return [by_byte[bytes([byte])] for byte in data]


def test_encode_and_decode(tok: Tokenizer) -> None:
    text = f"{BOS}abc 中é😀\n{USER}<think>{EOS}"
    ids = tok.encode(text)
    assert ids[0] == tok.bos_id and ids[-1] == tok.eos_id and tok.token_id(USER) in ids
    assert tok.decode(ids) == text
    assert tok.decode(ids, skip_special=True) == "abc 中é😀\n<think>"
    assert tok.encode("") == [] and tok.decode([]) == ""
    assert len(tok.encode("abc")) == 1
    with pytest.raises(ValueError, match="text: expected valid Unicode"):
        tok.encode("a\ud800")


def test_ids(tok: Tokenizer) -> None:
    assert [tok.bos_id, tok.eos_id, tok.pad_id] == [263, 264, 265]
    assert tok.vocab_size == 256 + len(MERGES) + len(SPECIAL) + 1
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a token '<none>', found none"):
        tok.token_id("<none>")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError, match="tokenizer.json: not found"):
        Tokenizer.from_checkpoint(tmp_path)
    for text in ("", "{", "{}", '{"model": 3}', "\0"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer description"):
            Tokenizer.from_checkpoint(tmp_path)
    backend = build()
    backend.decoder = decoders.WordPiece()
    backend.save(str(path))
    with pytest.raises(ValueError, match="field decoder: expected ByteLevel, found WordPiece"):
        Tokenizer.from_checkpoint(tmp_path)
    tokenizers.Tokenizer(models.BPE()).save(str(path))
    with pytest.raises(ValueError, match="field decoder: expected ByteLevel, found NoneType"):
        Tokenizer.from_checkpoint(tmp_path)


def test_bytes_are_those_of_the_library(tok: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tok.vocab_size + 2) for _ in range(rng.randrange(12))]
        data = b"".join(tok.token_bytes(index) for index in ids)
        assert data.decode(errors="replace") == tok.decode(ids)


TEXTS = ["a😀b", "中文é\n", "\ufffd\ufffdx\ufffd", f"{USER}<think>é", "👩💻"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_appear_with_their_last_byte(tok: Tokenizer, text: str) -> None:
    stream = TextStream(tok)
    for character in text:
        *first, last = byte_ids(tok, character.encode())
        assert [stream.push(index) for index in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.finish() == "" and stream.text == text and not stream.stopped


def test_tokens_across_characters(tok: Tokenizer) -> None:
    ids = [tok.token_id(token) for token in ("ðŁ", "ĺ", "Ģ", "Ã", "©Ã", "©", "ä¸", "Ń", USER)]
    stream = TextStream(tok)
    pieces = [stream.push(index) for index in ids]
    assert pieces == ["", "", "😀", "", "é", "é", "", "中", USER]


def test_half_a_character_at_the_end_is_dropped(tok: Tokenizer) -> None:
    for kept, tail in (("x", "😀".encode()[:3]), ("\ufffd", "中".encode()[:1]), ("", b"\xc3")):
        stream = TextStream(tok)
        pieces = [stream.push(index) for index in byte_ids(tok, kept.encode() + tail)]
        assert "".join(pieces) == kept and stream.finish() == "" and stream.text == kept


def test_random_ids_give_the_text_of_decode(tok: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tok.vocab_size + 2) for _ in range(rng.randrange(40))]
        stream = TextStream(tok)
        pieces = [stream.push(index) for index in [*ids, tok.token_id("a")]]
        assert "".join(pieces) == tok.decode(ids) + "a"


def naive_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text that may be shown and whether it stopped, found one character at a time."""
    for end in range(len(text) + 1):
        found = [end - len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return text[: min(found)], True
    beginnings = {s[:length] for s in stop for length in range(len(s))}
    held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
    return text[: len(text) - held], False


def test_stop_strings_against_a_naive_search(tok: Tokenizer) -> None:
    rng = random.Random(2)
    pieces = [tok.token_id(token) for token in ("a", "b", "c", "ab", "abc")]
    stopped = 0
    for _ in range(1000):
        stop = tuple(
            "".join(rng.choice("abc") for _ in range(rng.randint(1, 5)))
            for _ in range(rng.randint(1, 3))
        )
        stream, seen, shown = TextStream(tok, stop), "", ""
        for index in rng.choices(pieces, k=12):
            seen += tok.decode([index])
            shown += stream.push(index)
            assert (shown, stream.stopped) == naive_stop(seen, stop), (seen, stop)
        shown += stream.finish()
        stopped += stream.stopped
        assert shown == stream.text == (naive_stop(seen, stop)[0] if stream.stopped else seen)
        assert stream.finish() == ""
    assert 200 < stopped < 999


def test_stop_strings_by_example(tok: Tokenizer) -> None:
    stream = TextStream(tok, stop=("ab中c",))
    pieces = [stream.push(index) for index in byte_ids(tok, "xaab中".encode())]
    assert pieces == ["x", "", "a", "", "", "", ""]
    assert stream.push(tok.token_id("ab")) == "ab中" and stream.finish() == "ab"
    stream = TextStream(tok, stop=("abcd", "bc"))
    assert [stream.push(index) for index in byte_ids(tok, b"abcd")] == ["", "", "a", ""]
    assert stream.stopped and stream.text == "a" and stream.finish() == ""
    stream = TextStream(tok, stop=(USER,))
    assert stream.push(tok.token_id("a")) == "a" and stream.push(tok.token_id(USER)) == ""
    assert stream.stopped
