"""Chapter 04's exercises, answered as readers do."""

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch04")


def probabilities(q, p, t):
    return (q @ p.T / t).softmax(dim=1)


def own(q, p):
    """(B, N): 1 at each query's positive."""
    return (
        torch.eye(len(q), dtype=q.dtype)
        .repeat_interleave(1, 1)
        .new_zeros(len(q), len(p))
        .index_put((torch.arange(len(q)), torch.arange(len(q)) * (len(p) // len(q))), torch.ones((), dtype=q.dtype))
    )


right("representation_gradient")(lambda q, p, t: (probabilities(q, p, t) - own(q, p)).T @ q / (len(q) * t))


@right("representation_gradient")
def subtracted(q, p, t):
    grads = probabilities(q, p, t).T @ q
    grads[:: len(p) // len(q)] -= q
    return grads / (len(q) * t)


@right("representation_gradient")
def labelled(q, p, t):
    P = torch.softmax(q @ p.T / t, -1)
    P[torch.arange(len(q)), torch.arange(len(q)) * (len(p) // len(q))] -= 1
    return P.T @ q / t / len(q)


@right("representation_gradient")
def loop(q, p, t):
    P, group = probabilities(q, p, t), len(p) // len(q)
    rows = [
        sum(P[i, j] * q[i] for i in range(len(q))) - (q[j // group] if j % group == 0 else 0) for j in range(len(p))
    ]
    return torch.stack(rows) / (len(q) * t)


@right("representation_gradient")
def in_double(q, p, t):
    return subtracted(q.double(), p.double(), t)


@right("representation_gradient")
def shifted(q, p, t):
    z = q @ p.T / t
    e = (z - z.amax(1, keepdim=True)).exp()
    P = e / e.sum(1, keepdim=True) - own(q, p)
    return torch.einsum("ij,id->jd", P, q) / (len(q) * t)


wrong("representation_gradient", "the queries' gradient", "queries' gradient")(
    lambda q, p, t: (probabilities(q, p, t) - own(q, p)) @ p / (len(q) * t)
)
wrong("representation_gradient", "temperature forgotten outside", "no tau")(
    lambda q, p, t: (probabilities(q, p, t) - own(q, p)).T @ q / len(q)
)
wrong("representation_gradient", "mean forgotten", "no B")(
    lambda q, p, t: (probabilities(q, p, t) - own(q, p)).T @ q / t
)
wrong("representation_gradient", "mean over the passages", "divided by N")(
    lambda q, p, t: (probabilities(q, p, t) - own(q, p)).T @ q / (len(p) * t)
)
wrong("representation_gradient", "multiplied by the temperature", "times tau")(
    lambda q, p, t: (probabilities(q, p, t) - own(q, p)).T @ q * t / len(q)
)
wrong("representation_gradient", "wrong sign", "sign")(
    lambda q, p, t: (own(q, p) - probabilities(q, p, t)).T @ q / (len(q) * t)
)
wrong("representation_gradient", "positive forgotten", "no positive")(
    lambda q, p, t: probabilities(q, p, t).T @ q / (len(q) * t)
)
wrong("representation_gradient", "positives only", "positive only")(lambda q, p, t: -own(q, p).T @ q / (len(q) * t))
wrong("representation_gradient", "softmax over the wrong axis", "softmax over columns")(
    lambda q, p, t: ((q @ p.T / t).softmax(0) - own(q, p)).T @ q / (len(q) * t)
)
wrong("representation_gradient", "temperature forgotten inside", "no temperature in softmax")(
    lambda q, p, t: ((q @ p.T).softmax(1) - own(q, p)).T @ q / (len(q) * t)
)
wrong("representation_gradient", "the first B passages are the positives", "first B are the positives")(
    lambda q, p, t: (probabilities(q, p, t) - torch.eye(len(q), len(p), dtype=q.dtype)).T @ q / (len(q) * t)
)
wrong("representation_gradient", "-q for the whole group", "-q for the whole group")(
    lambda q, p, t: (
        (probabilities(q, p, t) - torch.eye(len(q), dtype=q.dtype).repeat_interleave(len(p) // len(q), 1)).T
        @ q
        / (len(q) * t)
    )
)
wrong("representation_gradient", "exponentials as they are", "exp")(
    lambda q, p, t: ((q @ p.T / t).exp() / (q @ p.T / t).exp().sum(1, keepdim=True) - own(q, p)).T @ q / (len(q) * t)
)
wrong("representation_gradient", "logits for probabilities", "logits")(
    lambda q, p, t: (q @ p.T / t - own(q, p)).T @ q / (len(q) * t)
)
wrong("representation_gradient", "shapes of queries and passages", "not transposed")(
    lambda q, p, t: (probabilities(q, p, t) - own(q, p)) @ q / (len(q) * t)
)
wrong("representation_gradient", "normalised once more", "normalised")(
    lambda q, p, t: subtracted(torch.nn.functional.normalize(q, dim=1), torch.nn.functional.normalize(p, dim=1), t)
)
wrong("representation_gradient", None, "p subtracted")(
    lambda q, p, t: (probabilities(q, p, t).T @ q - p) / (len(q) * t)
)
wrong("representation_gradient", "shapes of queries and passages", "notebook's line, K forgotten")(
    lambda q, p, t: (probabilities(q, p, t).T @ q - q) / (len(q) * t)
)
wrong("representation_gradient", "half divided", "divisor on the softmax part only")(
    lambda q, p, t: probabilities(q, p, t).T @ q / (len(q) * t) - own(q, p).T @ q
)
wrong("representation_gradient", "another form", "numpy")(lambda q, p, t: subtracted(q, p, t).numpy())
wrong("representation_gradient", "another form", "both")(
    lambda q, p, t: ((probabilities(q, p, t) - own(q, p)) @ p / (len(q) * t), subtracted(q, p, t))
)


@wrong("representation_gradient", "left to a function that does it", "autograd")
def autograd(q, p, t):
    p = p.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(q @ p.T / t, torch.arange(len(q)) * (len(p) // len(q))).backward()
    return p.grad


@wrong("representation_gradient", "input changed in place", "in place")
def changes_queries(q, p, t):
    P = probabilities(q, p, t) - own(q, p)
    return P.T @ q.div_(len(q) * t)


right("surrogate")(lambda reps, cached, loss: loss.detach() + ((reps - reps.detach()) * cached.detach()).sum())
right("surrogate")(
    lambda reps, cached, loss: (reps * cached.detach()).sum() - (reps * cached).sum().detach() + loss.detach()
)
right("surrogate")(lambda r, u, loss: torch.einsum("nd,nd->", r, u.detach()) + (loss - (r * u).sum()).detach())
right("surrogate")(
    lambda r, u, loss: (
        torch.vdot(r.flatten(), u.detach().flatten()) + (loss - torch.vdot(r.flatten(), u.flatten())).item()
    )
)


@right("surrogate")
def steps(reps, cached, loss):
    dot = torch.tensordot(reps, cached.detach(), dims=2)
    return dot + (loss.detach() - dot.detach())


@right("surrogate")
def with_data(reps, cached, loss):
    u = cached.clone().detach()
    return ((reps - reps.data) * u).sum() + loss.data


wrong("surrogate", "value of the dot product", "no value")(lambda r, u, loss: (r * u.detach()).sum())
wrong("surrogate", "loss on top of the dot product", "loss added")(
    lambda r, u, loss: (r * u.detach()).sum() + loss.detach()
)
wrong("surrogate", "loss not detached", "loss with its graph")(
    lambda r, u, loss: loss + ((r - r.detach()) * u.detach()).sum()
)
wrong("surrogate", "cache not detached", "graph in cached")(
    lambda r, u, loss: loss.detach() + ((r * u).sum() - (r * u).sum().detach())
)
wrong("surrogate", "the loss itself", "loss itself")(lambda r, u, loss: loss)
wrong("surrogate", "gradient cut off", "loss detached")(lambda r, u, loss: loss.detach())
wrong("surrogate", "times the loss", "times loss")(lambda r, u, loss: (r * u.detach()).sum() * loss.detach())
wrong("surrogate", "scaled to the loss", "scaled to the loss")(
    lambda r, u, loss: (r * u.detach()).sum() / (r * u).sum().detach() * loss.detach()
)
wrong("surrogate", "mean over everything", "mean")(
    lambda r, u, loss: loss.detach() + ((r - r.detach()) * u.detach()).mean()
)
wrong("surrogate", "mean over the rows", "mean over rows")(
    lambda r, u, loss: loss.detach() + ((r - r.detach()) * u.detach()).sum(1).mean()
)
wrong("surrogate", None, "per row")(lambda r, u, loss: loss.detach() + ((r - r.detach()) * u.detach()).sum(1))
wrong("surrogate", "all pairs", "matmul all rows")(
    lambda r, u, loss: loss.detach() + ((r - r.detach()) @ u.detach().T).sum()
)
wrong("surrogate", "wrong sign", "sign")(lambda r, u, loss: loss.detach() - ((r - r.detach()) * u.detach()).sum())
wrong("surrogate", "representations detached", "reps detached")(
    lambda r, u, loss: loss.detach() + (r.detach() * u.detach()).sum() - (r.detach() * u).sum()
)
wrong("surrogate", "dot product's value added", "dot detached")(
    lambda r, u, loss: (r * u).sum().detach() + loss.detach()
)
wrong("surrogate", "half the squared distance", "square")(
    lambda r, u, loss: loss.detach() + ((r - u.detach()) ** 2).sum() / 2 - ((r - u) ** 2).sum().detach() / 2
)
wrong("surrogate", "gradient cut off", "dot subtracted without detach")(
    lambda r, u, loss: (r * u.detach()).sum() - (r * u.detach()).sum() + loss.detach()
)
wrong("surrogate", "dot product taken off the loss", "loss minus dot, value of dot")(
    lambda r, u, loss: loss.detach() - (r * u.detach()).sum()
)
wrong("surrogate", "another form", "value only")(lambda r, u, loss: loss.item())
wrong("surrogate", "cosine instead of dot product", "cosine")(
    lambda r, u, loss: (
        loss.detach() + torch.cosine_similarity(r, u.detach()).sum() - torch.cosine_similarity(r, u).sum().detach()
    )
)


@wrong("surrogate", "backward inside", "backward inside")
def backward_inside(reps, cached, loss):
    reps.backward(cached.detach())
    return loss.detach()


right("linear_gradient")(lambda inputs, cached: sum(u.T @ x for x, u in zip(inputs, cached, strict=True)))
right("linear_gradient")(lambda inputs, cached: torch.cat(cached).T @ torch.cat(inputs))
right("linear_gradient")(lambda inputs, cached: torch.einsum("nd,nx->dx", torch.cat(cached), torch.cat(inputs)))
right("linear_gradient")(
    lambda inputs, cached: torch.stack([u.T @ x for x, u in zip(inputs, cached, strict=True)]).sum(0)
)
right("linear_gradient")(lambda inputs, cached: (torch.cat(inputs).T @ torch.cat(cached)).T)


@right("linear_gradient")
def outer_loop(inputs, cached):
    total = torch.zeros(cached[0].shape[1], inputs[0].shape[1], dtype=inputs[0].dtype)
    for x, u in zip(inputs, cached, strict=True):
        for row in range(len(x)):
            total += torch.outer(u[row], x[row])
    return total


wrong("linear_gradient", "transposed", "transposed")(lambda xs, us: sum(x.T @ u for x, u in zip(xs, us, strict=True)))
wrong("linear_gradient", "mean over the chunks", "averaged")(
    lambda xs, us: sum(u.T @ x for x, u in zip(xs, us, strict=True)) / len(xs)
)
wrong("linear_gradient", "mean over the rows", "mean of each chunk")(
    lambda xs, us: sum(u.T @ x / len(x) for x, u in zip(xs, us, strict=True))
)
wrong("linear_gradient", "mean over all rows", "by all rows")(
    lambda xs, us: torch.cat(us).T @ torch.cat(xs) / len(torch.cat(xs))
)
wrong("linear_gradient", "first chunk only", "first")(lambda xs, us: us[0].T @ xs[0])
wrong("linear_gradient", "last chunk only", "last")(lambda xs, us: us[-1].T @ xs[-1])
wrong("linear_gradient", "a list, not a sum", "list")(lambda xs, us: [u.T @ x for x, u in zip(xs, us, strict=True)])
wrong("linear_gradient", "stacked, not summed", "stacked")(
    lambda xs, us: torch.stack([u.T @ x for x, u in zip(xs, us, strict=True)])
)
wrong("linear_gradient", "all rows added before they are multiplied", "sum of each first")(
    lambda xs, us: torch.outer(sum(u.sum(0) for u in us), sum(x.sum(0) for x in xs))
)
wrong("linear_gradient", "rows added before they are multiplied", "chunk sums, outer")(
    lambda xs, us: sum(torch.outer(u.sum(0), x.sum(0)) for x, u in zip(xs, us, strict=True))
)
wrong("linear_gradient", None, "sign")(lambda xs, us: -sum(u.T @ x for x, u in zip(xs, us, strict=True)))
wrong("linear_gradient", "short chunk left out", "short dropped")(
    lambda xs, us: (
        sum(u.T @ x for x, u in zip(xs, us, strict=True) if len(x) == len(xs[0]))
        + torch.zeros(us[0].shape[1], xs[0].shape[1])
    )
)
wrong("linear_gradient", "last chunk left out", "without the last")(
    lambda xs, us: (
        sum([u.T @ x for x, u in zip(xs, us, strict=True)][:-1]) + torch.zeros(us[0].shape[1], xs[0].shape[1])
    )
)
wrong("linear_gradient", "stack of unequal chunks", "stack of unequal")(
    lambda xs, us: torch.einsum("cnd,cnx->dx", torch.stack(us), torch.stack(xs))
)
wrong("linear_gradient", "chunks weighted by their rows", "weighted by rows")(
    lambda xs, us: sum(u.T @ x * len(x) for x, u in zip(xs, us, strict=True)) / sum(map(len, xs))
)
wrong("linear_gradient", "another form", "numpy")(
    lambda xs, us: sum(u.T @ x for x, u in zip(xs, us, strict=True)).numpy()
)
wrong("linear_gradient", "shapes of a product", "u x without T")(
    lambda xs, us: sum(u @ x for x, u in zip(xs, us, strict=True))
)
wrong("linear_gradient", None, "reversed")(lambda xs, us: sum(u.T @ x for x, u in zip(xs, reversed(us), strict=True)))


@wrong("linear_gradient", "input changed in place", "changes a list")
def popping(xs, us):
    total = us.pop().T @ xs.pop()
    while xs:
        total += us.pop().T @ xs.pop()
    return total


@wrong("linear_gradient", "left to a function that does it", "adds into the first product of the input")
def autograd_used(xs, us):
    W = torch.zeros(us[0].shape[1], xs[0].shape[1], requires_grad=True)
    for x, u in zip(xs, us, strict=True):
        (x @ W.T).backward(u)
    return W.grad


right("bytes_to_store")(lambda B, D, K: 4 * D * (B + B * (1 + K)))
right("bytes_to_store")(lambda B, D, K: 4 * B * D * (2 + K))
right("bytes_to_store")(lambda B, D, K: sum([B, B * (1 + K)]) * D * 32 // 8)
right("bytes_to_store")(lambda B, D, K: np.int64(4 * B * D) * (2 + K))
right("bytes_to_store")(lambda B, D, K: torch.empty(B * (2 + K), D, device="meta").nbytes)

wrong("bytes_to_store", "queries only", "queries only")(lambda B, D, K: 4 * B * D)
wrong("bytes_to_store", "passages only", "passages only")(lambda B, D, K: 4 * B * D * (1 + K))
wrong("bytes_to_store", "hard negatives forgotten", "no K")(lambda B, D, K: 8 * B * D)
wrong("bytes_to_store", "numbers, not bytes", "numbers")(lambda B, D, K: B * D * (2 + K))
wrong("bytes_to_store", "the logits", "logits")(lambda B, D, K: 4 * B * B * (1 + K))
wrong("bytes_to_store", "twice as much", "with the reps")(lambda B, D, K: 8 * B * D * (2 + K))
wrong("bytes_to_store", None, "half")(lambda B, D, K: 2 * B * D * (2 + K))
wrong("bytes_to_store", "twice as much", "double")(lambda B, D, K: 8 * D * (B + B * (1 + K)))
wrong("bytes_to_store", "a float for an int", "float")(lambda B, D, K: 4.0 * B * D * (2 + K))
wrong("bytes_to_store", None, "bits")(lambda B, D, K: 32 * B * D * (2 + K))
wrong("bytes_to_store", "batch and negatives added", "B + K")(lambda B, D, K: 4 * D * (B + B + K))
wrong("bytes_to_store", "passages only", "K only")(lambda B, D, K: 4 * D * (B + B * K))
wrong("bytes_to_store", None, "no D")(lambda B, D, K: 4 * B * (2 + K))
wrong("bytes_to_store", None, "B squared")(lambda B, D, K: 4 * D * B * B * (1 + K))
wrong("bytes_to_store", "MiB, not bytes", "MiB")(lambda B, D, K: 4 * D * B * (2 + K) / 2**20)
wrong("bytes_to_store", "as many queries as passages", "negatives for all")(lambda B, D, K: 4 * D * 2 * B * (1 + K))
