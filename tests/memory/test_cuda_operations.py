"""A card's operations on fake tensors: counted by hand, and against steps that a real card's ledger recorded."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from helpers.shares import a_share
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import BertConfig

from gclib import ContrastiveLoss, Encoder, forecast_step, record_memory
from gclib.memory.cuda_operations import CudaKernels
from gclib.memory.recording import load_recordings
from gclib.steps import STEPS as TRAINING
from tests.memory.test_forecast_models import NARROWED, fed, small
from tests.memory.test_ledger import batch

HOST_BYTES = 1024  # seeds of attention, which a card keeps with the host
STEPS = [(recording, step) for recording in load_recordings() for step in recording.steps]
NAMES = [f"{card.calibration.device} {step.case.step}{' bf16' * step.case.autocast}" for card, step in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize(("recording", "recorded"), STEPS, ids=NAMES)
def test_every_piece_of_a_recorded_step_peaks_where_it_was_forecast(recording, recorded):
    """The oracle is the ledger of a step that a card really ran; nothing of it is known here but the case."""
    case = recorded.case
    same = {"query_length": case.length, "passage_length": case.length, "batch_size": case.batch_size}
    same |= {"chunk_size": case.chunk_size, "autocast": torch.bfloat16 if case.autocast else None}
    told = forecast_step(case.step, config=recording.calibration.model, device="cuda", **same)
    assert told.exact_law
    assert told.peak_bytes == pytest.approx(recorded.ledger_peak_bytes, abs=HOST_BYTES)
    pieces = [
        (piece.phase, piece.tower, int(piece.kind_bytes.sum(axis=1).max() + repeat * piece.net_bytes.sum()))
        for piece in told.timeline[1:]
        for repeat in range(piece.repeats)
    ]
    seen = [(p.phase, p.tower, max(p.ledger_bytes)) for p in recorded.pieces if p.phase != "start"]
    seen = seen[: len(pieces) or None]  # a heading without operations may follow: the replay has ended
    assert [piece[:2] for piece in pieces] == [piece[:2] for piece in seen]
    for (*_, forecast), (*_, measured) in zip(pieces, seen, strict=True):
        assert forecast == pytest.approx(measured, abs=4 * HOST_BYTES)


@pytest.mark.parametrize(("recording", "recorded"), STEPS, ids=NAMES)
def test_a_card_was_asked_for_the_tensors_its_workspace_and_little_else(recording, recorded):
    """The allocator's own history, which knows no ledger, and its peaks."""
    tensors = recorded.requested_peak_bytes - recording.calibration.workspace_bytes
    assert recorded.ledger_peak_bytes == pytest.approx(tensors, rel=0.01)
    assert max(max(piece.allocator_bytes, default=0) for piece in recorded.pieces) == recorded.requested_peak_bytes
    assert recorded.requested_peak_bytes <= recorded.allocated_peak_bytes <= recorded.reserved_peak_bytes


@pytest.mark.slow
def test_forecasts_are_within_five_percent_of_what_cards_gave_out():
    """Forecasts of now against `torch.cuda.max_memory_allocated` of BERT-base, C = 8 to 256, naive and cached."""
    plain, rounded = [], []
    for recording in load_recordings():
        for reading in recording.calibration.readings:
            case = reading.case
            same = {"query_length": case.length, "passage_length": case.length, "batch_size": case.batch_size}
            same |= {"chunk_size": case.chunk_size, "autocast": torch.bfloat16 if case.autocast else None}
            told = forecast_step(case.step, config=recording.calibration.model, device="cuda", **same).peak_bytes
            assert told == reading.forecast_bytes
            ratio = reading.measured_bytes / (told + reading.workspace_bytes)
            (rounded if case.autocast else plain).append(ratio)
    assert len(plain) >= 12 and all(abs(ratio - 1) <= 0.05 for ratio in plain)
    assert len(rounded) >= 12 and all(abs(ratio - 1) <= 0.05 for ratio in rounded)
    sizes = {r.case.chunk_size for recording in load_recordings() for r in recording.calibration.readings}
    assert {8, 16, 32, 64, 128, 256} <= sizes


def held(run):
    """Bytes that are live after `run`, which keeps its graph: with a card's operations, and with a processor's."""
    found = []
    for kernels in (CudaKernels(), nullcontext()):
        with FakeTensorMode(), kernels, record_memory() as ledger:
            kept = run()
            found.append(ledger.events[-1].total_bytes)
            del kept
    return found


