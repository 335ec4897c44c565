"""Chapter 04's exercises: misconceptions in other words, right answers in other words, and the oracles themselves."""

import numpy as np
import pytest
import torch

from gclib import contrastive_loss
from gclib.course.checks import ch04


def no_outer_temperature(query_reps, passage_reps, temperature):
    z = torch.einsum("id,jd->ij", query_reps, passage_reps).div(temperature)
    weights = z.exp() / z.exp().sum(dim=1, keepdim=True) - torch.eye(len(z))
    return weights @ passage_reps / len(z)


def uphill_and_down(query_reps, passage_reps, temperature):
    p = torch.softmax(query_reps @ passage_reps.T / temperature, -1)
    return (passage_reps - p @ passage_reps) / temperature / len(p)


def each_query_alone(query_reps, passage_reps, temperature):
    rows = []
    for query, own in zip(query_reps, passage_reps, strict=True):
        p = (passage_reps @ query / temperature).softmax(0)
        rows.append((p @ passage_reps - own) / temperature)
    return torch.stack(rows)


def columns(query_reps, passage_reps, temperature):
    p = (passage_reps @ query_reps.T / temperature).softmax(dim=1).T
    return (p @ passage_reps - passage_reps) / (len(p) * temperature)


def no_positive(query_reps, passage_reps, temperature):
    p = (query_reps @ passage_reps.T / temperature).softmax(dim=1)
    return sum(p[:, j : j + 1] * passage_reps[j] for j in range(len(p))) / (len(p) * temperature)


def averaged(reps, cached):
    return torch.mean(cached.detach() * reps)


def cosine(reps, cached):
    r, u = (x / x.norm(dim=1, keepdim=True) for x in (reps, cached.detach()))
    return torch.einsum("ij,ij->", r, u)


def attached(reps, cached):
    return torch.einsum("ij,ij->", reps, cached)


def wrong_one_detached(reps, cached):
    return torch.einsum("ij,ij->", reps.data, cached)


def matrix_product(reps, cached):
    return torch.einsum("id,jd->", reps, cached.detach())


def chunk_means(inputs, cached):
    return torch.stack([torch.einsum("nd,nx->dx", u, x) for x, u in zip(inputs, cached, strict=True)]).mean(0)


def overwritten(inputs, cached):
    for x, u in zip(inputs, cached, strict=True):
        gradient = torch.einsum("nd,nx->dx", u, x)
    return gradient


def other_way_round(inputs, cached):
    return torch.cat(inputs).T @ torch.cat(cached)


def pairs_only(batch_size, dimensions, hard_negatives):
    return 8 * batch_size * dimensions


def counted_in_numbers(batch_size, dimensions, hard_negatives):
    return torch.empty(batch_size * (2 + hard_negatives), dimensions, device="meta").numel()


