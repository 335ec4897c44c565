"""Top-k accuracy and MRR against a plain count: `gclib.training.retrieval`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer
from gclib.models.encoder import Encoder
from gclib.training.retrieval import encode_texts, retrieval_metrics

PAIRS = [TextPair(f"query {n} of many", f"passage {n} " + "word " * (n % 5)) for n in range(23)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PAIRS, vocab_size=200)


class Table(nn.Module):
    """An encoder by heart: the representation of each text is given, looked up by its tokens."""

    def __init__(self, tokenizer, texts, reps):
        super().__init__()
        self.reps = {tuple(tokenizer(text)["input_ids"]): rep for text, rep in zip(texts, reps, strict=True)}
        self.rows: list[int] = []

    def forward(self, input_ids, attention_mask):
        self.rows.append(len(input_ids))
        keys = (tuple(ids[mask == 1].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True))
        return torch.stack([self.reps[key] for key in keys])


def towers(tokenizer, pairs, query_reps, passage_reps):
    queries = list(dict.fromkeys(pair.query for pair in pairs))
    passages = list(dict.fromkeys(pair.passage for pair in pairs))
    return Table(tokenizer, queries, query_reps), Table(tokenizer, passages, passage_reps)


def counted(scores, positives, ks):
    """The oracle: sort each row, find the positive; no ties."""
    ranks = [sorted(row, reverse=True).index(row[own]) + 1 for row, own in zip(scores, positives, strict=True)]
    metrics = {f"top-{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
    return {**metrics, "mrr": sum(1 / rank for rank in ranks) / len(ranks)}


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 23), chunk_size=st.integers(1, 30))
def test_metrics_equal_a_plain_count(tokenizer, seed, count, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    pairs = PAIRS[:count]
    queries, passages = (torch.randn(count, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    found = retrieval_metrics(towers(tokenizer, pairs, queries, passages), pairs, tokenizer, chunk_size=chunk_size)
    expected = counted((queries @ passages.T).tolist(), range(count), (1, 5, 20, 100))
    assert found == pytest.approx(expected, abs=1e-12)


def test_chunks_are_no_bigger_than_asked(tokenizer):
    both = towers(tokenizer, PAIRS, torch.randn(23, 4), torch.randn(23, 4))
    retrieval_metrics(both, PAIRS, tokenizer, chunk_size=10)
    assert [tower.rows for tower in both] == [[10, 10, 3], [10, 10, 3]]


def test_a_passage_that_stands_twice_counts_as_one(tokenizer):
    pairs = [
        TextPair("first query", "the same passage"),
        TextPair("second query", "the same passage"),
        TextPair("third query", "another passage"),
    ]
    queries = torch.tensor([[1.0, 0.0], [0.9, 0.1], [1.0, 0.5]])
    passages = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = retrieval_metrics(towers(tokenizer, pairs, queries, passages), pairs, tokenizer, ks=(1, 2))
    assert found == pytest.approx({"top-1": 2 / 3, "top-2": 1.0, "mrr": (1 + 1 + 1 / 2) / 3})


FOUR = [TextPair("what is it", "it is this"), TextPair("What is  it?", "it is that"), *PAIRS[:2]]


def test_the_rank_is_that_of_the_best_of_several_right_passages(tokenizer):
    """Two pairs ask the same; each passage is right for both, and the better one counts."""
    reps = torch.eye(4)
    queries = torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0]])
    towers_ = towers(tokenizer, FOUR, queries, reps)
    found = retrieval_metrics(towers_, FOUR, tokenizer, ks=(1, 2))
    assert found == pytest.approx({"top-1": 3 / 4, "top-2": 1.0, "mrr": (1 + 1 + 1 / 2 + 1) / 4})
    alone = retrieval_metrics(towers_, FOUR, tokenizer, ks=(1, 2), right=[(0,), (1,), (2,), (3,)])
    assert alone == pytest.approx({"top-1": 2 / 4, "top-2": 1.0, "mrr": (1 / 2 + 1 + 1 / 2 + 1) / 4})
    both = retrieval_metrics(towers_, FOUR, tokenizer, ks=(1,), right=[{0, 1}, {1}, [3], ()])
    assert both == {"top-1": 1.0, "mrr": 1.0}


def test_twins_of_a_right_passage_are_right(tokenizer):
    pairs = [TextPair("first query", "The same passage."), TextPair("second query", "the same  passage")]
    queries, passages = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(2)
    reps = (lambda **batch: queries[: len(batch["input_ids"])], lambda **batch: passages)
    assert retrieval_metrics(reps, pairs, tokenizer, ks=(1,))["top-1"] == 1.0


@pytest.mark.parametrize("right", [3, "0123", [(0,)], [(0,)] * 5, [(0,), (1,), (2,), (4,)], [(0,), (1,), (2,), (-1,)]])
def test_what_is_right_must_be_numbers_of_pairs(right, tokenizer):
    def encode(**batch):
        raise AssertionError("encoded")

    with pytest.raises(ValueError, match="right.* must "):
        retrieval_metrics((encode, encode), FOUR, tokenizer, right=right)


def test_hard_negatives_are_not_part_of_the_pool(tokenizer):
    pairs = [TextPair("query 0 of many", "passage 0 ", ("never looked up",))]
    found = retrieval_metrics(towers(tokenizer, pairs, torch.ones(1, 2), torch.ones(1, 2)), pairs, tokenizer, ks=(1,))
    assert found == {"top-1": 1.0, "mrr": 1.0}


def test_an_encoder_that_gives_everything_the_same_vector_ranks_last(tokenizer):
    same = towers(tokenizer, PAIRS, torch.ones(23, 4), torch.ones(23, 4))
    found = retrieval_metrics(same, PAIRS, tokenizer, ks=(1, 22, 23))
    assert found == pytest.approx({"top-1": 0.0, "top-22": 0.0, "top-23": 1.0, "mrr": 1 / 23})


def test_representations_that_are_not_numbers_rank_last(tokenizer):
    broken = towers(tokenizer, PAIRS, torch.full((23, 4), math.nan), torch.ones(23, 4))
    assert retrieval_metrics(broken, PAIRS, tokenizer, ks=(22,))["top-22"] == 0.0


def test_encoded_texts_come_back_in_their_own_order(tokenizer):
    texts = [pair.passage for pair in PAIRS]
    reps = torch.arange(23.0).unsqueeze(1)
    found = encode_texts(Table(tokenizer, texts, reps), texts, tokenizer, 64, 4)
    assert found.tolist() == reps.tolist()


@pytest.fixture
def encoder():
    return Encoder.from_config("tiny", vocab_size=200, dropout=0.5)


def test_eval_mode_no_gradients_and_everything_put_back(tokenizer, encoder):
    encoder.train()
    encoder.model.embeddings.eval()  # a part that its owner froze stays frozen
    modes = [module.training for module in encoder.modules()]
    seen = []
    encoder.register_forward_hook(lambda module, args, output: seen.append((module.training, output.requires_grad)))
    state = torch.get_rng_state()
    first = retrieval_metrics((encoder, encoder), PAIRS, tokenizer)
    assert first == retrieval_metrics((encoder, encoder), PAIRS, tokenizer)
    assert set(seen) == {(False, False)}
    assert [module.training for module in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_modes_are_put_back_after_an_error(tokenizer, encoder):
    encoder.train()

    def fail(**batch):
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        retrieval_metrics((encoder, fail), PAIRS, tokenizer)
    assert all(module.training for module in encoder.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoders": None}, "encoders must be two.* got 'NoneType'"),
        ({"encoders": (len,)}, "encoders must be two.* got 1 of them"),
        ({"encoders": (len, 3)}, r"encoders\[1\] must be callable, got 'int'"),
        ({"pairs": []}, "pairs must be a list of at least one TextPair"),
        ({"tokenizer": 3}, "tokenizer must be"),
        ({"ks": ()}, "ks must be a list or tuple of at least one k"),
        ({"ks": 5}, "ks must be a list or tuple"),
        ({"ks": (1, 0)}, "ks must be an int of at least 1, got 0"),
        ({"ks": (1, 2.5)}, "ks must be an int of at least 1, got 2.5"),
        ({"chunk_size": 0}, "chunk_size must be an int of at least 1, got 0"),
        ({"query_length": 2}, "query_length must leave room"),
        ({"passage_length": -1}, "passage_length must be an int"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_encoded(change, message, tokenizer):
    def encode(**batch):
        raise AssertionError("encoded")

    arguments = {"encoders": (encode, encode), "pairs": PAIRS, "tokenizer": tokenizer, **change}
    positional = [arguments.pop(name) for name in ("encoders", "pairs", "tokenizer")]
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*positional, **arguments)