def test_dropout_keeps_one_byte_a_number():
    card, processor = held(lambda: F.dropout(torch.empty(100, requires_grad=True), 0.1))
    assert card == 400 + 400 + 100
    assert processor == 400 + 400 + 400


@pytest.mark.parametrize("options", [{"training": False}, {"p": 0.0}, {"p": 1.0}])
def test_dropout_that_drops_nothing_or_everything_is_as_it_was(options):
    card, processor = held(lambda: F.dropout(torch.empty(100, requires_grad=True), **{"p": 0.5, **options}))
    assert card == processor


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_keeps_a_number_a_row_and_no_probabilities(dropout):
    """Inputs and output of 16 KiB, a log-sum-exp of 4 bytes a row and head, two seeds of 8 bytes."""

    def attend():
        query, key, value = (torch.empty(1, 2, 64, 32, requires_grad=True) for _ in range(3))
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)

    card, processor = held(attend)
    assert card == 4 * 2**14 + 4 * 2 * 64 + 16
    if dropout:
        assert processor > card + 4 * 2 * 64 * 64


def test_grouped_heads_are_repeated_for_the_kernel():
    with FakeTensorMode(), CudaKernels():
        query, key = torch.empty(1, 8, 16, 32, requires_grad=True), torch.empty(1, 2, 16, 32)
        assert F.scaled_dot_product_attention(query, key, key, enable_gqa=True).shape == query.shape


@pytest.mark.parametrize(("columns", "padded"), [(10, 16), (16, 16)])
def test_a_mask_is_made_numbers_and_padded_for_the_kernel(columns, padded):
    """The boolean mask, and its numbers in the queries' dtype once for all heads."""

    def attend():
        query = torch.empty(3, 2, 7, 8)
        key = torch.empty(3, 2, columns, 8)
        mask = torch.empty(3, 1, 7, columns, dtype=torch.bool)
        asked = query.clone().requires_grad_()
        return F.scaled_dot_product_attention(asked, key, key, attn_mask=mask), query, key, mask

    card, _ = held(attend)
    given = 4 * 3 * 2 * 8 * (7 + columns) + 3 * 7 * columns
    asked_and_output, sums, seeds = 2 * 4 * 3 * 2 * 7 * 8, 4 * 3 * 2 * 32, 16
    assert card == given + asked_and_output + sums + seeds + 4 * 3 * 7 * padded


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("layer_norm", lambda x: F.layer_norm(x, (8,))),
        ("softmax", lambda x: F.softmax(x, dim=-1)),
        ("log_softmax", lambda x: F.log_softmax(x, dim=-1)),
        ("cosine_similarity", lambda x: F.cosine_similarity(x, x)),
        ("sum", lambda x: x.sum(dim=1)),
        ("sum by name", lambda x: torch.sum(input=x, dim=1)),
        ("pow", lambda x: x.pow(2)),
        ("normalize", lambda x: F.normalize(x, dim=-1)),
        ("cross_entropy", lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long))),
        ("smoothed", lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long), label_smoothing=0.1)),
    ],
)
def test_autocast_of_a_card_stays_in_float32_where_it_does(name, function):
    """By PyTorch's list of operations that CUDA's autocast runs in float32; products stay in bf16."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), CudaKernels():
        narrow = F.linear(torch.empty(4, 8), torch.empty(8, 8))
        assert narrow.dtype == torch.bfloat16
        assert function(narrow).dtype == torch.float32, name
    with FakeTensorMode(), CudaKernels():
        assert function(torch.empty(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16, name


@pytest.mark.slow
@pytest.mark.parametrize("step", ["naive", "grad_cache"])
def test_a_forecast_for_a_card_is_its_own_law(step):
    """Fewer bytes than a processor's, equal to a fake run of the whole step, and never read from the other's file."""
    same = {"config": "tiny", "batch_size": 12, "query_length": 32, "passage_length": 32}
    same |= {} if step == "naive" else {"chunk_size": 5}
    card, processor = (forecast_step(step, device=device, **same).peak_bytes for device in ("cuda", "cpu"))
    assert card < processor
    whole = forecast_step(step, device="cuda", **(same | {"query_length": [32] * 12}))
    assert not whole.exact_law and whole.peak_bytes == card
    assert forecast_step(step, device="cuda", **same).at_peak()["random states"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_attention_that_keeps_its_weights_is_another_law(device):
    """Equal configs but for the attention, which transformers leaves out of a config's JSON."""
    same = {"batch_size": 4, "query_length": 64, "passage_length": 64, "device": device}
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 64}
    for made in (lambda config: {"config": config}, lambda config: {"encoders": [Encoder.from_config(config)] * 2}):
        fused, eager = (
            forecast_step("naive", **made(BertConfig(**sizes, attn_implementation=name)), **same).peak_bytes
            for name in ("sdpa", "eager")
        )
        if device == "cuda":
            assert eager > fused + 2 * 2 * 4 * 2 * 64 * 64 * 4  # layers, towers, rows, heads, T x T float32
        else:
            assert eager != fused


