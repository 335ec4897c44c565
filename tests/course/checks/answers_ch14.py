"""Answers to chapter 14, in the styles and with the mistakes of readers."""

import torch
from torch.nn import functional as F

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch14")

# --- chunk and bank -------------------------------------------------------------------------------------------


def _beside(kept=lambda part: part.detach(), rows=lambda losses, chunk: losses.mean(), first=False):
    """InfoNCE over chunk and bank with one part of it done otherwise. first: the kept ones stand before the chunk."""

    def answer(queries, passages, kept_queries, kept_passages, temperature):
        sides = [[queries, kept(kept_queries)], [passages, kept(kept_passages)]]
        q, p = (torch.cat(side[::-1] if first else side) for side in sides)
        losses = F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)), reduction="none")
        return rows(losses, len(queries))

    return answer


@right("bank_loss")
def bank_by_logsumexp(queries, passages, kept_queries, kept_passages, temperature):
    q, p = torch.cat([queries, kept_queries.detach()]), torch.cat([passages, kept_passages.detach()])
    logits = q.matmul(p.t()) / temperature
    return (logits.logsumexp(1) - logits.diagonal()).mean()


@right("bank_loss")
def bank_without_a_graph_for_what_is_kept(queries, passages, kept_queries, kept_passages, temperature):
    with torch.no_grad():
        old_queries, old_passages = kept_queries.clone(), kept_passages.clone()
    q, p = torch.vstack((queries, old_queries)), torch.vstack((passages, old_passages))
    return F.cross_entropy(q @ p.T / temperature, torch.arange(q.shape[0]))


right("bank_loss")(_beside(first=True))

wrong("bank_loss", "one side kept")(_beside(rows=lambda losses, chunk: losses[:chunk].mean()))
wrong("bank_loss", "the bank trained too")(_beside(kept=lambda part: part))
wrong("bank_loss", "sum over the queries")(_beside(rows=lambda losses, chunk: losses.sum()))
wrong("bank_loss", "a mean over the chunk")(_beside(rows=lambda losses, chunk: losses.sum() / chunk))
wrong("bank_loss", None)(_beside(rows=lambda losses, chunk: losses[chunk:].mean()))
wrong("bank_loss", None)(_beside(rows=lambda losses, chunk: losses[:chunk].sum() / len(losses)))
wrong("bank_loss", None)(_beside(rows=lambda losses, chunk: losses))
wrong("bank_loss", "no graph at all")(_beside(rows=lambda losses, chunk: losses.mean().detach()))


@wrong("bank_loss", "multiplied by the temperature")
def bank_times_temperature(queries, passages, kept_queries, kept_passages, temperature):
    return _beside()(queries, passages, kept_queries, kept_passages, 1 / temperature)


@wrong("bank_loss", "temperature forgotten")
def bank_without_temperature(queries, passages, kept_queries, kept_passages, temperature):
    return _beside()(queries, passages, kept_queries, kept_passages, 1.0)


@wrong("bank_loss", "one side kept")
def bank_of_passages_alone(queries, passages, kept_queries, kept_passages, temperature):
    p = torch.cat([passages, kept_passages.detach()])
    return F.cross_entropy(queries @ p.T / temperature, torch.arange(len(queries)))


@wrong("bank_loss", "one side trained")
def bank_with_the_passages_held_only(queries, passages, kept_queries, kept_passages, temperature):
    q, p = torch.cat([queries, kept_queries]), torch.cat([passages, kept_passages.detach()])
    return F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)))


@wrong("bank_loss", None)
def bank_apart(queries, passages, kept_queries, kept_passages, temperature):
    one = F.cross_entropy(queries @ passages.T / temperature, torch.arange(len(queries)))
    two = F.cross_entropy(
        kept_queries.detach() @ kept_passages.detach().T / temperature, torch.arange(len(kept_queries))
    )
    return (one + two) / 2


@wrong("bank_loss", "no graph at all")
def bank_without_any_graph(queries, passages, kept_queries, kept_passages, temperature):
    with torch.no_grad():
        return _beside()(queries, passages, kept_queries, kept_passages, temperature)


