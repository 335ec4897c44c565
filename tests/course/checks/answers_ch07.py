"""Answers to chapter 07, in the styles and with the mistakes of readers."""

import math

import numpy as np
import torch

from tests.course.checks.answers import answers_to

right, wrong, ANSWERS = answers_to("ch07")


@right("price")
def price_in_forwards(padded, encoded, retained):
    return (4 * encoded - retained) / (3 * padded)


@right("price")
def price_in_words(padded, encoded, retained):
    again = encoded - retained
    return (encoded + again + 2 * encoded) / (padded + 2 * padded)


@right("price")
def price_by_rho(padded, encoded, retained):
    rho, r = encoded / padded, retained / encoded
    return rho * (1 + (1 - r) / 3)


@right("price")
def price_as_tensor(padded, encoded, retained):
    return torch.tensor((4 * encoded - retained) / (3 * padded), dtype=torch.float64)


@right("price")
def price_of_numpy(padded, encoded, retained):
    return np.float64(4 * encoded - retained) / (3 * padded)


@wrong("price", "always 4/3")
def four_thirds(padded, encoded, retained):
    return 4 / 3


@wrong("price", "retained chunks forgotten")
def no_retained(padded, encoded, retained):
    return 4 * encoded / (3 * padded)


@wrong("price", "padding forgotten")
def no_padding(padded, encoded, retained):
    return 1 + (1 - retained / encoded) / 3


@wrong("price", "backward of retained chunks forgotten")
def retained_backward_free(padded, encoded, retained):
    return (encoded + 3 * (encoded - retained)) / (3 * padded)


@wrong("price", "share of the padded tokens")
def retained_share_of_padded(padded, encoded, retained):
    return encoded / padded * (1 + (1 - retained / padded) / 3)


@wrong("price", "backward counted as one forward")
def backward_one_forward(padded, encoded, retained):
    return (3 * encoded - retained) / (2 * padded)


@wrong("price", "upside down")
def upside_down(padded, encoded, retained):
    return 3 * padded / (4 * encoded - retained)


@wrong("price", "the surcharge alone")
def extra_only(padded, encoded, retained):
    return (encoded - retained) / (3 * padded)


@wrong("price", "retained share added")
def sign_of_r(padded, encoded, retained):
    return encoded / padded * (1 + (1 + retained / encoded) / 3)


@wrong("price", "retained share the wrong way round")
def r_for_one_minus_r(padded, encoded, retained):
    return encoded / padded * (1 + retained / encoded / 3)


@wrong("price", "divided without a remainder")
def whole_division(padded, encoded, retained):
    return (4 * encoded - retained) // (3 * padded)


@wrong("price", "one forward padded")
def second_forward_at_full_width(padded, encoded, retained):
    return (3 * encoded + padded - retained) / (3 * padded)


@wrong("price", "everything twice")
def forwards_only(padded, encoded, retained):
    return (2 * encoded - retained) / padded


@wrong("price", "trimmed in the extra forward only")
def rho_on_the_surcharge_only(padded, encoded, retained):
    return 1 + (encoded - retained) / (3 * padded)


@wrong("price", "padding forgotten")
def over_its_own_tokens(padded, encoded, retained):
    return (4 * encoded - retained) / (3 * encoded)


