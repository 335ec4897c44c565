"""Chapter 05's exercises, answered as readers do."""

import copy

import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch05")


# First forward.


@right("first_forward")
def first_plain(encoder, chunks):
    states, reps = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.get_rng_state())
            reps.append(encoder(chunk))
    return torch.cat(reps).requires_grad_(), states


@right("first_forward")
def first_detached(encoder, chunks):
    states, reps = [], []
    for chunk in chunks:
        states.append(torch.get_rng_state().clone())
        with torch.no_grad():
            reps.append(encoder(chunk).detach())
    return torch.cat(reps, dim=0).clone().requires_grad_(True), states


@right("first_forward")
@torch.no_grad()
def first_decorated(encoder, chunks):
    pairs = [(torch.get_rng_state(), encoder(chunk)) for chunk in chunks]
    return torch.cat([reps for _, reps in pairs]).requires_grad_(), [state for state, _ in pairs]


@right("first_forward")
def first_enabled(encoder, chunks):
    out = ([], [])
    with torch.set_grad_enabled(False):
        for c in chunks:
            out[1].append(torch.random.get_rng_state())
            out[0].append(encoder(c))
    leaf = torch.cat(out[0])
    leaf.requires_grad = True
    return [leaf, out[1]]


@right("first_forward")
def first_parameter_like(encoder, chunks):
    states = []
    with torch.no_grad():
        reps = torch.cat([(states.append(torch.get_rng_state()), encoder(c))[1] for c in chunks])
    return torch.vstack([reps]).detach().requires_grad_(), tuple(states)


def first(context=torch.no_grad, before=True, leaf=lambda reps: reps.requires_grad_(), one=False, order=1):
    """A family of first forwards."""

    def answer(encoder, chunks):
        states, reps = [], []
        if one:
            states.append(torch.get_rng_state())
        with context():
            for chunk in chunks[::order]:
                if before and not one:
                    states.append(torch.get_rng_state())
                reps.append(encoder(chunk))
                if not before:
                    states.append(torch.get_rng_state())
        return leaf(torch.cat(reps)), states * len(chunks) if one else states

    return answer


wrong("first_forward", "graph kept in the first forward", "with graph, detached")(
    first(torch.enable_grad, leaf=lambda r: r.detach().requires_grad_())
)
wrong("first_forward", "not detached", "with graph")(first(torch.enable_grad, leaf=lambda r: r))
wrong("first_forward", "state taken after the chunk", "state after")(first(before=False))
wrong("first_forward", "one state for all chunks", "first state for all")(first(one=True))
wrong("first_forward", "no gradient asked for", "no grad asked for")(first(leaf=lambda r: r))
wrong("first_forward", "no gradient asked for", "inference mode")(first(torch.inference_mode, leaf=lambda r: r))
wrong("first_forward", "no gradient asked for", "inference mode, cloned")(
    first(torch.inference_mode, leaf=lambda r: r.clone())
)
wrong("first_forward", None, "reversed")(first(order=-1))
wrong("first_forward", None, "leaf under no_grad clone")(first(leaf=lambda r: r.requires_grad_().clone()))
wrong("first_forward", None, "leaf times one")(first(leaf=lambda r: r.requires_grad_() * 1))
wrong("first_forward", None, "normalised again")(
    first(leaf=lambda r: torch.nn.functional.normalize(r, dim=1).detach().requires_grad_())
)
wrong("first_forward", "not detached", "retain_grad non-leaf")(
    first(torch.enable_grad, leaf=lambda r: (r.retain_grad(), r)[1])
)


@wrong("first_forward", "dropout switched off", "eval left")
def first_eval(encoder, chunks):
    encoder.eval()
    return first_plain(encoder, chunks)


@wrong("first_forward", "dropout switched off", "eval, then train")
def first_eval_train(encoder, chunks):
    encoder.eval()
    found = first_plain(encoder, chunks)
    encoder.train()
    return found


@wrong("first_forward", "a list of leaves", "list of leaves")
def first_list(encoder, chunks):
    reps, states = first_plain(encoder, chunks)
    return [r.detach().requires_grad_() for r in reps.split([len(c) for c in chunks])], states


@wrong("first_forward", "another form", "swapped")
def first_swapped(encoder, chunks):
    return first_plain(encoder, chunks)[::-1]


@wrong("first_forward", "another form", "reps only")
def first_alone(encoder, chunks):
    return first_plain(encoder, chunks)[0]