@wrong("bank_loss", "the chunk detached")
def bank_with_the_chunk_cut_off(queries, passages, kept_queries, kept_passages, temperature):
    q, p = torch.cat([queries.detach(), kept_queries]), torch.cat([passages.detach(), kept_passages])
    return F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)))


@wrong("bank_loss", None)
def bank_of_unit_vectors(queries, passages, kept_queries, kept_passages, temperature):
    sides = (F.normalize(part, dim=1) for part in (queries, passages, kept_queries, kept_passages))
    return _beside()(*sides, temperature)


@wrong("bank_loss", "both directions")
def bank_in_both_directions(queries, passages, kept_queries, kept_passages, temperature):
    there = _beside()(queries, passages, kept_queries, kept_passages, temperature)
    return (there + _beside()(passages, queries, kept_passages, kept_queries, temperature)) / 2


@wrong("bank_loss", "passages in another order")
def bank_in_another_order(queries, passages, kept_queries, kept_passages, temperature):
    q, p = torch.cat([queries, kept_queries.detach()]), torch.cat([kept_passages.detach(), passages])
    return F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)))


@wrong("bank_loss", None)
def bank_side_by_side(queries, passages, kept_queries, kept_passages, temperature):
    q, p = torch.cat([queries, kept_queries.detach()], 1), torch.cat([passages, kept_passages.detach()], 1)
    return F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)))


# --- the sigmoid loss -----------------------------------------------------------------------------------------


def _signs(count):
    return 2 * torch.eye(count, dtype=torch.float64) - 1


def _sigmoid(logits=lambda s, t, b: s / t + b, signs=_signs, total=lambda terms: terms.sum() / len(terms), sign=-1):
    """SigLIP's loss with one part of it done otherwise."""

    def answer(queries, passages, temperature, bias):
        z = logits(queries @ passages.T, temperature, bias)
        return sign * total(F.logsigmoid(signs(len(z)).to(z.dtype) * z))

    return answer


right("sigmoid_loss")(_sigmoid())


@right("sigmoid_loss")
def sigmoid_by_softplus(queries, passages, temperature, bias):
    z = queries @ passages.T / temperature + bias
    return F.softplus(z - 2 * z * torch.eye(len(z), dtype=z.dtype)).sum() / len(z)


@right("sigmoid_loss")
def sigmoid_by_cross_entropy(queries, passages, temperature, bias):
    z = torch.einsum("id,jd->ij", queries, passages) / temperature + bias
    labels = torch.eye(len(z), dtype=z.dtype)
    return F.binary_cross_entropy_with_logits(z, labels, reduction="sum") / len(z)


@right("sigmoid_loss")
def sigmoid_in_two_sums(queries, passages, temperature, bias):
    z = queries.matmul(passages.mT) / temperature + bias
    own, others = z.diagonal(), z[~torch.eye(len(z), dtype=torch.bool)]
    return -(F.logsigmoid(own).sum() + F.logsigmoid(-others).sum()) / len(z)


right("sigmoid_loss")(lambda queries, passages, temperature, bias: _sigmoid()(queries, passages, temperature, bias) * 1)

wrong("sigmoid_loss", "mean over all pairs")(_sigmoid(total=lambda terms: terms.mean()))
wrong("sigmoid_loss", "not divided")(_sigmoid(total=lambda terms: terms.sum()))
wrong("sigmoid_loss", None)(_sigmoid(sign=1))
wrong("sigmoid_loss", "bias forgotten")(_sigmoid(logits=lambda s, t, b: s / t))
wrong("sigmoid_loss", "bias subtracted")(_sigmoid(logits=lambda s, t, b: s / t - b))
wrong("sigmoid_loss", "bias divided too")(_sigmoid(logits=lambda s, t, b: (s + b) / t))
wrong("sigmoid_loss", "multiplied by the temperature")(_sigmoid(logits=lambda s, t, b: s * t + b))
wrong("sigmoid_loss", "temperature forgotten")(_sigmoid(logits=lambda s, t, b: s + b))
wrong("sigmoid_loss", "zeros for the other passages")(_sigmoid(signs=lambda n: torch.eye(n)))
wrong("sigmoid_loss", "every pair a positive")(_sigmoid(signs=lambda n: torch.ones(n, n)))
wrong("sigmoid_loss", "signs turned round")(_sigmoid(signs=lambda n: -_signs(n)))
wrong("sigmoid_loss", "positives alone")(_sigmoid(total=lambda terms: terms.diagonal().mean()))
wrong("sigmoid_loss", None)(_sigmoid(total=lambda terms: terms.sum(1)))


