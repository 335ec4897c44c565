"""`python -m gclib evaluate`: the metrics of a saved or a pretrained folder."""

import json
import shutil

import pytest
import transformers

from gclib import __main__ as commands
from gclib.data.pairs import TextPair
from gclib.models.encoder import Encoder
from gclib.training import build, evaluation
from gclib.training.retrieval import retrieval_metrics

ROWS = [
    {"query": f"How to {deed} the {thing}.", "passage": f"def {deed}_{thing}(): return {deed}({thing})"}
    for thing in ("apples", "pears", "plums", "figs")
    for deed in ("count", "sort", "weigh")
]
SMALL = "--model tiny --vocab-size 200 --batch-size 4 --chunk-size 3 --steps 2 --query-length 16 --passage-length 24"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", ROWS), ("test", ROWS[:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    prefixes = ["--query-prefix", "ask: ", "--passage-prefix", "tell: "]
    arguments = ["train", "--output", str(folder), "--data", str(data), "--quiet", *SMALL.split(), *prefixes]
    assert commands.main(arguments) == 0
    return folder


def printed(capsys):
    """The table as {metric: value}."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1] for line in lines[2:]}


def metrics_of(folder, query="", passage="", rows=ROWS[:9]):
    """What the folder's model finds, computed here."""
    encoder = Encoder.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = [TextPair(query + row["query"], passage + row["passage"]) for row in rows]
    found = retrieval_metrics((encoder, encoder), pairs, tokenizer, query_length=16, passage_length=24)
    return {name: f"{value:.3f}" for name, value in found.items()}


def test_a_run_is_evaluated_as_it_was_at_its_end(run, capsys):
    assert commands.main(["evaluate", str(run)]) == 0
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert printed(capsys) == {name: f"{last[name]:.3f}" for name in last if name not in ("step", "pairs")}


@pytest.mark.parametrize(
    ("more", "prefixes"),
    [
        ([], ("ask: ", "tell: ")),
        (["--query-prefix", ""], ("", "tell: ")),
        (["--query-prefix", "q: ", "--passage-prefix", "p: "], ("q: ", "p: ")),
    ],
)
def test_a_folder_is_evaluated_with_its_prompts_or_those_that_are_typed(more, prefixes, run, data, capsys):
    lengths = ["--query-length", "16", "--passage-length", "24"]
    assert commands.main(["evaluate", str(run / "model"), "--data", str(data), *lengths, *more]) == 0
    assert printed(capsys) == metrics_of(run / "model", *prefixes)


def test_the_train_split_and_the_first_so_many(run, data, capsys):
    arguments = ["--split", "train", "--test-pairs", "11", "--query-prefix", "", "--passage-prefix", ""]
    assert commands.main(["evaluate", str(run), *arguments]) == 0
    assert printed(capsys) == metrics_of(run / "model", rows=ROWS[:11])


def test_nothing_is_written_and_nothing_trained(run, data):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert commands.main(["evaluate", str(run)]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mini", "MODEL must be a folder that holds a model, or a name on the hub, got 'mini'"),
        ("{data}", "--model must be a folder that holds a model's config.json"),
        ("{data}/nothing", "--model must be one of"),
        ("{unfinished}", "MODEL must be a run that has ended and left model/"),
        ("{run} --test-pairs 0", "--test-pairs must be at least 1"),
        ("{run} --test-pairs -1", "--test-pairs must be at least 0"),
        ("{run} --data {data}/nothing", "--data must be a folder"),
        ("{run} --query-column question", "question"),
        ("{run} --passage-length 600", "must be at most the model's 512 tokens, got 600"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(arguments, message, run, data, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    typed = arguments.format(run=run, data=data, unfinished=tmp_path / "unfinished").split()
    assert commands.main(["evaluate", *typed]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("python -m gclib evaluate: error: ") and told.count("\n") == 1


def test_a_tokenizer_without_words_is_refused(run, data, tmp_path, capsys):
    """transformers makes one of nothing but special tokens where a folder holds none."""
    shutil.copytree(run / "model", tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert commands.main(["evaluate", str(tmp_path / "model"), "--data", str(data)]) == 2
    assert "--model must hold a tokenizer beside the model" in capsys.readouterr().err


def test_too_little_memory_is_one_line_and_a_fault_of_the_program_is_not(run, monkeypatch, capsys):
    def raises(error):
        def fault(*_, **__):
            raise error

        monkeypatch.setattr(evaluation, "retrieval_metrics", fault)

    raises(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried"))
    assert commands.main(["evaluate", str(run)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    raises(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        commands.main(["evaluate", str(run)])


def test_a_batch_of_one_has_no_wrong_passage_and_is_refused(data, tmp_path, capsys):
    more = SMALL.replace("--batch-size 4", "--batch-size 1").split()
    assert commands.main(["train", "--output", str(tmp_path / "run"), "--data", str(data), *more]) == 2
    assert "--batch-size must be at least 2 without hard negatives" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]", '{"prompts": ["q"]}'])
def test_prompts_that_can_not_be_read_are_refused(content, run, tmp_path):
    (tmp_path / "config_sentence_transformers.json").write_text(content)
    with pytest.raises(ValueError, match=r"config_sentence_transformers\.json that can be read"):
        build.prompts_of(str(tmp_path))
