"""Answers to chapter 13, in the styles and with the mistakes of readers."""

import math

import numpy as np
import torch

import gclib
from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch13")


@right("negatives_and_updates")
def negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    queries = per_device * (ranks if gather else 1)
    negatives = queries * (1 + hard_negatives) - 1
    updates = pairs // (per_device * ranks * accumulation)
    return {"negatives": negatives, "updates": updates}


@right("negatives_and_updates")
def negatives_in_a_line(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    b = per_device * ranks**gather
    return dict(updates=pairs // (accumulation * ranks * per_device), negatives=b - 1 + b * hard_negatives)


@right("negatives_and_updates")
def negatives_of_numpy(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    others = np.int64(per_device * ranks if gather else per_device) * (hard_negatives + 1)
    return {"negatives": others - 1, "updates": math.floor(pairs / per_device / ranks / accumulation + 1e-9)}


def _wrong_negatives(negatives, pairs, per_device, ranks, accumulation):
    return {"negatives": negatives, "updates": pairs // (per_device * ranks * accumulation)}


@wrong("negatives_and_updates", "accumulation counted as negatives")
def accumulation_adds_negatives(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    b = per_device * accumulation * (ranks if gather else 1)
    return _wrong_negatives(b * (1 + hard_negatives) - 1, pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "ranks forgotten")
def gather_ignored(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    return _wrong_negatives(per_device * (1 + hard_negatives) - 1, pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "ranks without gathering")
def always_gathered(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    return _wrong_negatives(per_device * ranks * (1 + hard_negatives) - 1, pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "only its own hard negatives")
def own_hard_negatives_only(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    b = per_device * (ranks if gather else 1)
    return _wrong_negatives(b - 1 + hard_negatives, pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "own positive counted")
def own_positive_counted(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    b = per_device * (ranks if gather else 1)
    return _wrong_negatives(b * (1 + hard_negatives), pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "hard negatives forgotten")
def hard_negatives_forgotten(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    b = per_device * (ranks if gather else 1)
    return _wrong_negatives(b - 1, pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "own hard negatives left out")
def others_hard_negatives_only(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    b = per_device * (ranks if gather else 1)
    return _wrong_negatives((b - 1) * (1 + hard_negatives), pairs, per_device, ranks, accumulation)


@wrong("negatives_and_updates", "rounded up")
def updates_rounded_up(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    found = negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather)
    return found | {"updates": math.ceil(pairs / (per_device * ranks * accumulation))}


@wrong("negatives_and_updates", "an update for each accumulated loss")
def accumulation_not_in_updates(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    found = negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather)
    return found | {"updates": pairs // (per_device * ranks)}


@wrong("negatives_and_updates", "every rank sees all pairs")
def ranks_not_in_updates(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    found = negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather)
    return found | {"updates": pairs // (per_device * accumulation)}


@wrong("negatives_and_updates", "pairs dealt out only where passages are gathered")
def updates_of_a_gathered_batch_only(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    found = negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather)
    return found | {"updates": pairs // (per_device * (ranks if gather else 1) * accumulation)}


@wrong("negatives_and_updates", "not rounded")
def updates_as_float(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    found = negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather)
    return found | {"updates": pairs / (per_device * ranks * accumulation)}


@wrong("negatives_and_updates", "another form")
def as_two_numbers(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    return tuple(negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather).values())


@wrong("negatives_and_updates", "accumulation multiplies the updates")
def accumulation_multiplies_updates(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    found = negatives_in_order(pairs, per_device, ranks, accumulation, hard_negatives, gather)
    return found | {"updates": pairs * accumulation // (per_device * ranks)}


@wrong("negatives_and_updates", "an update's queries taken for the loss's")
def batch_for_negatives(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    return _wrong_negatives(per_device * ranks * accumulation - 1, pairs, per_device, ranks, accumulation)


def _towers(inputs):
    names = ("query", "passage")
    return [{"ids": inputs[f"{name}_ids"], "mask": inputs[f"{name}_mask"]} for name in names]


@right("compute_loss")
def by_the_library(model, inputs, loss_fn, chunk_size):
    queries = {"ids": inputs["query_ids"], "mask": inputs["query_mask"]}
    passages = {"ids": inputs["passage_ids"], "mask": inputs["passage_mask"]}
    return gclib.grad_cache_loss([model, model], [queries, passages], loss_fn, chunk_size=chunk_size)


@right("compute_loss")
def by_the_library_in_words(model, inputs, loss_fn, chunk_size):
    towers = [{k.split("_")[1]: v for k, v in inputs.items() if k.startswith(n)} for n in ("query", "passage")]
    return gclib.grad_cache_loss((model,) * 2, towers, loss_fn, chunk_size=chunk_size)


@right("compute_loss")
def by_the_library_unsorted(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model] * 2, _towers(inputs), loss_fn, chunk_size=chunk_size, sort_by_length=False)


class _Replay(torch.autograd.Function):
    """The loss, and a backward that encodes chunk by chunk with a graph."""

    @staticmethod
    def forward(ctx, anchor, loss, replay):
        ctx.replay = replay
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.replay(gradient)
        return None, None, None


@right("compute_loss")
def by_hand(model, inputs, loss_fn, chunk_size):
    def chunks(name):
        return zip(inputs[f"{name}_ids"].split(chunk_size), inputs[f"{name}_mask"].split(chunk_size), strict=True)

    states, reps = [], []
    with torch.no_grad():
        for name in ("query", "passage"):
            parts = []
            for ids, mask in chunks(name):
                states.append(torch.get_rng_state())
                parts.append(model(ids=ids, mask=mask))
            reps.append(torch.cat(parts).requires_grad_())
    with torch.enable_grad():
        loss = loss_fn(*reps)
        cache = torch.autograd.grad(loss, reps)

    def replay(gradient):
        own, place = torch.get_rng_state(), iter(states)
        for name, cached in zip(("query", "passage"), cache, strict=True):
            for (ids, mask), part in zip(chunks(name), cached.split(chunk_size), strict=True):
                torch.set_rng_state(next(place))
                with torch.enable_grad():
                    rep = model(ids=ids, mask=mask)
                rep.backward(part * gradient)
        torch.set_rng_state(own)

    anchor = torch.zeros((), requires_grad=True)
    return _Replay.apply(anchor, loss.detach(), replay)


@wrong("compute_loss", "the whole batch with its graph")
def naive_autograd(model, inputs, loss_fn, chunk_size):
    queries, passages = _towers(inputs)
    return loss_fn(model(**queries), model(**passages))


@wrong("compute_loss", "backward inside, a number returned")
def a_step_for_a_loss(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_step([model, model], _towers(inputs), loss_fn, chunk_size=chunk_size)


@wrong("compute_loss", "backward inside, a number returned")
def backward_inside(model, inputs, loss_fn, chunk_size):
    loss = gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk_size=chunk_size)
    loss.backward()
    return loss.detach()


@wrong("compute_loss", None)
def mean_of_chunk_losses(model, inputs, loss_fn, chunk_size):
    queries, passages = _towers(inputs)
    losses, total = 0, len(inputs["query_ids"])
    for i in range(0, total, chunk_size):
        q = model(**{k: v[i : i + chunk_size] for k, v in queries.items()})
        p = model(**{k: v[i : i + chunk_size] for k, v in passages.items()})
        losses = losses + loss_fn(q, p) * len(q) / total
    return losses


@wrong("compute_loss", "every graph kept")
def chunks_with_all_graphs(model, inputs, loss_fn, chunk_size):
    reps = []
    for tower in _towers(inputs):
        parts = zip(tower["ids"].split(chunk_size), tower["mask"].split(chunk_size), strict=True)
        reps.append(torch.cat([model(ids=a, mask=m) for a, m in parts]))
    return loss_fn(*reps)


@wrong("compute_loss", "towers swapped")
def towers_swapped(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model, model], _towers(inputs)[::-1], loss_fn, chunk_size=chunk_size)


@wrong("compute_loss", "chunks twice as large")
def chunk_size_twice(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk_size=2 * chunk_size)


@wrong("compute_loss", "mask left out")
def masks_left_out(model, inputs, loss_fn, chunk_size):
    towers = [{"ids": t["ids"], "mask": torch.ones_like(t["mask"])} for t in _towers(inputs)]
    return gclib.grad_cache_loss([model, model], towers, loss_fn, chunk_size=chunk_size)


@wrong("compute_loss", "divided by the chunks")
def a_mean_over_chunks(model, inputs, loss_fn, chunk_size):
    loss = gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk_size=chunk_size)
    return loss / math.ceil(len(inputs["query_ids"]) / chunk_size)


@wrong("compute_loss", "cut off from the model")
def without_a_graph(model, inputs, loss_fn, chunk_size):
    with torch.no_grad():
        queries, passages = _towers(inputs)
        return loss_fn(model(**queries), model(**passages))


@wrong("compute_loss", "names of the collator")
def whole_dictionary_for_each_tower(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model, model], [inputs, inputs], loss_fn, chunk_size=chunk_size)


@wrong("compute_loss", "ids or mask missing")
def a_dictionary_without_its_stars(model, inputs, loss_fn, chunk_size):
    return loss_fn(*(model(tower) for tower in _towers(inputs)))


@wrong("compute_loss", "changed in between")
def trained_in_another_mode(model, inputs, loss_fn, chunk_size):
    model.eval()
    loss = gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk_size=chunk_size)
    model.train()
    return loss


@wrong("compute_loss", None)
def a_keyword_by_place(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk_size)


@wrong("compute_loss", None)
def a_loss_forgotten(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model, model], _towers(inputs), chunk_size=chunk_size)


@wrong("compute_loss", None)
def a_keyword_misspelt(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk=chunk_size)


@wrong("compute_loss", "every graph kept")
def all_graphs_retained(model, inputs, loss_fn, chunk_size):
    chunks = 2 * math.ceil(len(inputs["query_ids"]) / chunk_size)
    return gclib.grad_cache_loss([model, model], _towers(inputs), loss_fn, chunk_size=chunk_size, retain_chunks=chunks)


@wrong("compute_loss", "queries twice")
def queries_twice(model, inputs, loss_fn, chunk_size):
    queries, _ = _towers(inputs)
    return gclib.grad_cache_loss([model, model], [queries, queries], loss_fn, chunk_size=chunk_size)


@wrong("compute_loss", "another mode")
def model_in_eval_mode(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model.eval()] * 2, _towers(inputs), loss_fn, chunk_size=chunk_size)


@wrong("compute_loss", "one tower without gradient")
def passages_without_gradient(model, inputs, loss_fn, chunk_size):
    queries, passages = _towers(inputs)
    with torch.no_grad():
        fixed = model(**passages)
    return gclib.grad_cache_loss([model], [queries], lambda q: loss_fn(q, fixed), chunk_size=chunk_size)


@right("bytes_with_lora")
def lora_bytes_in_a_line(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * rank * sum(o + i for o, i in shapes)


@right("bytes_with_lora")
def lora_bytes_by_loop(base_weights, base_bytes, shapes, rank):
    adapters = 0
    for out, into in shapes:
        adapters += out * rank + rank * into
    return base_weights * base_bytes + adapters * 4 + adapters * 4 + adapters * 8


@right("bytes_with_lora")
def lora_bytes_of_numpy(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + int(np.array(shapes, dtype=np.int64).sum()) * rank * 4 * 4


@wrong("bytes_with_lora", "twelve bytes a weight")
def gradients_forgotten(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 12 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "states forgotten")
def states_forgotten(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 8 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "weights alone")
def weights_alone(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 4 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "the base trained")
def base_trained_too(base_weights, base_bytes, shapes, rank):
    return 4 * base_weights * base_bytes + 16 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "gradients for the base")
def base_with_gradients(base_weights, base_bytes, shapes, rank):
    return 2 * base_weights * base_bytes + 16 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "whole matrices trained")
def whole_matrices(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * sum(o * i for o, i in shapes)


@wrong("bytes_with_lora", "a whole matrix times the rank")
def product_times_rank(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * rank * sum(o * i for o, i in shapes)


@wrong("bytes_with_lora", "the other factor of two")
def one_factor(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * rank * sum(o for o, i in shapes)


@wrong("bytes_with_lora", "one factor of two")
def the_other_factor(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * rank * sum(i for o, i in shapes)


@wrong("bytes_with_lora", None)
def adapters_in_the_bases_bytes(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 4 * base_bytes * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "twelve bytes a weight")
def one_state(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + (4 + 4 + 4) * rank * sum(i + o for o, i in shapes)


@wrong("bytes_with_lora", "the base forgotten")
def base_forgotten(base_weights, base_bytes, shapes, rank):
    return 16 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "numbers, not bytes")
def numbers_for_bytes(base_weights, base_bytes, shapes, rank):
    return base_weights + 4 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "rank forgotten")
def rank_forgotten(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "rank by rank")
def rank_squared(base_weights, base_bytes, shapes, rank):
    return base_weights * base_bytes + 16 * rank**2 * len(shapes)


@wrong("bytes_with_lora", "the first matrix for all")
def first_matrix_for_all(base_weights, base_bytes, shapes, rank):
    out, into = shapes[0]
    return base_weights * base_bytes + 16 * rank * (out + into) * len(shapes)


@wrong("bytes_with_lora", "adapters instead of the base")
def base_less_the_adapted(base_weights, base_bytes, shapes, rank):
    frozen = base_weights - sum(o * i for o, i in shapes)
    return frozen * base_bytes + 16 * rank * sum(o + i for o, i in shapes)


@wrong("bytes_with_lora", "a float for an int")
def bytes_as_float(base_weights, base_bytes, shapes, rank):
    return float(base_weights * base_bytes + 16 * rank * sum(o + i for o, i in shapes))


@right("scaled_updates")
def updates_as_the_documentation(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


@right("scaled_updates")
def updates_with_names(setup, batches):
    model, optimizer, scaler = setup.model, setup.optimizer, setup.scaler
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), max_norm=setup.max_norm)
        scaler.step(optimizer)
        scaler.update()


@right("scaled_updates")
def updates_cleared_by_the_model(setup, batches):
    for batch in batches:
        setup.model.zero_grad()
        loss = setup.scaler.scale(setup.model(batch))
        loss.backward()
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


@right("scaled_updates")
def updates_cleared_to_zero(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad(set_to_none=False)
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in setup.model.parameters()))
        for p in setup.model.parameters():
            p.grad.mul_(torch.clamp(setup.max_norm / (norm + 1e-6), max=1.0))
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


def _updates(
    setup,
    batches,
    *,
    backward=True,
    clear="each",
    unscale="before",
    clip=True,
    step="scaler",
    update="each",
    scale=True,
):
    clipping = torch.nn.utils.clip_grad_norm_
    for place, batch in enumerate(batches):
        if clear == "each" or clear == "first" and place == 0:
            setup.optimizer.zero_grad()
        loss = setup.model(batch)
        loss = setup.scaler.scale(loss) if scale else loss
        if backward:
            loss.backward()
        if clear == "after backward":
            setup.optimizer.zero_grad()
        if unscale == "before":
            setup.scaler.unscale_(setup.optimizer)
        if clip:
            clipping(setup.model.parameters(), setup.max_norm)
        if unscale == "after":
            setup.scaler.unscale_(setup.optimizer)
        if step == "scaler":
            setup.scaler.step(setup.optimizer)
        elif step == "optimizer":
            setup.optimizer.step()
        if update in ("each", "twice"):
            setup.scaler.update()
    if update in ("end", "twice"):
        setup.scaler.update()


@wrong("scaled_updates", "old gradients kept")
def never_cleared(setup, batches):
    _updates(setup, batches, clear="never")


@wrong("scaled_updates", "old gradients kept")
def cleared_once(setup, batches):
    _updates(setup, batches, clear="first")


@wrong("scaled_updates", "no gradients were looked at")
def cleared_after_the_backward(setup, batches):
    _updates(setup, batches, clear="after backward")


@wrong("scaled_updates", "no gradients were looked at")
def backward_forgotten(setup, batches):
    _updates(setup, batches, backward=False)


@wrong("scaled_updates", "no gradients were looked at")
def updated_once_more_at_the_end(setup, batches):
    _updates(setup, batches, update="twice")


@wrong("scaled_updates", "clipped while scaled")
def clipped_while_scaled(setup, batches):
    _updates(setup, batches, unscale="never")


@wrong("scaled_updates", "clipped while scaled")
def clipped_before_unscaling(setup, batches):
    _updates(setup, batches, unscale="after")


@wrong("scaled_updates", "not clipped")
def not_clipped(setup, batches):
    _updates(setup, batches, clip=False)


@wrong("scaled_updates", "not clipped")
def not_clipped_nor_unscaled(setup, batches):
    _updates(setup, batches, clip=False, unscale="never")


@wrong("scaled_updates", "the optimizer's own step")
def optimizer_steps_itself(setup, batches):
    _updates(setup, batches, step="optimizer")


@wrong("scaled_updates", "unscaled twice")
def the_optimizer_steps_and_no_update(setup, batches):
    _updates(setup, batches, step="optimizer", update="never")


@wrong("scaled_updates", "an update that was not ended")
def no_update_of_the_scale(setup, batches):
    _updates(setup, batches, update="never")


@wrong("scaled_updates", "an update that was not ended")
def updated_at_the_end(setup, batches):
    _updates(setup, batches, update="end")


@wrong("scaled_updates", "no step taken")
def no_step(setup, batches):
    _updates(setup, batches, step="none")


@wrong("scaled_updates", "never scaled")
def not_scaled(setup, batches):
    _updates(setup, batches, scale=False)


@wrong("scaled_updates", None)
def no_scaler_at_all(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.model(batch).backward()
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.optimizer.step()


@wrong("scaled_updates", "clipped number by number")
def clipped_by_value(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_value_(setup.model.parameters(), setup.max_norm)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


@wrong("scaled_updates", "clipped one by one")
def clipped_one_by_one(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        for p in setup.model.parameters():
            torch.nn.utils.clip_grad_norm_(p, setup.max_norm)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


@wrong("scaled_updates", "one update for all batches")
def accumulated_over_all_batches(setup, batches):
    setup.optimizer.zero_grad()
    for batch in batches:
        setup.scaler.scale(setup.model(batch)).backward()
    setup.scaler.unscale_(setup.optimizer)
    torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()


@wrong("scaled_updates", "always as long as max_norm")
def always_clipped_to_the_norm(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in setup.model.parameters()))
        for p in setup.model.parameters():
            p.grad.mul_(setup.max_norm / norm)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


@wrong("scaled_updates", "not clipped")
def clipped_after_the_step(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        setup.scaler.step(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.scaler.update()
