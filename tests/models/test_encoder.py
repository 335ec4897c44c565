"""Pooling honours the mask; any folder that transformers wrote can be loaded."""

import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DistilBertConfig,
    DistilBertModel,
    FunnelBaseModel,
    FunnelConfig,
)

from gclib import Encoder
from gclib.models.encoder import SIZES, bert_config
from gclib.models.layers import Dense
from gclib.steps import grad_cache_step


@pytest.fixture(scope="module")
def model():
    return Encoder.from_config("tiny", dropout=0.0).eval()


def padded(ids, width, left=False):
    row = torch.zeros(1, width, dtype=torch.long)
    mask = torch.zeros(1, width, dtype=torch.long)
    span = slice(width - len(ids), width) if left else slice(len(ids))
    row[0, span], mask[0, span] = torch.tensor(ids), 1
    return {"input_ids": row, "attention_mask": mask}


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_changes_nothing(model, pooling):
    encoder = Encoder(model.model, pooling=pooling)
    short, long = encoder(**padded([5, 6, 7], 3)), encoder(**padded([5, 6, 7], 9))
    torch.testing.assert_close(short, long)


@pytest.mark.parametrize(("pooling", "position"), [("cls", 4), ("last", 6)])
def test_first_and_last_token_of_left_padded_rows(model, pooling, position):
    encoder = Encoder(model.model, pooling=pooling, normalize=False)
    inputs = padded([5, 6, 7], 7, left=True)
    hidden = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(**inputs), hidden[:, position])


def test_mean_is_over_unmasked_tokens(model):
    encoder = Encoder(model.model, normalize=False)
    inputs = padded([5, 6, 7], 8)
    hidden = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(**inputs), hidden[:, :3].mean(dim=1))


def test_unit_vectors_and_no_mask(model):
    reps = model(torch.randint(5, 100, (3, 6)))
    torch.testing.assert_close(reps.norm(dim=1), torch.ones(3))


def test_a_row_of_padding_alone_is_no_nan(model):
    assert model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_an_unused_pooler_is_dropped():
    encoder = Encoder(BertModel(bert_config("tiny", vocab_size=50)))
    assert not any("pooler" in name for name, _ in encoder.named_parameters())
    encoder(torch.tensor([[1, 2]])).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_every_size_is_what_its_name_says():
    assert set(SIZES) == {"tiny", "mini", "small", "medium", "bert-base"}
    with torch.device("meta"):
        bert = Encoder.from_config("bert-base", vocab_size=30_522)
    without_pooler = 109_482_240 - 590_592  # BERT-base's published parameters, less its pooler's 768 * 768 + 768
    assert sum(parameter.numel() for parameter in bert.parameters()) == without_pooler


def test_a_transformers_config_is_used_as_it_is():
    config = BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8)
    assert Encoder.from_config(config)(torch.tensor([[1, 2, 3]])).shape == (1, 24)


def test_from_pretrained_reads_a_local_folder(tmp_path, model):
    model.model.save_pretrained(tmp_path / "saved")
    loaded = Encoder.from_pretrained(tmp_path / "saved").eval()
    inputs = padded([5, 6, 7], 4)
    torch.testing.assert_close(loaded(**inputs), model(**inputs))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: Encoder.from_config("huge"), "size must be one of"),
        (lambda: Encoder.from_config("tiny", vocab_size=0), "vocab_size"),
        (lambda: Encoder.from_config("tiny", vocab_size=8.5), "vocab_size"),
        (lambda: Encoder.from_config("tiny", dropout=1.0), "dropout"),
        (lambda: Encoder.from_config("tiny", dropout=float("nan")), "dropout"),
        (lambda: Encoder.from_config("tiny", pooling="max"), "pooling"),
        (lambda: Encoder("a model"), "model"),
        (lambda: Encoder.from_pretrained("no/such/folder/anywhere"), "name_or_folder"),
    ],
)
def test_bad_input_is_refused_in_words(call, names, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=names):
        call()


def test_token_representations_are_not_pooled(model):
    encoder = Encoder(model.model, pooling="tokens")
    reps = encoder(**padded([5, 6, 7], 4))
    assert reps.shape == (1, 4, 32)
    torch.testing.assert_close(reps.norm(dim=2), torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    without_mask = encoder(padded([5, 6, 7], 4)["input_ids"])
    torch.testing.assert_close(without_mask.norm(dim=2), torch.ones(1, 4))


@pytest.mark.parametrize("head", [(), (Dense(32, 6, activation=torch.nn.Tanh()),)])
def test_token_representations_are_zero_at_padding_and_their_rows_are_trimmed(model, head):
    encoder = Encoder(model.model, pooling="tokens", head=head)
    batch = {name: torch.cat([padded([5, 6, 7], 8)[name], padded([9], 8)[name]]) for name in padded([5], 8)}
    reps = encoder(**batch)
    assert not reps[batch["attention_mask"] == 0].any() and reps[batch["attention_mask"] == 1].any(-1).all()
    widths = []
    handle = model.model.register_forward_hook(
        lambda module, args, kwargs, out: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            widths.clear()
            grad_cache_step([encoder] * 2, [batch] * 2, lambda q, p: (q * p.roll(1, 0)).sum(), chunk_size=1)
    handle.remove()
    assert sorted(set(widths)) == [1, 3]


def test_not_a_number_at_padding_stays_out_of_token_representations(model):
    encoder = Encoder(model.model, pooling="tokens")
    batch = padded([5, 6, 7], 5)

    def spoil(module, args, output):
        padding = batch["attention_mask"].unsqueeze(-1) == 0
        output.last_hidden_state = output.last_hidden_state.masked_fill(padding, torch.nan)
        return output

    handle = model.model.register_forward_hook(spoil)
    reps = encoder(**batch)
    handle.remove()
    reps.square().sum().backward()
    assert torch.isfinite(reps).all() and all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)


class Plain(torch.nn.Module):
    """A module that is not of transformers."""


@pytest.mark.parametrize(
    "model", [Plain(), FunnelBaseModel(FunnelConfig(d_model=8, n_head=1, d_head=8, d_inner=8, vocab_size=9))]
)
def test_a_model_that_can_not_be_checkpointed_is_refused(model):
    with pytest.raises(ValueError, match=f"model must be one that transformers can checkpoint.*{type(model).__name__}"):
        Encoder(model).checkpoint_activations()


def test_a_models_own_representation_is_its_poolers_or_its_projection():
    bert = BertModel(bert_config("tiny", vocab_size=50)).eval()
    inputs = padded([5, 6, 7], 4)
    own = Encoder(bert, pooling="own", normalize=False)(**inputs)
    torch.testing.assert_close(own, bert(**inputs).pooler_output)
    with pytest.raises(ValueError, match="pooling may be 'own' only"):
        Encoder(DistilBertModel(DistilBertConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2)), pooling="own")(**inputs)


def test_pictures_are_encoded_without_tokens():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 8, "image_size": 16, "patch_size": 8}
    config = CLIPVisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    pictures = torch.rand(3, 3, 16, 16)
    assert Encoder.from_config(config, pooling="cls")(pixel_values=pictures).shape == (3, 16)
    config.architectures = ["CLIPVisionModelWithProjection"]
    encoder = Encoder.from_config(config, pooling="own")
    assert encoder.reads_pictures and encoder(pixel_values=pictures).shape == (3, 8)
