"""Chapter 11's checks: the exercises ask for what the library does, and mistakes in other words are recognised."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gclib.course.checks import ch11
from gclib.losses.matryoshka import MatryoshkaLoss
from gclib.losses.max_sim import max_sim


def test_the_exercises_ask_for_what_the_library_does():
    rng = np.random.default_rng(0)
    for maker in ch11.max_sim.makers:
        inputs = maker(rng)
        torch.testing.assert_close(ch11.max_sim.oracle(**inputs), max_sim(**inputs))
    queries, passages, dims, loss_fn = ch11.matryoshka_loss.makers[0](rng).values()
    expected = ch11.matryoshka_loss.oracle(queries, passages, dims, loss_fn)
    torch.testing.assert_close(MatryoshkaLoss(loss_fn, dims)(queries, passages), expected)


def counts_the_accumulated(library, knobs, ranks):
    if library == "open_clip":
        return {"batch_size": knobs["batch_size"] * knobs["accum_freq"] * ranks, "chunk_size": knobs["batch_size"]}
    own = knobs["per_device_train_batch_size"]
    whole = own * knobs["gradient_accumulation_steps"]
    if knobs["gather_across_devices"]:
        whole = whole * ranks
    return {"chunk_size": min(own, knobs["mini_batch_size"]), "batch_size": whole}


def one_rank(library, knobs, ranks):
    if library == "open_clip":
        return {"batch_size": knobs["batch_size"] * knobs["accum_freq"], "chunk_size": knobs["batch_size"]}
    own = knobs["per_device_train_batch_size"]
    return {"batch_size": own, "chunk_size": min(own, knobs["mini_batch_size"])}


def accumulation_in_open_clip(library, knobs, ranks):
    if library == "open_clip":
        return {"batch_size": knobs["batch_size"] * ranks, "chunk_size": knobs["batch_size"]}
    own = knobs["per_device_train_batch_size"]
    shared = ranks if knobs["gather_across_devices"] else 1
    return {"batch_size": own * shared, "chunk_size": min(own, knobs["mini_batch_size"])}


def unmasked_passages(query_tokens, passage_tokens, query_mask, passage_mask):
    rows = []
    for query, mask in zip(query_tokens, query_mask, strict=True):
        best = (passage_tokens @ query.T).max(dim=1).values  # (N, Tq)
        rows.append((best * mask).sum(dim=1))
    return torch.stack(rows)


def averaged(query_tokens, passage_tokens, query_mask, passage_mask):
    scores = max_sim(query_tokens, passage_tokens, query_mask, passage_mask)
    return scores / query_mask.sum(dim=1, keepdim=True)


def best_of_each_passage_token(query_tokens, passage_tokens, query_mask, passage_mask):
    return max_sim(passage_tokens, query_tokens, passage_mask, query_mask).T


def plain_prefixes(query_reps, passage_reps, dims, loss_fn):
    total = 0
    for dim in dims:
        total = total + loss_fn(query_reps[:, :dim], passage_reps[:, :dim])
    return total


def cut_units(query_reps, passage_reps, dims, loss_fn):
    query_reps, passage_reps = F.normalize(query_reps, dim=-1), F.normalize(passage_reps, dim=-1)
    return torch.stack([loss_fn(query_reps[:, :d], passage_reps[:, :d]) for d in dims]).sum()


def averaged_prefixes(query_reps, passage_reps, dims, loss_fn):
    losses = [loss_fn(*(F.normalize(reps[:, :d], dim=1) for reps in (query_reps, passage_reps))) for d in dims]
    return torch.stack(losses).mean()


def angle(found, expected):
    return float((found / found.norm()) @ (expected / expected.norm()))


def lengths(found, expected):
    return (found.square().sum() / expected.square().sum()).sqrt()


def batch_cut_in_open_clip(library, knobs, ranks):
    if library == "open_clip":
        return {"batch_size": knobs["batch_size"] * ranks, "chunk_size": knobs["batch_size"] // knobs["accum_freq"]}
    own = knobs["per_device_train_batch_size"]
    shared = ranks if knobs["gather_across_devices"] else 1
    return {"batch_size": own * shared, "chunk_size": min(own, knobs["mini_batch_size"])}


def chunk_of_all_ranks(library, knobs, ranks):
    if library == "open_clip":
        return {"batch_size": knobs["batch_size"] * knobs["accum_freq"] * ranks, "chunk_size": knobs["batch_size"]}
    whole = knobs["per_device_train_batch_size"] * (ranks if knobs["gather_across_devices"] else 1)
    return {"batch_size": whole, "chunk_size": min(whole, knobs["mini_batch_size"])}


def minus_one(query_tokens, passage_tokens, query_mask, passage_mask):
    products = torch.einsum("isd,jtd->ijst", query_tokens, passage_tokens)
    best = products.masked_fill(passage_mask[None, :, None] == 0, -1).amax(dim=3)
    return (best * query_mask[:, None]).sum(dim=2)


def of_unit_tokens(query_tokens, passage_tokens, query_mask, passage_mask):
    units = (tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12) for tokens in (query_tokens, passage_tokens))
    return max_sim(*units, query_mask, passage_mask)


def first_rows(query_reps, passage_reps, dims, loss_fn):
    return sum(loss_fn(F.normalize(query_reps[:d], dim=1), F.normalize(passage_reps[:d], dim=1)) for d in dims)


def unit_columns(query_reps, passage_reps, dims, loss_fn):
    cut = [(query_reps[:, :d], passage_reps[:, :d]) for d in dims]
    return sum(loss_fn(q / q.norm(dim=0), p / p.norm(dim=0)) for q, p in cut)


def reciprocal(found, expected):
    return expected.square().sum() / (expected * found).sum()


def ratio_of_means(found, expected):
    return found.mean() / expected.mean()


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch11.translate, counts_the_accumulated, "accumulated steps counted"),
        (ch11.translate, one_rank, "ranks forgotten"),
        (ch11.translate, accumulation_in_open_clip, "accum_freq taken for accumulation"),
        (ch11.max_sim, unmasked_passages, "passage padding wins"),
        (ch11.max_sim, averaged, "mean over the query"),
        (ch11.max_sim, best_of_each_passage_token, "maximum over the query"),
        (ch11.matryoshka_loss, plain_prefixes, "prefix not made a unit vector"),
        (ch11.matryoshka_loss, cut_units, "normalised before cutting"),
        (ch11.matryoshka_loss, averaged_prefixes, "mean over the prefixes"),
        (ch11.gradient_scale, angle, "cosine"),
        (ch11.gradient_scale, lengths, "ratio of lengths"),
        (ch11.translate, batch_cut_in_open_clip, "open_clip's batch_size taken for the batch"),
        (ch11.translate, chunk_of_all_ranks, "chunk capped by all ranks' queries"),
        (ch11.max_sim, minus_one, "padding filled with -1"),
        (ch11.max_sim, of_unit_tokens, "tokens made unit vectors"),
        (ch11.matryoshka_loss, first_rows, "rows cut, not columns"),
        (ch11.matryoshka_loss, unit_columns, "normalised along the batch"),
        (ch11.gradient_scale, reciprocal, "upside down"),
        (ch11.gradient_scale, ratio_of_means, "ratio of the sums"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(4):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def translate(library, knobs, ranks):
        if library == "open_clip":
            knobs = {
                "per_device_train_batch_size": knobs["batch_size"] * knobs["accum_freq"],
                "mini_batch_size": knobs["batch_size"],
                "gather_across_devices": True,
            }
        batch = knobs["per_device_train_batch_size"]
        chunk = min(batch, knobs["mini_batch_size"])
        return {"chunk_size": chunk, "batch_size": batch * ranks ** knobs["gather_across_devices"]}

    def scores(query_tokens, passage_tokens, query_mask, passage_mask):
        grid = query_tokens[:, None] @ passage_tokens[None].transpose(2, 3)
        grid = torch.where(passage_mask[None, :, None].bool(), grid, -torch.inf).amax(dim=-1)
        return torch.where(query_mask[:, None].bool(), grid, 0.0).sum(dim=-1)

    def gradient_scale(found, expected):
        return (found * expected).sum() / expected.norm() ** 2

    assert ch11.translate.judge(translate).status == "correct"
    assert ch11.max_sim.judge(scores).status == "correct"
    assert ch11.matryoshka_loss.judge(lambda q, p, d, f: MatryoshkaLoss(f, d)(q, p)).status == "correct"
    assert ch11.gradient_scale.judge(gradient_scale).status == "correct"


def test_a_message_shows_the_loss_and_no_address():
    told = ch11.matryoshka_loss.judge(plain_prefixes).explanation
    assert "loss_fn = InfoNCE(temperature=0.2)" in told and "0x" not in told


def test_a_detached_side_is_told():
    def matryoshka_loss(query_reps, passage_reps, dims, loss_fn):
        return MatryoshkaLoss(loss_fn, dims)(query_reps, passage_reps.detach())

    assert "no gradient reaches `passage_reps`" in ch11.matryoshka_loss.judge(matryoshka_loss).explanation
