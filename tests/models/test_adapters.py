"""LoRA: the cached gradient is the naive one's, and what is kept is loaded again to the same vectors."""

import copy
import json
from functools import cache, partial

import pytest
import torch
from helpers.oracles import InfoNCE, gradients, token_batch, worst_error
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from gclib import Encoder, grad_cache_loss, grad_cache_step, naive_step, plan_chunks
from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer
from gclib.models.adapters import ATTENTION, LoRA, add_lora, is_adapted, merged, targets_of
from gclib.models.folder import save_model_folder
from gclib.models.layers import Dense
from gclib.models.presets import PRESETS
from gclib.models.pretrained import load_tokenizer
from gclib.towers import row_lengths
from tests.test_steps import kept_graphs

peft = pytest.importorskip("peft")
few = settings(max_examples=max(5, settings.default.max_examples // 4))  # a case takes a fifth of a second
CHECKPOINTING = ("none", "not reentrant", "reentrant")
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60}


def shaken(encoder):
    """With second matrices that are no longer zero, so that the first ones get gradients too."""
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return encoder


def adapted(seed, lora, dropout=0.0, kind="bert"):
    import transformers

    torch.manual_seed(seed)
    size = "tiny" if kind == "bert" else transformers.Qwen3Config(**DECODER)
    options = {"vocab_size": 60, "dropout": dropout} if kind == "bert" else {"pooling": "last"}
    return shaken(add_lora(Encoder.from_config(size, **options).double(), lora))


@cache
def encoder_of(seed, kind, checkpointing, dropout):
    """An encoder with adapters, and the same without checkpointing."""
    targets = "all-linear" if seed else None
    encoder = adapted(seed, LoRA(3, dropout=dropout, targets=targets), kind=kind)
    plain = copy.deepcopy(encoder)
    if checkpointing != "none":
        encoder.checkpoint_activations(reentrant=checkpointing == "reentrant")
    return encoder, plain


def by_loss(encoders, inputs, loss, **options):
    value = grad_cache_loss(encoders, inputs, loss, **options)
    value.backward()
    return value


@st.composite
def cases(draw, dropout=0.0):
    rows = draw(st.integers(2, 9))
    kind, checkpointing = draw(st.sampled_from(("bert", "qwen3"))), draw(st.sampled_from(CHECKPOINTING))
    tied, negatives = draw(st.booleans()), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    inputs = [token_batch(count, 7, generator, vocabulary=60) for count in (rows, rows * (1 + negatives))]
    pairs = [encoder_of(0 if tied else tower, kind, checkpointing, dropout) for tower in (0, 1)]
    options = {"chunk_size": draw(st.integers(1, 5)), "retain_chunks": draw(st.integers(0, 3))}
    options["sort_by_length"] = draw(st.booleans())
    step = draw(st.sampled_from((grad_cache_step, by_loss)))
    return step, [one for one, _ in pairs], [plain for _, plain in pairs], inputs, InfoNCE().double(), options


@pytest.mark.slow
@few
@given(cases())
def test_the_cached_gradient_is_the_naive_one(case):
    step, encoders, plain, inputs, loss, options = case
    truth = gradients([*plain, loss], lambda: naive_step(plain, inputs, loss))
    found = gradients([*encoders, loss], lambda: step(encoders, inputs, loss, **options))
    assert worst_error(found[1], truth[1]) <= 1e-12
    trained = {name for name, p in encoders[0].named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.slow
@few
@given(cases(dropout=0.4))
def test_dropout_of_adapters_is_replayed(case):
    step, encoders, plain, inputs, loss, options = case
    size, sort = options["chunk_size"], options["sort_by_length"]
    plans = [plan_chunks(row_lengths(tower), chunk_size=size, sort=sort) for tower in inputs]
    options = {"plan": plans, "retain_chunks": options["retain_chunks"]}
    order = []

    def watch(phase, *, tower=None, chunk=None, **rest):
        if phase == "first_forward" and chunk is not None and (tower, chunk) not in order:
            order.append((tower, chunk))

    torch.manual_seed(7)
    found = gradients([*encoders, loss], partial(step, encoders, inputs, loss, on_phase=watch, **options))
    torch.manual_seed(7)
    truth = gradients([*plain, loss], lambda: kept_graphs(plain, inputs, loss, None, plans, order))
    assert worst_error(found[1], truth[1]) <= 1e-12


def test_a_model_that_peft_wrapped_itself_is_trained_and_merged_alike():
    base = Encoder.from_config("tiny", vocab_size=60, dropout=0.0).double()
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["LayerNorm"])
    encoder = shaken(Encoder(peft.get_peft_model(base.model, config)).double()).checkpoint_activations(reentrant=True)
    generator = torch.Generator().manual_seed(0)
    inputs, loss = [token_batch(5, 6, generator, vocabulary=60) for _ in range(2)], InfoNCE().double()
    truth = gradients([encoder, loss], lambda: naive_step([encoder] * 2, inputs, loss))
    found = gradients([encoder, loss], lambda: grad_cache_step([encoder] * 2, inputs, loss, chunk_size=2))
    assert worst_error(found[1], truth[1]) <= 1e-12
    plain = merged(encoder)
    torch.testing.assert_close(plain(**inputs[0]), encoder(**inputs[0]), rtol=0, atol=1e-12)
    assert type(plain.model).__name__ == "BertModel" and not is_adapted(plain)
    with pytest.raises(ValueError, match="must have no adapters yet: merge them first"):
        add_lora(encoder)


def test_tied_weights_are_tied_in_the_merged_model_too():
    encoder = Encoder.from_config("tiny", vocab_size=60)
    first, last = (encoder.model.encoder.layer[place].output.dense for place in (0, -1))
    last.weight = first.weight
    plain = merged(shaken(add_lora(encoder)))
    first, last = (plain.model.encoder.layer[place].output.dense for place in (0, -1))
    assert last is not first and last.weight is first.weight and first.weight.requires_grad


# --- what is trained --------------------------------------------------------------------------------------------


def test_only_the_pairs_are_trained_and_nothing_moves_before_the_first_step():
    torch.manual_seed(0)
    encoder = Encoder.from_config("tiny", vocab_size=60).eval()
    encoder.head = nn.ModuleList([Dense(32, 8, activation=nn.Tanh())])
    batch = token_batch(3, 5, torch.Generator().manual_seed(1), vocabulary=60)
    before = encoder(**batch)
    assert add_lora(encoder, LoRA(4, dropout=0.5)) is encoder
    assert torch.equal(encoder(**batch), before)  # in eval mode, as it was
    trained = {name: p.shape for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("query" in name or "value" in name for name in trained)
    assert set(trained.values()) == {(4, 32), (32, 4)}
    layer = encoder.model.encoder.layer[0].attention.self.query
    assert layer.scaling["default"] == 2.0  # alpha is twice the rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pairs_beside_half_precision_are_in_float32(dtype):
    encoder = add_lora(Encoder.from_config("tiny", vocab_size=60).to(dtype))
    halves = dtype in (torch.bfloat16, torch.float16)
    assert {p.dtype for p in encoder.parameters() if p.requires_grad} == {torch.float32 if halves else dtype}
    assert {p.dtype for p in encoder.parameters() if not p.requires_grad} == {dtype}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_layers_that_are_adapted_where_none_are_named(name):
    with torch.device("meta"):
        model = Encoder.from_config(name).model
    assert targets_of(model) in ATTENTION
    assert targets_of(model, "all-linear") == "all-linear"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank must be an int of at least 1"),
        ({"alpha": 0}, "alpha must be a finite number above 0"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ({"targets": ()}, "targets must be names of linear layers"),
        ({"targets": ["query", 3]}, "targets must be names of linear layers"),
        ({"targets": "keys"}, "targets must be some of this model's linear layers: dense, key, query, value"),
    ],
)
def test_bad_input_is_refused_in_words(options, words):
    encoder = Encoder.from_config("tiny", vocab_size=60)
    with pytest.raises(ValueError, match=words):
        add_lora(encoder, LoRA(**options))
    assert not is_adapted(encoder) and all(p.requires_grad for p in encoder.parameters())


def test_adapters_are_neither_put_in_twice_nor_taken_out_of_nothing():
    encoder = Encoder.from_config("tiny", vocab_size=60)
    with pytest.raises(ValueError, match="must have adapters, got one without"):
        merged(encoder)
    add_lora(encoder)
    with pytest.raises(ValueError, match="must have no adapters yet"):
        add_lora(encoder)
    with pytest.raises(ValueError, match="must hold a model of transformers"):
        add_lora(Encoder(nn.Embedding(3, 4)))


def test_without_peft_one_is_told_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("gclib.models.adapters.find_spec", lambda name: None)
    for call in (lambda: add_lora(Encoder.from_config("tiny")), lambda: Encoder.from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="pip install 'gclib\\[lora\\]'"):
            call()


# --- what is kept -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TextPair(f"how to add {n}", f"sum {n} of <code> things") for n in range(20)], vocab_size=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(3)
    save_model_folder(Encoder.from_config("tiny", vocab_size=64).double(), tokenizer, folder, max_length=32)
    return folder


TEXTS = ["how to add 7", "sum 3 of <code>", "things", "how how how to to to add things"]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kept", ["adapter", "merged"])
def test_a_folder_gives_the_same_vectors_again_here_and_in_sentence_transformers(
    kept, dtype, most, base, tokenizer, tmp_path
):
    library = pytest.importorskip("sentence_transformers")
    encoder = shaken(add_lora(Encoder.from_pretrained(base, dtype=dtype), LoRA(4, dropout=0.2))).eval()
    inputs = load_tokenizer(base)(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        vectors = encoder(**inputs)
        assert (vectors - Encoder.from_pretrained(base, dtype=dtype).eval()(**inputs)).norm() > 1e-2
        save_model_folder(merged(encoder) if kept == "merged" else encoder, tokenizer, tmp_path / kept, max_length=32)
        again = Encoder.from_pretrained(tmp_path / kept, dtype=dtype).eval()
        torch.testing.assert_close(again(**inputs), vectors, rtol=0, atol=most)
        assert torch.equal(encoder(**inputs), vectors)  # merging changed nothing
    assert (tmp_path / kept / "config.json").exists() == (kept == "merged")
    assert all(p.requires_grad == (kept == "merged" or "lora_" in name) for name, p in again.named_parameters())
    other = library.SentenceTransformer(str(tmp_path / kept), device="cpu", model_kwargs={"dtype": dtype})
    torch.testing.assert_close(other.encode(TEXTS, convert_to_tensor=True), vectors, rtol=0, atol=most)


def test_an_adapter_beside_bfloat16_is_kept_in_float32(base, tokenizer, tmp_path):
    encoder = shaken(add_lora(Encoder.from_pretrained(base, dtype=torch.bfloat16)))
    save_model_folder(encoder, tokenizer, tmp_path / "model", max_length=32)
    again = dict(Encoder.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).named_parameters())
    assert all(torch.equal(again[name], p) and again[name].dtype == p.dtype for name, p in encoder.named_parameters())


def test_peft_loads_what_we_keep(base, tokenizer, tmp_path):
    encoder = shaken(add_lora(Encoder.from_pretrained(base))).eval()
    save_model_folder(encoder, tokenizer, tmp_path / "model", max_length=32)
    model = peft.PeftModel.from_pretrained(Encoder.from_pretrained(base).model, str(tmp_path / "model")).eval()
    batch = token_batch(3, 5, torch.Generator().manual_seed(1), vocabulary=60)
    torch.testing.assert_close(Encoder(model).eval()(**batch), encoder(**batch), rtol=0, atol=1e-6)


def test_what_can_not_be_loaded_again_is_refused_in_words(base, tokenizer, tmp_path):
    fresh = add_lora(Encoder.from_config("tiny", vocab_size=60))
    with pytest.raises(ValueError, match="must have a base that is kept somewhere"):
        save_model_folder(fresh, tokenizer, tmp_path / "fresh", max_length=32)
    folder = tmp_path / "model"
    save_model_folder(add_lora(Encoder.from_pretrained(base)), tokenizer, folder, max_length=32)
    weights, about = load_file(folder / "adapter_model.safetensors"), (folder / "adapter_config.json").read_text()
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="all weights of its adapter: 1 are missing, such as"):
        Encoder.from_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"its adapter as adapter_model.safetensors \(others may be pickled\)"):
        Encoder.from_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors")
    for change, words in (
        ({"base_model_name_or_path": None}, "names its base model"),
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "must be a folder that save_pretrained wrote"),
        ({"target_modules": ["magic"]}, "must hold an adapter that can be loaded"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(json.loads(about) | change))
        with pytest.raises(ValueError, match=words):
            Encoder.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("no json")
    with pytest.raises(ValueError, match="adapter_config.json that PEFT wrote"):
        Encoder.from_pretrained(folder)
    (folder / "adapter_config.json").write_text(about)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="a model or an adapter, and not both"):
        Encoder.from_pretrained(folder)