@wrong("first_forward", "one state for all chunks", "whole batch at once")
def first_whole(encoder, chunks):
    state = torch.get_rng_state()
    with torch.no_grad():
        return encoder(torch.cat(chunks)).requires_grad_(), [state] * len(chunks)


@wrong("first_forward", None, "stack")
def first_stack(encoder, chunks):
    states, reps = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.get_rng_state())
            reps.append(encoder(chunk))
    return torch.stack(reps).requires_grad_(), states


@wrong("first_forward", "another form", "seeds instead of states")
def first_seeds(encoder, chunks):
    states, reps = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.initial_seed())
            reps.append(encoder(chunk))
    return torch.cat(reps).requires_grad_(), states


@wrong("first_forward", "encoded twice", "encoder called twice")
def first_twice(encoder, chunks):
    states, reps = [], []
    with torch.no_grad():
        for chunk in chunks:
            encoder(chunk)
            states.append(torch.get_rng_state())
            reps.append(encoder(chunk))
    return torch.cat(reps).requires_grad_(), states


@wrong("first_forward", "one state for all chunks", "all states first")
def first_states_first(encoder, chunks):
    states = [torch.get_rng_state() for _ in chunks]
    with torch.no_grad():
        return torch.cat([encoder(c) for c in chunks]).requires_grad_(), states


@wrong("first_forward", None, "stub state: manual seed per chunk")
def first_manual(encoder, chunks):
    states, reps = [], []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            torch.manual_seed(number)
            states.append(torch.get_rng_state())
            reps.append(encoder(chunk))
    return torch.cat(reps).requires_grad_(), states


@wrong("first_forward", "input changed in place", "encoder frozen for good")
def first_frozen(encoder, chunks):
    encoder.requires_grad_(False)
    return first_plain(encoder, chunks)


@wrong("first_forward", "gradients left off", "grad mode left off")
def first_grad_off(encoder, chunks):
    torch.set_grad_enabled(False)
    states, reps = [], []
    for chunk in chunks:
        states.append(torch.get_rng_state())
        reps.append(encoder(chunk))
    return torch.cat(reps).requires_grad_(), states


@wrong("first_forward", "last chunk only", "last chunk only")
def first_last(encoder, chunks):
    states = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.get_rng_state())
            reps = encoder(chunk)
    return reps.requires_grad_(), states


# Loss and cache.


@right("build_cache")
def cache_backward(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), [r.grad for r in reps]


@right("build_cache")
def cache_cloned(reps, loss_fn):
    for r in reps:
        r.grad = None
    loss = loss_fn(reps[0], reps[1])
    loss.backward()
    return loss.detach(), [reps[0].grad.clone(), reps[1].grad.clone()]


@right("build_cache")
def cache_fresh_leaves(reps, loss_fn):
    leaves = [r.detach().clone().requires_grad_() for r in reps]
    loss = loss_fn(*leaves)
    loss.backward()
    return loss.detach().clone(), tuple(leaf.grad for leaf in leaves)


@right("build_cache")
def cache_grad(reps, loss_fn):
    loss = loss_fn(*reps)
    found = torch.autograd.grad(loss, [*reps, *loss_fn.parameters()])
    for parameter, grad in zip(loss_fn.parameters(), found[2:], strict=True):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    return loss.detach(), list(found[:2])


@right("build_cache")
def cache_data(reps, loss_fn):
    (loss := loss_fn(*reps)).backward()
    return loss.data, [rep.grad.detach() for rep in reps]


@wrong("build_cache", "temperature without gradient", "temperature without gradient")
def cache_grad_only(reps, loss_fn):
    loss = loss_fn(*reps)
    return loss.detach(), list(torch.autograd.grad(loss, reps))


@wrong("build_cache", "temperature counted twice", "temperature twice")
def cache_twice(reps, loss_fn):
    loss = loss_fn(*reps)
    found = torch.autograd.grad(loss, reps, retain_graph=True)
    loss.backward()
    loss_fn(*[r.detach() for r in reps]).backward()
    return loss.detach(), list(found)


