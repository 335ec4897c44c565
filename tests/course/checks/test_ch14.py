"""Chapter 14's checks: they ask for what the library does, and mistakes written in other words are recognised."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gclib import ContrastiveLoss
from gclib.course.banks import MomentumEncoder, TwoSidedBankLoss
from gclib.course.checks import ch14
from gclib.losses.sigmoid import SigmoidLoss


def test_the_exercises_ask_for_what_the_library_does():
    rng = np.random.default_rng(0)
    for maker in ch14.bank_loss.makers:
        *rows, temperature = maker(rng).values()
        queries, passages, kept_queries, kept_passages = rows
        loss_fn = TwoSidedBankLoss(len(kept_queries), ContrastiveLoss(temperature))
        loss_fn(kept_queries, kept_passages)
        torch.testing.assert_close(ch14.bank_loss.oracle(*rows, temperature), loss_fn(queries, passages))
    for maker in ch14.sigmoid_loss.makers:
        queries, passages, temperature, bias = maker(rng).values()
        expected = SigmoidLoss(temperature, bias, learnable=False)(queries, passages)
        torch.testing.assert_close(ch14.sigmoid_loss.oracle(queries, passages, temperature, bias), expected)
    for maker in ch14.follow.makers:
        encoder, follower, momentum = maker(rng).values()
        follows = MomentumEncoder(encoder, momentum)
        follows.copy.load_state_dict(follower.state_dict())
        follows.follow()
        ch14.follow.oracle(encoder, follower, momentum)
        for mine, theirs in zip(follower.parameters(), follows.copy.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_budget_by_hand():
    """Two queries and K = 2: 8 texts. Naive 3 forwards each; the cache 4; a queue 3 for queries and 1 for passages."""
    paid = ch14.updates_paid.oracle
    assert [paid(240, 2, 2, way) for way in ("naive", "cache", "queue")] == [10, 7, 20]


def queue_of_passages(queries, passages, kept_queries, kept_passages, temperature):
    with torch.no_grad():
        constants = kept_passages.clone()
    z = torch.cat([queries @ passages.T, queries @ constants.T], dim=1) / temperature
    return (z.logsumexp(1) - z.diagonal()).mean()


def never_detached(queries, passages, kept_queries, kept_passages, temperature):
    z = torch.cat([queries, kept_queries]) @ torch.cat([passages, kept_passages]).T / temperature
    return -z.log_softmax(1).diagonal().mean()


def two_losses(queries, passages, kept_queries, kept_passages, temperature):
    total = 0.0
    for q, p in ((queries, passages), (kept_queries.detach(), kept_passages.detach())):
        z = q @ p.T / temperature
        total = total + (z.logsumexp(1) - z.diagonal()).sum()
    return total / (len(queries) + len(kept_queries))


def short_labels(queries, passages, kept_queries, kept_passages, temperature):
    q = torch.cat([queries, kept_queries.detach()])
    p = torch.cat([passages, kept_passages.detach()])
    return F.cross_entropy(q @ p.T / temperature, torch.arange(len(queries)))


def over_all_pairs(queries, passages, temperature, bias):
    z = torch.einsum("id,jd->ij", queries, passages) / temperature + bias
    return F.binary_cross_entropy_with_logits(z, torch.eye(len(z), dtype=z.dtype))


def bias_inside(queries, passages, temperature, bias):
    z = (queries @ passages.T + bias) / temperature
    return F.softplus(torch.where(torch.eye(len(z), dtype=torch.bool), -z, z)).sum() / len(z)


def info_nce(queries, passages, temperature, bias):
    z = queries @ passages.T / temperature + bias
    return -z.log_softmax(dim=1).trace() / len(z)


def as_cheap(budget, batch_size, hard_negatives, way):
    texts = batch_size * (2 + hard_negatives)
    return budget // (3 * batch_size + batch_size * (1 + hard_negatives) if way == "queue" else 3 * texts)


def all_trained(budget, batch_size, hard_negatives, way):
    return budget // ((4 if way == "cache" else 3) * batch_size * (2 + hard_negatives))


def one_passage(budget, batch_size, hard_negatives, way):
    return budget // (batch_size * {"naive": 6, "cache": 8, "queue": 4}[way])


def nearly_the_encoder(encoder, follower, momentum):
    with torch.no_grad():
        for mine, theirs in zip(follower.parameters(), encoder.parameters(), strict=True):
            mine.lerp_(theirs, momentum)


def loaded(encoder, follower, momentum):
    follower.load_state_dict(encoder.state_dict())


def attached(encoder, follower, momentum):
    for mine, theirs in zip(follower.parameters(), encoder.parameters(), strict=True):
        mine.lerp_(theirs, 1 - momentum)


def other_way_round(encoder, follower, momentum):
    for mine, theirs in zip(encoder.parameters(), follower.parameters(), strict=True):
        mine.mul_(momentum).add_(theirs, alpha=1 - momentum)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch14.bank_loss, queue_of_passages, "one side kept"),
        (ch14.bank_loss, never_detached, "the bank trained too"),
        (ch14.bank_loss, two_losses, "chunk and bank apart"),
        (ch14.bank_loss, short_labels, "labels of the chunk alone"),
        (ch14.sigmoid_loss, over_all_pairs, "mean over all pairs"),
        (ch14.sigmoid_loss, bias_inside, "bias divided too"),
        (ch14.sigmoid_loss, info_nce, "a softmax"),
        (ch14.updates_paid, as_cheap, "second forward forgotten"),
        (ch14.updates_paid, all_trained, "queue's passages backpropagated"),
        (ch14.updates_paid, one_passage, "hard negatives forgotten"),
        (ch14.follow, nearly_the_encoder, "momentum on the wrong side"),
        (ch14.follow, loaded, "a plain copy"),
        (ch14.follow, attached, "follower in a graph"),
        (ch14.follow, other_way_round, "an encoder in a graph"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(4):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def bank_loss(queries, passages, kept_queries, kept_passages, temperature):
        with torch.no_grad():
            kept = kept_queries.clone(), kept_passages.clone()
        z = torch.cat([kept[0], queries]) @ torch.cat([kept[1], passages]).T / temperature
        return (z.logsumexp(dim=1) - z.diagonal()).mean()

    def sigmoid_loss(queries, passages, temperature, bias):
        z = queries @ passages.T / temperature + bias
        return F.binary_cross_entropy_with_logits(z, torch.eye(len(z), dtype=z.dtype), reduction="sum") / len(z)

    def updates_paid(budget, batch_size, hard_negatives, way):
        each = {"naive": (3, 3), "cache": (4, 4), "queue": (3, 1)}[way]
        return divmod(budget, batch_size * each[0] + batch_size * (1 + hard_negatives) * each[1])[0]

    def follow(encoder, follower, momentum):
        with torch.no_grad():
            for name, value in follower.named_parameters():
                value.copy_(momentum * value + (1 - momentum) * encoder.get_parameter(name))

    for answer in (bank_loss, sigmoid_loss, updates_paid, follow):
        for seed in range(4):
            assert getattr(ch14, answer.__name__).judge(answer, seed=seed).status == "correct"


def test_the_sigmoid_check_takes_float32_signs():
    def sigmoid_loss(queries, passages, temperature, bias):
        signs = 2 * torch.eye(len(queries)) - 1
        return -F.logsigmoid(signs * (queries @ passages.T / temperature + bias)).sum(dim=1).mean()

    assert ch14.sigmoid_loss.judge(sigmoid_loss).status == "correct"


def test_inputs_come_back_as_they_were():
    rng = np.random.default_rng(0)
    inputs = ch14.bank_loss.makers[0](rng)
    before = copy.deepcopy(inputs)
    ch14.bank_loss.oracle(*inputs.values())
    assert all(torch.equal(inputs[name], before[name]) for name in list(inputs)[:4])


def test_a_new_name_for_what_should_change_is_asked_whether_it_changes_anything():
    def renamed(encoder, follower, momentum):
        for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
            old = momentum * old + (1 - momentum) * new

    said = ch14.follow.judge(renamed, seed=0)
    assert (
        said.status == "not attempted" and "does it change what came in (a new value with its name" in said.explanation
    )
