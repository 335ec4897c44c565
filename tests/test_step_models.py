"""Steps with the models and losses that people have: each against plain autograd on the whole batch."""

import shutil
from functools import partial

import pytest
import torch
from helpers.oracles import InfoNCE, TinyEncoder, gradients, token_batch, worst_error
from torch import Tensor, nn
from torch.nn import functional as F

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib.chunks import Chunk

BOUND = 1e-12


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    return token_batch(7, 6, generator), token_batch(7, 11, generator)


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return Encoder.from_config("tiny", dropout=0.0).double()


def whole_batch(encoders, inputs, loss_fn):
    """The oracle: everything encoded with its graph, one backward."""
    reps = [e(**x) if isinstance(x, dict) else e(x) for e, x in zip(encoders, inputs, strict=True)]
    loss = loss_fn(*reps)
    loss.backward()
    return loss


def held_to_autograd(encoders, inputs, loss_fn, modules, bound=BOUND, **options):
    """Loss and every gradient of `modules` after one SGD step, cached against plain autograd."""
    truth = gradients(modules, lambda: whole_batch(encoders, inputs, loss_fn))
    found = gradients(modules, lambda: grad_cache_step(encoders, inputs, loss_fn, **options))
    assert found[0].item() == pytest.approx(truth[0].item(), rel=max(bound, 1e-12))
    assert worst_error(found[1], truth[1]) <= bound
    return truth[1]


def test_a_plain_hugging_face_model_in_a_lambda(batch):
    from transformers import AutoModel

    from gclib.models.encoder import bert_config

    torch.manual_seed(0)
    model = AutoModel.from_config(bert_config("tiny", dropout=0.0), add_pooling_layer=False).double()
    encode = lambda **inputs: model(**inputs).last_hidden_state[:, 0]  # noqa: E731
    held_to_autograd([encode, encode], batch, ContrastiveLoss(1.0), [model], chunk_size=3)


def test_an_image_tower_against_a_text_tower(bert, batch):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=16, patch_size=8, **sizes)
    vit = ViTModel(config, add_pooling_layer=False).double()
    images = lambda pixels: F.normalize(vit(pixels).last_hidden_state[:, 0], dim=-1)  # noqa: E731
    inputs = [batch[0], torch.randn(7, 3, 16, 16, dtype=torch.float64)]
    loss_fn = InfoNCE(symmetric=True).double()
    held_to_autograd([bert, images], inputs, loss_fn, [bert, vit, loss_fn], chunk_size=(3, 2), retain_chunks=1)


