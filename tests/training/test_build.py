"""A run that starts from a folder keeps what the folder says, or ends in one line before anything is written."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from gclib import Encoder
from gclib import __main__ as commands
from gclib.data.pairs import TextPair
from gclib.data.tokens import train_tokenizer

PAIRS = [TextPair(f"how to add {n}", f"sum number {n} of <code> things " + "word " * (n % 9)) for n in range(20)]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PAIRS, vocab_size=100)


@pytest.fixture
def train(tmp_path, capsys):
    """Runs the command from a model in `tmp_path`; gives the exit status, the run's folder and what was printed."""
    lines = [json.dumps({"query": pair.query, "passage": pair.passage}) for pair in PAIRS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")

    def run(model, output="run", more=""):
        typed = ["--output", str(tmp_path / output), "--data", str(tmp_path), "--model", str(model)]
        options = "--test-pairs 0 --batch-size 8 --chunk-size 4 --steps 2"
        status = commands.main(["train", *typed, *options.split(), *more.split()])
        printed = capsys.readouterr()
        return status, tmp_path / output, printed.out + printed.err

    return run


def assert_refused(result, words):
    """In one line, and the output folder can be used by a better command."""
    status, output, told = result
    last = told.strip().splitlines()[-1]
    assert status == 2 and last.startswith("python -m gclib train: error: ") and words in last
    assert "Traceback" not in told and not output.exists()


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(path):
    return json.loads(path.read_text())


@pytest.mark.slow
def test_pooling_and_length_of_our_own_folder_are_kept_on_a_second_run(train):
    first = "--vocab-size 100 --pooling cls --query-length 6 --passage-length 9"
    status, output, _ = train("tiny", "first", first)
    assert status == 0
    status, second, told = train(output / "model", "second")  # by default lengths, 64 and 256
    assert status == 0 and "pooling cls" in told and "queries of 9, passages of 9 tokens at most" in told
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert read(second / "model" / name) == read(output / "model" / name)
    assert_refused(train(output / "model", "third", "--passage-length 10"), "at most the model's 9 tokens, got 10")


@pytest.mark.slow
def test_layers_and_prompts_of_sentence_transformers_are_trained_and_kept(train, tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    base = pytest.importorskip("sentence_transformers.base.modules")
    config = transformers.BertConfig(vocab_size=128, **SMALL)
    bert = save(transformers.BertModel(config), tokenizer, tmp_path / "bert")
    parts = [base.Transformer(str(bert), max_seq_length=20), modules.Pooling(16, "cls"), base.Dense(16, 8)]
    prompts = {"query": "query: ", "document": "passage: "}
    library.SentenceTransformer(modules=parts, prompts=prompts, device="cpu").save(str(tmp_path / "st"))
    status, output, told = train(tmp_path / "st", more="--query-length 10 --passage-length 12")
    assert status == 0 and "pooling cls, Dense 16 -> 8, normalized, at most 20 tokens, prompt" in told
    assert "prompt query 'query: '" in told and "prompt document 'passage: '" in told
    trained = library.SentenceTransformer(str(output / "model"), device="cpu")
    assert trained.encode("how to add 3").shape == (8,)
    assert (trained.prompts, trained.max_seq_length) == (prompts, 20)
    name = "linear.weight"
    before, after = (load_file(f / "2_Dense" / "model.safetensors")[name] for f in (tmp_path / "st", output / "model"))
    assert not torch.equal(before, after)


def test_a_model_that_is_compared_otherwise_than_by_cosine_or_dot_is_refused(train, tokenizer, tmp_path):
    assert train("tiny", "first", "--vocab-size 100")[0] == 0
    about = tmp_path / "first" / "model" / "config_sentence_transformers.json"
    about.write_text(json.dumps({"similarity_fn_name": "euclidean"}))
    assert_refused(train(tmp_path / "first" / "model"), "similarity_fn_name must be one of 'cosine', 'dot'")


def test_bfloat16_weights_are_trained_in_float32(train, tokenizer, tmp_path):
    encoder, shares = Encoder.from_config("tiny", vocab_size=len(tokenizer), dropout=0.0), []
    for dtype in (torch.float32, torch.bfloat16):
        folder = save(encoder.model.to(dtype), tokenizer, tmp_path / str(dtype))
        more = "--learning-rate 2e-5 --weight-decay 0 --schedule constant"
        status, output, told = train(folder, f"run {dtype}", more)
        assert status == 0 and "weights in float32" in told
        before, after = load_file(folder / "model.safetensors"), load_file(output / "model" / "model.safetensors")
        names = [name for name in after if "layer" in name and name.endswith("dense.weight")]
        moved = torch.cat([(before[name].float() != after[name]).flatten() for name in names])
        shares.append(float(moved.float().mean()))
    assert shares[1] > 0.9 * shares[0] > 0.5


def test_lengths_beyond_robertas_positions_are_refused(train, tokenizer, tmp_path):
    config = transformers.RobertaConfig(max_position_embeddings=34, pad_token_id=1, vocab_size=128, **SMALL)
    folder = save(transformers.RobertaModel(config), tokenizer, tmp_path / "roberta")
    assert_refused(train(folder, more="--passage-length 33"), "must be at most the model's 32 tokens, got 33")
    assert train(folder, more="--passage-length 32 --query-length 32")[0] == 0


def test_a_tokenizer_written_in_python_trains_and_is_resumed(train, tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=384, **SMALL))
    folder = save(bert, transformers.ByT5Tokenizer(), tmp_path / "bytes")
    status, output, _ = train(folder, more="--query-length 20 --passage-length 40")
    assert status == 0
    assert commands.main(["train", "--output", str(output), "--resume", "--quiet"]) == 0


def test_of_t5_the_encoder_is_trained(train, tokenizer, tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 128}
    folder = save(transformers.T5Model(transformers.T5Config(**sizes)), tokenizer, tmp_path / "t5")
    status, output, _ = train(folder)
    assert status == 0 and read(output / "model" / "config.json")["architectures"] == ["T5EncoderModel"]


def test_what_can_not_be_trained_is_refused_before_anything_is_written(train, tokenizer, tmp_path):
    bart = transformers.BartConfig(vocab_size=128, d_model=16, encoder_layers=1, decoder_layers=1)
    folder = save(transformers.BartModel(bart), tokenizer, tmp_path / "bart")
    assert_refused(train(folder), "must be of an encoder")
    sizes = {"image_size": 8, "patch_size": 4, **SMALL}
    folder = save(transformers.ViTModel(transformers.ViTConfig(**sizes)), tokenizer, tmp_path / "vit")
    assert_refused(train(folder), "--model must encode texts")
    encoder = Encoder.from_config("tiny", vocab_size=len(tokenizer))
    encoder.model.save_pretrained(tmp_path / "bare")
    assert_refused(train(tmp_path / "bare"), "--model must hold a tokenizer beside the model")
    tokenizer.save_pretrained(tmp_path / "bare")
    more = transformers.AutoTokenizer.from_pretrained(tmp_path / "bare")
    more.add_tokens(["<code>"])
    more.save_pretrained(tmp_path / "bare")
    assert_refused(train(tmp_path / "bare"), "--model must have a row for each token")
