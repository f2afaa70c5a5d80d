"""Load a data set as prompts and draw prompts from an endless, resumable stream."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from string import Formatter
from typing import Any

import datasets
import pandas
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..batch.samples import Prompt
from ..config import DataConfig
from ..errors import InputError

logger = logging.getLogger(__name__)

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_REMEDY = "give a .jsonl, .json, .csv or .parquet file, a save_to_disk folder, or a name on the hub"


def load_tokenizer(path: str, field: str = "model.path") -> Any:
    """Load the tokenizer of a model folder; ``field`` is the config field named in the error.

    Raises:
        InputError: transformers cannot load a tokenizer from the folder.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            f"{field} = {path!r} has no tokenizer that can be loaded ({' '.join(str(error).split())})"
        ) from None


def load_prompts(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, section: str = "data") -> list[Prompt]:
    """Read a data set, apply the templates, tokenize, and drop prompts longer than ``max_prompt_tokens``.

    Args:
        cfg: the data set and its templates.
        tokenizer: the policy's tokenizer. If ``cfg.use_chat_template`` is None, its chat template is used
            when it has one.
        section: section of ``cfg`` in the config, for error lines: ``data`` or ``eval.sets.NAME``.

    Returns:
        Prompts in the order of the data set, with ``id`` = ``"{name}/{row}"`` and ``input_ids``. With a chat
        template ``messages`` is set, without a chat template ``text``.

    Raises:
        InputError: the data set, split or column does not exist; there are no rows; a prompt or answer is
            missing or has the wrong type; the template is invalid; the length filter drops all prompts.
    """
    _check_template(cfg.template, section)
    chat = _uses_chat_template(cfg, tokenizer, section)
    rows = _load(cfg, section)
    _check_columns(cfg, rows, section)
    problems = zip(rows[cfg.prompt_column], rows[cfg.answer_column], strict=True)
    prompts = [_prompt(row, *problem, cfg, chat, section) for row, problem in enumerate(problems)]
    _tokenize(prompts, tokenizer, chat, section)
    kept = [prompt for prompt in prompts if len(prompt.input_ids) <= cfg.max_prompt_tokens]
    if not kept:
        shortest = min(len(prompt.input_ids) for prompt in prompts)
        raise InputError(
            f"{section}.max_prompt_tokens = {cfg.max_prompt_tokens} leaves no prompt of {len(prompts)}: "
            f"give at least {shortest}"
        )
    dropped = len(prompts) - len(kept)
    kept = kept[: cfg.max_prompts]
    logger.info(
        "%s: %d prompts from %s; dropped %d prompts longer than %d tokens",
        section,
        len(kept),
        cfg.path,
        dropped,
        cfg.max_prompt_tokens,
    )
    return kept


