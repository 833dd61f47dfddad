"""TokenizerVocab on tokenizers of every make: the bytes of each token, and where tokens stand in a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

from nextoken.model.loading import bundled_path
from nextoken.model.tokenizer import TokenizerVocab, byte_of_letter
from nextoken.model.vocab import Encoding

CORPUS = [
    "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "l'été où le naïve café 😀 日本語 text\tand\ttabs\r\nlines",
    "the the them then   spaces    here <s> </s> 12345",
] * 5

TEXTS = [
    "hello the times",
    "  two leading spaces",
    "trailing  ",
    " ",
    "\n\n",
    "😀 the 👩‍👩‍👧 family",
    "e\u0301 cafe\u0301 é",
    "a nul \x00 here",
    "tab\tx\t\ty",
    "a\r\nb\r\n",
    "<s> and </s> <unk> <|bos|> [CLS] are text",
    "日本語 text",
    "x<0x41>y",
    "Ġbyte ġ Ċ",
    "\u2028\ufeff\u200b",
    "ﬁne ①②",
]


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


def with_prefix_space() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def sentencepiece(*, dummy_space: bool) -> PreTrainedTokenizerFast:
    """▁ for spaces, <0xNN> for bytes without a piece; Llama 2 begins texts with a dummy space, Gemma does not."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, limit_alphabet=60, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in pieces]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend = [normalizers.Prepend("▁")] if dummy_space else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if dummy_space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def unigram() -> PreTrainedTokenizerFast:
    """T5-like: normalises compatibility forms, case and runs of spaces away; no begin token."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


MAKES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "with_prefix_space": with_prefix_space,
    "llama2": lambda: sentencepiece(dummy_space=True),
    "gemma": lambda: sentencepiece(dummy_space=False),
    "unigram": unigram,
    "wordpiece": wordpiece,
}
LOSSLESS = ["byte_level", "with_prefix_space", "llama2", "gemma"]
"""Makes that change nothing of a text without ▁, but for a space before it."""


@cache
def vocab(make: str) -> TokenizerVocab:
    return TokenizerVocab(MAKES[make]())


def lies_in(encoding: Encoding, data: bytes) -> None:
    starts, ends = encoding.starts, encoding.ends
    assert len(encoding.ids) == len(starts) == len(ends)
    assert all(0 <= start <= end <= len(data) for start, end in zip(starts, ends, strict=True))
    assert list(starts) == sorted(starts) and list(ends) == sorted(ends)


def is_exact(known: TokenizerVocab, encoding: Encoding, data: bytes) -> None:
    """Every span holds its token's bytes, but that the first tokens may have a space that the text has not."""
    joined = known.decode(encoding.ids)
    surplus = len(joined) - len(data)
    assert surplus in (0, 1) and joined[surplus:] == data and not joined[:surplus].strip()
    assert b"".join(data[s:e] for s, e in zip(encoding.starts, encoding.ends, strict=True)) == data
    for token_id, start, end in zip(encoding.ids, encoding.starts, encoding.ends, strict=True):
        spelled = known.token_bytes[token_id]
        assert data[start:end] == (spelled if start or not surplus or end - start == len(spelled) else spelled[1:])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", MAKES)
def test_offsets_lie_in_the_text(make: str, text: str) -> None:
    known, data = vocab(make), text.encode()
    encoding = known.encode(text)
    lies_in(encoding, data)
    assert encoding == known.encode(data)
    if make in LOSSLESS:
        is_exact(known, encoding, data)


@pytest.mark.parametrize("make", MAKES)
@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example(text="\u0344\u0958ﷺ")
def test_offsets_of_any_text(make: str, text: str) -> None:
    known, data = vocab(make), text.encode()
    encoding = known.encode(text)
    lies_in(encoding, data)
    if make in LOSSLESS and "▁" not in text:
        is_exact(known, encoding, data)


@pytest.mark.parametrize("make", LOSSLESS)
def test_names_of_specials_are_text(make: str) -> None:
    known = vocab(make)
    encoding = known.encode("<s></s><unk><|bos|><|eos|>")
    assert known.bos_id is not None and known.specials >= {known.bos_id, *known.eos_ids}
    # SentencePiece makes may have a piece of that spelling; the specials of byte-level BPE are never in a text.
    if make in ("byte_level", "with_prefix_space"):
        assert not set(encoding.ids) & known.specials
    assert known.label(known.bos_id) in ("<s>", "<|bos|>")


def test_bytes_of_byte_level_tokens() -> None:
    known = vocab("byte_level")
    assert {known.token_bytes[i] for i in range(known.size)} >= {bytes([b]) for b in range(256)}
    assert len(byte_of_letter()) == 256
    emoji = known.encode("😀").ids
    assert len(emoji) > 1 and known.decode(emoji) == "😀".encode()
    assert "\\xf0" in known.label(emoji[0])


