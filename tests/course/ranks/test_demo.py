"""Chapter 09's ranks: every way of the loss on real processes, against an oracle in one; what is sent is counted."""

import contextlib
import io
import subprocess

import pytest
import torch
import torch.distributed as dist
from helpers.oracles import InfoNCE

from gclib.course.ranks.demo import (
    _own_words,
    chunk_sizes,
    command,
    first_draws,
    launch,
    main,
    make_batch,
    make_encoder,
    messages_noted,
    own_part,
    say_in_turn,
    work,
)
from gclib.course.ranks.ways import TEMPERATURE, WAYS, RankLoss
from gclib.distributed import Rank

RIGHT = ("gather", "ring", "whole loss on every rank")


def truth(pairs):
    """One process, an oracle's own loss: gradients by the names of the demonstration."""
    encoder, loss_fn = make_encoder(), InfoNCE(False).double()
    with torch.no_grad():
        loss_fn.temperature.fill_(TEMPERATURE)
    loss = loss_fn(*(encoder(inputs) for inputs in make_batch(pairs)))
    loss.backward()
    found = {f"0.{name}": parameter.grad for name, parameter in encoder.named_parameters()}
    return float(loss.detach()), found | {"1.temperature": loss_fn.temperature.grad}


def together(gradients):
    return torch.cat([gradients[name].flatten() for name in sorted(gradients) if name.startswith("0.")])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(((6, 3), 3), marks=pytest.mark.deep, id="2 ranks"),
        pytest.param(((4, 2, 3), 2), id="3 ranks"),
    ],
)
def ranks(request):
    rows, chunks = request.param
    with contextlib.redirect_stdout(io.StringIO()) as said:
        results = launch(rows, chunks=chunks, peak_pairs=192)
    return results, rows, said.getvalue()


@pytest.mark.slow
def test_right_ways_give_one_process_s_gradient_on_every_rank(ranks):
    loss, expected = truth(9)
    for rank in ranks[0]:
        for way in RIGHT:
            found = rank["ways"][way]["gradients"]
            for name, gradient in expected.items():
                assert float((found[name] - gradient).norm()) <= 1e-12 * float(together(expected).norm()), (way, name)
        assert rank["ways"]["gather"]["loss"] == pytest.approx(loss, abs=1e-12)


@pytest.mark.slow
def test_each_wrong_way_has_the_scale_that_the_chapter_says(ranks):
    results, rows, _ = ranks
    world, (_, expected) = len(rows), truth(9)
    right, temperature = together(expected), expected["1.temperature"]
    scales = {
        "share without W": (1 / world, 1 / world),
        "W twice": (world, world),
        "whole loss, no gradient": (1 / world, 1),
        "the same, times W": (1, world),
    }
    for rank in results:
        for way, (of_encoder, of_temperature) in scales.items():
            found = rank["ways"][way]["gradients"]
            torch.testing.assert_close(together(found), of_encoder * right, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found["1.temperature"], of_temperature * temperature, rtol=1e-9, atol=1e-12)
        for way in set(WAYS) - set(scales) - set(RIGHT):
            found = together(rank["ways"][way]["gradients"])
            assert float(torch.cosine_similarity(found, right, dim=0)) < 0.999, way
    mine, others = (together(rank["ways"]["not averaged"]["gradients"]) for rank in results[:2])
    assert not torch.allclose(mine, others)
    shares = [together(rank["ways"]["not averaged"]["gradients"]) for rank in results]
    torch.testing.assert_close(torch.stack(shares).mean(0), right)


@pytest.mark.slow
def test_gradients_travel_once_and_with_ddp_s_hooks_once_a_chunk(ranks):
    results, rows, _ = ranks
    chunks = {2: 3, 3: 2}[len(rows)]
    numbers = sum(p.numel() for p in make_encoder().parameters())
    for rank in results:
        way = rank["ways"]["gather"]
        assert [name for name, _ in way["in_step"]] == ["all_gather", "all_gather", "all_reduce", "all_reduce"]
        assert len(way["after"]) == 1 and way["after"][0][1] >= (numbers + 1) * 8
        replayed, retained = rank["hooks"]["replayed"], rank["hooks"]["retained"]
        assert replayed["sent"] == [numbers * 8] * (2 * chunks)
        for name, gradient in truth(9)[1].items():
            torch.testing.assert_close(replayed["gradients"][name], gradient)
        right = together(truth(9)[1])
        assert float((together(retained["gradients"]) - right).norm() / right.norm()) > 0.01


