"""Rank 0 alone asks the hub for a model; every rank uses its folder, or fails with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from huggingface_hub import constants

from megatron_gmpo.config import Config
from megatron_gmpo.distributed import rank
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.snapshot import with_local_models

from ..support.hub import COMMITS, hub
from ..support.ranks import RankPool

pytestmark = pytest.mark.distributed

NOWHERE = "http://127.0.0.1:9"


def resolve(path: str, endpoint: str, cache: str) -> str:
    """Return the folder or the error line of a rank; ranks other than 0 cannot reach the hub."""
    endpoint = endpoint if rank() == 0 else NOWHERE
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_CACHE": cache}
    with patch.multiple(constants, HF_HUB_OFFLINE=False, **settings):
        try:
            cfg = Config.model_validate({"model": {"path": path}})
            return with_local_models(cfg, torch.device("cpu")).model.path
        except InputError as error:
            return str(error)


def test_one_rank_asks_and_all_agree(
    ranks: RankPool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with hub("someone/tiny", tiny_model("qwen3")) as (endpoint, requests):
        first, *others = ranks.run(2, resolve, "someone/tiny", endpoint, str(tmp_path))
        assert Path(first).name == COMMITS["main"]
        assert others == [first]
        assert len([path for path in requests if "revision" in path]) == 1
        first, *others = ranks.run(2, resolve, "someone/else", endpoint, str(tmp_path))
    assert "'hf download someone/else'" in first
    assert others == [first]
