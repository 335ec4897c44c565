"""Answers to chapter 11, in the styles and with the mistakes of readers."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch11")
ST, CLIP = "sentence-transformers", "open_clip"


def _both(library, st, clip):
    b, c = st() if library == ST else clip()
    return {"batch_size": b, "chunk_size": c}


@right("translate")
def knobs_by_branches(library, knobs, ranks):
    if library == "sentence-transformers":
        batch = knobs["per_device_train_batch_size"]
        total = batch * ranks if knobs["gather_across_devices"] else batch
        return {"batch_size": total, "chunk_size": min(knobs["mini_batch_size"], batch)}
    return {"batch_size": knobs["batch_size"] * knobs["accum_freq"] * ranks, "chunk_size": knobs["batch_size"]}


@right("translate")
def knobs_with_get(library, knobs, ranks):
    if library == "open_clip":
        chunk = knobs["batch_size"]
        return dict(batch_size=chunk * knobs.get("accum_freq", 1) * ranks, chunk_size=chunk)
    own, across = knobs["per_device_train_batch_size"], knobs.get("gather_across_devices", False)
    return dict(chunk_size=min(own, knobs["mini_batch_size"]), batch_size=own * (ranks if across else 1))


@right("translate")
def knobs_of_numpy(library, knobs, ranks):
    if library == "open_clip":
        chunk = np.int64(knobs["batch_size"])
        return {"batch_size": chunk * knobs["accum_freq"] * ranks, "chunk_size": chunk}
    own = knobs["per_device_train_batch_size"]
    factor = np.where(knobs["gather_across_devices"], ranks, 1).item()
    return {"batch_size": own * factor, "chunk_size": np.minimum(own, knobs["mini_batch_size"])}


@wrong("translate", "accumulated steps counted")
def accumulation_is_batch(library, knobs, ranks):
    if library == CLIP:
        return knobs_by_branches(library, knobs, ranks)
    right = knobs_by_branches(library, knobs, ranks)
    return right | {"batch_size": right["batch_size"] * knobs["gradient_accumulation_steps"]}


@wrong("translate", "ranks without gathering")
def always_all_ranks(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right if library == CLIP else right | {"batch_size": knobs["per_device_train_batch_size"] * ranks}


@wrong("translate", "ranks forgotten")
def never_all_ranks(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    if library == CLIP:
        return right | {"batch_size": knobs["batch_size"] * knobs["accum_freq"]}
    return right | {"batch_size": knobs["per_device_train_batch_size"]}


@wrong("translate", "nothing returned")
def open_clip_alone(library, knobs, ranks):
    if library == CLIP:
        return knobs_by_branches(library, knobs, ranks)


@wrong("translate", None)
def open_clip_on_one_rank(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right | {"batch_size": knobs["batch_size"] * knobs["accum_freq"]} if library == CLIP else right


@wrong("translate", "open_clip's batch_size taken for the batch")
def accum_freq_divides(library, knobs, ranks):
    if library != CLIP:
        return knobs_by_branches(library, knobs, ranks)
    return {"batch_size": knobs["batch_size"] * ranks, "chunk_size": knobs["batch_size"] // knobs["accum_freq"]}


@wrong("translate", "accum_freq taken for accumulation")
def accum_freq_forgotten(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right | {"batch_size": knobs["batch_size"] * ranks} if library == CLIP else right


@wrong("translate", "chunk larger than the batch")
def mini_batch_even_if_larger(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right if library == CLIP else right | {"chunk_size": knobs["mini_batch_size"]}


@wrong("translate", "the rank's batch taken for the chunk")
def chunk_is_the_device_batch(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right if library == CLIP else right | {"chunk_size": knobs["per_device_train_batch_size"]}


@wrong("translate", "batch and chunk swapped")
def batch_and_chunk_swapped(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return {"batch_size": right["chunk_size"], "chunk_size": right["batch_size"]}


@wrong("translate", "chunks of all ranks together")
def chunk_over_all_ranks(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right | {"chunk_size": right["chunk_size"] * ranks}


@wrong("translate", "another form")
def as_a_pair(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    return right["batch_size"], right["chunk_size"]


@wrong("translate", "one library's knobs asked of the other")
def open_clip_forgotten(library, knobs, ranks):
    own = knobs["per_device_train_batch_size"]
    factor = ranks if knobs["gather_across_devices"] else 1
    return {"batch_size": own * factor, "chunk_size": min(own, knobs["mini_batch_size"])}


@wrong("translate", None)
def gather_upside_down(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    if library == CLIP:
        return right
    own = knobs["per_device_train_batch_size"]
    return right | {"batch_size": own if knobs["gather_across_devices"] else own * ranks}


@wrong("translate", "mini_batch_size taken for the batch")
def mini_batch_is_the_loss(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    if library == CLIP:
        return right
    size = knobs["mini_batch_size"]
    return {"batch_size": size * (ranks if knobs["gather_across_devices"] else 1), "chunk_size": size}


@wrong("translate", None)
def everything_times_everything(library, knobs, ranks):
    right = knobs_by_branches(library, knobs, ranks)
    if library == CLIP:
        return right
    steps = knobs["gradient_accumulation_steps"]
    return right | {"batch_size": knobs["per_device_train_batch_size"] * ranks * steps}


@right("max_sim")
def max_sim_by_einsum(q, p, q_mask, p_mask):
    scores = torch.einsum("bqd,npd->bnqp", q, p)
    scores = scores.masked_fill(~p_mask.bool()[None, :, None, :], -math.inf)
    return (scores.max(-1).values * q_mask[:, None, :]).sum(-1)


@right("max_sim")
def max_sim_by_loops(q, p, q_mask, p_mask):
    rows = []
    for i in range(len(q)):
        own = q[i][q_mask[i].bool()]
        rows.append(torch.stack([(own @ p[j][p_mask[j].bool()].T).max(1).values.sum() for j in range(len(p))]))
    return torch.stack(rows)


@right("max_sim")
def max_sim_by_matmul(q, p, q_mask, p_mask):
    sims = q[:, None] @ p[None].transpose(-1, -2)
    sims = torch.where(p_mask[None, :, None] > 0, sims, torch.finfo(sims.dtype).min)
    return sims.amax(-1).masked_fill(q_mask[:, None] == 0, 0).sum(-1)


@right("max_sim")
def max_sim_by_where_and_mul(q, p, q_mask, p_mask):
    sims = torch.tensordot(q, p, dims=([2], [2])).permute(0, 2, 1, 3)
    best = torch.where(p_mask.bool()[None, :, None], sims, float("-inf")).max(dim=3)[0]
    return torch.einsum("bnq,bq->bn", best, q_mask.to(best.dtype))


def _sims(q, p):
    return torch.einsum("bqd,npd->bnqp", q, p)


@wrong("max_sim", "no mask at all")
def no_masks(q, p, q_mask, p_mask):
    return _sims(q, p).amax(-1).sum(-1)


@wrong("max_sim", "passage padding wins")
def query_mask_only(q, p, q_mask, p_mask):
    return (_sims(q, p).amax(-1) * q_mask[:, None]).sum(-1)


@wrong("max_sim", "query padding counted")
def passage_mask_only(q, p, q_mask, p_mask):
    return _sims(q, p).masked_fill(p_mask[None, :, None] == 0, -math.inf).amax(-1).sum(-1)


@wrong("max_sim", "passage padding wins")
def padding_as_zero(q, p, q_mask, p_mask):
    return ((_sims(q, p) * p_mask[None, :, None]).amax(-1) * q_mask[:, None]).sum(-1)


@wrong("max_sim", "padding filled with -10")
def soft_penalty(q, p, q_mask, p_mask):
    sims = _sims(q, p) - 10 * (1 - p_mask[None, :, None].to(q.dtype))
    return (sims.amax(-1) * q_mask[:, None]).sum(-1)


@wrong("max_sim", "padding filled with -1")
def padding_as_minus_one(q, p, q_mask, p_mask):
    return (_sims(q, p).masked_fill(p_mask[None, :, None] == 0, -1).amax(-1) * q_mask[:, None]).sum(-1)


@wrong("max_sim", "mean over the query")
def mean_over_queries(q, p, q_mask, p_mask):
    return max_sim_by_einsum(q, p, q_mask, p_mask) / q_mask.sum(1)[:, None]


@wrong("max_sim", "largest of all pairs")
def largest_over_all(q, p, q_mask, p_mask):
    sims = _sims(q, p).masked_fill(p_mask[None, :, None] == 0, -math.inf)
    return sims.masked_fill(q_mask[:, None, :, None] == 0, -math.inf).amax((-1, -2))


@wrong("max_sim", "all pairs added up")
def sum_over_passage_tokens(q, p, q_mask, p_mask):
    return (_sims(q, p) * p_mask[None, :, None] * q_mask[:, None, :, None]).sum((-1, -2))


@wrong("max_sim", "maximum over the query")
def best_query_token_for_each_passage_token(q, p, q_mask, p_mask):
    sims = _sims(q, p).masked_fill(q_mask[:, None, :, None] == 0, -math.inf)
    return (sims.amax(2) * p_mask[None]).sum(-1)


@wrong("max_sim", "tokens made unit vectors")
def normalised_tokens(q, p, q_mask, p_mask):
    return max_sim_by_einsum(F.normalize(q, dim=-1), F.normalize(p, dim=-1), q_mask, p_mask)


@wrong("max_sim", "pooled first")
def pooled(q, p, q_mask, p_mask):
    q = (q * q_mask[..., None]).sum(1) / q_mask.sum(1, keepdim=True)
    p = (p * p_mask[..., None]).sum(1) / p_mask.sum(1, keepdim=True)
    return q @ p.T


@wrong("max_sim", "own passage alone")
def own_passage_only(q, p, q_mask, p_mask):
    return max_sim_by_einsum(q, p, q_mask, p_mask).diagonal()


@wrong("max_sim", "passage padding wins")
def tokens_zeroed_first(q, p, q_mask, p_mask):
    return _sims(q * q_mask[..., None], p * p_mask[..., None]).amax(-1).sum(-1)


@wrong("max_sim", "passages by queries")
def turned(q, p, q_mask, p_mask):
    return max_sim_by_einsum(q, p, q_mask, p_mask).T


@wrong("max_sim", "mean over the passage")
def mean_over_passage_tokens(q, p, q_mask, p_mask):
    sims = (_sims(q, p) * p_mask[None, :, None]).sum(-1) / p_mask.sum(1)[None, :, None]
    return (sims * q_mask[:, None]).sum(-1)


@wrong("max_sim", "graph cut off")
def detached_scores(q, p, q_mask, p_mask):
    return max_sim_by_einsum(q.detach(), p.detach(), q_mask, p_mask)


@wrong("max_sim", "without a sign")
def absolute_scores(q, p, q_mask, p_mask):
    return ((_sims(q, p).abs() * p_mask[None, :, None]).amax(-1) * q_mask[:, None]).sum(-1)


@right("matryoshka_loss")
def prefixes_by_sum(query_reps, passage_reps, dims, loss_fn):
    return sum(loss_fn(F.normalize(query_reps[:, :d], dim=1), F.normalize(passage_reps[:, :d], dim=1)) for d in dims)


@right("matryoshka_loss")
def prefixes_by_loop(q, p, dims, loss_fn):
    total = 0.0
    for d in dims:
        a, b = q[..., :d], p[..., :d]
        total = total + loss_fn(a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True))
    return total


@right("matryoshka_loss")
def prefixes_stacked(q, p, dims, loss_fn):
    cut = lambda x, d: F.normalize(x.narrow(1, 0, d), p=2, dim=-1)  # noqa: E731
    return torch.stack([loss_fn(cut(q, d), cut(p, d)) for d in dims]).sum()


@right("matryoshka_loss")
def prefixes_by_squares(q, p, dims, loss_fn):
    parts = [[x[:, :d] / x[:, :d].pow(2).sum(1, keepdim=True).sqrt() for x in (q, p)] for d in dims]
    return sum(loss_fn(*part) for part in parts)


@wrong("matryoshka_loss", "prefix not made a unit vector")
def not_normalised(q, p, dims, loss_fn):
    return sum(loss_fn(q[:, :d], p[:, :d]) for d in dims)


@wrong("matryoshka_loss", "normalised before cutting")
def normalised_before_the_cut(q, p, dims, loss_fn):
    q, p = F.normalize(q, dim=1), F.normalize(p, dim=1)
    return sum(loss_fn(q[:, :d], p[:, :d]) for d in dims)


@wrong("matryoshka_loss", "one tower made unit vectors")
def queries_only_normalised(q, p, dims, loss_fn):
    return sum(loss_fn(F.normalize(q[:, :d], dim=1), p[:, :d]) for d in dims)


@wrong("matryoshka_loss", "mean over the prefixes")
def mean_of_prefixes(q, p, dims, loss_fn):
    return prefixes_by_sum(q, p, dims, loss_fn) / len(dims)


@wrong("matryoshka_loss", "rows cut, not columns")
def rows_for_columns(q, p, dims, loss_fn):
    return sum(loss_fn(F.normalize(q[:d], dim=1), F.normalize(p[:d], dim=1)) for d in dims)


@wrong("matryoshka_loss", "normalised along the batch")
def normalised_over_rows(q, p, dims, loss_fn):
    return sum(loss_fn(F.normalize(q[:, :d], dim=0), F.normalize(p[:, :d], dim=0)) for d in dims)


@wrong("matryoshka_loss", "the last numbers")
def last_numbers(q, p, dims, loss_fn):
    return sum(loss_fn(F.normalize(q[:, -d:], dim=1), F.normalize(p[:, -d:], dim=1)) for d in dims)


@wrong("matryoshka_loss", None)
def queries_cut_only(q, p, dims, loss_fn):
    zero = [torch.cat([F.normalize(q[:, :d], dim=1), torch.zeros_like(q[:, d:])], 1) for d in dims]
    return sum(loss_fn(z, F.normalize(p, dim=1)) for z in zero)


@wrong("matryoshka_loss", "bands, not prefixes")
def slices_between_dims(q, p, dims, loss_fn):
    cuts = list(zip([0, *dims[:-1]], dims, strict=True))
    return sum(loss_fn(F.normalize(q[:, a:b], dim=1), F.normalize(p[:, a:b], dim=1)) for a, b in cuts)


@wrong("matryoshka_loss", "only the largest prefix")
def largest_prefix_only(q, p, dims, loss_fn):
    d = max(dims)
    return loss_fn(F.normalize(q[:, :d], dim=1), F.normalize(p[:, :d], dim=1))


@wrong("matryoshka_loss", "weighted by their length")
def weighted_by_dims(q, p, dims, loss_fn):
    pairs = [(d, F.normalize(q[:, :d], dim=1), F.normalize(p[:, :d], dim=1)) for d in dims]
    return sum(d / max(dims) * loss_fn(a, b) for d, a, b in pairs)


@wrong("matryoshka_loss", "only the whole vector")
def last_loss_returned(q, p, dims, loss_fn):
    for d in dims:
        loss = loss_fn(F.normalize(q[:, :d], dim=1), F.normalize(p[:, :d], dim=1))
    return loss


@wrong("matryoshka_loss", "another form")
def detached_prefixes(q, p, dims, loss_fn):
    return sum(loss_fn(F.normalize(q[:, :d], dim=1), F.normalize(p[:, :d], dim=1)).item() for d in dims)


@wrong("matryoshka_loss", "cut from what was cut")
def normalised_twice_cut_of_the_cut(q, p, dims, loss_fn):
    total = 0
    for d in dims:
        q, p = F.normalize(q[:, :d], dim=1), F.normalize(p[:, :d], dim=1)
        total = total + loss_fn(q, p)
    return total


@wrong("matryoshka_loss", "cut from what was cut, the shortest first")
def cut_of_the_cut_after_sorting(q, p, dims, loss_fn):
    return normalised_twice_cut_of_the_cut(q, p, sorted(dims), loss_fn)


@wrong("matryoshka_loss", "another form")
def list_of_losses(q, p, dims, loss_fn):
    return [loss_fn(F.normalize(q[:, :d], dim=1), F.normalize(p[:, :d], dim=1)) for d in dims]


@wrong("matryoshka_loss", "one length for the whole batch")
def norm_of_the_whole_matrix(q, p, dims, loss_fn):
    return sum(loss_fn(q[:, :d] / q[:, :d].norm(), p[:, :d] / p[:, :d].norm()) for d in dims)


@right("gradient_scale")
def scale_by_dot(found, expected):
    return (torch.dot(found, expected) / torch.dot(expected, expected)).item()


@right("gradient_scale")
def scale_as_tensor(found, expected):
    return found @ expected / expected.pow(2).sum()


@right("gradient_scale")
def scale_by_norm(found, expected):
    return float((found * expected).sum() / expected.norm() ** 2)


@right("gradient_scale")
def scale_by_lstsq(found, expected):
    return torch.linalg.lstsq(expected[:, None].double(), found[:, None].double()).solution.item()


@right("gradient_scale")
def scale_by_numpy(found, expected):
    f, e = found.detach().numpy(), expected.detach().numpy()
    return float(f.dot(e) / e.dot(e))


@wrong("gradient_scale", "ratio of lengths")
def ratio_of_norms(found, expected):
    return (found.norm() / expected.norm()).item()


@wrong("gradient_scale", "cosine")
def cosine(found, expected):
    return F.cosine_similarity(found, expected, dim=0).item()


@wrong("gradient_scale", "the other way round")
def other_way_round(found, expected):
    return (found @ expected / (found @ found)).item()


@wrong("gradient_scale", "mean of the ratios")
def mean_of_ratios(found, expected):
    return (found / expected).mean().item()


@wrong("gradient_scale", "ratio of the sums")
def ratio_of_sums(found, expected):
    return (found.sum() / expected.sum()).item()


@wrong("gradient_scale", "ratio of mean sizes")
def ratio_of_means(found, expected):
    return (found.abs().mean() / expected.abs().mean()).item()


@wrong("gradient_scale", "median of the ratios")
def median_of_ratios(found, expected):
    return (found / expected).median().item()


@wrong("gradient_scale", "one entry's ratio")
def first_ratio(found, expected):
    return (found[0] / expected[0]).item()


@wrong("gradient_scale", "never divided")
def dot_without_division(found, expected):
    return (found @ expected).item()


@wrong("gradient_scale", "divided by the length alone")
def divided_by_the_norm(found, expected):
    return (found @ expected / expected.norm()).item()


@wrong("gradient_scale", "relative error")
def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@wrong("gradient_scale", "upside down")
def inverse(found, expected):
    return (expected @ expected / (found @ expected)).item()


@wrong("gradient_scale", "rounded")
def rounded_scale(found, expected):
    return round((found @ expected / (expected @ expected)).item())


@wrong("gradient_scale", "ratio of squared lengths")
def squared_ratio(found, expected):
    return ((found @ found) / (expected @ expected)).item()


@wrong("gradient_scale", "ratio of the largest")
def ratio_of_largest(found, expected):
    return (found.abs().max() / expected.abs().max()).item()


@wrong("gradient_scale", "distance")
def distance(found, expected):
    return (found - expected).norm().item()