@pytest.mark.slow
def test_peaks_and_draws(ranks):
    results, _, _ = ranks
    for rank in results:
        peaks = rank["peaks"]
        assert peaks["ring"] < peaks["gathered, tiled"] < peaks["gathered, dense"]
    same, own = zip(*(rank["draws"].values() for rank in results), strict=True)
    assert len(set(same)) == 1 and len(set(own)) == len(results)


@pytest.mark.slow
def test_lines_come_in_the_order_of_ranks_and_nothing_else_is_printed(ranks):
    _, rows, said = ranks
    lines = said.splitlines()
    assert len(lines) == len(rows)
    for rank, (line, count) in enumerate(zip(lines, rows, strict=True)):
        start, stop = sum(rows[:rank]), sum(rows[: rank + 1]) - 1
        words = f"encodes pairs {start} to {stop}, gathers 9 passages, has {count} x 9 logits"
        assert line.startswith(f"rank {rank} of {len(rows)}: {words}")


@pytest.mark.slow
def test_ranks_that_fail_are_told_in_their_own_words():
    with pytest.raises(RuntimeError, match="the ranks failed: ValueError: query_reps must be a floating point"):
        launch([2, 1], chunks=1, peak_pairs=0)


def test_what_no_ranks_could_run_starts_none(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match="chunks must be possible for all of the rows"):
        launch([4, 1], chunks=3)
    for rows in ([], [1] * 9):
        with pytest.raises(ValueError, match="rows must be 1 to 8 numbers, one a rank"):
            launch(rows, chunks=1)


def test_of_all_that_is_said_the_ranks_own_words_are_told():
    noise = "Traceback (most recent call last):\n  File torch/distributed/run.py\nfailed (exitcode: 1)\n"
    own = "[rank1]: ValueError: rows must be 2\n[rank0]: ValueError: rows must be 2\ntorch.x.ChildFailedError: \n"
    assert _own_words(noise + own) == "ValueError: rows must be 2"
    assert _own_words(noise) == noise


def test_the_command_line_is_one_that_can_be_typed():
    line = " ".join(command([6, 3], 2))
    start = "python -m torch.distributed.run --standalone --nproc-per-node 2"
    assert line == f"{start} -m gclib.course.ranks.demo --rows 6 3 --chunks 2"


def test_ranks_that_never_answer_are_stopped(monkeypatch):
    monkeypatch.setattr("gclib.course.ranks.demo.LAUNCH_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match="gave no answer in 0.2 seconds, and were stopped"):
        launch([1], chunks=1)


def test_messages_are_noted_and_the_calls_put_back(monkeypatch):
    kept = dist.all_reduce
    sent = []
    monkeypatch.setattr(dist, "all_gather", lambda received, tensor: sent.append(tensor))
    with messages_noted() as noted:
        dist.all_gather([], torch.zeros(3))
    assert noted == [("all_gather", 12)] and len(sent) == 1 and dist.all_reduce is kept


def test_own_rows_are_cut_and_the_batch_is_always_the_same():
    batch = make_batch(5)
    parts = [own_part(batch, [2, 3], rank)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), batch[0]) and torch.equal(make_batch(5)[1], batch[1])
    state = torch.get_rng_state()
    first, second = (torch.nn.utils.parameters_to_vector(make_encoder().parameters()) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


def test_a_process_alone_is_rank_0_of_1(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    say_in_turn(Rank(0, 1, torch.device("cpu")), "here")
    assert capsys.readouterr().out == "here\n"
    with pytest.raises(ValueError, match="rows must be 1 numbers"):
        main(["--rows", "2", "1", "--folder", str(tmp_path)])
    assert set(first_draws(0).values()) == {first_draws(0)["seed 0 + rank"]}


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: chunk_sizes([4, 3], 3), "chunks must be possible for all of the rows"),
        (lambda: chunk_sizes([2, 0], 1), "rows must be an int of at least 1"),
        (lambda: make_batch(0), "pairs must be an int of at least 1"),
        (lambda: RankLoss("magic", [1]), "way must be one of"),
        (lambda: work(Rank(0, 2, torch.device("cpu")), [1], 1, 8), "rows must be 2 numbers, one a rank"),
    ],
)
def test_bad_arguments_are_refused_in_words(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
