"""Tokenizer and token batches: `gclib.data.tokens`."""

import subprocess
import sys

import pytest
import torch

from gclib.data.pairs import TextPair
from gclib.data.tokens import SPECIAL_TOKENS, tokenize_pairs, train_tokenizer

PAIRS = [
    TextPair(f"Count the {what} in the basket.", f"def count_{what}(basketOfFruit):\n    return len(basketOfFruit)")
    for what in ("apples", "pears", "plums", "figs", "dates", "melons")
]
HARD = [TextPair(pair.query, pair.passage, (f"hard {n}", f"harder {n} of all")) for n, pair in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PAIRS, vocab_size=200)


def test_the_tokenizer_is_the_same_each_time_and_within_its_vocabulary(tokenizer):
    again = train_tokenizer(PAIRS, vocab_size=200)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) <= 200
    assert tokenizer.pad_token_id == 0
    assert set(SPECIAL_TOKENS) <= set(tokenizer.get_vocab())


def test_a_small_vocabulary_is_kept_to_even_with_many_letters():
    letters = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 500))
    tokenizer = train_tokenizer([TextPair(letters, "def f(x): return x")], vocab_size=64)
    assert len(tokenizer) <= 64
    ids = tokenizer(letters)["input_ids"]
    assert max(ids) < 64
    assert tokenizer.unk_token_id in ids


def test_names_in_code_and_words_in_sentences_share_tokens(tokenizer):
    def words(text):
        return tokenizer.tokenize(text, add_special_tokens=False)

    assert words("basketOfFruit") == words("Basket of fruit") == words("basket\n  OF fruit")
    assert words("count_apples") == [*words("count"), "_", *words("apples")]
    assert tokenizer.convert_ids_to_tokens(tokenizer("apples")["input_ids"])[:: len(words("apples")) + 1] == [
        "[CLS]",
        "[SEP]",
    ]


def test_shapes_types_and_padding(tokenizer):
    queries, passages = tokenize_pairs(PAIRS, tokenizer)
    for batch, texts in ((queries, [p.query for p in PAIRS]), (passages, [p.passage for p in PAIRS])):
        assert type(batch) is dict and list(batch) == ["input_ids", "attention_mask"]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
        alone = [tokenizer(text)["input_ids"] for text in texts]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(texts), max(map(len, alone)))
        for ids, mask, expected in zip(*batch.values(), alone, strict=True):
            assert ids[mask == 1].tolist() == expected
            assert set(ids[mask == 0].tolist()) <= {tokenizer.pad_token_id}


def test_passages_stand_query_major(tokenizer):
    _, passages = tokenize_pairs(HARD, tokenizer)
    assert passages["input_ids"].shape[0] == len(HARD) * 3
    for i, pair in enumerate(HARD):
        for offset, text in enumerate((pair.passage, *pair.negatives)):
            row = passages["input_ids"][i * 3 + offset][passages["attention_mask"][i * 3 + offset] == 1]
            assert row.tolist() == tokenizer(text)["input_ids"]


def test_texts_are_cut_to_the_lengths(tokenizer):
    queries, passages = tokenize_pairs(PAIRS, tokenizer, query_length=5, passage_length=3)
    assert queries["input_ids"].shape == (6, 5)
    assert passages["input_ids"].shape == (6, 3)
    assert (passages["input_ids"][:, -1] == tokenizer.sep_token_id).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "pairs must be a list of at least one TextPair, got 'none'"),
        ({"pairs": None}, "pairs must be a list.* got 'NoneType'"),
        ({"pairs": "text"}, "pairs must be a list.* got 'str'"),
        ({"pairs": [("q", "p")]}, r"pairs\[0\] must be a TextPair, got 'tuple'"),
        ({"pairs": [PAIRS[0], HARD[1]]}, r"pairs\[1\] must have as many negatives as pairs\[0\], 0, got 2"),
        ({"tokenizer": None}, "tokenizer must be a transformers tokenizer with a padding token"),
        ({"query_length": 0}, "query_length must be an int of at least 1, got 0"),
        ({"query_length": 2}, "query_length must leave room beside the tokenizer's 2 special tokens, got 2"),
        ({"passage_length": -1}, "passage_length must be an int of at least 1, got -1"),
        ({"passage_length": 2.5}, "passage_length must be an int of at least 1, got 2.5"),
        ({"passage_length": float("nan")}, "passage_length must be an int"),
    ],
)
def test_tokenize_pairs_refuses(change, message, tokenizer):
    arguments = {"pairs": PAIRS, "tokenizer": tokenizer, **change}
    with pytest.raises(ValueError, match=message):
        tokenize_pairs(arguments.pop("pairs"), arguments.pop("tokenizer"), **arguments)


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    unpadded = train_tokenizer(PAIRS, vocab_size=200)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        tokenize_pairs(PAIRS, unpadded)


@pytest.mark.parametrize(
    ("pairs", "vocab_size", "message"),
    [
        ([], 200, "pairs must be"),
        (PAIRS, 0, "vocab_size must be an int of at least 1"),
        (PAIRS, 63, "vocab_size must be at least 64, got 63"),
        (PAIRS, 100.0, "vocab_size must be an int"),
    ],
)
def test_train_tokenizer_refuses(pairs, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(pairs, vocab_size=vocab_size)


@pytest.mark.slow
def test_equally_common_letters_are_cut_alike_in_every_process():
    """More letters than get a token: two processes must leave out the same ones, or one's weights mean other tokens."""
    code = """
import hashlib
from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer
letters = [chr(0x4E00 + number) for number in range(1_200)]
pairs = [TextPair("".join(letters[i : i + 7]) + " q", "".join(letters[i : i + 5]) + " p") for i in range(1_190)]
print(hashlib.sha256(train_tokenizer(pairs).backend_tokenizer.to_str().encode()).hexdigest())
"""
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(found) == 1
