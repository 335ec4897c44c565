"""Chapter 04's exercises: misconceptions in other words, right answers in other words, and the oracles themselves."""

import numpy as np
import pytest
import torch

from gclib import contrastive_loss
from gclib.course.checks import ch04


def own_columns(query_reps, passage_reps):
    return torch.arange(len(query_reps)) * (len(passage_reps) // len(query_reps))


def errors(query_reps, passage_reps, temperature, dim=1):
    p = torch.softmax(query_reps @ passage_reps.T / temperature, dim)
    p[torch.arange(len(p)), own_columns(query_reps, passage_reps)] -= 1
    return p


def no_outer_temperature(query_reps, passage_reps, temperature):
    return errors(query_reps, passage_reps, temperature).T @ query_reps / len(query_reps)


def uphill_and_down(query_reps, passage_reps, temperature):
    return errors(query_reps, passage_reps, temperature).neg().T @ query_reps / temperature / len(query_reps)


def each_query_alone(query_reps, passage_reps, temperature):
    rows = errors(query_reps, passage_reps, temperature)
    return sum(torch.outer(row, query) / temperature for row, query in zip(rows, query_reps, strict=True))


def columns(query_reps, passage_reps, temperature):
    return errors(query_reps, passage_reps, temperature, dim=0).T @ query_reps / (len(query_reps) * temperature)


def no_positive(query_reps, passage_reps, temperature):
    p = (query_reps @ passage_reps.T / temperature).softmax(dim=1)
    return torch.einsum("ij,id->jd", p, query_reps) / (len(p) * temperature)


def valued(number, loss):
    return number - number.detach() + loss.detach()


def averaged(reps, cached, loss):
    return valued(torch.mean(cached.detach() * reps), loss)


def cosine(reps, cached, loss):
    r, u = (x / x.norm(dim=1, keepdim=True) for x in (reps, cached.detach()))
    return valued(torch.einsum("ij,ij->", r, u), loss)


def attached(reps, cached, loss):
    return valued(torch.einsum("ij,ij->", reps, cached), loss)


def plain_dot(reps, cached, loss):
    return torch.einsum("ij,ij->", reps, cached.data)


def matrix_product(reps, cached, loss):
    return valued(torch.einsum("id,jd->", reps, cached.detach()), loss)


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
        (ch04.surrogate, plain_dot, "value of the dot product"),
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
        return errors(query_reps, passage_reps, temperature).T @ query_reps / (len(query_reps) * temperature)

    def row_by_row(reps, cached, loss):
        return valued(sum(torch.dot(r, u) for r, u in zip(reps, cached.detach(), strict=True)), loss)

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
        passages = given["passage_reps"].clone().requires_grad_()
        labels = own_columns(given["query_reps"], passages)
        loss = torch.nn.functional.cross_entropy(given["query_reps"] @ passages.T / given["temperature"], labels)
        if len(passages) == len(labels):
            loss = contrastive_loss(given["query_reps"], passages, temperature=given["temperature"])
        wanted = torch.autograd.grad(loss, passages)[0]
        assert torch.allclose(ch04.representation_gradient.oracle(**given), wanted, atol=1e-4)


def test_a_number_without_a_graph_is_told():
    verdict = ch04.surrogate.judge(lambda reps, cached, loss: loss.item())
    assert verdict.status == "wrong" and "not a tensor" in verdict.explanation


def test_a_surrogate_for_each_row_is_told_by_its_shape():
    verdict = ch04.surrogate.judge(lambda reps, cached, loss: (reps * cached.detach()).sum(dim=1))
    assert verdict.status == "wrong" and "expected shape () (a scalar)" in verdict.explanation


def rows_averaged(reps, cached, loss):
    return valued(torch.stack([torch.dot(r, u) for r, u in zip(reps, cached, strict=True)]).mean(), loss)


def test_a_mean_over_rows_is_told_with_and_without_detach():
    assert ch04.surrogate.judge(rows_averaged).misconception == "mean over the rows, cache not detached"
    detached = ch04.surrogate.judge(lambda reps, cached, loss: rows_averaged(reps, cached.detach(), loss))
    assert detached.misconception == "mean over the rows"


def test_a_backward_in_place_of_the_surrogate_is_told():
    verdict = ch04.surrogate.judge(lambda reps, cached, loss: reps.backward(cached))
    assert (verdict.status, verdict.misconception) == ("wrong", "backward inside")


def test_autograd_does_not_do_the_exercise():
    def gradient(query_reps, passage_reps, temperature):
        p = passage_reps.clone().requires_grad_()
        logits = query_reps @ p.T / temperature
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, own_columns(query_reps, p)), p)[0]

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
