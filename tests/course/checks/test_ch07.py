"""Chapter 07's checks: the counting encoder counts truly, and mistakes written in other words are recognised."""

import numpy as np
import pytest
import torch

from gclib import plan_chunks
from gclib.course.checks import ch07
from gclib.memory.flops import count_tokens, time_ratio


def test_the_encoder_counts_tokens_and_rows_and_does_not_see_padding():
    inputs = ch07.encode_sorted.makers[0](np.random.default_rng(0))
    encoder, rows, lengths = inputs["encoder"], inputs["rows"], inputs["lengths"]
    whole = encoder(rows)
    assert (encoder.tokens, encoder.most_rows) == (rows.shape[0] * rows.shape[1], rows.shape[0])
    alone = torch.cat([encoder(row[None, :length]) for row, length in zip(rows, lengths, strict=True)])
    torch.testing.assert_close(alone, whole)
    assert encoder.tokens == rows.shape[0] * rows.shape[1] + sum(lengths)


def test_the_exercises_ask_for_what_the_library_does():
    rng = np.random.default_rng(0)
    for maker in ch07.padded_tokens.makers:
        lengths, size = maker(rng).values()
        assert ch07.padded_tokens.oracle(lengths, size) == sum(
            chunk.tokens for chunk in plan_chunks(lengths, chunk_size=size, call_tokens=None)
        )
        tokens = count_tokens([lengths], chunk_size=size, retain_chunks=1)
        asked = ch07.price.oracle(tokens.padded, tokens.encoded, tokens.retained)
        assert asked == pytest.approx(tokens.time_ratio) == pytest.approx(time_ratio(tokens.rho, tokens.retained_share))


def backward_like_forward(padded, encoded, retained):
    naive, cached = 2 * padded, retained * 2 + (encoded - retained) * 3
    return cached / naive


def rho_ignored(padded, encoded, retained):
    r = retained / encoded
    return 1 + (1 - r) / 3


def overhead(padded, encoded, retained):
    return encoded * (1 + (1 - retained / encoded) / 3) / padded - 1.0


def slices_in_file_order(lengths, chunk_size):
    total = 0
    for start in range(0, len(lengths), chunk_size):
        part = lengths[start : start + chunk_size]
        total += max(part) * len(part)
    return total


def rising(lengths, chunk_size):
    rows = sorted(lengths)
    return sum(len(rows[i : i + chunk_size]) * rows[i : i + chunk_size][-1] for i in range(0, len(rows), chunk_size))


def all_full(lengths, chunk_size):
    return sum(chunk_size * width for width in sorted(lengths, reverse=True)[::chunk_size])


def gathered_by_the_order(encoder, rows, lengths, chunk_size):
    order = torch.tensor(sorted(range(len(lengths)), key=lambda row: -lengths[row]))
    reps = torch.cat([encoder(rows[part, : lengths[part[0]]]) for part in order.split(chunk_size)])
    return reps.index_select(0, order)


def left_in_order(encoder, rows, lengths, chunk_size):
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = []
    for start in range(0, len(order), chunk_size):
        part = order[start : start + chunk_size]
        parts.append(encoder(rows[part][:, : lengths[part[0]]]))
    return torch.vstack(parts)


def full_width(encoder, rows, lengths, chunk_size):
    order = torch.tensor(lengths).argsort(descending=True)
    return torch.cat([encoder(rows[part]) for part in order.split(chunk_size)])[order.argsort()]


def beside_the_replay(graph, loss, replay, budget, chunks):
    kept = 0
    while kept < chunks and replay + (kept + 1) * graph <= budget:
        kept += 1
    return kept


def strictly_below(graph, loss, replay, budget, chunks):
    return max(r for r in range(chunks + 1) if r == 0 or loss + r * graph < budget)


def rho_alone(padded, encoded, retained):
    return encoded / padded


def kept_for_nothing(padded, encoded, retained):
    return (encoded - retained) / padded * (1 + 1 / 3)


def without_the_naive_backward(padded, encoded, retained):
    return (2 * encoded + encoded + (encoded - retained)) / padded


def turned_over(padded, encoded, retained):
    return 1 / (encoded / padded * (1 + (1 - retained / encoded) / 3))


def narrow(lengths, chunk_size):
    rows = sorted(lengths)[::-1]
    return sum(len(rows[i : i + chunk_size]) * rows[i : i + chunk_size][-1] for i in range(0, len(rows), chunk_size))


