"""A folder of sentence-transformers gives here the vectors that it gives there, and again once we have saved it."""

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from gclib import Encoder
from gclib.data.pairs import TextPair
from gclib.data.tokens import tokenize_texts, train_tokenizer
from gclib.models.folder import save_model_folder
from gclib.models.pretrained import load_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers")
kinds = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
base = pytest.importorskip("sentence_transformers.base.modules")

TEXTS = ["Count the Apples", "sort", "weigh the figs and the dates and the plums and the melons"]
MODES = ["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder that transformers wrote."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer([TextPair(text, text[::-1]) for text in TEXTS], vocab_size=100)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=100, initializer_range=0.5, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved(bert, folder, pooling="mean", layers=(), **options):
    """A folder that sentence-transformers wrote: its model, and the vectors of `TEXTS`."""
    transformer = base.Transformer(str(bert), max_seq_length=options.pop("max_seq_length", 12))
    pooled = kinds.Pooling(16, pooling)
    modules = [transformer, pooled, *layers]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(folder))
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def vectors(folder, texts=TEXTS):
    """What we make of the folder."""
    encoder, tokenizer = Encoder.from_pretrained(folder).eval(), load_tokenizer(folder)
    with torch.no_grad():
        return encoder(**tokenize_texts(texts, tokenizer, tokenizer.model_max_length))


def assert_the_same_here_there_and_saved_again(model, folder, tmp_path):
    theirs = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(vectors(folder), theirs, rtol=0, atol=1e-6)
    encoder, tokenizer = Encoder.from_pretrained(folder), load_tokenizer(folder)
    save_model_folder(encoder, tokenizer, tmp_path / "again", max_length=encoder.rules.max_length)
    torch.testing.assert_close(vectors(tmp_path / "again"), theirs, rtol=0, atol=1e-6)
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), theirs, rtol=0, atol=1e-6)
    assert again.max_seq_length == model.max_seq_length
    assert {k: v for k, v in again.prompts.items() if v} == {k: v for k, v in model.prompts.items() if v}
    assert again.default_prompt_name == model.default_prompt_name
    assert again.similarity_fn_name == model.similarity_fn_name


@pytest.mark.slow
@pytest.mark.parametrize("pooling", [*MODES, ("cls", "mean"), ("lasttoken", "cls")])
def test_every_pooling(pooling, bert, tmp_path):
    model = saved(bert, tmp_path / "st", pooling)
    assert_the_same_here_there_and_saved_again(model, tmp_path / "st", tmp_path)


