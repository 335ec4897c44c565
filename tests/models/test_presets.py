"""Every preset is the model whose name it has: its parameters are counted without being allocated."""

import json

import pytest
import torch

from gclib import Encoder
from gclib.models.presets import PRESETS, config_of

# What is published with the weights, less the poolers that pooling leaves out: 768 * 768 + 768 and so on.
PUBLISHED = {
    "bert-base-uncased": 109_482_240 - 590_592,
    "minilm-l6": 22_713_216 - 147_840,
    "distilbert-base": 66_362_880,
    "xlm-roberta-base": 278_043_648 - 590_592,
    "mpnet-base": 109_486_464 - 590_592,
    "modernbert-base": 149_014_272,
    "bge-large": 335_141_888 - 1_049_600,
    "qwen3-4b": 151_665 * 2560 + 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728 + 2 * 2560 + 256) + 2560,
    "qwen3-8b": 151_665 * 4096 + 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12_288 + 2 * 4096 + 256) + 4096,
    "e5-mistral-7b": 7_241_732_096 - 32_000 * 4096,  # Mistral-7B-v0.1 without its head
}
CLIP = {"clip-vit-b-32": 151_277_313, "clip-vit-l-14": 427_616_513}  # both towers and the learned temperature


def parameters(name):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Encoder.from_config(name).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_table_says(name):
    assert parameters(name) == PRESETS[name].parameters
    assert PRESETS[name].source


@pytest.mark.parametrize("name", PUBLISHED)
def test_and_they_are_the_published_ones(name):
    assert PRESETS[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", CLIP)
def test_clips_two_towers_and_temperature_are_the_published_ones(name):
    assert parameters(f"{name}-text") + parameters(f"{name}-vision") + 1 == CLIP[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_pools_as_its_source_does(name):
    with torch.device("meta"):
        encoder = Encoder.from_config(name)
    assert encoder.pooling == PRESETS[name].pooling
    assert encoder.reads_pictures == name.endswith("vision")
    assert not getattr(encoder.model.config, "use_cache", False)


def test_a_config_json_is_read_from_its_file_or_folder(tmp_path):
    config_of("minilm-l6").save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert config_of(place).to_dict() == config_of("minilm-l6").to_dict()
        with torch.device("meta"):
            built = Encoder.from_config(place)
        assert sum(parameter.numel() for parameter in built.parameters()) == PRESETS["minilm-l6"].parameters


def test_projections_survive_a_config_json(tmp_path):
    config_of("clip-vit-b-32-text").save_pretrained(tmp_path)
    with torch.device("meta"):
        assert type(Encoder.from_config(tmp_path, pooling="own").model).__name__ == "CLIPTextModelWithProjection"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("no json", "config.json that transformers wrote"),
        ("[1]", "config.json that transformers wrote"),
        (json.dumps({"model_type": "magic"}), "model_type"),
        (json.dumps({"model_type": "clip", "text_config": {}, "vision_config": {}}), "one tower"),
    ],
)
def test_a_file_that_is_no_config_is_refused_in_words(tmp_path, written, words):
    (tmp_path / "config.json").write_text(written, "utf-8")
    with pytest.raises(ValueError, match=words):
        config_of(tmp_path)


def test_a_name_that_is_neither_preset_nor_file_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="bge-large"):
        config_of("bert-huge")
    with pytest.raises(ValueError, match="path of a config.json"):
        Encoder.from_config(tmp_path / "nowhere")