class PromptStream:
    """An endless stream of prompts, reshuffled every epoch. The order depends only on ``seed`` and the epoch.

    Args:
        prompts: the prompts of an epoch, at least one.
        seed: seed of the order.
        shuffle: False keeps the order of the data set in every epoch.
    """

    def __init__(self, prompts: list[Prompt], seed: int, shuffle: bool) -> None:
        assert prompts
        self.prompts = prompts
        self.seed = seed
        self.shuffle = shuffle
        self._start_epoch(0)

    def next(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts, which may come from several epochs."""
        taken: list[Prompt] = []
        while len(taken) < n:
            if self.position == len(self.order):
                self._start_epoch(self.epoch + 1)
            part = self.order[self.position : self.position + n - len(taken)]
            self.position += len(part)
            taken += [self.prompts[index] for index in part]
        return taken

    def state_dict(self) -> dict[str, int]:
        """Return the position of the stream."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "num_prompts": len(self.prompts),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the position and the seed of ``state``.

        Raises:
            InputError: the state belongs to a data set of another length.
        """
        if state["num_prompts"] != len(self.prompts):
            raise InputError(
                f"data has {len(self.prompts)} prompts, the checkpoint's data had {state['num_prompts']}: "
                "resume with the data set and length limits it was saved with"
            )
        self.seed = state["seed"]
        self._start_epoch(state["epoch"])
        self.position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.position = 0
        self.order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(self.order)


def _check_template(template: str, section: str) -> None:
    if not template:
        return
    field = f"{section}.template = {template!r}"
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise InputError(
            f"{field} is not a format string ({error}): write literal braces as {{{{ and }}}}"
        ) from None
    if fields != {"prompt"}:
        raise InputError(
            f"{field} must have the field {{prompt}} and no other, has {sorted(fields)}: "
            "write literal braces as {{ and }}"
        )


def _uses_chat_template(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, section: str) -> bool:
    has_one = tokenizer.chat_template is not None
    chat = has_one if cfg.use_chat_template is None else cfg.use_chat_template
    if chat and not has_one:
        raise InputError(
            f"{section}.use_chat_template = true: the tokenizer has no chat template, "
            "leave the field out or set it to false"
        )
    if cfg.system_prompt and not chat:
        raise InputError(
            f"{section}.system_prompt = {cfg.system_prompt!r} needs a chat template: "
            f"put it into {section}.template"
        )
    return chat


def _check_columns(cfg: DataConfig, rows: datasets.Dataset, section: str) -> None:
    for field, column in (("prompt_column", cfg.prompt_column), ("answer_column", cfg.answer_column)):
        if column not in rows.column_names:
            raise InputError(
                f"{section}.{field} = {column!r} is not a column of {cfg.path}: "
                f"choose one of {rows.column_names}"
            )
    if len(rows) == 0:
        raise InputError(f"{section}.path = {cfg.path!r} has no rows: give a data set with problems")


def _prompt(row: int, problem: Any, answer: Any, cfg: DataConfig, chat: bool, section: str) -> Prompt:
    """Return the prompt of a row, without ``input_ids``."""
    where = f"{section}.path = {cfg.path!r}, row {row}"
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise InputError(
            f"{where}: column {cfg.answer_column!r} is {answer!r}: "
            "give every problem an answer, text or a number"
        )
    name = Path(cfg.path.partition(":")[0]).stem
    prompt = Prompt(id=f"{name}/{row}", answer=str(answer))
    if chat:
        prompt.messages = _messages(problem, cfg, where)
    elif isinstance(problem, str) and problem:
        prompt.text = _fill(cfg.template, problem)
    else:
        raise InputError(
            f"{where}: column {cfg.prompt_column!r} is not text, and only a chat template takes messages"
        )
    return prompt


def _fill(template: str, problem: str) -> str:
    return template.format(prompt=problem) if template else problem


def _load(cfg: DataConfig, section: str) -> datasets.Dataset:
    """Load the rows of a file, a folder or a hub data set."""
    path = Path(cfg.path)
    field = f"{section}.path = {cfg.path!r}"
    if not cfg.path:
        raise InputError(f"{section}.path is empty: {_REMEDY}")
    if not path.exists() and (path.suffix in _FORMATS or path.is_absolute() or cfg.path.startswith(".")):
        raise InputError(f"{field} does not exist: {_REMEDY}")
    if path.is_file() and path.suffix not in _FORMATS:
        raise InputError(f"{field} has an unknown format: {_REMEDY}")
    try:
        if path.suffix == ".csv":
            # read all columns as text, because datasets would convert the answer "052" to 52 and "NA" to None
            splits = {
                "train": datasets.Dataset.from_pandas(pandas.read_csv(path, dtype=str, keep_default_na=False))
            }
        elif path.is_file():
            splits = datasets.load_dataset(_FORMATS[path.suffix], data_files=cfg.path)
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            splits = datasets.load_from_disk(cfg.path)
        else:
            name, _, subset = cfg.path.partition(":")
            splits = datasets.load_dataset(name, subset or None)
    except (StopIteration, IndexError):  # datasets raises these for an empty file or data set
        raise InputError(f"{field} has no rows: give a data set with problems") from None
    except (DatasetsError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise InputError(f"{field} cannot be loaded ({reason}): {_REMEDY}") from None
    if isinstance(splits, datasets.Dataset):
        return splits
    if cfg.split not in splits:
        raise InputError(
            f"{section}.split = {cfg.split!r} is not a split of {cfg.path}: choose one of {list(splits)}"
        )
    return splits[cfg.split]


def _messages(problem: Any, cfg: DataConfig, where: str) -> list[dict[str, str]]:
    if isinstance(problem, str) and problem:
        messages = [{"role": "user", "content": _fill(cfg.template, problem)}]
    elif isinstance(problem, list) and problem and all(map(_is_message, problem)):
        if cfg.template:
            raise InputError(
                f"{where}: column {cfg.prompt_column!r} holds messages: "
                "leave template out, it applies to text"
            )
        messages = [{"role": message["role"], "content": message["content"]} for message in problem]
    else:
        raise InputError(
            f"{where}: column {cfg.prompt_column!r} is neither text nor a list of messages: "
            "give messages with role and content, both text"
        )
    if cfg.system_prompt:
        if messages[0]["role"] == "system":
            raise InputError(f"{where}: the messages have a system message already: leave system_prompt out")
        messages.insert(0, {"role": "system", "content": cfg.system_prompt})
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _tokenize(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, chat: bool, section: str) -> None:
    """Set ``input_ids`` of every prompt."""
    if chat:
        try:
            conversations = [prompt.messages for prompt in prompts]
            token_ids = tokenizer.apply_chat_template(
                conversations,  # pyright: ignore[reportArgumentType]
                add_generation_prompt=True,
                return_dict=False,
            )
        except TemplateError as error:
            raise InputError(
                f"{section}: the tokenizer's chat template refuses the messages: {error}"
            ) from None
    else:
        texts = [prompt.text for prompt in prompts]
        token_ids = tokenizer(texts)["input_ids"]  # pyright: ignore[reportArgumentType]
    for prompt, ids in zip(prompts, token_ids, strict=True):  # pyright: ignore[reportArgumentType]
        prompt.input_ids = ids  # pyright: ignore[reportAttributeAccessIssue]
