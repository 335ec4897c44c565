"""`python -m gclib train --lora-rank`: pairs are trained, checkpointed and kept; the base stays as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gclib import Encoder
from gclib import __main__ as commands
from gclib.models.adapters import is_adapted, numbers_trained
from gclib.models.pretrained import load_tokenizer
from gclib.training.checkpoints import list_checkpoints, read_checkpoint
from tests.training.test_command import arguments_of, records, write_data

pytest.importorskip("peft")
pytestmark = pytest.mark.slow
FROM_A_FOLDER = "--batch-size 8 --chunk-size 3 --query-length 16 --passage-length 24 --schedule constant"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of data, a base, and a run that trained pairs beside it."""
    folder = tmp_path_factory.mktemp("lora")
    assert commands.main(arguments_of(folder / "first", write_data(folder / "data"))) == 0
    assert commands.main(run_in(folder, "whole", "--steps 6")) == 0
    return folder


def run_in(folder, name, more):
    small = f"{FROM_A_FOLDER} --model {folder / 'first' / 'model'} --lora-rank 4 --warmup-steps 0"
    return arguments_of(folder / name, folder / "data", more, small)


def test_the_adapter_and_the_merged_model_give_the_same_vectors(place):
    library = pytest.importorskip("sentence_transformers")
    texts = ["How to sort the figs.", "def count_pears(): return count(pears)"]
    inputs = load_tokenizer(place / "whole" / "adapter")(texts, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        encoders = {n: Encoder.from_pretrained(place / "whole" / n).eval() for n in ("adapter", "model")}
        base = Encoder.from_pretrained(place / "first" / "model").eval()(**inputs)
        vectors = {name: encoder(**inputs) for name, encoder in encoders.items()}
    assert is_adapted(encoders["adapter"]) and not is_adapted(encoders["model"])
    torch.testing.assert_close(vectors["adapter"], vectors["model"], rtol=0, atol=1e-6)
    assert (vectors["model"] - base).abs().max() > 1e-4
    for name in ("adapter", "model"):
        other = library.SentenceTransformer(str(place / "whole" / name), device="cpu")
        torch.testing.assert_close(other.encode(texts, convert_to_tensor=True), vectors[name], rtol=0, atol=1e-6)


def test_only_pairs_change_and_only_they_are_in_checkpoints(place):
    base, after = (load_file(place / run / "model" / "model.safetensors") for run in ("first", "whole"))
    changed = {name for name in base if not torch.equal(base[name], after[name])}
    assert changed and all(name.endswith(("query.weight", "value.weight")) for name in changed)
    checkpoint = read_checkpoint(list_checkpoints(place / "whole")[-1])
    assert checkpoint.model and all("lora_" in name for name in checkpoint.model)
    adapter = Encoder.from_pretrained(place / "whole" / "adapter")
    assert sum(tensor.numel() for tensor in checkpoint.model.values()) == numbers_trained(adapter) == 2 * 2 * 2 * 4 * 32
    assert records(place / "whole")[0]["learning_rate"] == 2e-4


def test_a_run_that_is_resumed_goes_on_to_the_same_losses_and_weights(place):
    assert commands.main(run_in(place, "half", "--steps 3")) == 0
    resumed = [word for word in run_in(place, "half", "--steps 6") if word != "--quiet"]
    assert commands.main([*resumed, "--resume"]) == 0
    assert records(place / "whole") == records(place / "half")
    lines = (place / "half" / "evaluations.jsonl").read_text().splitlines()
    assert lines[-1] == (place / "whole" / "evaluations.jsonl").read_text().splitlines()[-1]
    first, second = (load_file(place / run / "model" / "model.safetensors") for run in ("whole", "half"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_run_and_adapter_are_evaluated(place, capsys):
    last = json.loads((place / "whole" / "evaluations.jsonl").read_text().splitlines()[-1])
    lengths = ["--query-length", "16", "--passage-length", "24", "--data", str(place / "data")]
    for words in ([str(place / "whole")], [str(place / "whole" / "adapter"), *lengths]):
        capsys.readouterr()
        assert commands.main(["evaluate", *words]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
        told = {line[0]: line[1] for line in lines}
        assert told["mrr"] == f"{last['mrr']:.3f}" and told["top-1"] == f"{last['top-1']:.3f}"


def test_an_adapter_is_trained_on_and_not_adapted_twice(place, capsys):
    more = f"{FROM_A_FOLDER} --model {place / 'whole' / 'adapter'} --steps 1"
    assert commands.main(arguments_of(place / "on", place / "data", "", more)) == 0
    assert is_adapted(Encoder.from_pretrained(place / "on" / "adapter"))
    assert commands.main(arguments_of(place / "twice", place / "data", "--lora-rank 4", more)) == 2
    assert "--lora-rank: encoder must have no adapters yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--model tiny --lora-rank 4", "--lora-rank must be given with trained weights"),
        ("--lora-rank 0", "--lora-rank must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(more, words, tmp_path, capsys):
    assert commands.main(["train", "--output", str(tmp_path / "run"), *more.split()]) == 2
    assert words in capsys.readouterr().err


def test_a_resumed_run_refuses_another_base(place, capsys):
    copy, base = place / "base", place / "first" / "model"
    shutil.copytree(base, copy)
    small = f"{FROM_A_FOLDER} --model {copy} --lora-rank 4 --warmup-steps 0"
    assert commands.main(arguments_of(place / "moved", place / "data", "--steps 4 --checkpoint-every 2", small)) == 0
    resume = ["train", "--output", str(place / "moved"), "--resume", "--steps", "6"]
    assert commands.main(resume) == 0
    tensors = load_file(copy / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    assert commands.main([*resume[:-1], "8"]) == 2
    assert "--resume must find the frozen weights that the run began with" in capsys.readouterr().err