@right("padded_tokens")
def tokens_by_heads(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    return sum(rows[i] * len(rows[i : i + chunk_size]) for i in range(0, len(rows), chunk_size))


@right("padded_tokens")
def tokens_by_rows(lengths, chunk_size):
    rows = sorted(lengths)[::-1]
    return sum(rows[i // chunk_size * chunk_size] for i in range(len(rows)))


@right("padded_tokens")
def tokens_by_torch(lengths, chunk_size):
    rows = torch.tensor(lengths).sort(descending=True).values
    return sum(int(part.max()) * len(part) for part in rows.split(chunk_size))


@right("padded_tokens")
def tokens_of_numpy(lengths, chunk_size):
    rows = np.sort(lengths)[::-1]
    return sum(rows[i] * min(chunk_size, len(rows) - i) for i in range(0, len(rows), chunk_size))


@right("padded_tokens")
def tokens_by_while(lengths, chunk_size):
    todo, total = sorted(lengths, reverse=True), 0
    while todo:
        part, todo = todo[:chunk_size], todo[chunk_size:]
        total += max(part) * len(part)
    return total


@wrong("padded_tokens", "not sorted")
def not_sorted(lengths, chunk_size):
    parts = [lengths[i : i + chunk_size] for i in range(0, len(lengths), chunk_size)]
    return sum(max(part) * len(part) for part in parts)


@wrong("padded_tokens", "shortest first")
def sorted_rising(lengths, chunk_size):
    rows = sorted(lengths)
    parts = [rows[i : i + chunk_size] for i in range(0, len(rows), chunk_size)]
    return sum(max(part) * len(part) for part in parts)


@wrong("padded_tokens", "short last chunk counted as full")
def last_counted_full(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    return sum(rows[i] * chunk_size for i in range(0, len(rows), chunk_size))


@wrong("padded_tokens", "last chunk lost")
def last_dropped(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    return sum(rows[i] * chunk_size for i in range(0, len(rows) - chunk_size + 1, chunk_size))


@wrong("padded_tokens", "no padding at all")
def no_padding_at_all(lengths, chunk_size):
    return sum(lengths)


@wrong("padded_tokens", "padded to the longest of all")
def whole_batch_padded(lengths, chunk_size):
    return max(lengths) * len(lengths)


@wrong("padded_tokens", "trimmed to the shortest row")
def shortest_row(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    parts = [rows[i : i + chunk_size] for i in range(0, len(rows), chunk_size)]
    return sum(part[-1] * len(part) for part in parts)


@wrong("padded_tokens", "widths without their rows")
def heads_only(lengths, chunk_size):
    return sum(sorted(lengths, reverse=True)[::chunk_size])


@wrong("padded_tokens", "input changed in place")
def sorted_in_place(lengths, chunk_size):
    lengths.sort(reverse=True)
    return sum(lengths[i] * len(lengths[i : i + chunk_size]) for i in range(0, len(lengths), chunk_size))


@wrong("padded_tokens", "the padding alone")
def padding_alone(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    total = sum(rows[i] * len(rows[i : i + chunk_size]) for i in range(0, len(rows), chunk_size))
    return total - sum(lengths)


@wrong("padded_tokens", "both forwards")
def both_forwards(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    return 2 * sum(rows[i] * len(rows[i : i + chunk_size]) for i in range(0, len(rows), chunk_size))


@wrong("padded_tokens", "chunk_size chunks, evenly")
def chunk_size_as_count(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    size = math.ceil(len(rows) / chunk_size)
    return sum(rows[i] * len(rows[i : i + size]) for i in range(0, len(rows), size))


@wrong("padded_tokens", "rows dealt out")
def dealt_out(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    count = math.ceil(len(rows) / chunk_size)
    return sum(max(rows[i::count]) * len(rows[i::count]) for i in range(count))


@wrong("padded_tokens", "no padding at all")
def mean_length(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    parts = [rows[i : i + chunk_size] for i in range(0, len(rows), chunk_size)]
    return sum(sum(part) / len(part) * len(part) for part in parts)


@wrong("padded_tokens", "a float for an int")
def a_float_of_tokens(lengths, chunk_size):
    rows = sorted(lengths, reverse=True)
    return float(sum(rows[i] * len(rows[i : i + chunk_size]) for i in range(0, len(rows), chunk_size)))


def _order(lengths):
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


@right("encode_sorted")
def put_back_by_index(encoder, rows, lengths, chunk_size):
    order = _order(lengths)
    parts = [order[i : i + chunk_size] for i in range(0, len(order), chunk_size)]
    reps = torch.cat([encoder(rows[part, : lengths[part[0]]]) for part in parts])
    back = torch.empty_like(reps)
    back[torch.tensor(order)] = reps
    return back


@right("encode_sorted")
def put_back_by_argsort(encoder, rows, lengths, chunk_size):
    order = torch.tensor(lengths).argsort(descending=True, stable=True)
    reps = [encoder(rows[part][:, : max(lengths[i] for i in part)]) for part in order.split(chunk_size)]
    return torch.cat(reps)[order.argsort()]


@right("encode_sorted")
def put_back_by_dict(encoder, rows, lengths, chunk_size):
    order, reps = np.argsort([-n for n in lengths], kind="stable").tolist(), {}
    for start in range(0, len(order), chunk_size):
        part = order[start : start + chunk_size]
        reps.update(zip(part, encoder(rows[part][:, : lengths[part[0]], :]), strict=True))
    return torch.stack([reps[i] for i in range(len(lengths))])


@right("encode_sorted")
def put_back_by_index_copy(encoder, rows, lengths, chunk_size):
    sizes = torch.tensor(lengths)
    order = torch.sort(sizes, descending=True).indices
    found = [encoder(rows.index_select(0, p)[:, : int(sizes[p].max())]) for p in order.split(chunk_size)]
    reps = torch.cat(found)
    return torch.zeros_like(reps).index_copy(0, order, reps)


@wrong("encode_sorted", "not put back")
def sorted_order_returned(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    return torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p)]) for p in order.split(chunk_size)])


@wrong("encode_sorted", "put back with the order itself")
def put_back_by_order_itself(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    return torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p)]) for p in order.split(chunk_size)])[order]


@wrong("encode_sorted", "not trimmed")
def untrimmed(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    return torch.cat([encoder(rows[p]) for p in order.split(chunk_size)])[order.argsort()]


@wrong("encode_sorted", "not sorted")
def unsorted_chunks(encoder, rows, lengths, chunk_size):
    starts = range(0, len(rows), chunk_size)
    return torch.cat([encoder(rows[i : i + chunk_size, : max(lengths[i : i + chunk_size])]) for i in starts])


@wrong("encode_sorted", "all rows at once")
def whole_batch_at_once(encoder, rows, lengths, chunk_size):
    return encoder(rows)


@wrong("encode_sorted", "shortest first")
def shortest_first(encoder, rows, lengths, chunk_size):
    order = torch.tensor(lengths).argsort()
    return torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p)]) for p in order.split(chunk_size)])[
        order.argsort()
    ]