@wrong("build_cache", "loss with its graph", "loss with graph")
def cache_loss_graph(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss, [r.grad for r in reps]


@wrong("build_cache", "another form", "loss as float")
def cache_float(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.item(), [r.grad for r in reps]


@wrong("build_cache", "caches with a graph", "caches with graph")
def cache_create_graph(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward(create_graph=True)
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "representations instead of gradients", "reps instead of grads")
def cache_reps(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), [r.detach() for r in reps]


@wrong("build_cache", "towers swapped", "swapped caches")
def cache_swapped(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), [reps[1].grad, reps[0].grad]


@wrong("build_cache", "towers swapped in the loss", "swapped arguments")
def cache_arguments(reps, loss_fn):
    loss = loss_fn(reps[1], reps[0])
    loss.backward()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "detached before the loss", "detached inputs: no grads")
def cache_detached(reps, loss_fn):
    loss = loss_fn(*[r.detach() for r in reps])
    loss.backward()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "no backward", "no backward")
def cache_none(reps, loss_fn):
    loss = loss_fn(*reps)
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "temperature's gradient cleared", "temperature's gradient wiped")
def cache_zeroed(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    loss_fn.zero_grad()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "temperature's earlier gradient lost", "temperature's earlier gradient wiped")
def cache_zero_first(reps, loss_fn):
    loss_fn.zero_grad()
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "another form", "one tensor")
def cache_cat(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), torch.cat([r.grad for r in reps])


@wrong("build_cache", "cache divided by the rows", "averaged by rows")
def cache_mean(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), [r.grad / len(r) for r in reps]


@wrong("build_cache", None, "scaled by rows")
def cache_scaled(reps, loss_fn):
    loss = loss_fn(*reps)
    (loss * len(reps[0])).backward()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "another form", "caches only")
def cache_only(reps, loss_fn):
    loss_fn(*reps).backward()
    return [r.grad for r in reps]


@wrong("build_cache", "backward twice", "backward twice")
def cache_backward_twice(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward(retain_graph=True)
    loss.backward()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "temperature counted twice", "one backward for each tower")
def cache_each(reps, loss_fn):
    loss_fn(reps[0], reps[1].detach()).backward()
    loss = loss_fn(reps[0].detach(), reps[1])
    loss.backward()
    return loss.detach(), [r.grad for r in reps]


@wrong("build_cache", "no graph to go back", "detached first")
def cache_of_a_detached_loss(reps, loss_fn):
    loss = loss_fn(*reps).detach()
    loss.backward()
    return loss, [r.grad for r in reps]


@wrong("build_cache", "no graph to go back", "under no_grad")
def cache_no_grad(reps, loss_fn):
    with torch.no_grad():
        loss = loss_fn(*reps)
    loss.backward()
    return loss, [r.grad for r in reps]


@wrong("build_cache", "queries' cache only", "queries' cache only")
def cache_queries(reps, loss_fn):
    loss = loss_fn(reps[0], reps[1].detach())
    loss.backward()
    return loss.detach(), [reps[0].grad, torch.zeros_like(reps[1])]