HEADS = {
    "normalize": lambda: [base.Normalize()],
    "dense": lambda: [base.Dense(16, 8)],
    "dense without bias, with ReLU, normalized": lambda: [
        base.Dense(16, 8, bias=False, activation_function=nn.ReLU()),
        base.Normalize(),
    ],
    "two dense layers": lambda: [
        base.Dense(16, 40, activation_function=None),
        base.Dense(40, 16, activation_function=None),
        base.Normalize(),
    ],
    "residual": lambda: [base.Dense(16, 16, use_residual=True)],
    "residual to another width": lambda: [base.Dense(16, 6, activation_function=nn.PReLU(), use_residual=True)],
    "layer norm and dropout": lambda: [kinds.LayerNorm(16), kinds.Dropout(0.3)],
    "normalized and then dense": lambda: [base.Normalize(), base.Dense(16, 8)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_every_layer_behind_the_pooling(name, bert, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = saved(bert, tmp_path / "st", layers=HEADS[name]())
    assert_the_same_here_there_and_saved_again(model, tmp_path / "st", tmp_path)


def test_prompts_length_and_similarity(bert, tmp_path):
    prompts = {"query": "count: ", "document": "sort: "}
    options = {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "dot", "max_seq_length": 7}
    model = saved(bert, tmp_path / "st", **options)
    encoder = Encoder.from_pretrained(tmp_path / "st")
    assert (encoder.rules.prompts, encoder.rules.default_prompt, encoder.rules.similarity) == (prompts, "query", "dot")
    assert encoder.rules.max_length == load_tokenizer(tmp_path / "st").model_max_length == 7
    assert "prompt query 'count: '" in encoder.in_words() and "at most 7 tokens" in encoder.in_words()
    prompted = vectors(tmp_path / "st", ["count: " + text for text in TEXTS])
    torch.testing.assert_close(prompted, model.encode(TEXTS, convert_to_tensor=True), rtol=0, atol=1e-6)


def test_words_before_version_6_are_read(bert, tmp_path):
    """Flags for poolings, another name of the length's file, modules in a folder of their own, lower case."""
    folder = tmp_path / "old"
    shutil.copytree(bert, folder / "0_Transformer")
    (folder / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, **flags})
    write(folder / "0_Transformer" / "sentence_roberta_config.json", {"max_seq_length": 9, "do_lower_case": True})
    paths = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling")]
    listed = [
        {"idx": n, "name": str(n), "path": p, "type": f"sentence_transformers.models.{k}"}
        for n, (p, k) in enumerate(paths)
    ]
    write(folder / "modules.json", listed)
    backend = folder / "0_Transformer" / "tokenizer.json"
    content = json.loads(backend.read_text())
    content["normalizer"] = None  # so that the case matters
    write(backend, content)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert_the_same_here_there_and_saved_again(model, folder, tmp_path)
    assert torch.equal(vectors(folder, ["SORT"]), vectors(folder, ["sort"]))


def test_the_folder_alone_decides_unless_it_is_told_otherwise(bert, tmp_path):
    saved(bert, tmp_path / "st", "cls", [base.Dense(16, 8), base.Normalize()])
    encoder = Encoder.from_pretrained(tmp_path / "st", normalize=False)
    assert (encoder.pooling, encoder.normalize, len(encoder.head)) == ("cls", False, 1)
    with pytest.raises(ValueError, match="pooling must be 'cls', as layers of the folder stand behind it"):
        Encoder.from_pretrained(tmp_path / "st", pooling="mean")
    saved(bert, tmp_path / "plain", "cls")
    assert Encoder.from_pretrained(tmp_path / "plain", pooling="mean").pooling == "mean"


def write(path, content):
    path.write_text(json.dumps(content))


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def retyped(name):
    return "modules.json", lambda modules: modules[2].update(type=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (*retyped("sentence_transformers.models.LSTM"), "modules.json must list modules of Transformer, .*LSTM"),
        (*retyped("custom_code.Dense"), "modules.json must list modules of Transformer"),
        ("modules.json", lambda modules: modules.pop(1), "must list a Transformer, a Pooling"),
        ("modules.json", lambda modules: modules[2].update(path="../elsewhere"), "inside the folder"),
        ("modules.json", lambda modules: modules[2].pop("path"), "modules with type and path"),
        ("1_Pooling/config.json", lambda said: said.update(pooling_mode="median"), "must pool by some of cls, max"),
        ("1_Pooling/config.json", lambda said: said.update(include_prompt=False), "include_prompt must be true"),
        ("2_Dense/config.json", lambda said: said.update(activation_function="my.Act"), "must be one of torch.nn"),
        ("2_Dense/config.json", lambda said: said.update(module_input_name="token_embeddings"), "module_input_name"),
        ("2_Dense/config.json", lambda said: said.update(scale=2), "must not say more than we can follow, got 'scale'"),
        ("2_Dense/config.json", lambda said: said.pop("in_features"), "must describe a Dense"),
        ("2_Dense/config.json", lambda said: said.update(out_features=9), "must hold the weights of its Dense"),
        ("sentence_bert_config.json", lambda said: said.update(query_expansion={"length": 3}), "query_expansion"),
        ("sentence_bert_config.json", lambda said: said.update(tokenizer_args={"a": 1}), "tokenizer_args"),
        ("sentence_bert_config.json", lambda said: said.update(max_seq_length=0), "max_seq_length must be an int"),
        ("config_sentence_transformers.json", lambda said: said.update(model_type="SparseEncoder"), "model_type"),
    ],
)
def test_what_we_can_not_follow_is_refused_by_its_name(file, change, words, bert, tmp_path):
    saved(bert, tmp_path / "st", layers=[base.Dense(16, 8)], prompts={"query": "q: "})
    changed(tmp_path / "st" / file, change)
    with pytest.raises(ValueError, match=words):
        Encoder.from_pretrained(tmp_path / "st")


def test_files_that_can_not_be_read_are_refused(bert, tmp_path):
    saved(bert, tmp_path / "st", layers=[base.Dense(16, 8)])
    (tmp_path / "st" / "2_Dense" / "model.safetensors").rename(tmp_path / "st" / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="2_Dense must hold its weights as model.safetensors"):
        Encoder.from_pretrained(tmp_path / "st")
    (tmp_path / "st" / "modules.json").write_text("[")
    with pytest.raises(ValueError, match="modules.json must be a JSON file in UTF-8"):
        Encoder.from_pretrained(tmp_path / "st")


@pytest.mark.parametrize("pooling", ["own", "tokens"])
def test_layers_behind_a_pooling_without_a_name_are_not_lost(pooling, bert, tmp_path):
    from gclib.models.layers import UnitLength

    encoder = Encoder(BertModel.from_pretrained(bert), pooling=pooling, head=[UnitLength()])
    with pytest.raises(ValueError, match="must not have layers behind pooling"):
        save_model_folder(encoder, load_tokenizer(bert), tmp_path / "model", max_length=8)
    assert not (tmp_path / "model").exists()


def test_without_a_dtype_the_layers_behind_the_pooling_follow_the_model(bert, tmp_path):
    saved(bert, tmp_path / "st", layers=HEADS["dense"]())
    encoder = Encoder.from_pretrained(tmp_path / "st", dtype=torch.bfloat16)
    save_model_folder(encoder, load_tokenizer(tmp_path / "st"), tmp_path / "half", max_length=16)
    again = Encoder.from_pretrained(tmp_path / "half", dtype=None)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    tokens = torch.ones(2, 3, dtype=torch.long)
    assert again(input_ids=tokens, attention_mask=tokens).shape == (2, 8)