@wrong("encode_sorted", "trimmed to the shortest row")
def trimmed_to_the_shortest(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    return torch.cat([encoder(rows[p][:, : min(lengths[i] for i in p)]) for p in order.split(chunk_size)])[
        order.argsort()
    ]


@wrong("encode_sorted", "a graph was not kept")
def without_a_graph(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    with torch.no_grad():
        reps = torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p)]) for p in order.split(chunk_size)])
    return reps[order.argsort()]


@wrong("encode_sorted", "a graph was not kept")
def detached(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    return torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p)]).detach() for p in order.split(chunk_size)])[
        order.argsort()
    ]


@wrong("encode_sorted", "one row at a time")
def row_by_row(encoder, rows, lengths, chunk_size):
    return torch.cat([encoder(row[None, :length]) for row, length in zip(rows, lengths, strict=True)])


@wrong("encode_sorted", None)
def last_rows_dropped(encoder, rows, lengths, chunk_size):
    order = _order(lengths)
    out = torch.zeros(len(rows), encoder(rows[:1]).shape[1], dtype=rows.dtype)
    for i in range(0, len(order) - chunk_size + 1, chunk_size):
        part = order[i : i + chunk_size]
        out[part] = encoder(rows[part][:, : lengths[part[0]]])
    return out


@wrong("encode_sorted", "a token too few")
def one_token_too_few(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    return torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p) - 1]) for p in order.split(chunk_size)])[
        order.argsort()
    ]


