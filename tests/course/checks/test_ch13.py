"""Chapter 13's checks: mistakes in other words are recognised, right answers in another style are right."""

import pytest
import torch

import gclib
from gclib.course.checks import ch13


def as_if_accumulated(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    queries = per_device * accumulation
    if gather:
        queries = queries * ranks
    whole = per_device * ranks * accumulation
    return {"updates": (pairs - pairs % whole) // whole, "negatives": queries + queries * hard_negatives - 1}


def alone(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    passages = per_device * (hard_negatives + 1)
    return {"negatives": passages - 1, "updates": pairs // (accumulation * per_device * ranks)}


def a_ceiling(pairs, per_device, ranks, accumulation, hard_negatives, gather):
    rows = per_device * ranks if gather else per_device
    return {
        "negatives": rows * (1 + hard_negatives) - 1,
        "updates": -(-pairs // (per_device * ranks * accumulation)),
    }


def sides(inputs):
    for side in ("query_", "passage_"):
        yield {name.removeprefix(side): part for name, part in inputs.items() if name.startswith(side)}


def all_at_once(model, inputs, loss_fn, chunk_size):
    queries, passages = sides(inputs)
    return loss_fn(model(**queries), model(passages["ids"], passages["mask"]))


def in_chunks_with_graphs(model, inputs, loss_fn, chunk_size):
    reps = []
    for tower in sides(inputs):
        pieces = [model(i, m) for i, m in zip(*(part.split(chunk_size) for part in tower.values()), strict=True)]
        reps.append(torch.vstack(pieces))
    return loss_fn(*reps)


def step_itself(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_step([model] * 2, list(sides(inputs)), loss_fn, chunk_size=chunk_size)


def both_ways_round(model, inputs, loss_fn, chunk_size):
    towers = list(sides(inputs))
    towers.reverse()
    return gclib.grad_cache_loss([model] * 2, towers, loss_fn, chunk_size=chunk_size)


def backward_too(model, inputs, loss_fn, chunk_size):
    loss = gclib.grad_cache_loss([model] * 2, list(sides(inputs)), loss_fn, chunk_size=chunk_size)
    loss.backward()
    return loss


def unsorted_names(model, inputs, loss_fn, chunk_size):
    return gclib.grad_cache_loss([model] * 2, [inputs, inputs], loss_fn, chunk_size=chunk_size)


def without_states(base_weights, base_bytes, shapes, rank):
    total = base_bytes * base_weights
    for rows, columns in shapes:
        total += 8 * (rows * rank + rank * columns)
    return total


def full_matrices(base_weights, base_bytes, shapes, rank):
    return base_bytes * base_weights + sum(16 * rows * columns * rank for rows, columns in shapes)


def replaced(base_weights, base_bytes, shapes, rank):
    left = base_weights - sum(rows * columns for rows, columns in shapes)
    return left * base_bytes + sum(16 * rank * (rows + columns) for rows, columns in shapes)


def clips_early(setup, batches):
    for batch in batches:
        for parameter in setup.model.parameters():
            parameter.grad = None
        setup.scaler.scale(setup.model(batch)).backward()
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.scaler.unscale_(setup.optimizer)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


def plain_step(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad(set_to_none=False)
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.optimizer.step()
        setup.scaler.update()


def never_cleared(setup, batches):
    for batch in batches:
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()


def no_update(setup, batches):
    for batch in batches:
        setup.optimizer.zero_grad()
        setup.scaler.scale(setup.model(batch)).backward()
        setup.scaler.unscale_(setup.optimizer)
        torch.nn.utils.clip_grad_norm_(setup.model.parameters(), setup.max_norm)
        setup.scaler.step(setup.optimizer)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch13.negatives_and_updates, as_if_accumulated, "accumulation counted as negatives"),
        (ch13.negatives_and_updates, alone, "ranks forgotten"),
        (ch13.negatives_and_updates, a_ceiling, "rounded up"),
        (ch13.compute_loss, all_at_once, "the whole batch with its graph"),
        (ch13.compute_loss, in_chunks_with_graphs, "every graph kept"),
        (ch13.compute_loss, step_itself, "backward inside, a number returned"),
        (ch13.compute_loss, both_ways_round, "towers swapped"),
        (ch13.compute_loss, backward_too, "backward inside"),
        (ch13.compute_loss, unsorted_names, "names of the collator"),
        (ch13.bytes_with_lora, without_states, "states forgotten"),
        (ch13.bytes_with_lora, full_matrices, "a whole matrix times the rank"),
        (ch13.bytes_with_lora, replaced, "adapters instead of the base"),
        (ch13.scaled_updates, clips_early, "clipped while scaled"),
        (ch13.scaled_updates, plain_step, "the optimizer's own step"),
        (ch13.scaled_updates, never_cleared, "old gradients kept"),
        (ch13.scaled_updates, no_update, "an update that was not ended"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(3):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_right_answers_in_other_words_are_right():
    def counts(pairs, per_device, ranks, accumulation, hard_negatives, gather):
        grid = torch.zeros(per_device * ranks**gather, 1 + hard_negatives)
        return {"updates": divmod(pairs, per_device * ranks * accumulation)[0], "negatives": grid.numel() - 1}

    def by_hand(model, inputs, loss_fn, chunk_size):
        """The surrogate, chunk by chunk, in a backward of one's own."""
        cut = [[part.split(chunk_size) for part in tower.values()] for tower in sides(inputs)]
        towers = [list(zip(*parts, strict=True)) for parts in cut]
        with torch.no_grad():
            reps = [torch.cat([model(*piece) for piece in tower]) for tower in towers]
        leaves = [rep.requires_grad_() for rep in reps]
        loss = loss_fn(*leaves)
        caches = torch.autograd.grad(loss, leaves)

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value, anchor):
                return value.clone()

            @staticmethod
            def backward(ctx, arrived):
                with torch.enable_grad():
                    for tower, cache in zip(towers, caches, strict=True):
                        for piece, rows in zip(tower, cache.split(chunk_size), strict=True):
                            model(*piece).backward(arrived * rows)
                return None, None

        return Replay.apply(loss.detach(), torch.zeros((), requires_grad=True))

    def lora_bytes(base_weights, base_bytes, shapes, rank):
        adapters = torch.tensor(shapes).sum().item() * rank
        return base_bytes * base_weights + adapters * (4 + 4 + 8)

    def own_clipping(setup, batches):
        for batch in batches:
            setup.scaler.scale(setup.model(batch)).backward()
            setup.scaler.unscale_(setup.optimizer)
            slopes = [parameter.grad for parameter in setup.model.parameters()]
            norm = float(torch.cat(slopes).norm())
            for slope in slopes:
                slope.mul_(min(1.0, setup.max_norm / max(norm, 1e-12)))
            setup.scaler.step(setup.optimizer)
            setup.scaler.update()
            setup.optimizer.zero_grad()

    assert ch13.negatives_and_updates.judge(counts).status == "correct"
    assert ch13.compute_loss.judge(by_hand).status == "correct"
    assert ch13.bytes_with_lora.judge(lora_bytes).status == "correct"
    for seed in range(5):
        assert ch13.scaled_updates.judge(own_clipping, seed=seed).status == "correct"


def test_the_messages_show_what_was_given_and_no_address():
    told = ch13.compute_loss.judge(all_at_once, seed=0).explanation
    assert "loss_fn = InfoNCE(temperature=0.2)" in told and "0x" not in told