def test_bytes_of_sentencepiece_tokens() -> None:
    known = vocab("llama2")
    pieces = known.tokenizer.get_vocab()
    assert known.token_bytes[pieces["<0x0A>"]] == b"\n"
    spaced = next(piece for piece in pieces if piece.startswith("▁") and piece.strip("▁"))
    assert known.token_bytes[pieces[spaced]] == b" " + spaced[1:].replace("▁", " ").encode()
    assert [known.token_bytes[i] for i in known.encode("👩").ids][-4:] == [bytes([b]) for b in "👩".encode()]
    first = known.encode("the")
    assert known.token_bytes[first.ids[0]].startswith(b" ") and (first.starts[0], first.ends[-1]) == (0, 3)


def test_changed_texts_keep_their_places() -> None:
    known = vocab("unigram")
    data = "The  ﬁne".encode()
    encoding = known.encode(data)
    assert known.decode(encoding.ids) == b" the fine"
    assert encoding.ends[-1] == len(data)
    covered = {data[s:e] for s, e in zip(encoding.starts, encoding.ends, strict=True)}
    assert "ﬁ".encode() in covered  # each token of its two letters shares its span
    known = vocab("wordpiece")
    encoding = known.encode("Leading")
    assert known.decode(encoding.ids) == b"leading" and encoding.ends[-1] == 7


def test_spans_that_run_backwards_are_held_where_they_were() -> None:
    class Reordering:
        is_fast = True

        def __call__(self, text: str, **_: object) -> dict[str, list[object]]:
            return {"input_ids": [5, 6, 7], "offset_mapping": [(0, 3), (1, 2), (0, 4)]}

    known = TokenizerVocab(unigram())
    known.tokenizer = Reordering()  # type: ignore[assignment]
    encoding = known.encode("äbcd")
    assert (encoding.starts, encoding.ends) == ((0, 2, 2), (4, 4, 5))


@pytest.mark.parametrize("make", MAKES)
def test_the_empty_text_has_no_tokens(make: str) -> None:
    assert vocab(make).encode("") == Encoding((), (), ())


def test_begin_and_end_tokens() -> None:
    assert vocab("byte_level").bos_id == 0 and vocab("byte_level").eos_ids == {1}
    assert vocab("unigram").bos_id is None and vocab("wordpiece").eos_ids == frozenset()
    known = TokenizerVocab(byte_level(), size=300, eos_ids=[1, 7, 4000])
    assert known.eos_ids == {1, 7}  # ids that the model never predicts end nothing
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    assert TokenizerVocab(tokenizer, size=300).bos_id is None


def test_models_of_other_sizes_than_their_tokenizer() -> None:
    tokenizer = byte_level()
    padded = TokenizerVocab(tokenizer, size=512)
    assert padded.size == 512 and padded.specials >= set(range(len(tokenizer), 512))
    assert padded.label(511) == "<511>"
    assert TokenizerVocab(tokenizer, size=300).size == 300
    assert TokenizerVocab(tokenizer).size == len(tokenizer)


def test_added_tokens_are_text_unless_special() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("été", special=False), AddedToken("<|reserved|>", special=True)])
    known = TokenizerVocab(tokenizer)
    word, reserved = tokenizer.convert_tokens_to_ids(["été", "<|reserved|>"])
    assert known.token_bytes[word] == "été".encode() and word in known.encode("un été").ids
    assert reserved in known.specials and known.label(reserved) == "<|reserved|>"
    assert reserved not in known.encode("a <|reserved|> b").ids


def test_ids_may_have_gaps() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 9}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known = TokenizerVocab(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<s>"))
    assert known.size == 10 and known.token_bytes[9] == b"b" and known.specials == {0, *range(2, 9)}
    assert known.encode("a b").ids == (1, 9)


def test_digest_tells_tokenizers_apart() -> None:
    # How a text is cut is no part of it: two makes here share the tokens of another.
    makes = [make for make in MAKES if make not in ("with_prefix_space", "gemma")]
    assert len({vocab(make).digest for make in makes}) == len(makes)
    assert TokenizerVocab(byte_level()).digest == vocab("byte_level").digest


def test_bundled_tokenizer_is_exact() -> None:
    known = TokenizerVocab(PreTrainedTokenizerFast.from_pretrained(bundled_path("nano")))
    for text in TEXTS:
        is_exact(known, known.encode(text), text.encode())


def test_gpt2s_own_tokenizer() -> None:
    folder = Path(__file__).parents[3] / "shared/data/gpt2-tokenizer"
    if not folder.is_dir():
        pytest.skip("the files of GPT-2's tokenizer are not here")
    known = TokenizerVocab(GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")))
    assert known.size == 50257 and known.bos_id == 50256 and known.eos_ids == {50256}
    assert known.encode("Hello world").ids == (15496, 995)
    for text in TEXTS:
        is_exact(known, known.encode(text), text.encode())