def rising_and_narrow(lengths, chunk_size):
    rows = sorted(lengths)
    return sum(len(rows[i : i + chunk_size]) * rows[i] for i in range(0, len(rows), chunk_size))


def first_in_file(lengths, chunk_size):
    return sum(len(lengths[i : i + chunk_size]) * lengths[i] for i in range(0, len(lengths), chunk_size))


def so_many_pieces(lengths, chunk_size):
    return sum(len(part) * max(part) for part in np.array_split(sorted(lengths, reverse=True), chunk_size))


def there_and_again(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    parts = [rows[start : start + chunk_size] for start in range(0, len(rows), chunk_size)]
    return sum(len(part) * part[0] for part in parts + parts)


def row_by_row(encoder, rows, lengths, chunk_size):
    return torch.stack([encoder(rows[i : i + 1, : lengths[i]])[0] for i in range(len(lengths))])


def torch_chunk(encoder, rows, lengths, chunk_size):
    order = torch.tensor(lengths).argsort(descending=True)
    return torch.cat([encoder(rows[part, : lengths[part[0]]]) for part in order.chunk(chunk_size)])[order.argsort()]


def width_of_another_row(encoder, rows, lengths, chunk_size):
    reps, order = [None] * len(lengths), sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), chunk_size):
        part = order[start : start + chunk_size]
        for row, rep in zip(part, encoder(rows[part][:, : lengths[start]]), strict=True):
            reps[row] = rep
    return torch.stack(reps)


def only_the_lengths_sorted(encoder, rows, lengths, chunk_size):
    falling = sorted(lengths, reverse=True)
    starts = range(0, len(rows), chunk_size)
    return torch.cat([encoder(rows[start : start + chunk_size, : falling[start]]) for start in starts])


def rising_and_cut(encoder, rows, lengths, chunk_size):
    order = torch.tensor(lengths).argsort()
    return torch.cat([encoder(rows[part, : lengths[part[0]]]) for part in order.split(chunk_size)])[order.argsort()]


def both_at_once(graph, loss, replay, budget, chunks):
    return max([0] + [r for r in range(1, chunks + 1) if loss + replay + r * graph <= budget])


def beside_the_smaller(graph, loss, replay, budget, chunks):
    return max(r for r in range(chunks + 1) if r == 0 or min(loss, replay) + r * graph <= budget)


def a_part_of_a_graph(graph, loss, replay, budget, chunks):
    return min((budget - loss) / graph, chunks)


def nearest_graph(graph, loss, replay, budget, chunks):
    return min(chunks, int((budget - loss) / graph + 0.5))


def end_left_out(graph, loss, replay, budget, chunks):
    return max(r for r in range(chunks) if max(loss + r * graph, replay) <= budget)


@pytest.mark.parametrize(
    ("exercise", "answer", "name"),
    [
        (ch07.price, backward_like_forward, "backward counted as one forward"),
        (ch07.price, rho_ignored, "padding forgotten"),
        (ch07.price, overhead, "the surcharge instead of the ratio"),
        (ch07.padded_tokens, slices_in_file_order, "not sorted"),
        (ch07.padded_tokens, rising, "shortest first"),
        (ch07.padded_tokens, all_full, "short last chunk counted as full"),
        (ch07.encode_sorted, gathered_by_the_order, "put back with the order itself"),
        (ch07.encode_sorted, left_in_order, "not put back"),
        (ch07.encode_sorted, full_width, "not trimmed"),
        (ch07.graphs_to_retain, beside_the_replay, "graphs held beside the replay"),
        (ch07.graphs_to_retain, strictly_below, "exact fit refused"),
        (ch07.price, rho_alone, "second forward forgotten"),
        (ch07.price, lambda padded, encoded, retained: (encoded + encoded - retained) / padded, "everything twice"),
        (ch07.price, kept_for_nothing, "retained tokens for nothing"),
        (ch07.price, without_the_naive_backward, "the naive step without its backward"),
        (ch07.price, turned_over, "upside down"),
        (ch07.padded_tokens, narrow, "trimmed to the shortest row"),
        (ch07.padded_tokens, rising_and_narrow, "shortest first, trimmed to the shortest row"),
        (ch07.padded_tokens, first_in_file, "first row taken for the longest"),
        (ch07.padded_tokens, so_many_pieces, "chunk_size chunks"),
        (ch07.padded_tokens, there_and_again, "both forwards"),
        (ch07.encode_sorted, row_by_row, "one row at a time"),
        (ch07.encode_sorted, torch_chunk, "chunk_size chunks"),
        (ch07.encode_sorted, width_of_another_row, "width from the unsorted lengths"),
        (ch07.encode_sorted, only_the_lengths_sorted, "lengths sorted, rows not"),
        (ch07.encode_sorted, rising_and_cut, "shortest first, trimmed to the shortest row"),
        (ch07.graphs_to_retain, both_at_once, "loss and replay added up"),
        (ch07.graphs_to_retain, beside_the_smaller, "the smaller of loss and replay"),
        (ch07.graphs_to_retain, a_part_of_a_graph, "not rounded"),
        (ch07.graphs_to_retain, nearest_graph, "rounded to the nearest"),
        (ch07.graphs_to_retain, end_left_out, "last chunk left out"),
    ],
)
def test_a_misconception_is_recognised_however_it_is_written(exercise, answer, name):
    for seed in range(4):
        assert exercise.judge(answer, seed=seed).misconception == name