def logits(batch_size, dimensions, hard_negatives):
    return torch.empty(batch_size, batch_size * (1 + hard_negatives), device="meta").nbytes


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch04.representation_gradient, no_outer_temperature, "temperature forgotten outside"),
        (ch04.representation_gradient, uphill_and_down, "wrong sign"),
        (ch04.representation_gradient, each_query_alone, "mean forgotten"),
        (ch04.representation_gradient, columns, "softmax over the wrong axis"),
        (ch04.representation_gradient, no_positive, "positive forgotten"),
        (ch04.surrogate, averaged, "mean over everything"),
        (ch04.surrogate, cosine, "cosine instead of dot product"),
        (ch04.surrogate, attached, "cache not detached"),
        (ch04.surrogate, wrong_one_detached, "representations detached"),
        (ch04.surrogate, matrix_product, "all pairs"),
        (ch04.linear_gradient, chunk_means, "mean over the chunks"),
        (ch04.linear_gradient, overwritten, "last chunk only"),
        (ch04.linear_gradient, other_way_round, "transposed"),
        (ch04.bytes_to_store, pairs_only, "hard negatives forgotten"),
        (ch04.bytes_to_store, counted_in_numbers, "numbers, not bytes"),
        (ch04.bytes_to_store, logits, "the logits"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    assert exercise.judge(answer).misconception == name


def test_right_answers_in_other_words_are_right():
    def one_by_one(query_reps, passage_reps, temperature):
        p = (query_reps @ passage_reps.T / temperature).softmax(dim=1)
        return (p - torch.eye(len(p))) @ passage_reps / (len(p) * temperature)

    def row_by_row(reps, cached):
        return sum(torch.dot(r, u) for r, u in zip(reps, cached.detach(), strict=True))

    def all_at_once(inputs, cached):
        return torch.cat(cached).T @ torch.cat(inputs)

    for seed in range(20):
        assert ch04.representation_gradient.judge(one_by_one, seed=seed).status == "correct"
    assert ch04.surrogate.judge(row_by_row).status == "correct"
    assert ch04.linear_gradient.judge(all_at_once).status == "correct"
    assert ch04.bytes_to_store.judge(lambda b, d, k: (b * d + b * (1 + k) * d) * 4).status == "correct"


def test_the_gradient_asked_for_is_that_of_the_library():
    for maker in ch04.representation_gradient.makers:
        given = maker(np.random.default_rng(0))
        queries = given["query_reps"].clone().requires_grad_()
        loss = contrastive_loss(queries, given["passage_reps"], temperature=given["temperature"])
        wanted = torch.autograd.grad(loss, queries)[0]
        assert torch.allclose(ch04.representation_gradient.oracle(**given), wanted, atol=1e-6)


def test_a_number_without_a_graph_is_told():
    verdict = ch04.surrogate.judge(lambda reps, cached: (reps * cached).sum().item())
    assert verdict.status == "wrong" and "not a tensor" in verdict.explanation


def test_a_surrogate_for_each_row_is_told_by_its_shape():
    verdict = ch04.surrogate.judge(lambda reps, cached: (reps * cached.detach()).sum(dim=1))
    assert verdict.status == "wrong" and "expected shape () (a scalar)" in verdict.explanation


def rows_averaged(reps, cached):
    return torch.stack([torch.dot(r, u) for r, u in zip(reps, cached, strict=True)]).mean()


def test_a_mean_over_rows_is_told_with_and_without_detach():
    assert ch04.surrogate.judge(rows_averaged).misconception == "mean over the rows, cache not detached"
    detached = ch04.surrogate.judge(lambda reps, cached: rows_averaged(reps, cached.detach()))
    assert detached.misconception == "mean over the rows"


def test_a_backward_in_place_of_the_surrogate_is_told():
    verdict = ch04.surrogate.judge(lambda reps, cached: reps.backward(cached))
    assert (verdict.status, verdict.misconception) == ("wrong", "backward inside")


def test_autograd_does_not_do_the_exercise():
    def gradient(query_reps, passage_reps, temperature):
        q = query_reps.clone().requires_grad_()
        return torch.autograd.grad(contrastive_loss(q, passage_reps, temperature=temperature), q)[0]

    def linear(inputs, cached):
        weight = torch.zeros(cached[0].shape[1], inputs[0].shape[1], requires_grad=True)
        for x, u in zip(inputs, cached, strict=True):
            (x @ weight.T).backward(u)
        return weight.grad

    for exercise, answer in ((ch04.representation_gradient, gradient), (ch04.linear_gradient, linear)):
        assert "does the work" in exercise.judge(answer).explanation


def test_eight_bytes_a_number_are_told():
    explanation = ch04.bytes_to_store.judge(lambda b, d, k: 8 * d * (2 * b + b * k)).explanation
    assert "A float32 number takes 4 bytes, not 8" in explanation


def test_lists_of_chunks_are_described_by_their_shapes():
    explanation = ch04.linear_gradient.judge(lambda inputs, cached: 0, seed=0).explanation
    assert "inputs = a list of" in explanation and "tensor(" not in explanation
