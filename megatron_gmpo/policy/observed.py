"""Keep the values of each token in the updates of a step, and record a few samples (``token_records``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.columns import Microbatch, TrainBatch, ranges, turn_numbers
from ..batch.index import StepIndex
from ..batch.samples import SampleGroup
from ..distributed import agreed, gather_bytes, rank, world_size
from ..losses.objective import Objective
from ..losses.tokens import LossOutput
from ..metrics.across_ranks import fetch
from ..metrics.token_records import PROMPT_CHARACTERS, Record, choose, write_records
from .routing import RoutingPass
from .schedule import Schedule

OBSERVED = ("logprobs", "entropy", "gradient")
"""Columns that an update computes anyway, or from the loss alone."""


@dataclass(frozen=True)
class Observed(Objective):
    """The loss of a step's updates, which also keeps what they see of each response token.

    Attributes:
        seen: one entry an update, filled by ``end``.
    """

    seen: list[Seen] = field(default_factory=list)
    _index: list[Tensor] = field(default_factory=list)
    _values: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in OBSERVED})

    @classmethod
    def of(cls, objective: Objective) -> Observed:
        """Return the same loss, observed."""
        return cls(**vars(objective))

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, microbatch: Microbatch, cp_group: dist.ProcessGroup | None
    ) -> LossOutput:
        if torch.is_grad_enabled():
            leaf = logprobs.detach().requires_grad_()
            # a penalty would also give a gradient to tokens that the policy term clips
            policy_term = replace(self, kl_coef=0.0, entropy_coef=0.0)
            loss = Objective.__call__(policy_term, leaf, entropy.detach(), microbatch, cp_group).loss
            (gradient,) = torch.autograd.grad(loss, leaf)
            slots = microbatch.loss_slots
            self._index.append(microbatch.flat_index[slots])
            for name, column in zip(OBSERVED, (logprobs, entropy, gradient), strict=True):
                self._values[name].append(column.detach()[slots])
        return super().__call__(logprobs, entropy, microbatch, cp_group)

    def end(self, schedule: Schedule, minibatch: TrainBatch, routing: RoutingPass | None) -> None:
        """Add the entry of an update, after its microbatches. Collective."""
        columns = {
            name: schedule.gather(list(zip(self._index, values, strict=True)), len(minibatch.tokens))
            for name, values in self._values.items()
        }
        if routing and routing.compares:
            columns["rerouted"] = routing.rerouted(schedule.groups)
        self.seen.append(Seen(minibatch, self, columns))
        for values in (self._index, *self._values.values()):
            values.clear()


@dataclass(frozen=True)
class Seen:
    """The values of the tokens of a replica's minibatch in one update.

    Attributes:
        minibatch: S sequences, L tokens.
        objective: the loss.
        columns: (L,) on the device of every rank of the replica: ``logprobs`` and ``entropy`` before the
            update; ``gradient``, the derivative of the SUM of the policy terms with respect to ``logprobs``;
            and ``rerouted``, see ``RoutingPass.rerouted``, if the minibatch knows experts.
    """

    minibatch: TrainBatch
    objective: Objective
    columns: dict[str, Tensor]

    @cached_property
    def host(self) -> dict[str, np.ndarray]:
        """Return the columns, ``mask`` (L,), and ``old`` (L,), the log probabilities of the old policy."""
        old = self.objective.old_logprobs_of(self.minibatch)
        assert old is not None
        fetched = {name: column.numpy() for name, column in fetch(self.columns).items()}
        return fetched | {"old": old.numpy(), "mask": self.minibatch.response_mask.numpy()}

    @cached_property
    def log_ratio(self) -> np.ndarray:
        """Return (L,) fp32 log pi - log pi_old, 0 outside the response."""
        host = self.host
        return np.where(host["mask"], host["logprobs"] - host["old"], np.float32(0))

    @property
    def largest(self) -> np.ndarray:
        """Return (U,) fp32 largest absolute log ratio of each unit, -1 without response tokens."""
        sizes = np.where(self.host["mask"], np.abs(self.log_ratio), np.float32(-1))
        starts = np.flatnonzero(np.diff(self.minibatch.unit_ids.numpy(), prepend=-1))
        return np.maximum.reduceat(sizes, starts) if len(sizes) else sizes

    def record(self, row: int, unit: int, tokenizer: Any, **about: Any) -> Record:
        """Return the record of one unit of the sequence in a row: of its response tokens, without others.

        Args:
            unit: number of the unit in its sequence.
            about: the fields of ``Record`` that the minibatch does not know.
        """
        batch, host = self.minibatch, self.host
        start, advantage = int(batch.starts[row]), float(batch.advantages[row])
        span = slice(start, start + int(batch.lengths[row]))
        mask, turns = host["mask"][span], turn_numbers(batch.response_mask[span], batch.lengths[row, None])
        if batch.turns is not None:
            mask = mask & (batch.turns[span].numpy() == unit)
        response = start + np.flatnonzero(mask)
        prompt, ids = batch.tokens.numpy()[start : response[0]], batch.tokens.numpy()[response]
        log_ratio = self.log_ratio[response]
        low, high = self.objective.log_clip
        bounded = np.minimum(log_ratio, high) if advantage > 0 else np.maximum(log_ratio, low)
        return Record(
            # a character has at least a quarter of a token
            prompt=tokenizer.decode(prompt[-4 * PROMPT_CHARACTERS :].tolist()),
            advantage=advantage,
            sequence_ratio=float(np.exp(bounded.mean(dtype=np.float64))),
            ids=ids,
            text=pieces(tokenizer, ids),
            log_ratio=log_ratio,
            clipped=(host["gradient"][response] == 0) & (advantage != 0),
            entropy=host["entropy"][response],
            rollout_difference=host["old"][response] - batch.rollout_logprobs.numpy()[response],
            layers_rerouted=host["rerouted"][response] if "rerouted" in host else None,
            turn=turns.numpy()[mask],
            **about,
        )


class TokenRecorder:
    """Write the record of ``count`` samples of each step.

    Args:
        folder: folder of the records.
        count: samples of a step; 0 observes and writes nothing.
        leads_replica: whether this rank sends the records of its replica.
    """

    def __init__(self, folder: Path, count: int, tokenizer: Any, leads_replica: bool) -> None:
        self._folder, self._count = folder, count
        self._tokenizer, self._leads_replica = tokenizer, leads_replica
        self._seen: list[Seen] = []
        self._names: dict[int, str] = {}

    def observe(self, objective: Objective, groups: Mapping[int, SampleGroup]) -> Objective:
        """Return the loss for the updates of a step, which is observed if samples are recorded.

        Args:
            groups: this rank's groups of the step, by position in the step.
        """
        if not self._count:
            return objective
        observed = Observed.of(objective)
        self._seen = observed.seen
        self._names = {position: group.prompt.id for position, group in groups.items()}
        return observed

    def write(self, step: int, index: StepIndex) -> None:
        """Write the record of the observed step. Collective.

        The replicas agree on the units by one all-reduce of a number a unit. Then rank 0 gets the records
        from the ranks that lead the replicas.

        Args:
            index: the sequences of the step.
        """
        by_turn = any(one.minibatch.turns is not None for one in self._seen)
        units = torch.from_numpy(index.units("turn" if by_turn else "episode")).long().clamp(min=1)
        first = units.cumsum(0) - units
        largest = torch.full((int(units.sum()),), -1.0)
        for one in self._seen:
            assert one.minibatch.numbers is not None
            mine = ranges(first[one.minibatch.numbers], one.minibatch.units)
            largest[mine] = torch.from_numpy(one.largest)
        if world_size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        chosen = choose(largest.where(largest >= 0, torch.nan).numpy(), self._count, seed=step)
        sequence_of = torch.repeat_interleave(torch.arange(len(index)), units).tolist()
        places = {unit: (sequence_of[unit], unit - int(first[sequence_of[unit]])) for unit in chosen}
        with agreed():
            records = self._records(index, chosen, places) if self._leads_replica else {}
        groups = {int(index.group[number]) for number, _ in places.values()}
        names = {position: name for position, name in self._names.items() if position in groups}
        mine = orjson.dumps([names, records], option=orjson.OPT_NON_STR_KEYS)
        everywhere = [orjson.loads(part) for part in gather_bytes(mine)]
        with agreed():
            if rank() == 0:
                names, lines = ({k: v for part in everywhere for k, v in part[i].items()} for i in (0, 1))
                found = [
                    replace(
                        Record.from_json(lines[str(unit)]), prompt_id=names[str(index.group[places[unit][0]])]
                    )
                    for unit in chosen
                ]
                about = {"sequences": len(index), "tokens": int(index.response_length.sum())}
                loss = self._seen[0].objective.description if self._seen else ""
                write_records(self._folder, step, {"loss": loss} | about, found)
        self._seen = []  # the minibatches keep the step's file in memory

    def _records(
        self, index: StepIndex, chosen: Mapping[int, str], places: Mapping[int, tuple[int, int]]
    ) -> dict[int, str]:
        """Return the chosen units of this replica as JSON, without the names of their prompts.

        Args:
            places: the sequence of each chosen unit, and the unit's number in it.
        """
        bounds, records = index.group_bounds, dict[int, str]()
        for one in self._seen:
            assert one.minibatch.numbers is not None
            rows = {number: row for row, number in enumerate(one.minibatch.numbers.tolist())}
            for unit, (number, place) in places.items():
                if number in rows:
                    record = one.record(
                        rows[number],
                        place,
                        self._tokenizer,
                        prompt_id="",
                        index=number - int(bounds[index.group[number]]),
                        chosen=chosen[unit],
                        reward=float(index.reward[number]),
                    )
                    records[unit] = record.to_json().decode()
        return records


def pieces(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """Return the text of each token. Bytes that are no whole character become U+FFFD."""
    unique, places = np.unique(ids, return_inverse=True)
    texts = []
    for token, name in zip(unique.tolist(), tokenizer.convert_ids_to_tokens(unique.tolist()), strict=True):
        text = tokenizer.decode([token])
        # SentencePiece drops the space at the beginning of a text
        texts.append(f" {text}" if (name or "").startswith("▁") and not text.startswith(" ") else text)
    return [texts[place] for place in places]
