"""Models from the field: loaded whole and in the dtype asked for, or refused in words: `gclib.models.pretrained`."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPTextConfig, RobertaConfig, T5Config, T5Model

from gclib import ContrastiveLoss, Encoder, forecast_step, naive_step
from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer
from gclib.models.folder import save_model_folder
from gclib.models.presets import positions_of
from gclib.models.pretrained import check_reads_text, load_tokenizer, tokenizer_text

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 100,
}
T5 = {"vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


@pytest.fixture(scope="module")
def tokenizer():
    pairs = [TextPair(f"how to add {n}", f"sum number {n} of <code> things") for n in range(20)]
    return train_tokenizer(pairs, vocab_size=100)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A BERT that transformers wrote, and its tokenizer."""
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_become_float32_unless_another_dtype_is_asked_for(kept, tmp_path):
    BertModel(BertConfig(**SIZES)).to(kept).save_pretrained(tmp_path)
    for asked, given in ((torch.float64, torch.float64), (None, kept)):
        assert {p.dtype for p in Encoder.from_pretrained(tmp_path, dtype=asked).parameters()} == {given}
    encoder = Encoder.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert encoder.in_words().endswith("weights in float32")


def test_missing_weights_are_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    for gone in ("encoder.layer.0.output.dense.weight", "embeddings.LayerNorm.bias"):
        save_file({name: w for name, w in weights.items() if name != gone}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"all weights of its BertModel: 1 are missing, such as {gone}"):
            Encoder.from_pretrained(folder)


def test_a_pooler_may_be_missing_unless_it_pools(folder):
    assert Encoder.from_pretrained(folder, pooling="own").pooling == "own"
    weights = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in weights.items() if not n.startswith("pooler")}, folder / "model.safetensors")
    Encoder.from_pretrained(folder)
    with pytest.raises(ValueError, match="pooling may be 'own' only where the pooler's weights are kept"):
        Encoder.from_pretrained(folder, pooling="own")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "not quantized ones"),
        ({"hidden_size": 18}, "name_or_folder must hold a model that can be loaded"),
        ({"model_type": "never-heard-of"}, "name_or_folder must be a folder that save_pretrained wrote"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "must be of an encoder"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "custom"}, "name_or_folder must be a folder"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(said, words, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(ValueError, match=words):
        Encoder.from_pretrained(folder)


def test_an_adapter_and_a_damaged_file_are_refused(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="name_or_folder must hold a model that can be loaded"):
        Encoder.from_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold an adapter_config.json that PEFT wrote"):
        Encoder.from_pretrained(folder)


# --- other kinds of models --------------------------------------------------------------------------------------


def test_of_t5_the_encoder_is_taken_and_kept(tmp_path, tokenizer):
    model = T5Model(T5Config(**T5)).eval()
    model.save_pretrained(tmp_path / "t5")
    expected = model.encoder(**INPUTS).last_hidden_state[:, 0]
    encoder = Encoder.from_pretrained(tmp_path / "t5", pooling="cls", normalize=False).eval()
    torch.testing.assert_close(encoder(**INPUTS), expected)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    save_model_folder(encoder, tokenizer, tmp_path / "again", max_length=8)
    torch.testing.assert_close(Encoder.from_pretrained(tmp_path / "again").eval()(**INPUTS), expected)
    assert type(Encoder.from_config(T5Config(**T5)).model).__name__ == "T5EncoderModel"


def test_a_decoder_behind_an_encoder_is_refused():
    with pytest.raises(ValueError, match="model must be an encoder without a decoder"):
        Encoder(T5Model(T5Config(**T5)))
    with pytest.raises(ValueError, match="config must be of an encoder"):
        Encoder.from_config(transformers.BartConfig(vocab_size=100, d_model=16))


def test_a_projection_is_read_with_the_model(tmp_path):
    config = CLIPTextConfig(**SIZES, projection_dim=6, max_position_embeddings=12, eos_token_id=2)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    model.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, normalize=False)
    assert encoder.pooling == "own"
    torch.testing.assert_close(encoder(**INPUTS), model(**INPUTS).text_embeds)


def test_a_sentence_transformer_is_no_model_to_be_wrapped_and_a_step_says_how_it_is_called(folder):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    transformer = pytest.importorskip("sentence_transformers.base.modules").Transformer(str(folder))
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu").eval()
    with pytest.raises(ValueError, match="of a SentenceTransformer: from_pretrained"):
        Encoder(model)
    with pytest.raises(ValueError, match="must take the inputs' names as keywords .*sentence_embedding"):
        naive_step([model, model], [INPUTS, INPUTS], ContrastiveLoss())
    with pytest.raises(ValueError, match="must take the inputs' tensors one by one"):
        naive_step([torch.nn.Linear(4, 4)] * 2, [(torch.ones(2, 4), torch.ones(2, 4))] * 2, ContrastiveLoss())
    naive_step([lambda **f: model(f)["sentence_embedding"]] * 2, [dict(INPUTS), dict(INPUTS)], ContrastiveLoss())


