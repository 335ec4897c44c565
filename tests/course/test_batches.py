"""What comes with a big batch: expected shares against drawn batches and masks, losses against plain autograd."""

import math
import random

import pytest
import torch

from gclib.course import batches
from gclib.data.negatives import false_negative_mask
from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer
from gclib.losses.module import ContrastiveLoss
from gclib.models.encoder import Encoder

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def pairs(count=30):
    """Distinct pairs, but for: 1 asks what 0 asks, 3 gives what 2 gives, 5 and 6 double 4 in other letters."""
    texts = [" ".join(WORDS[int(digit)] for digit in f"{number:02d}") for number in range(count)]
    found = [TextPair(f"find {text}", f"def {text}") for text in texts]
    found[1] = TextPair("Find zero  zero.", found[1].passage)
    found[3] = TextPair(found[3].query, found[2].passage)
    found[5] = TextPair(found[4].query.upper(), found[4].passage + " ")
    found[6] = TextPair(found[4].query, found[4].passage)
    return found


def test_twins_are_counted_as_the_mask_counts_them():
    mask = false_negative_mask(pairs())
    assert batches.false_negatives(pairs()) == mask.sum(dim=1).tolist()
    assert batches.same_query(pairs())[:8] == [1, 1, 0, 0, 2, 2, 2, 0]
    assert batches.same_passage(pairs())[:8] == [0, 0, 1, 1, 2, 2, 2, 0]


def test_same_words_in_any_order_and_number():
    texts = ["read a file, then close it", "Close it: read, read then a file.", "read a file", "read a-file"]
    assert batches.same_words([TextPair(text, text) for text in texts]) == [1, 1, 1, 1]


def test_passages_that_begin_alike_are_one_to_the_encoder():
    texts = ["one two three", "one two four", "five"]
    tokenizer = train_tokenizer([TextPair(text, text) for text in texts * 9], vocab_size=80)
    given = [TextPair("ask", text) for text in texts]
    for length, expected in ((30, [0, 0, 0]), (4, [1, 1, 0])):  # 4: two special tokens, "one" and "two"
        assert batches.same_beginning(given, tokenizer, length) == expected


@pytest.mark.parametrize("batch_size", [2, 5, 29])
def test_the_expected_share_is_that_of_drawn_batches(batch_size):
    twins = batches.false_negatives(pairs())
    draw, seen, rounds = random.Random(0), 0.0, 400
    for _ in range(rounds):
        mask = false_negative_mask(draw.sample(pairs(), batch_size))
        seen += mask.any(dim=1).double().mean().item() / rounds
    assert batches.expected_share(twins, batch_size) == pytest.approx(seen, abs=0.025)
    assert batches.expected_share(twins, 30) == pytest.approx(sum(m > 0 for m in twins) / 30)
    assert batches.expected_share(twins, 1) == pytest.approx(0, abs=1e-12)


def test_the_expected_share_is_the_exact_quotient_of_binomials():
    share = batches.expected_share([3] * 50, 10)
    assert share == pytest.approx(1 - math.comb(46, 9) / math.comb(49, 9), rel=1e-9)
    assert 0.0 < batches.expected_share([1] * 1_000_000, 4_096) < 0.01


def test_loss_and_norm_are_those_of_the_batches_and_nothing_is_changed():
    given = pairs(100)
    tokenizer = train_tokenizer(given, vocab_size=100)
    encoder = Encoder.from_config("tiny", vocab_size=100).train()
    before = [parameter.clone() for parameter in encoder.parameters()]
    lengths = {"query_length": 8, "passage_length": 8}
    found = batches.measure_rows(encoder, given, tokenizer, ContrastiveLoss(0.05), [4, 16], draws=1, **lengths)
    assert encoder.training and all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    encoder.eval()
    for measured, rows in zip(found, (4, 16), strict=True):
        texts = [pair.query for pair in given[:rows]], [pair.passage for pair in given[:rows]]
        cut = {"truncation": True, "max_length": 8, "padding": True, "return_tensors": "pt"}
        asked, answers = (tokenizer(part, **cut) for part in texts)
        reps = [encoder(part["input_ids"], part["attention_mask"]) for part in (asked, answers)]
        logits = reps[0] @ reps[1].T / 0.05
        loss = (torch.logsumexp(logits, dim=1) - logits.diagonal()).mean()
        encoder.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in encoder.parameters() if p.grad is not None).sqrt()
        assert measured.rows == rows and measured.chance == pytest.approx(math.log(rows))
        assert measured.loss == pytest.approx(loss.item(), rel=1e-5)
        assert measured.gradient_norm == pytest.approx(norm.item(), rel=1e-4)
    assert found[0].loss < found[1].loss


def test_refusals():
    with pytest.raises(ValueError, match="batch_size must be at most the number of pairs, 30, got 31"):
        batches.expected_share([0] * 30, 31)
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1, got 0"):
        batches.expected_share([0] * 30, 0)
    with pytest.raises(ValueError, match="twins must be an int of at least 0, got -1"):
        batches.expected_share([0, -1], 1)
    with pytest.raises(ValueError, match="pairs must be"):
        batches.same_query([])
    tokenizer = train_tokenizer(pairs(), vocab_size=80)
    with pytest.raises(ValueError, match="rows times draws must be at most the 30 pairs, got 16 times 2"):
        batches.measure_rows(None, pairs(), tokenizer, None, [4, 16], draws=2)
    with pytest.raises(ValueError, match="length must be an int of at least 1"):
        batches.same_beginning(pairs(), tokenizer, 0)