@wrong("sigmoid_loss", "bias outside the sign")
def sigmoid_with_the_bias_outside(queries, passages, temperature, bias):
    z = queries @ passages.T / temperature
    return -F.logsigmoid(_signs(len(z)) * z + bias).sum() / len(z)


@wrong("sigmoid_loss", "no logarithm")
def sigmoid_without_a_logarithm(queries, passages, temperature, bias):
    z = queries @ passages.T / temperature + bias
    return -torch.sigmoid(_signs(len(z)) * z).sum() / len(z)


@wrong("sigmoid_loss", "a softmax")
def softmax_instead(queries, passages, temperature, bias):
    z = queries @ passages.T / temperature + bias
    return F.cross_entropy(z, torch.arange(len(z)))


@wrong("sigmoid_loss", None)
def sigmoid_of_unit_vectors(queries, passages, temperature, bias):
    return _sigmoid()(F.normalize(queries, dim=1), F.normalize(passages, dim=1), temperature, bias)


@right("sigmoid_loss")
def sigmoid_with_a_naive_logarithm(queries, passages, temperature, bias):
    z = queries @ passages.T / temperature + bias
    return -torch.log(torch.sigmoid(_signs(len(z)) * z)).sum() / len(z)


# --- what a budget pays for -----------------------------------------------------------------------------------


def _paid(
    naive=3, cache=4, queue=lambda b, k: 3 * b + b * (1 + k), whole=lambda budget, cost: budget // cost, texts=None
):
    """Updates with another price of a text, or another count of texts."""
    texts = texts or (lambda b, k: b * (2 + k))

    def answer(budget, batch_size, hard_negatives, way):
        b, k = batch_size, hard_negatives
        cost = {"naive": naive * texts(b, k), "cache": cache * texts(b, k), "queue": queue(b, k)}[way]
        return whole(budget, cost)

    return answer


@right("updates_paid")
def paid_in_branches(budget, batch_size, hard_negatives, way):
    queries, passages = batch_size, batch_size * (1 + hard_negatives)
    if way == "queue":
        return budget // (3 * queries + passages)
    return budget // ((4 if way == "cache" else 3) * (queries + passages))


@right("updates_paid")
def paid_by_a_table(budget, batch_size, hard_negatives, way):
    q, p = {"naive": (3, 3), "cache": (4, 4), "queue": (3, 1)}[way]
    return int(budget / (batch_size * (q + p * (hard_negatives + 1))) + 1e-12)


right("updates_paid")(_paid())

