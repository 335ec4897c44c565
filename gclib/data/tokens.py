"""Tokens of text pairs: a tokenizer trained on them, and the token batches that encoders are fed.

Letters: B queries, K hard negatives per query, N = B * (1 + K) passages, Tq and Tp tokens.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gclib.data.pairs import TextPair, check_pairs, texts_of
from gclib.support.validation import positive_int, refuse

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = 500  # characters that get a token of their own; rarer ones become [UNK]


def train_tokenizer(pairs: Sequence[TextPair], *, vocab_size: int = 8_000) -> Any:
    """A lower-case BPE tokenizer trained on the pairs' texts, as a transformers PreTrainedTokenizerFast.

    White space, punctuation (the underscore too) and the humps of camelCase separate words, so that a name in code and
    the same word in a sentence share their tokens; layout is lost. At most `vocab_size` tokens, [PAD] (id 0), [UNK],
    [CLS], [SEP] and [MASK] among them. The same pairs give the same tokenizer.

    Source: byte-pair encoding, Sennrich et al. 2016 (arXiv 1508.07909). Raises ValueError for no pairs, or a vocabulary
    below 64.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = texts_of(check_pairs(pairs))
    if positive_int("vocab_size", vocab_size) < 64:
        raise refuse("vocab_size", "must be at least 64", vocab_size)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    humps = normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), humps, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = most_common_letters(texts, tokenizer.normalizer, min(LETTERS, vocab_size - len(SPECIAL_TOKENS)))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def most_common_letters(texts: Sequence[str], normalizer: Any, most: int) -> list[str]:
    """The commonest characters of the normalized texts, of equally common ones the first in Unicode's order.

    Chosen here because the trainer's own cut takes equally common ones in another order in each process.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    ranked = sorted((letter for letter in counts if not letter.isspace()), key=lambda letter: (-counts[letter], letter))
    return ranked[:most]


def tokenize_pairs(
    pairs: Sequence[TextPair], tokenizer: Any, *, query_length: int = 64, passage_length: int = 256
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batch's queries (B, Tq) and passages (N, Tp): dicts of int64 `input_ids` and `attention_mask`.

    Passages stand query-major: the positive of query i in row i * (1 + K), its K negatives after it. Texts are cut to
    `query_length` and `passage_length` tokens, special ones included; Tq and Tp are those of the longest row of this
    batch, shorter rows are padded with attention_mask 0.

    Raises ValueError for no pairs, pairs of different K, a tokenizer without a padding token, or a length that
    leaves no room for text.
    """
    check_pairs(pairs)
    passages = [text for pair in pairs for text in (pair.passage, *pair.negatives)]
    queries = [pair.query for pair in pairs]
    return (
        tokenize_texts(queries, tokenizer, query_length, "query_length"),
        tokenize_texts(passages, tokenizer, passage_length, "passage_length"),
    )


def tokenize_texts(texts: Sequence[str], tokenizer: Any, length: int, argument: str = "length") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 (rows, T), cut to `length` tokens and padded to the longest row."""
    check_tokenizer(tokenizer, length, argument)
    batch = tokenizer(list(texts), truncation=True, max_length=int(length), padding="longest", return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def check_tokenizer(tokenizer: Any, length: Any, argument: str) -> None:
    """A tokenizer that can pad, and a length with room for at least one token of text; ValueError otherwise."""
    if getattr(tokenizer, "pad_token_id", None) is None or not callable(tokenizer):
        rule = "must be a transformers tokenizer with a padding token"
        raise refuse("tokenizer", rule, type(tokenizer).__name__)
    special = tokenizer.num_special_tokens_to_add()
    if positive_int(argument, length) <= special:
        raise refuse(argument, f"must leave room beside the tokenizer's {special} special tokens", length)