def test_an_error_inside_an_encoder_stays_what_it_is():
    def encoder(input_ids, attention_mask):
        return input_ids + None

    with pytest.raises(TypeError, match="unsupported operand"):
        naive_step([encoder, encoder], [INPUTS, INPUTS], ContrastiveLoss())


# --- positions, tokenizers and one small forward ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "room"),
    [
        ("Bert", 20),
        ("Roberta", 18),
        ("XLMRoberta", 18),
        ("Camembert", 18),
        ("MPNet", 18),
        ("Nystromformer", 20),
        ("GPT2", 20),
    ],
)
def test_the_longest_row_is_the_one_that_runs(kind, room):
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=20, **SIZES)
    model = transformers.AutoModel.from_config(config).eval()
    assert positions_of(config) == room
    model(torch.full((1, room), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, room + 1), 5))


@pytest.mark.slow
def test_forecasts_refuse_what_does_not_run():
    config = RobertaConfig(max_position_embeddings=34, pad_token_id=1, **SIZES)
    options = {"config": config, "batch_size": 2}
    assert forecast_step("naive", query_length=32, passage_length=32, **options).peak_bytes > 0
    for lengths in ({"query_length": 33, "passage_length": 8}, {"query_length": 8, "passage_length": [8, 33]}):
        with pytest.raises(ValueError, match="_length must be at most the model's 32 tokens, got 33"):
            forecast_step("naive", **lengths, **options)


def test_an_encoder_that_fits_its_tokenizer_passes_and_stays_as_it_was(folder):
    encoder, tokenizer = Encoder.from_pretrained(folder).train(), load_tokenizer(folder)
    state, before = torch.get_rng_state(), tokenizer_text(tokenizer)
    check_reads_text(encoder, tokenizer, 512)
    assert encoder.training and torch.equal(torch.get_rng_state(), state) and tokenizer_text(tokenizer) == before
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("pooling", ["cls", "tokens"])
def test_what_does_not_fit_is_refused(pooling, folder, tokenizer):
    encoder, more = Encoder.from_pretrained(folder, pooling=pooling), load_tokenizer(folder)
    with pytest.raises(ValueError, match="encoder must encode texts, from token ids and an attention mask alone"):
        check_reads_text(encoder, more, 513)
    more.add_tokens([f"<{n}>" for n in range(101 - len(more))])
    rule = "--model must have a row for each token: its tokenizer's go to number 100, its table has 100 rows"
    with pytest.raises(ValueError, match=rule):
        check_reads_text(encoder, more, 8, "--model")
    with torch.no_grad():
        encoder.model.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="must give finite numbers"):
        check_reads_text(encoder, tokenizer, 8)


def test_models_of_something_else_than_text_are_refused(tokenizer):
    sizes = {"image_size": 8, "patch_size": 4, **{k: v for k, v in SIZES.items() if k != "vocab_size"}}
    with pytest.raises(ValueError, match="must encode texts, from token ids"):
        check_reads_text(Encoder.from_config(transformers.ViTConfig(**sizes)), tokenizer, 8)


def test_token_types_that_we_do_not_give_are_refused(folder, tokenizer):
    encoder, other = Encoder.from_pretrained(folder), load_tokenizer(folder)
    from tokenizers.processors import TemplateProcessing

    ends = [(token, other.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    other.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS]:2 $A [SEP]", special_tokens=ends)
    other.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    with pytest.raises(ValueError, match="token types of 0"):
        check_reads_text(encoder, other, 8)


def test_tokenizers_written_in_python_have_a_text_too(tmp_path):
    tokenizer = transformers.ByT5Tokenizer()
    assert tokenizer_text(tokenizer) == tokenizer_text(transformers.ByT5Tokenizer())
    assert tokenizer_text(tokenizer) != tokenizer_text(transformers.ByT5Tokenizer(extra_ids=3))


@pytest.mark.parametrize("config", [BertConfig(**SIZES), T5Config(**T5), RobertaConfig(**SIZES)])
def test_a_folder_without_a_tokenizer_is_refused(config, tmp_path):
    """For want of files, transformers makes up one of special tokens alone: every text is unknown to it."""
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="name_or_folder must hold a tokenizer beside the model"):
        load_tokenizer(tmp_path)