def test_rows_in_another_order_are_said_to_be_all_there():
    def neither_trimmed_nor_put_back(encoder, rows, lengths, chunk_size):
        order = torch.tensor(lengths).argsort(descending=True)
        return torch.cat([encoder(rows[part]) for part in order.split(chunk_size)])

    told = "All the right rows are there, in another order."
    assert told in ch07.encode_sorted.judge(neither_trimmed_nor_put_back).explanation
    assert told not in ch07.encode_sorted.judge(full_width).explanation
    assert told not in ch07.encode_sorted.judge(rising_and_cut).explanation


def test_rows_of_one_length_are_not_mixed_up():
    def looked_up_by_length(encoder, rows, lengths, chunk_size):
        order = torch.tensor([lengths.index(length) for length in sorted(lengths, reverse=True)])
        reps = rows.new_zeros(len(rows), encoder.weight.shape[1])
        for part in order.split(chunk_size):
            reps[part] = encoder(rows[part, : lengths[part[0]]])
        return reps

    for seed in range(4):
        assert ch07.encode_sorted.judge(looked_up_by_length, seed=seed).status == "wrong"


@pytest.mark.parametrize("name", ["ragged chunks stacked", "float32 buffer"])
def test_slips_that_end_in_an_error_are_told(name):
    def encode_sorted(encoder, rows, lengths, chunk_size):
        order = torch.tensor(lengths).argsort(descending=True)
        if name == "ragged chunks stacked":
            return torch.stack([encoder(rows[part, : lengths[part[0]]]) for part in order.split(chunk_size)])
        reps = torch.zeros(len(rows), encoder.weight.shape[1])
        for part in order.split(chunk_size):
            reps[part] = encoder(rows[part, : lengths[part[0]]])
        return reps

    verdict = ch07.encode_sorted.judge(encode_sorted)
    assert (verdict.status, verdict.misconception) == ("wrong", name)


def test_a_number_of_graphs_is_an_int_and_a_price_may_be_a_float32_tensor():
    verdict = ch07.graphs_to_retain.judge(lambda g, loss, r, budget, chunks: float(min(chunks, (budget - loss) // g)))
    assert verdict.status == "wrong" and "an int is asked for" in verdict.explanation
    assert ch07.price.judge(lambda p, e, r: torch.tensor((4 * e - r) / (3 * p))).status == "correct"


def test_right_answers_in_other_words_are_right():
    def encode_sorted(encoder, rows, lengths, chunk_size):
        order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
        reps = [None] * len(order)
        for start in range(0, len(order), chunk_size):
            part = order[start : start + chunk_size]
            for row, rep in zip(part, encoder(rows[part][:, : lengths[part[0]]]), strict=True):
                reps[row] = rep
        return torch.stack(reps)

    def graphs_to_retain(graph, loss, replay, budget, chunks):
        return max(r for r in range(chunks + 1) if r == 0 or loss + r * graph <= budget)

    assert ch07.encode_sorted.judge(encode_sorted).status == "correct"
    assert ch07.graphs_to_retain.judge(graphs_to_retain).status == "correct"
    assert ch07.price.judge(lambda p, e, r: (4 * e - r) / (3 * p)).status == "correct"