@wrong("build_cache", "caches with the wrong sign", "sign")
def cache_sign(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    return loss.detach(), [-r.grad for r in reps]


@wrong("build_cache", "input changed in place", "leaf changed: a step taken on the reps")
def cache_moved(reps, loss_fn):
    loss = loss_fn(*reps)
    loss.backward()
    with torch.no_grad():
        for r in reps:
            r -= 0.1 * r.grad
    return loss.detach(), [r.grad for r in reps]


# Replay.


@right("replay")
def replay_plain(encoder, chunks, cache, states):
    start = 0
    for chunk, state in zip(chunks, states, strict=True):
        torch.set_rng_state(state)
        encoder(chunk).backward(cache[start : start + len(chunk)])
        start += len(chunk)


@right("replay")
def replay_split(encoder, chunks, cache, states):
    for chunk, u, state in zip(chunks, cache.split([len(c) for c in chunks]), states, strict=True):
        torch.set_rng_state(state)
        (encoder(chunk) * u).sum().backward()


@right("replay")
def replay_first_size(encoder, chunks, cache, states):
    for chunk, u, state in zip(chunks, cache.split(len(chunks[0])), states, strict=True):
        torch.random.set_rng_state(state)
        torch.autograd.backward(encoder(chunk), u)


@right("replay")
def replay_backwards(encoder, chunks, cache, states):
    pieces = list(zip(chunks, cache.detach().split([len(c) for c in chunks]), states, strict=True))
    for chunk, u, state in reversed(pieces):
        torch.set_rng_state(state)
        torch.einsum("nd,nd->", encoder(chunk), u).backward()


@right("replay")
def replay_forked(encoder, chunks, cache, states):
    begin = 0
    for chunk, state in zip(chunks, states, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            reps = encoder(chunk)
        reps.backward(gradient=cache[begin : (begin := begin + len(chunk))])


@right("replay")
def replay_by_grad(encoder, chunks, cache, states):
    for i, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
        torch.set_rng_state(state)
        rows = slice(sum(map(len, chunks[:i])), sum(map(len, chunks[: i + 1])))
        parameters = list(encoder.parameters())
        for p, g in zip(parameters, torch.autograd.grad(encoder(chunk), parameters, cache[rows]), strict=True):
            p.grad = g if p.grad is None else p.grad + g


def replayed(
    pieces, loss=lambda reps, u, size: (reps * u).sum(), restore=lambda states, i: torch.set_rng_state(states[i])
):
    """A family of replays: `pieces` cuts the cache, `loss` makes the surrogate, `restore` sets the state."""

    def answer(encoder, chunks, cache, states):
        for i, (chunk, u) in enumerate(zip(chunks, pieces(chunks, cache), strict=False)):
            restore(states, i)
            loss(encoder(chunk), u, len(chunks)).backward()

    return answer


def fair(chunks, cache):
    return cache.split([len(c) for c in chunks])


def offset_forgotten(chunks, cache):
    return [cache[: len(c)] for c in chunks]


wrong("replay", "cache offset forgotten", "offset forgotten")(replayed(offset_forgotten))
wrong("replay", "dropout not replayed", "no restore")(replayed(fair, restore=lambda states, i: None))
wrong("replay", "first state for every chunk", "first state for all")(
    replayed(fair, restore=lambda states, i: torch.set_rng_state(states[0]))
)
wrong("replay", "restored once only", "first state once")(
    replayed(fair, restore=lambda states, i: torch.set_rng_state(states[0]) if i == 0 else None)
)
wrong("replay", "last state for every chunk", "last state for all")(
    replayed(fair, restore=lambda states, i: torch.set_rng_state(states[-1]))
)
wrong("replay", None, "manual seed")(replayed(fair, restore=lambda states, i: torch.manual_seed(0)))
wrong("replay", "mean over the chunks", "averaged over chunks")(replayed(fair, lambda reps, u, n: (reps * u).sum() / n))
wrong("replay", "mean over the rows", "mean over rows")(replayed(fair, lambda reps, u, n: (reps * u).sum(1).mean()))
wrong("replay", "mean instead of dot product", "mean of all")(replayed(fair, lambda reps, u, n: (reps * u).mean()))
wrong("replay", "every row with every row", "all pairs")(replayed(fair, lambda reps, u, n: (reps @ u.T).sum()))
wrong("replay", "wrong sign", "sign")(replayed(fair, lambda reps, u, n: -(reps * u).sum()))
wrong("replay", "squared distance instead of dot product", "mse")(
    replayed(fair, lambda reps, u, n: ((reps - u) ** 2).sum())
)
wrong("replay", "cache left out", "row sums only, no cache")(replayed(fair, lambda reps, u, n: reps.sum()))
wrong("replay", None, "detached")(replayed(fair, lambda reps, u, n: (reps.detach().requires_grad_() * u).sum()))
wrong("replay", "cache reversed", "reversed cache")(replayed(lambda chunks, cache: fair(chunks, cache.flip(0))))
wrong("replay", "shapes that do not fit", "evenly cut")(replayed(lambda chunks, cache: cache.tensor_split(len(chunks))))
wrong("replay", "offset of one row a chunk", "offset by chunk number")(
    replayed(lambda chunks, cache: [cache[i : i + len(c)] for i, c in enumerate(chunks)])
)
wrong("replay", "re-split by its own length", "offset by the own length")(
    replayed(lambda chunks, cache: [cache[i * len(c) : (i + 1) * len(c)] for i, c in enumerate(chunks)])
)
wrong("replay", "shapes that do not fit", "whole cache to each")(replayed(lambda chunks, cache: [cache] * len(chunks)))


@wrong("replay", "shapes that do not fit", "a sum with the rows")
def replay_of_a_sum_with_the_rows(encoder, chunks, cache, states):
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        torch.set_rng_state(state)
        (encoder(chunk) * u).sum().backward(u)


@wrong("replay", "state set after encoding", "state set after encoding")
def replay_late(encoder, chunks, cache, states):
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        reps = encoder(chunk)
        torch.set_rng_state(state)
        reps.backward(u)


@wrong("replay", "short last chunk dropped", "short dropped")
def replay_short(encoder, chunks, cache, states):
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        if len(chunk) == len(chunks[0]):
            torch.set_rng_state(state)
            encoder(chunk).backward(u)


@wrong("replay", "last chunk left out", "without the last chunk")
def replay_without_last(encoder, chunks, cache, states):
    replay_plain(encoder, chunks[:-1], cache, states[:-1])


@wrong("replay", "earlier gradients lost", "zero_grad at the start")
def replay_wipes(encoder, chunks, cache, states):
    encoder.zero_grad()
    replay_plain(encoder, chunks, cache, states)


@wrong("replay", "last chunk's gradient only", "zero_grad for each chunk")
def replay_wipes_each(encoder, chunks, cache, states):
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        encoder.zero_grad()
        torch.set_rng_state(state)
        encoder(chunk).backward(u)


@wrong("replay", "last chunk's gradient only", "overwrites")
def replay_overwrites(encoder, chunks, cache, states):
    parameters = list(encoder.parameters())
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        torch.set_rng_state(state)
        for p, g in zip(parameters, torch.autograd.grad(encoder(chunk), parameters, u), strict=True):
            p.grad = g


@wrong("replay", "earlier gradients lost", "overwrites what was there, adds its own")
def replay_totals(encoder, chunks, cache, states):
    parameters = list(encoder.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        torch.set_rng_state(state)
        total = [t + g for t, g in zip(total, torch.autograd.grad(encoder(chunk), parameters, u), strict=True)]
    for p, t in zip(parameters, total, strict=True):
        p.grad = t


@wrong("replay", "all graphs alive at once", "all graphs at once")
def replay_whole(encoder, chunks, cache, states):
    reps = []
    for chunk, state in zip(chunks, states, strict=True):
        torch.set_rng_state(state)
        reps.append(encoder(chunk))
    torch.cat(reps).backward(cache)


@wrong("replay", "restored once only", "one forward")
def replay_one_forward(encoder, chunks, cache, states):
    torch.set_rng_state(states[0])
    encoder(torch.cat(chunks)).backward(cache)


@wrong("replay", "dropout switched off", "eval mode")
def replay_eval(encoder, chunks, cache, states):
    encoder.eval()
    replay_plain(encoder, chunks, cache, states)


@wrong("replay", "no graph to go back", "no_grad")
def replay_no_grad(encoder, chunks, cache, states):
    with torch.no_grad():
        replay_plain(encoder, chunks, cache, states)


@wrong("replay", "input changed in place", "a step too")
def replay_steps(encoder, chunks, cache, states):
    replay_plain(encoder, chunks, cache, states)
    with torch.no_grad():
        for p in encoder.parameters():
            p -= 0.01 * p.grad


@wrong("replay", "backpropagated twice", "backward twice")
def replay_twice(encoder, chunks, cache, states):
    replay_plain(encoder, chunks, cache, states)
    replay_plain(encoder, chunks, cache, states)


@wrong("replay", "all graphs alive at once", "graph left")
def replay_retains(encoder, chunks, cache, states):
    kept = []
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        torch.set_rng_state(state)
        reps = encoder(chunk)
        reps.backward(u, retain_graph=True)
        kept.append(reps)


@wrong("replay", "no gradient reaches the encoder", "returns surrogates")
def replay_returns(encoder, chunks, cache, states):
    total = 0
    for chunk, u, state in zip(chunks, fair(chunks, cache), states, strict=True):
        torch.set_rng_state(state)
        total = total + (encoder(chunk) * u).sum()
    return total


# The whole step.


def encoded(encoder, chunks):
    states, reps = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(torch.get_rng_state())
            reps.append(encoder(chunk))
    return torch.cat(reps).requires_grad_(), states


@right("gradient_cache_step")
def step_composed(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    towers = [queries.split(chunk_size), passages.split(chunk_size)]
    firsts = [first_plain(setup.encoder, tower) for tower in towers]
    loss, caches = cache_backward([reps for reps, _ in firsts], setup.loss_fn)
    for tower, cache, (_, states) in zip(towers, caches, firsts, strict=True):
        replay_plain(setup.encoder, tower, cache, states)
    setup.optimizer.step()
    return loss


@right("gradient_cache_step")
def step_flat(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad(set_to_none=False)
    reps, states = [], []
    for tower in (queries, passages):
        outs = []
        for chunk in tower.split(chunk_size):
            states.append(torch.get_rng_state())
            with torch.no_grad():
                outs.append(setup.encoder(chunk))
        reps.append(torch.cat(outs).requires_grad_())
    loss = setup.loss_fn(*reps)
    loss.backward()
    it = iter(states)
    for tower, rep in zip((queries, passages), reps, strict=True):
        for chunk, u in zip(tower.split(chunk_size), rep.grad.split(chunk_size), strict=True):
            torch.set_rng_state(next(it))
            (setup.encoder(chunk) * u).sum().backward()
    setup.optimizer.step()
    return loss.detach()


@right("gradient_cache_step")
def step_passages_first_in_replay(setup, queries, passages, chunk_size):
    for group in setup.optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
    q, q_states = encoded(setup.encoder, queries.split(chunk_size))
    p, p_states = encoded(setup.encoder, passages.split(chunk_size))
    loss = setup.loss_fn(q, p)
    loss.backward()
    replay_plain(setup.encoder, passages.split(chunk_size), p.grad, p_states)
    replay_plain(setup.encoder, queries.split(chunk_size), q.grad, q_states)
    setup.optimizer.step()
    return loss.detach().clone()


@right("gradient_cache_step")
def step_saves_state(setup, queries, passages, chunk_size):
    loss = step_composed(setup, queries, passages, chunk_size)
    return loss


@right("gradient_cache_step")
def step_zero_at_end_too(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    setup.loss_fn.zero_grad()
    setup.encoder.zero_grad()
    return step_flat(setup, queries, passages, chunk_size)


def step_with(
    zero=True,
    cut=lambda tower, size: tower.split(size),
    first=encoded,
    loss_and_caches=lambda setup, q, p: cache_backward([q, p], setup.loss_fn),
    back=replay_plain,
    swap=None,
    steps=1,
    result=lambda loss: loss,
):
    """A family of steps: each argument takes a part out or another in."""

    def answer(setup, queries, passages, chunk_size):
        if zero:
            setup.optimizer.zero_grad()
        towers = [cut(queries, chunk_size), cut(passages, chunk_size)]
        (q, q_states), (p, p_states) = (first(setup.encoder, tower) for tower in towers)
        loss, caches = loss_and_caches(setup, q, p)
        states = [q_states, p_states] if swap is None else swap(q_states, p_states)
        for tower, cache, own in zip(towers, caches, states, strict=True):
            back(setup.encoder, tower, cache, own)
        for _ in range(steps):
            setup.optimizer.step()
        return result(loss)

    return answer


def one_cache(setup, q, p):
    loss = setup.loss_fn(q, p)
    return loss.detach(), list(torch.autograd.grad(loss, [q, p]))


wrong("gradient_cache_step", "old gradients kept", "no zero_grad")(step_with(zero=False))
wrong("gradient_cache_step", "no optimizer step", "no step")(step_with(steps=0))
wrong("gradient_cache_step", "two optimizer steps", "two steps")(step_with(steps=2))
wrong("gradient_cache_step", "passages with the queries' states", "passages with the queries' states")(
    step_with(swap=lambda q, p: [q, q])
)
wrong("gradient_cache_step", "towers' states swapped", "states swapped")(step_with(swap=lambda q, p: [p, q]))
wrong("gradient_cache_step", "temperature without gradient", "temperature without gradient")(
    step_with(loss_and_caches=one_cache)
)
wrong("gradient_cache_step", "dropout not replayed", "no restore")(
    step_with(back=replayed(fair, restore=lambda states, i: None))
)
wrong("gradient_cache_step", "first state for every chunk", "first state for every chunk")(
    step_with(back=replayed(fair, restore=lambda states, i: torch.set_rng_state(states[0])))
)
wrong("gradient_cache_step", "state set after encoding", "state set after encoding")(step_with(back=replay_late))
wrong("gradient_cache_step", "state noted after encoding", "state noted after encoding")(
    step_with(first=first(before=False))
)
wrong("gradient_cache_step", "cache offset forgotten", "offset forgotten")(step_with(back=replayed(offset_forgotten)))
wrong("gradient_cache_step", "mean over the chunks", "averaged over chunks")(
    step_with(back=replayed(fair, lambda reps, u, n: (reps * u).sum() / n))
)
wrong("gradient_cache_step", "mean over the rows", "mean over rows")(
    step_with(back=replayed(fair, lambda reps, u, n: (reps * u).sum(1).mean()))
)
wrong("gradient_cache_step", "mean instead of dot product", "mean of all")(
    step_with(back=replayed(fair, lambda reps, u, n: (reps * u).mean()))
)
wrong("gradient_cache_step", "loss with its graph", "loss with graph")(
    step_with(loss_and_caches=lambda s, q, p: cache_loss_graph([q, p], s.loss_fn))
)
wrong("gradient_cache_step", "another form", "loss as float")(step_with(result=lambda loss: loss.item()))
wrong("gradient_cache_step", "another form", "returns nothing")(step_with(result=lambda loss: None))
wrong("gradient_cache_step", "caches swapped", "caches swapped")(
    step_with(loss_and_caches=lambda s, q, p: cache_swapped([q, p], s.loss_fn))
)
wrong("gradient_cache_step", "towers swapped in the loss", "loss arguments swapped")(
    step_with(loss_and_caches=lambda s, q, p: cache_arguments([q, p], s.loss_fn))
)
wrong("gradient_cache_step", "one chunk of all rows", "no chunks")(step_with(cut=lambda tower, size: [tower]))
wrong("gradient_cache_step", "chunk_size chunks", "chunk(size): number of chunks")(
    step_with(cut=lambda tower, size: tower.chunk(size))
)
wrong("gradient_cache_step", "all graphs alive in the replay", "all graphs kept in the replay")(
    step_with(back=replay_whole)
)
wrong("gradient_cache_step", "graph kept in the first forward", "graph in the first forward")(
    step_with(first=lambda e, chunks: first_with_graph(e, chunks))
)
wrong("gradient_cache_step", "gradients cleared for each tower", "zero_grad for each tower")(
    step_with(back=replay_wipes)
)
wrong("gradient_cache_step", None, "zero_grad for each chunk")(step_with(back=replay_wipes_each))
wrong("gradient_cache_step", "shapes that do not fit", "evenly cut cache")(
    step_with(back=replayed(lambda chunks, cache: cache.tensor_split(len(chunks))))
)
wrong("gradient_cache_step", "short last chunk dropped", "short chunk dropped")(step_with(back=replay_short))
wrong("gradient_cache_step", "dropout switched off in the first forward", "eval in the first forward")(
    step_with(first=lambda e, chunks: first_eval_train(e, chunks))
)
wrong("gradient_cache_step", "dropout switched off", "eval left")(
    step_with(first=lambda e, chunks: first_eval(e, chunks))
)
wrong("gradient_cache_step", "wrong sign", "sign")(step_with(back=replayed(fair, lambda reps, u, n: -(reps * u).sum())))


def first_with_graph(encoder, chunks):
    states, reps = [], []
    for chunk in chunks:
        states.append(torch.get_rng_state())
        reps.append(encoder(chunk))
    return torch.cat(reps).detach().requires_grad_(), states


@wrong("gradient_cache_step", "optimizer step for each tower", "step after each tower")
def step_each_tower(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    towers = [queries.split(chunk_size), passages.split(chunk_size)]
    firsts = [encoded(setup.encoder, tower) for tower in towers]
    loss, caches = cache_backward([reps for reps, _ in firsts], setup.loss_fn)
    for tower, cache, (_, states) in zip(towers, caches, firsts, strict=True):
        replay_plain(setup.encoder, tower, cache, states)
        setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", "temperature without gradient", "zero_grad between cache and replay")
def step_zero_late(setup, queries, passages, chunk_size):
    towers = [queries.split(chunk_size), passages.split(chunk_size)]
    firsts = [encoded(setup.encoder, tower) for tower in towers]
    loss, caches = cache_backward([reps for reps, _ in firsts], setup.loss_fn)
    setup.optimizer.zero_grad()
    for tower, cache, (_, states) in zip(towers, caches, firsts, strict=True):
        replay_plain(setup.encoder, tower, cache, states)
    setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", "gradients cleared before the step", "zero_grad after backward, before step")
def step_zero_before_step(setup, queries, passages, chunk_size):
    towers = [queries.split(chunk_size), passages.split(chunk_size)]
    firsts = [encoded(setup.encoder, tower) for tower in towers]
    loss, caches = cache_backward([reps for reps, _ in firsts], setup.loss_fn)
    for tower, cache, (_, states) in zip(towers, caches, firsts, strict=True):
        replay_plain(setup.encoder, tower, cache, states)
    setup.optimizer.zero_grad()
    setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", "the plain step", "naive")
def step_naive(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    loss = setup.loss_fn(setup.encoder(queries), setup.encoder(passages))
    loss.backward()
    setup.optimizer.step()
    return loss.detach()


@wrong("gradient_cache_step", "every graph kept", "every graph kept")
def step_kept(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    q, p = (torch.cat([setup.encoder(c) for c in t.split(chunk_size)]) for t in (queries, passages))
    loss = setup.loss_fn(q, p)
    loss.backward()
    setup.optimizer.step()
    return loss.detach()


@wrong("gradient_cache_step", "a loss for each chunk", "accumulation")
def step_accumulation(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    total = 0
    for q, p in zip(queries.split(chunk_size), passages.split(chunk_size), strict=True):
        loss = setup.loss_fn(setup.encoder(q), setup.encoder(p)) * len(q) / len(queries)
        loss.backward()
        total += loss.detach()
    setup.optimizer.step()
    return total


@wrong("gradient_cache_step", "queries and passages in turns", "interleaved")
def step_interleaved(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    pieces, reps, states = [queries.split(chunk_size), passages.split(chunk_size)], ([], []), ([], [])
    with torch.no_grad():
        for both in zip(*pieces, strict=True):
            for side, chunk in enumerate(both):
                states[side].append(torch.get_rng_state())
                reps[side].append(setup.encoder(chunk))
    leaves = [torch.cat(r).requires_grad_() for r in reps]
    loss, caches = cache_backward(leaves, setup.loss_fn)
    for side in range(2):
        replay_plain(setup.encoder, pieces[side], caches[side], states[side])
    setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", "passages encoded first", "passages encoded first")
def step_passages_first(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    p, p_states = encoded(setup.encoder, passages.split(chunk_size))
    q, q_states = encoded(setup.encoder, queries.split(chunk_size))
    loss, (uq, up) = cache_backward([q, p], setup.loss_fn)
    replay_plain(setup.encoder, queries.split(chunk_size), uq, q_states)
    replay_plain(setup.encoder, passages.split(chunk_size), up, p_states)
    setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", "passages not replayed", "queries' replay only")
def step_queries_only(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    q, states = encoded(setup.encoder, queries.split(chunk_size))
    p, _ = encoded(setup.encoder, passages.split(chunk_size))
    loss, caches = cache_backward([q, p], setup.loss_fn)
    replay_plain(setup.encoder, queries.split(chunk_size), caches[0], states)
    setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", "no replay", "no replay")
def step_no_replay(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    q, _ = encoded(setup.encoder, queries.split(chunk_size))
    p, _ = encoded(setup.encoder, passages.split(chunk_size))
    loss, _ = cache_backward([q, p], setup.loss_fn)
    setup.optimizer.step()
    return loss


@wrong("gradient_cache_step", None, "loss taken anew after the step")
def step_loss_after(setup, queries, passages, chunk_size):
    step_composed(setup, queries, passages, chunk_size)
    q, _ = encoded(setup.encoder, queries.split(chunk_size))
    p, _ = encoded(setup.encoder, passages.split(chunk_size))
    return setup.loss_fn(q, p).detach()


@wrong("gradient_cache_step", None, "a copy is trained")
def step_copy(setup, queries, passages, chunk_size):
    return step_composed(copy.deepcopy(setup), queries, passages, chunk_size)


@wrong("gradient_cache_step", None, "clipped")
def step_clipped(setup, queries, passages, chunk_size):
    setup.optimizer.zero_grad()
    towers = [queries.split(chunk_size), passages.split(chunk_size)]
    firsts = [encoded(setup.encoder, tower) for tower in towers]
    loss, caches = cache_backward([reps for reps, _ in firsts], setup.loss_fn)
    for tower, cache, (_, states) in zip(towers, caches, firsts, strict=True):
        replay_plain(setup.encoder, tower, cache, states)
    torch.nn.utils.clip_grad_norm_(setup.encoder.parameters(), 1e-3)
    setup.optimizer.step()
    return loss
