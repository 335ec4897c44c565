"""Chapter 01's exercises: mistakes in the gradient alone, work that another function does, texts that are shown.

tests/course/checks/test_checks.py has more of chapter 01, in other words.
"""

import torch
from torch.nn import functional as F

from gclib import contrastive_loss
from gclib.course.checks import ch01


def right(query_reps, passage_reps, temperature):
    return F.cross_entropy(query_reps @ passage_reps.T / temperature, torch.arange(len(query_reps)))


def judged(answer, seed=0):
    return ch01.info_nce.judge(answer, seed=seed)


def test_a_cut_gradient_is_not_taken_for_an_overflow():
    for seed in range(5):
        verdict = judged(lambda *given: right(*given).detach(), seed)
        assert verdict.misconception == "graph cut off"
        assert verdict.explanation.startswith("The value is right, but no gradient reaches `query_reps`")


def test_a_wrong_gradient_is_not_taken_for_an_overflow():
    verdict = judged(lambda *given: 2 * right(*given) - right(*given).detach())
    assert verdict.misconception is None and "the gradient of `query_reps` is not" in verdict.explanation


def test_an_overflow_is_still_told():
    def plain(query_reps, passage_reps, temperature):
        z = (query_reps @ passage_reps.T / temperature).exp()
        return -torch.log(torch.diag(z) / z.sum(-1)).mean()

    assert judged(plain).misconception == "overflow, divided"


def test_normalising_is_told_by_its_gradient():
    def answer(query_reps, passage_reps, temperature):
        q, p = (reps / reps.norm(dim=1, keepdim=True) for reps in (query_reps, passage_reps))
        return right(q, p, temperature)

    for seed in range(5):
        assert judged(answer, seed).misconception == "normalised once more"


def test_both_directions_are_told():
    def answer(query_reps, passage_reps, temperature):
        return right(query_reps, passage_reps, temperature) / 2 + right(passage_reps, query_reps, temperature) / 2

    assert judged(answer).misconception == "both directions"


def test_the_library_does_not_do_the_exercise():
    def answer(query_reps, passage_reps, temperature):
        return contrastive_loss(query_reps, passage_reps, temperature=temperature)

    verdict = judged(answer)
    assert verdict.status == "wrong" and "`contrastive_loss` does the work" in verdict.explanation


def test_a_wrong_cell_of_the_mask_shows_its_texts():
    def answer(queries, passages):
        mask = ch01.false_negative_mask.oracle(queries, passages)
        mask[1, 2] = ~mask[1, 2]
        return mask

    explanation = ch01.false_negative_mask.judge(answer, seed=0).explanation
    assert "the first is at [1, 2]" in explanation
    assert "Query 1 is 'question " in explanation and "; passage 2 is 'answer " in explanation


def test_whole_groups_of_a_twin_are_told():
    def answer(queries, passages):
        group = len(passages) // len(queries)
        same = torch.tensor([[one == other for other in queries] for one in queries])
        same &= ~torch.eye(len(queries), dtype=torch.bool)
        return same.repeat_interleave(group, dim=1)

    assert ch01.false_negative_mask.judge(answer).misconception == "whole group of a twin masked"
