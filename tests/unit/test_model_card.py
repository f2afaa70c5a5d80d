"""The card of ``megatron-gmpo push`` about the base model; tests/integration/test_train.py has the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from megatron_gmpo.commands.model_card import base_of, check_name, model_card
from megatron_gmpo.errors import InputError
from megatron_gmpo.view.snapshot import read

CACHED = "models--Qwen--Qwen3-VL-2B/snapshots/0123abcd"


def write_run(folder: Path, model: Path, readme: str = "", config: str = "{}") -> Path:
    """Write what the card reads, and return the run folder."""
    model.mkdir(parents=True)
    (model / "config.json").write_text(config)
    if readme:
        (model / "README.md").write_text(readme)
    folder.mkdir()
    (folder / "config.toml").write_text(
        f'[model]\npath = "{model}"\n[data]\npath = "{folder}/mine.jsonl"\n'
        '[algorithm]\nloss = "my_losses:Sharp"\n'
    )
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "reward/mean": 0.5}) + "\n")
    return folder


def test_a_base_model_of_the_hub_with_a_licence(tmp_path: Path) -> None:
    readme = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\ntext"
    run = read(write_run(tmp_path / "run", tmp_path / CACHED, readme, '{"vision_config": {}}'))
    assert base_of(run) == "Qwen/Qwen3-VL-2B"
    card = ModelCard(model_card(run, tmp_path / CACHED, "me/mine", 3, base_of(run)))
    data = card.data.to_dict()
    assert (data["base_model"], data["license"]) == ("Qwen/Qwen3-VL-2B", "other")
    assert (data["license_name"], data["license_link"]) == ("qwen", "LICENSE")
    assert data["pipeline_tag"] == "image-text-to-text"
    assert 'processor = AutoProcessor.from_pretrained("me/mine")' in card.text
    assert "AutoModelForImageTextToText" in card.text
    assert "[Qwen/Qwen3-VL-2B](https://huggingface.co/Qwen/Qwen3-VL-2B), trained" in card.text
    assert "The run was not evaluated." in card.text
    assert str(tmp_path) not in card.content


def test_a_base_model_of_a_folder(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "run", tmp_path / "models" / "Tiny-1"))
    assert base_of(run) == "Tiny-1"
    model = (tmp_path / "models").rename(tmp_path / "converted") / "Tiny-1"  # the base model may be gone
    card = ModelCard(model_card(run, model, "me/mine", 3, "Tiny-1"))
    assert card.data.base_model is None
    assert "Its folder does not state it: look it up." in card.text
    assert "The loss is `my_losses:Sharp`." in card.text


@pytest.mark.parametrize("repo", ["me/Tiny-1", "me/tiny-1", "tiny", "me/a/b", "/a", "me/", "me/a b"])
def test_names_that_are_refused(repo: str) -> None:
    with pytest.raises(InputError, match=r"is no name on the hub|has the name of the base model"):
        check_name(repo, "someone/Tiny-1")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no model\.path: give the folder of a run"):
        base_of(read(tmp_path))
