"""``model.path`` as a name on the hub: the real client, a hub on loopback, and what is in its cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from megatron_gmpo.commands import convert_hf_to_megatron, convert_megatron_to_hf
from megatron_gmpo.commands.plan import with_model_config
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import read_hf_config
from megatron_gmpo.models.snapshot import with_local_models

from ..support.hub import COMMITS, hub
from ..support.reference import saved_tensors

NAME = "someone/tiny.Model-1"


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a model folder that also has a pickle, code and weights in a subfolder."""
    folder = shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"the same weights")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that points the client at an endpoint and at an empty cache."""

    def use(endpoint: str) -> None:
        url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)

    return use


def resolved(**model: str) -> Any:
    return with_local_models(Config.model_validate({"model": model}), torch.device("cpu")).model


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_name_becomes_a_folder(model: Path, use_hub: Callable[[str], None]) -> None:
    with hub(NAME, model) as (endpoint, requests):
        use_hub(endpoint)
        found = resolved(path=NAME, reference_path=f"{NAME}@v1")
        assert Path(found.path).name == COMMITS["main"]
        assert Path(found.reference_path).name == COMMITS["v1"]
        left = {"pytorch_model.bin", "modeling.py", "original/model.safetensors"}
        expected = {name: data for name, data in contents(model).items() if name not in left}
        assert "additional_chat_templates/tools.jinja" in expected
        assert contents(Path(found.path)) == contents(Path(found.reference_path)) == expected
        assert saved_tensors(Path(found.path)).keys() == saved_tensors(model).keys()
        read_hf_config(found.path)  # links into the cache are allowed
        requests.clear()
        assert resolved(path=NAME).path == found.path
        assert [path for path in requests if "resolve" in path] == []  # nothing is downloaded again
    assert resolved(path=NAME).path == found.path  # the hub is gone, the cache is not


def test_a_folder_stays_what_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent.parent)
    relative = f"{model.parent.name}/{model.name}"
    assert resolved(path=relative).path == relative
    assert resolved(path=str(model)).path == str(model)
    assert resolved(path="").path == ""


def test_plan_downloads_the_config_alone(model: Path, use_hub: Callable[[str], None]) -> None:
    cfg = Config.model_validate({"model": {"path": NAME}})
    with hub(NAME, model) as (endpoint, _):
        use_hub(endpoint)
        found = Path(with_model_config(cfg, None).model.path)
    assert contents(found) == {"config.json": (model / "config.json").read_bytes()}


@pytest.mark.slow
def test_conversions_take_names(
    model: Path, use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with hub(NAME, model) as (endpoint, requests):
        use_hub(endpoint)
        convert_hf_to_megatron.main(["--hf", f"{NAME}@v1", "--megatron", "converted"])
        shutil.rmtree("converted/hf")
        requests.clear()
        command = ["--megatron", "converted", "--hf", "back", "--template", NAME]
        convert_megatron_to_hf.main(command)
        assert not [path for path in requests if path.endswith(".safetensors")]
    back = saved_tensors(tmp_path / "back")
    for name, tensor in saved_tensors(model).items():
        assert torch.equal(back[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "reason", "download"),
    [
        ("someone/else", "the hub has no such model", "'hf download someone/else'"),
        (f"{NAME}@v2", "the hub's model has no such revision", f"'hf download {NAME} --revision v2'"),
        ("some--one/else", "Cannot have -- or ..", "'hf download some--one/else'"),
    ],
)
def test_a_name_that_the_hub_does_not_know(
    model: Path, use_hub: Callable[[str], None], path: str, reason: str, download: str
) -> None:
    with hub(NAME, model) as (endpoint, _):
        use_hub(endpoint)
        with pytest.raises(InputError) as error:
            resolved(path=path)
    line = str(error.value)
    assert line.startswith(f"model.path = {path!r} is no folder, and {reason}")
    assert download in line
    assert "\n" not in line


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_and_cache(
    use_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    use_hub("http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(InputError) as error:
        resolved(reference_path="someone/else")
    assert str(error.value) == (
        "model.reference_path = 'someone/else' is no folder, and the hub cannot be reached, and its cache "
        "has not all files: correct it, or run 'hf download someone/else' on a machine with access and set "
        "HF_HOME to its cache"
    )