def test_a_sentence_transformers_model(batch):
    st = pytest.importorskip("sentence_transformers")
    from helpers.rivals import Embedder

    torch.manual_seed(0)
    model = st.SentenceTransformer(modules=[Embedder(Encoder.from_config("tiny", dropout=0.0))], device="cpu").double()
    model.train()
    encode = lambda **features: model(features)["sentence_embedding"]  # noqa: E731
    held_to_autograd([encode, encode], batch, ContrastiveLoss(0.1), [model], chunk_size=3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_inside_the_encoder(batch, reentrant):
    """Checkpointed layers draw their dropout a third time, in the backward: still the masks of the first forward."""
    torch.manual_seed(0)
    encoder = Encoder.from_config("tiny", dropout=0.3).double()
    plain = Encoder.from_config("tiny", dropout=0.3).double()
    plain.load_state_dict(encoder.state_dict())
    encoder.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_fn, found = ContrastiveLoss(0.1), []
    for module in (encoder, plain):
        torch.manual_seed(5)
        step = partial(grad_cache_step, [module, module], batch, loss_fn, chunk_size=3)
        found.append((*gradients([module], step), torch.get_rng_state()))
    assert found[0][0].item() == pytest.approx(found[1][0].item(), rel=1e-12)
    assert worst_error(found[0][1], found[1][1]) <= BOUND
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_encoder_replays_its_dropout(backend):
    """The graph-less forward is compiled apart from the one with a graph, and must draw the same masks."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile's default backend needs a C++ compiler, and there is none")
    torch.manual_seed(0)
    encoder = TinyEncoder(0.4).double()
    compiled, loss_fn = torch.compile(encoder, backend=backend, dynamic=True), InfoNCE(learnable=False).double()
    generator = torch.Generator().manual_seed(4)
    batch = [token_batch(6, 5, generator) for _ in range(2)]
    plan = [Chunk((0, 1, 2), 5), Chunk((3, 4, 5), 5)]

    def kept_graphs():
        torch.manual_seed(5)
        halves = [[{key: value[rows] for key, value in t.items()} for rows in (slice(3), slice(3, 6))] for t in batch]
        reps = [torch.cat([compiled(**half) for half in tower]) for tower in halves]
        loss = loss_fn(*reps)
        loss.backward()
        return loss

    def cached():
        torch.manual_seed(5)
        return grad_cache_step([compiled, compiled], batch, loss_fn, plan=[plan, plan])

    truth, found = gradients([encoder], kept_graphs), gradients([encoder], cached)
    assert found[0].item() == pytest.approx(truth[0].item(), rel=1e-12)
    assert worst_error(found[1], truth[1]) <= BOUND


def test_an_encoder_in_eval_mode(batch):
    torch.manual_seed(0)
    encoder = Encoder.from_config("tiny", dropout=0.4).double().eval()
    held_to_autograd([encoder, encoder], batch, ContrastiveLoss(0.1), [encoder], chunk_size=3)
    assert not encoder.training


def test_frozen_parameters_inside_a_tower(bert, batch):
    for parameter in bert.model.embeddings.parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in bert.parameters() if parameter.requires_grad]
    loss_fn = ContrastiveLoss(0.1)
    whole_batch([bert, bert], batch, loss_fn)
    truth = [parameter.grad.clone() for parameter in trained]
    bert.zero_grad()
    grad_cache_step([bert, bert], batch, loss_fn, chunk_size=3)
    assert worst_error([parameter.grad for parameter in trained], truth) <= BOUND
    assert all(parameter.grad is None for parameter in bert.model.embeddings.parameters())


def test_a_loss_of_pytorch_metric_learning(bert, batch):
    """Its losses take embeddings and labels: one label a pair, both towers one after another."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    ntxent = losses.NTXentLoss(temperature=0.1)
    labels = torch.arange(7).repeat(2)

    def loss_fn(queries: Tensor, passages: Tensor) -> Tensor:
        return ntxent(torch.cat([queries, passages]), labels)

    held_to_autograd([bert, bert], batch, loss_fn, [bert], chunk_size=3, retain_chunks=1)


class Tokens(nn.Module):
    """Multi-vector: a unit vector for each token, zero at padding (Khattab and Zaharia 2020, ColBERT, section 3.2)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model = encoder.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(tokens, dim=-1) * attention_mask.unsqueeze(-1)


def max_sim(queries: Tensor, passages: Tensor) -> Tensor:
    """In-batch loss over sum_t max_u q_t . p_u."""
    scores = torch.einsum("btd,nud->bntu", queries, passages).amax(dim=3).sum(dim=2)
    return F.cross_entropy(scores, torch.arange(len(scores)))


def test_max_sim_over_padded_token_representations(bert, batch):
    tower = Tokens(bert)
    held_to_autograd([tower, tower], batch, max_sim, [tower], chunk_size=3, retain_chunks=1)


def test_three_towers_query_positive_and_negative(bert, batch):
    generator = torch.Generator().manual_seed(9)
    negatives = token_batch(7, 8, generator)

    def triplet(queries: Tensor, positives: Tensor, others: Tensor) -> Tensor:
        return F.relu(0.4 - (queries * positives).sum(1) + (queries @ others.T).amax(dim=1)).mean()

    held_to_autograd([bert, bert, bert], [*batch, negatives], triplet, [bert], chunk_size=(2, 3, 7))


def test_half_precision_with_a_grad_scaler(batch):
    """float16 autocast and a GradScaler: as near to float32 as the naive step under the same autocast."""
    torch.manual_seed(0)
    encoder, loss_fn = Encoder.from_config("tiny", dropout=0.0), ContrastiveLoss(0.1)
    truth = gradients([encoder], lambda: naive_step([encoder, encoder], batch, loss_fn))[1]

    def in_half(step):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)

        def run():
            with torch.autocast("cpu", dtype=torch.float16):
                loss = step([encoder, encoder], batch, loss_fn, scaler=scaler)
            scaler.unscale_(optimizer)
            return loss

        return worst_error(gradients([encoder], run)[1], truth)

    naive, cached = in_half(naive_step), in_half(partial(grad_cache_step, chunk_size=3))
    assert 0 < cached <= 1.1 * naive


@pytest.mark.slow
def test_bf16_autocast_errs_no_more_than_the_naive_step():
    """Over ten batches: the error against float32 is at most the naive step's own, plus a tenth."""
    torch.manual_seed(0)
    encoder, loss_fn = Encoder.from_config("tiny", dropout=0.0), ContrastiveLoss(0.1)
    errors = {"naive": 0.0, "cached": 0.0}
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        given = [encoder, encoder], (token_batch(8, 6, generator), token_batch(8, 11, generator)), loss_fn
        naive, cached = partial(naive_step, *given), partial(grad_cache_step, *given, chunk_size=3)
        truth = gradients([encoder], naive)[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors["naive"] += worst_error(gradients([encoder], naive)[1], truth)
            errors["cached"] += worst_error(gradients([encoder], cached)[1], truth)
    assert 0 < errors["cached"] <= 1.1 * errors["naive"]


def test_clipping_by_the_caller_is_the_same(bert, batch):
    loss_fn, norms = ContrastiveLoss(0.1), []
    for step in (naive_step, partial(grad_cache_step, chunk_size=3)):
        bert.zero_grad()
        step([bert, bert], batch, loss_fn)
        norms.append(nn.utils.clip_grad_norm_(bert.parameters(), 0.01).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        ({"a": {"input_ids": torch.ones(3, 2, dtype=torch.long)}}, r"inputs\[0\]\['a'\].*lambda.*dict"),
        ({"pixels": torch.ones(3, 2), "scale": torch.tensor(2.0)}, r"inputs\[0\].*'scale'.*row"),
        ({"pixels": torch.ones(3, 2), "table": torch.ones(5, 2)}, r"inputs\[0\].*'table'.*3 rows"),
    ],
)
def test_nested_mappings_and_tensors_without_rows_are_refused_in_words(inputs, names):
    with pytest.raises(ValueError, match=names):
        grad_cache_step([lambda **x: x["pixels"]] * 2, [inputs, inputs], max_sim, chunk_size=2)