DTYPES = (torch.float32, torch.bfloat16)
CHECKPOINTED = [name for name in NARROWED if name != "mpnet-base"]  # whose class has no checkpointing


@pytest.mark.slow
@a_share(("name", "step", "dtype"), CHECKPOINTED, list(product(TRAINING, DTYPES)), one_in=6)
def test_checkpointing_is_forecast_for_a_card(step, dtype, name):
    """A figure by a law, below that of the step without checkpointing and of a processor's; whose is the ledger's."""
    length = None if name.endswith("vision") else 64
    same = {"config": small(name, **({} if length is None else {"max_position_embeddings": 128})), "batch_size": 8}
    same |= {"query_length": length, "passage_length": length} | ({} if step == "naive" else {"chunk_size": 4})
    kept = forecast_step(step, device="cuda", gradient_checkpointing=True, dtype=dtype, **same)
    processor = forecast_step(step, device="cpu", gradient_checkpointing=True, dtype=dtype, **same).peak_bytes
    assert kept.exact_law
    assert kept.peak_bytes < forecast_step(step, device="cuda", dtype=dtype, **same).peak_bytes
    assert kept.peak_bytes < processor == ledger_bytes(step, same["config"], length, dtype)


def ledger_bytes(step, config, length, dtype):
    """The peak of the real step of 8 rows with checkpointing, on the processor."""
    encoder, loss = Encoder.from_config(config).to(dtype).train().checkpoint_activations(), ContrastiveLoss()
    options = {} if step == "naive" else {"chunk_size": 4}
    options |= {"verify": "never"} if step == "grad_cache" else {}
    inputs = [fed(encoder, 8, length) for _ in range(2)]
    with record_memory(encoder, loss) as ledger:
        TRAINING[step]([encoder] * 2, inputs, loss, on_phase=ledger.on_phase, **options)
    return ledger.peak_bytes


@pytest.mark.slow
@a_share(("step", "reentrant"), ["naive", "grad_cache"], [True, False], one_in=2)
def test_both_kinds_of_checkpointing(step, reentrant):
    """On a processor equal to the ledger; on a card a figure."""
    encoder, loss = Encoder.from_config(small("bert-base-uncased")).train(), ContrastiveLoss()
    encoder.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    options = {} if step == "naive" else {"chunk_size": 3}
    same = {"encoders": [encoder] * 2, "batch_size": 7, "query_length": 8, "passage_length": 12, **options}
    card, processor = (forecast_step(step, device=device, **same) for device in ("cuda", "cpu"))
    options |= {"verify": "never"} if step == "grad_cache" else {}
    with record_memory(encoder, loss) as ledger:
        TRAINING[step]([encoder] * 2, [batch(7, 8), batch(7, 12)], loss, on_phase=ledger.on_phase, **options)
    assert processor.peak_bytes == ledger.peak_bytes
    assert card.peak_bytes < processor.peak_bytes and card.exact_law


def test_attention_inside_a_function_of_pytorch():
    """`F.multi_head_attention_forward` attends in Python: on a card its probabilities are not kept."""

    def attend():
        tokens = torch.empty(2, 64, 16, requires_grad=True)
        layer = torch.nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        return layer(tokens, tokens, tokens, need_weights=False)[0]

    card, processor = held(attend)
    assert processor > card + 2 * 2 * 64 * 64 * 4


def test_another_device_is_refused():
    with pytest.raises(ValueError, match="device must be one of"):
        forecast_step("naive", config="tiny", batch_size=2, query_length=8, passage_length=8, device="tpu")
