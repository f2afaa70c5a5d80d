"""The model card that ``push`` writes: settings, curves, evaluations, licence and citation."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData, metadata_load

from ..errors import InputError
from ..metrics.plots import Series, read_metrics
from ..models.folder import read_json
from ..view.snapshot import Snapshot

_SETTINGS = (
    "model.dtype",
    "data.path",
    "reward.name",
    "rollout.environment",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.temperature",
    "algorithm.loss",
    "algorithm.advantage",
    "algorithm.kl_coef",
    "train.minibatches_per_step",
    "optimizer.lr",
    "optimizer.lr_schedule",
    "seed",
)
"""Settings in the card. None but the name of the data is a path of the machine."""
_SNAPSHOT = re.compile(r"models--(\w[\w.-]*?)--(\w[\w.-]*)/snapshots/\w+/?$")
"""End of a folder in the hub's cache (huggingface_hub/file_download.py)."""
_RATE = re.compile(r"/(pass@\d+|maj@\d+|success)$")
_CITATION = """```bibtex
@article{zhao2025gmpo,
  title   = {Geometric-Mean Policy Optimization},
  author  = {Zhao, Yuzhong and Liu, Yue and Liu, Junpeng and Chen, Jingye and Wu, Xun
             and Hao, Yaru and Lv, Tengchao and Huang, Shaohan and Cui, Lei and Ye, Qixiang and Wan, Fang
             and Wei, Furu},
  journal = {arXiv preprint arXiv:2507.20673},
  year    = {2025}
}
```"""


def base_of(run: Snapshot) -> str:
    """Return the base model of a run: owner/name if it came from the hub, else the name of its folder.

    Raises:
        InputError: the run's config.toml has no model.path.
    """
    path = run.setting("model", "path")
    if not isinstance(path, str) or not path:
        raise InputError(f"{run.run_dir / 'config.toml'} has no model.path: give the folder of a run")
    found = _SNAPSHOT.search(path)
    return f"{found[1]}/{found[2]}" if found else Path(path).name


def check_name(repo: str, base: str) -> None:
    """Check that ``repo`` is owner/name, and does not have the name of the base model.

    Raises:
        InputError: it is not, or it has.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise InputError(f"REPO {repo!r} is no name on the hub: give owner/name")
    name = base.rpartition("/")[2]
    if repo.rpartition("/")[2].lower() == name.lower():
        raise InputError(
            f"REPO {repo!r} has the name of the base model {base!r}, for which it would be mistaken: choose "
            f"another, e.g. {repo}-GMPO"
        )


def model_card(run: Snapshot, model: Path, repo: str, step: int, base: str) -> str:
    """Return the content of README.md.

    Args:
        model: folder of the converted model. That of the base model, which may have the licence, may be gone.
        repo: name on the hub, owner/name.
        step: step of the checkpoint.
        base: see ``base_of``.
    """
    name, loss = repo.rpartition("/")[2], str(run.setting("algorithm", "loss"))
    loss = f"`{loss}`" if ":" in loss else loss.upper()  # the name of a function, or a built-in loss
    series = read_metrics(run.run_dir / "metrics.jsonl")
    licence = _licence(Path(run.setting("model", "path")))
    sees = "vision_config" in read_json(model / "config.json")
    reader, kind = ("Processor", "ImageTextToText") if sees else ("Tokenizer", "CausalLM")
    data = ModelCardData(
        base_model=base if "/" in base else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=["gmpo", "reinforcement-learning", "megatron_gmpo"],
        gmpo_run=run.run_dir.absolute().name,
        **licence,
    )
    if "license" in licence:
        terms = f"The base model has the licence `{licence['license']}`, which applies to this model too."
    else:
        terms = "The licence of the base model applies. Its folder does not state it: look it up."
    link = f"[{base}](https://huggingface.co/{base})" if "/" in base else base
    return f"""---
{data.to_yaml()}
---

# {name}

{link}, trained with reinforcement learning for {step} steps. The loss is {loss}.

```python
from transformers import Auto{reader}, AutoModelFor{kind}

{reader.lower()} = Auto{reader}.from_pretrained("{repo}")
model = AutoModelFor{kind}.from_pretrained("{repo}")
```

## Training

| setting | value |
|---|---|
{_settings(run, series, step)}

![Curves of the training](curves.png)

## Evaluation

{_evaluations(run.run_dir, series, step)}

Rates are shares of the problems, with 95 % intervals over problems in brackets. The model was not evaluated
for any other use.

## Licence

{terms}

## Citation

{_CITATION}
"""


def _settings(run: Snapshot, series: Series, step: int) -> str:
    rows = []
    for key in _SETTINGS:
        section, _, field = key.rpartition(".")
        value = run.setting(section, field) if section else run.config.get(field)
        if value not in (None, ""):
            shown = _data_name(value) if key == "data.path" else value
            rows.append(f"| `{key}` | {shown} |")
    for name in ("policy/clip_low", "policy/clip_high"):  # a default of the loss and the model, or adapted
        steps, values = series.get(name, (np.empty(0), np.empty(0)))
        rows += [f"| `{name}` | {value:.3g} |" for value in values[steps == step]]
    return "\n".join(rows)


def _data_name(path: Any) -> str:
    """Return the name of a data set: the hub's, or that of its file."""
    text = str(path)
    return text if re.fullmatch(r"[\w.-]+/[\w.:-]+", text) and not Path(text).suffix else Path(text).name


def _evaluations(run_dir: Path, series: Series, step: int) -> str:
    """Return a table: the first evaluation, the last until ``step``, and that of the command ``evaluate``."""
    evaluated = {
        name: dict(zip(steps.tolist(), values.tolist(), strict=True))
        for name, (steps, values) in series.items()
        if name.startswith("eval/")
    }
    steps = sorted({at for values in evaluated.values() for at in values if at <= step})
    columns = {
        f"step {at}": {name: values[at] for name, values in evaluated.items() if at in values}
        for at in steps[:1] + steps[-1:]
    }
    file, sampling = run_dir / "evaluation.json", ""
    if file.is_file() and (found := json.loads(file.read_bytes()))["step"] == step:
        sampling = f"\n\nSampling of `evaluate`: `{json.dumps(found['sampling'])}`"
        columns[f"step {step}, `evaluate`"] = {
            f"eval/{name}/{figure}": value
            for name, result in found["sets"].items()
            for figure, value in result["figures"].items()
        }
    rates = {name: None for figures in columns.values() for name in figures if _RATE.search(name)}
    if not rates:
        return "The run was not evaluated."
    head = ["", "benchmark", "figure", *columns, ""]
    rows = [
        ["", *name.split("/")[1:], *(_with_interval(figures, name) for figures in columns.values()), ""]
        for name in rates
    ]
    table = [head, ["", *["---"] * (len(head) - 2), ""], *rows]
    return "\n".join(" | ".join(row).strip() for row in table) + sampling


def _with_interval(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return ""
    benchmark, _, figure = name.rpartition("/")
    ends = [figures.get(f"{benchmark}/ci_{end}@{figure.removeprefix('pass@')}") for end in ("low", "high")]
    return f"{figures[name]:.3f}" + ("" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]")


def _licence(folder: Path) -> dict[str, Any]:
    """Return the entries about the licence in the README.md of a model's folder."""
    readme = folder / "README.md"
    found = (metadata_load(readme) if readme.is_file() else None) or {}
    return {key: found[key] for key in ("license", "license_name", "license_link") if key in found}
