"""The contrastive losses once more, dense and in numpy's long double, with formulas of their own: what floats are
judged by. Every direction, masks as whole matrices, weights of hard negatives, closed-form gradients.
"""

import math

import numpy as np
import torch

from gclib.losses.tiles import NEGLIGIBLE_EXPONENT

TEXTS = {
    "query_to_passage": ("q", "p"),
    "passage_to_query": ("+", "q"),
    "query_to_query": ("q", "q"),
    "passage_to_passage": ("+", "p"),
    "positive_to_positive": ("+", "+"),
}


def exact(queries, passages, temperature, names, joint, masks, strength=0.0, weighed=None):
    """(loss, of queries, of passages, of temperature). masks: by direction, True = left out, (B, columns); weighed: the
    query-to-passage logits to which strength * product is added, as a constant."""
    q, p = (np.asarray(reps.detach().numpy(), dtype=np.longdouble) for reps in (queries, passages))
    t, rows = np.longdouble(temperature.item()), np.arange(len(queries))
    group = len(p) // len(q)
    texts = {"q": q, "p": p, "+": p[::group]}
    gradients = {name: np.zeros_like(text) for name, text in texts.items()}
    positive = (q * p[::group]).sum(1) / t
    logits, others, own = {}, {}, {}
    for name in names:
        left, right = TEXTS[name]
        logits[name] = (texts[left][:, None] * texts[right][None]).sum(-1) / t
        taken = logits[name]
        if name == "query_to_passage" and weighed is not None:
            taken = taken + strength * t * taken * weighed
        margin = np.where(masks[name], -np.inf, taken - positive[:, None])
        own[name] = (rows, rows * group) if right == "p" else (rows, rows)
        if name in ("query_to_passage", "passage_to_query"):
            margin[own[name]] = -np.inf
        else:
            kept = margin.reshape(len(q), len(q), -1)
            kept[rows, rows] = -np.inf
        others[name] = margin
    loss, of_temperature = np.longdouble(0), np.longdouble(0)
    softmaxes = [names] if joint else [[name] for name in names]
    for softmax in softmaxes:
        copies = sum(name in ("query_to_passage", "passage_to_query") for name in softmax)
        top = np.maximum(np.max([others[name].max(1) for name in softmax], axis=0), 0)
        parts = {name: np.exp(others[name] - top[:, None]) for name in softmax}
        rest = sum(part.sum(1) for part in parts.values())
        total = copies * np.exp(-top) + rest
        losses = np.where(top > 0, top + np.log(total), np.log(copies) + np.log1p(rest / copies))
        share = len(q) * len(softmaxes)
        loss += losses.sum() / share
        for name in softmax:
            left, right = TEXTS[name]
            of_logits = parts[name] / total[:, None] / share
            if name == softmax[0]:
                of_logits[own[name]] = -rest / total / share
            gradients[left] += of_logits @ texts[right] / t
            gradients[right] += of_logits.T @ texts[left] / t
            of_temperature -= (of_logits * logits[name]).sum() / t
    gradients["p"][::group] += gradients["+"]
    return loss, gradients["q"], gradients["p"], of_temperature


def value_and_gradients(loss_function, queries, passages, temperature, **settings):
    """(loss, of queries, of passages, of temperature) by autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in (queries, passages, temperature)]
    loss = loss_function(leaves[0], leaves[1], temperature=leaves[2], **settings)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def errors(values, truth):
    """The length of each difference."""
    return [float(np.linalg.norm(np.ravel(v.numpy() - np.asarray(e)))) for v, e in zip(values, truth, strict=True)]


def own_errors(dense, oracle, inputs, neighbours=6):
    """What the dense loss of the inputs' dtype gets wrong, at worst, here and on neighbours with other last digits.

    dense(*inputs), oracle(*inputs): loss and three gradients. No version is asked for less than half a unit in the last
    place of the result, nor for probabilities that the tiles document to count as 0.
    """
    queries, passages, temperature = inputs
    norms = [float(np.linalg.norm(np.ravel(value))) for value in oracle(*inputs)]
    scales = [norms[0], *(max(norm, 1e-3 * float(np.linalg.norm(norms[1:]))) for norm in norms[1:])]
    largest = 1 + float(max(queries.abs().max(), passages.abs().max()))
    negligible = math.exp(NEGLIGIBLE_EXPONENT[queries.dtype] + 1) * len(passages) * (largest / temperature.item()) ** 2
    worst = [max(torch.finfo(queries.dtype).eps / 2 * scale, negligible) for scale in scales]
    for number in range(1 + neighbours):
        problem = inputs if number == 0 else [last_digits_changed(tensor) for tensor in inputs]
        worst = [max(pair) for pair in zip(worst, errors(dense(*problem), oracle(*problem)), strict=True)]
    return worst


def last_digits_changed(tensor):
    return tensor * (1 + torch.finfo(tensor.dtype).eps * torch.randint(-4, 5, tensor.shape).to(tensor))
