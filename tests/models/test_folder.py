"""A trained encoder as a folder: loaded again by us and by sentence-transformers: `gclib.models.folder`."""

import os
from unittest import mock

import pytest
import torch

from gclib.data.pairs import TextPair
from gclib.data.tokens import tokenize_texts, train_tokenizer
from gclib.models.encoder import Encoder
from gclib.models.folder import save_model_folder

TEXTS = ["count the apples", "sort plums", "weigh the figs and the dates " * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TextPair(text, text[::-1]) for text in TEXTS], vocab_size=100)


def representations(encoder, tokenizer):
    with torch.no_grad():
        return encoder.eval()(**tokenize_texts(TEXTS, tokenizer, 16))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_everyone_reads_the_same_representations(pooling, normalize, tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    config = Encoder.from_config("tiny", vocab_size=100).model.config
    encoder = Encoder.from_config(config, pooling=pooling, normalize=normalize)
    expected = representations(encoder, tokenizer)
    save_model_folder(encoder, tokenizer, tmp_path / "model", max_length=16)
    again = Encoder.from_pretrained(tmp_path / "model", pooling=pooling, normalize=normalize)
    torch.testing.assert_close(representations(again, tokenizer), expected, rtol=0, atol=0)
    other = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert other.max_seq_length == 16
    torch.testing.assert_close(other.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)


def test_a_pooling_without_a_name_leaves_model_and_tokenizer_alone(tokenizer, tmp_path):
    encoder = Encoder.from_config("tiny", vocab_size=100, pooling="tokens")
    save_model_folder(encoder, tokenizer, tmp_path / "model", max_length=16)
    assert not (tmp_path / "model" / "modules.json").exists()
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_an_older_folder_is_replaced_and_a_half_written_one_is_cleared_away(tokenizer, tmp_path):
    encoder = Encoder.from_config("tiny", vocab_size=100)
    for folder in ("model", ".model.part"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "old").touch()
    save_model_folder(encoder, tokenizer, tmp_path / "model", max_length=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / "old").exists()


def test_a_kill_while_a_folder_is_replaced_loses_neither(tokenizer, tmp_path, monkeypatch):
    """Killed before the new one has the name: both stand beside it; a call that fails puts the old one back."""
    folder, renames, rename = tmp_path / "model", [], os.rename
    save_model_folder(Encoder.from_config("tiny", vocab_size=100), tokenizer, folder, max_length=16)
    (folder / "old").touch()

    def killed(source, target):
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        save_model_folder(Encoder.from_config("tiny", vocab_size=100), tokenizer, folder, max_length=16)
    assert not folder.exists() and (tmp_path / ".model.aside" / "old").exists()
    assert (tmp_path / ".model.part" / "model.safetensors").exists()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        encoder = Encoder.from_config("tiny", vocab_size=100)
        patch.setattr(encoder.model, "save_pretrained", mock.Mock(side_effect=OSError("disk full")))
        save_model_folder(encoder, tokenizer, folder, max_length=16)
    assert (folder / "old").exists()
    save_model_folder(Encoder.from_config("tiny", vocab_size=100), tokenizer, folder, max_length=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not (folder / "old").exists()


def test_a_length_below_one_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="max_length must be an int of at least 1, got 0"):
        save_model_folder(Encoder.from_config("tiny", vocab_size=100), tokenizer, tmp_path / "model", max_length=0)
    assert not list(tmp_path.iterdir())