wrong("updates_paid", "queries forgotten")(_paid(texts=lambda b, k: b * (1 + k), queue=lambda b, k: b * (1 + k)))
wrong("updates_paid", "hard negatives forgotten")(_paid(texts=lambda b, k: 2 * b, queue=lambda b, k: 4 * b))
wrong("updates_paid", None)(_paid(texts=lambda b, k: b, queue=lambda b, k: 3 * b))
wrong("updates_paid", "a backward for a forward")(_paid(naive=2, cache=3, queue=lambda b, k: 2 * b + b * (1 + k)))
wrong("updates_paid", "second backward counted")(_paid(cache=6))
wrong("updates_paid", "second forward forgotten")(_paid(cache=3))
wrong("updates_paid", None)(_paid(cache=5))
wrong("updates_paid", "queue's passages backpropagated")(_paid(queue=lambda b, k: 3 * b * (2 + k)))
wrong("updates_paid", "queue's passages for nothing")(_paid(queue=lambda b, k: 3 * b))
wrong("updates_paid", "nothing trained in the queue")(_paid(queue=lambda b, k: b * (2 + k)))
wrong("updates_paid", "queue's sides changed over")(_paid(queue=lambda b, k: b + 3 * b * (1 + k)))
wrong("updates_paid", None)(_paid(queue=lambda b, k: 3 * b + 2 * b * (1 + k)))
wrong("updates_paid", "queue's hard negatives for nothing")(_paid(queue=lambda b, k: 3 * b + b))
wrong("updates_paid", None)(_paid(whole=lambda budget, cost: budget / cost))
wrong("updates_paid", "rounded up")(_paid(whole=lambda budget, cost: -(-budget // cost)))
wrong("updates_paid", "rounded to the nearest")(_paid(whole=lambda budget, cost: round(budget / cost)))
wrong("updates_paid", None)(_paid(whole=lambda budget, cost: cost))
wrong("updates_paid", None)(_paid(texts=lambda b, k: b * (1 + k) * 2, queue=lambda b, k: 4 * b * (1 + k)))
wrong("updates_paid", None)(_paid(texts=lambda b, k: 2 + k, queue=lambda b, k: 4 + k))


# --- a momentum encoder ---------------------------------------------------------------------------------------


@right("follow")
def follow_by_lerp(encoder, follower, momentum):
    with torch.no_grad():
        for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)


@right("follow")
def follow_by_data(encoder, follower, momentum):
    for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
        old.data.mul_(momentum).add_(new.data, alpha=1 - momentum)


@right("follow")
@torch.no_grad()
def follow_by_copy(encoder, follower, momentum):
    weights = dict(encoder.named_parameters())
    for name, old in follower.named_parameters():
        old.copy_(momentum * old + (1 - momentum) * weights[name])


@right("follow")
def follow_by_state(encoder, follower, momentum):
    new, old = encoder.state_dict(), follower.state_dict()
    follower.load_state_dict({name: momentum * old[name] + (1 - momentum) * new[name] for name in old})


def _follow(step, graph=False):
    def answer(encoder, follower, momentum):
        with torch.set_grad_enabled(graph):
            for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
                step(new, old, momentum)

    return answer


wrong("follow", "momentum on the wrong side")(_follow(lambda new, old, m: old.lerp_(new, m)))
wrong("follow", "a plain copy")(_follow(lambda new, old, m: old.copy_(new)))
wrong("follow", "the encoder follows")(_follow(lambda new, old, m: new.lerp_(old, m)))
wrong("follow", "added, not mixed")(_follow(lambda new, old, m: old.mul_(m).add_(new)))
wrong("follow", "kept in full")(_follow(lambda new, old, m: old.add_(new, alpha=1 - m)))
wrong("follow", "only shrunk")(_follow(lambda new, old, m: old.mul_(m)))
wrong("follow", "half and half")(_follow(lambda new, old, m: old.copy_((old + new) / 2)))
wrong("follow", "taken off, not added")(_follow(lambda new, old, m: old.copy_(m * old - (1 - m) * new)))
wrong("follow", "follower in a graph")(_follow(lambda new, old, m: old.mul_(m).add_(new, alpha=1 - m), graph=True))
wrong("follow", "taken off, not added")(_follow(lambda new, old, m: old.mul_(m).add_(new, alpha=-(1 - m))))


@wrong("follow", "the first weight alone")
def follow_the_first_weight_alone(encoder, follower, momentum):
    with torch.no_grad():
        next(follower.parameters()).lerp_(next(encoder.parameters()), 1 - momentum)


@wrong("follow", "only shrunk")
def follow_by_the_gradient(encoder, follower, momentum):
    with torch.no_grad():
        for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
            old.lerp_(new.grad if new.grad is not None else 0 * new, 1 - momentum)


@wrong("follow", "a plain copy")
def follow_and_share(encoder, follower, momentum):
    for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
        old.data = new.data
        old.data.mul_(1)


@wrong("follow", "matrices without biases")
def follow_matrices_alone(encoder, follower, momentum):
    with torch.no_grad():
        for new, old in zip(encoder.parameters(), follower.parameters(), strict=True):
            if new.ndim > 1:
                old.lerp_(new, 1 - momentum)