@wrong("encode_sorted", "widths of the unsorted chunks")
def lengths_not_sorted_along(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    chunks = rows[order].split(chunk_size)
    reps = [encoder(c[:, : max(lengths[i * chunk_size : (i + 1) * chunk_size])]) for i, c in enumerate(chunks)]
    return torch.cat(reps)[order.argsort()]


@wrong("encode_sorted", "another form")
def a_list_of_rows(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    reps = torch.cat([encoder(rows[p][:, : max(lengths[i] for i in p)]) for p in order.split(chunk_size)])
    return list(reps[order.argsort()])


@wrong("encode_sorted", "a forward too many")
def encoded_twice(encoder, rows, lengths, chunk_size):
    order = torch.tensor(_order(lengths))
    width = encoder(rows).shape[1]
    out = torch.zeros(len(rows), width, dtype=rows.dtype)
    for p in order.split(chunk_size):
        out[p] = encoder(rows[p][:, : max(lengths[i] for i in p)])
    return out


@right("graphs_to_retain")
def retain_by_division(graph, loss, replay, budget, chunks):
    return min(chunks, (budget - loss) // graph)


@right("graphs_to_retain")
def retain_by_counting(graph, loss, replay, budget, chunks):
    return max(R for R in range(chunks + 1) if max(loss + R * graph, replay) <= budget)


@right("graphs_to_retain")
def retain_by_floor(graph, loss, replay, budget, chunks):
    return max(0, min(int((budget - loss) // graph), chunks))


@right("graphs_to_retain")
def retain_of_numpy(graph, loss, replay, budget, chunks):
    return np.clip((budget - loss) // graph, 0, chunks)


@right("graphs_to_retain")
def retain_by_while(graph, loss, replay, budget, chunks):
    R = 0
    while chunks > R and loss + (R + 1) * graph <= budget:
        R += 1
    return R


@wrong("graphs_to_retain", "loss and replay added up")
def replay_at_the_same_time(graph, loss, replay, budget, chunks):
    return max(0, min(chunks, (budget - loss - replay) // graph))


@wrong("graphs_to_retain", "loss forgotten")
def loss_forgotten(graph, loss, replay, budget, chunks):
    return min(chunks, budget // graph)


@wrong("graphs_to_retain", "graphs held beside the replay")
def replay_for_loss(graph, loss, replay, budget, chunks):
    return min(chunks, (budget - replay) // graph)


@wrong("graphs_to_retain", None)
def larger_of_both(graph, loss, replay, budget, chunks):
    return min(chunks, (budget - max(loss, replay)) // graph)


@wrong("graphs_to_retain", "more than there are chunks")
def no_cap(graph, loss, replay, budget, chunks):
    return (budget - loss) // graph


@wrong("graphs_to_retain", "last chunk left out")
def one_chunk_must_be_replayed(graph, loss, replay, budget, chunks):
    return min(chunks - 1, (budget - loss) // graph)


@wrong("graphs_to_retain", None)
def rounded_up(graph, loss, replay, budget, chunks):
    return min(chunks, math.ceil((budget - loss) / graph))


@wrong("graphs_to_retain", "not rounded")
def true_division(graph, loss, replay, budget, chunks):
    return min(chunks, (budget - loss) / graph)


@wrong("graphs_to_retain", "exact fit refused")
def strictly_below_budget(graph, loss, replay, budget, chunks):
    return max([R for R in range(chunks + 1) if max(loss + R * graph, replay) < budget], default=0)


@wrong("graphs_to_retain", "one too few")
def one_less(graph, loss, replay, budget, chunks):
    return max(0, min(chunks, (budget - loss) // graph - 1))


@wrong("graphs_to_retain", "all or none")
def all_or_nothing(graph, loss, replay, budget, chunks):
    return chunks if max(loss + chunks * graph, replay) <= budget else 0


@wrong("graphs_to_retain", "last chunk left out")
def chunks_ends_range(graph, loss, replay, budget, chunks):
    return max(R for R in range(chunks) if loss + R * graph <= budget)


@wrong("graphs_to_retain", "the smaller of loss and replay")
def smaller_of_both(graph, loss, replay, budget, chunks):
    return min(chunks, (budget - min(loss, replay)) // graph)


@wrong("graphs_to_retain", "rounded to the nearest")
def rounded_to_nearest(graph, loss, replay, budget, chunks):
    return min(chunks, round((budget - loss) / graph))
