"""The sequences that a replica trains: their flat batch, and the packed microbatches cut from it.

A column is declared once, as a field with a ``Column`` in its metadata. The code that checks, splits, packs,
moves and saves columns, and selects a rank's share of the routing, reads this declaration. To add a column,
add one field to ``OptionalColumns``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import InputError
from .images import MicrobatchImages
from .schema import Column, column, ranges


@dataclass(frozen=True)
class RoutingShape:
    """The dimensions of a MoE's routing.

    Attributes:
        num_layers: decoder layers, with and without experts.
        moe_layers: numbers, from 0, of the layers with experts.
        num_experts: experts per such layer.
        topk: experts per token.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int

    @property
    def dtype(self) -> torch.dtype:
        """Return the narrowest dtype of an expert's number."""
        return torch.uint8 if self.num_experts <= 256 else torch.int16


@dataclass(frozen=True)
class Minibatch:
    """The plan of one optimizer step for one replica.

    Attributes:
        rows: (first, end) of its sequences in the replica's batch.
        microbatches: ascending rows of the sequences in each microbatch; [] is a dummy. All replicas have
            equally many.
        first_microbatch: number of the first of these microbatches in the step.
        sequences: number of its units with response tokens, on all replicas.
        response_tokens: their number of response tokens.
        tokens: tokens of all its sequences.
        computed_tokens: tokens of the sequences that some replica computes.
    """

    rows: tuple[int, int]
    microbatches: list[list[int]]
    first_microbatch: int
    sequences: int
    response_tokens: int
    tokens: int
    computed_tokens: int


@dataclass(kw_only=True)
class OptionalColumns:
    """Columns that a ``TrainBatch`` and its ``Microbatch``es share by name; None until they are computed.

    Shapes refer to a ``TrainBatch``. Outside ``response_mask``, log probabilities are 0 and weights are 1.

    Attributes:
        old_logprobs: (L,) log probabilities under the policy before the step's first update.
        ref_logprobs: (L,) log probabilities under the reference policy.
        sequence_weights: (U,) importance weights that multiply each unit's loss; None means 1.
        token_weights: (L,) importance weights that multiply each token's loss; None means 1.
        kept_tokens: (L,) tokens of ``response_mask`` that count in the policy term of the loss; None means
            all.
        router_shift: (L,) shift of the routing of each input token since the old policy
            (``losses.rspo``'s gamma). The ratio of token t + 1 depends on input token t; the value of a
            sequence's last token has no meaning.
        extra: columns of a user's loss, by name; ``TrainBatch.extra_columns`` declares them.
    """

    old_logprobs: Tensor | None = field(default=None, metadata=column(torch.float32, "predicted"))
    ref_logprobs: Tensor | None = field(default=None, metadata=column(torch.float32, "predicted"))
    sequence_weights: Tensor | None = field(default=None, metadata=column(torch.float32, "unit"))
    token_weights: Tensor | None = field(default=None, metadata=column(torch.float32, "predicted"))
    kept_tokens: Tensor | None = field(default=None, metadata=column(torch.bool, "predicted"))
    router_shift: Tensor | None = field(default=None, metadata=column(torch.float32, "input"))
    extra: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class TrainBatch(OptionalColumns):
    """Concatenated sequences on the host (S sequences, U units, L tokens): those that this replica trains.

    In a step of the training loop, the ranks of a replica hold its share of the step, with a plan. A batch
    without a plan is complete on every rank; ``Policy.share`` makes the shares of it.

    Row t of a per-token column describes token t: ``old_logprobs[t]`` is the log probability of ``tokens[t]``
    given the tokens before it in its sequence. Every assignment of a column checks its dtype and shape.

    Attributes:
        tokens: (L,) token ids.
        lengths: (S,) tokens of each sequence, at least 1.
        response_mask: (L,) tokens that carry loss. Never True on the first token of a sequence. In an
            episode, observations separate the turns.
        advantages: (S,) advantage of each sequence.
        rollout_logprobs: (L,) log probabilities that the rollout engine reported, 0 outside
            ``response_mask``.
        routed_experts: (L, layers, topk) experts of each input token that the rollout engine recorded, or
            None. Layers without experts and the last token of a sequence have no meaning.
        turns: (L,) number of each token's turn in its sequence, see ``turn_numbers``. A unit is then a turn,
            and a sequence without a turn has one empty unit. None means that a unit is a sequence.
        rope_positions: (L, 3) position of each token in time, height and width (``images.rope_positions``).
            None for a model without vision, like the columns of images.
        image_counts: (S,) number of images in each sequence.
        image_starts: (I,) index in its sequence of each image's first token, in the order of the tokens.
        image_grids: (I, 3) patches in time, height and width of each image.
        image_digests: (I, 16) digest of each image's file, its name in the run's ``ImageFolder``.
        numbers: (S,) numbers of the sequences in the step, ascending.
        plan: the optimizer steps of a share, in order; () without a plan.
        own_experts: the experts that this rank's routers chose in the pass of the old log probabilities:
            (layer, microbatch of the step) -> (T', topk) uint8 or int16, for the T' slots that this rank's
            routers see. Empty if they were not recorded. Training replays them instead of
            ``routed_experts``.
        own_scores: the log scores that these routers gave these experts, fp32 of the same shapes, in
            ascending order of the experts.
        extra_columns: the declaration of each column in ``extra``.

    Raises:
        InputError: the dtype or shape of a column differs from its declaration.
    """

    tokens: Tensor = field(metadata=column(torch.int64, "input", narrow=torch.int32))
    lengths: Tensor = field(metadata=column(torch.int64, "sequence"))
    response_mask: Tensor = field(metadata=column(torch.bool, "predicted"))
    advantages: Tensor = field(metadata=column(torch.float32, "sequence"))
    rollout_logprobs: Tensor = field(metadata=column(torch.float32, "predicted"))
    routed_experts: Tensor | None = field(
        default=None,
        metadata=column(torch.int16, "input", dims=("layers", "topk"), narrow=torch.uint8),
        kw_only=True,
    )
    turns: Tensor | None = field(default=None, metadata=column(torch.int32, "predicted"), kw_only=True)
    rope_positions: Tensor | None = field(
        default=None, metadata=column(torch.int32, "input", dims=("axes",)), kw_only=True
    )
    image_counts: Tensor | None = field(default=None, metadata=column(torch.int64, "sequence"), kw_only=True)
    image_starts: Tensor | None = field(default=None, metadata=column(torch.int64, "image"), kw_only=True)
    image_grids: Tensor | None = field(
        default=None, metadata=column(torch.int64, "image", dims=("axes",)), kw_only=True
    )
    image_digests: Tensor | None = field(
        default=None, metadata=column(torch.uint8, "image", dims=("bytes",)), kw_only=True
    )
    numbers: Tensor | None = field(default=None, metadata=column(torch.int64, "sequence"), kw_only=True)
    plan: Sequence[Minibatch] = field(default=(), kw_only=True)
    own_experts: dict[tuple[int, int], Tensor] = field(default_factory=dict, kw_only=True)
    own_scores: dict[tuple[int, int], Tensor] = field(default_factory=dict, kw_only=True)
    extra_columns: dict[str, Column] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        # the numbers of units and images follow from columns of the other kinds
        for name in sorted(COLUMNS, key=lambda name: COLUMNS[name].aligned_to in ("unit", "image")):
            self._check(name, COLUMNS[name], getattr(self, name))
        for name, values in self.extra.items():
            self._check(name, self.extra_columns[name], values)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COLUMNS and "extra_columns" in vars(self):  # the last field that the constructor sets
            self._check(name, COLUMNS[name], value)
        super().__setattr__(name, value)

    def _check(self, name: str, column: Column, values: Tensor | None) -> None:
        if values is None:
            return
        if name in ("tokens", "lengths"):  # they define the number of rows
            rows = len(values)
        elif column.aligned_to == "unit":
            rows = int(self.units.sum())
        elif column.aligned_to == "image":
            rows = int(self.image_sizes.sum())
        else:
            rows = len(self.lengths if column.aligned_to == "sequence" else self.tokens)
        column.check(name, values, rows)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Tensor:
        """Return (S,) int64: index of each sequence's first token in the flat columns."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def units(self) -> Tensor:
        """Return (S,) int64: number of units of each sequence, at least 1."""
        if self.turns is None:
            return torch.ones_like(self.lengths)
        return self.turns[self.lengths.cumsum(0) - 1].long() + 1

    @property
    def image_sizes(self) -> Tensor:
        """Return (S,) int64: number of images of each sequence."""
        return torch.zeros_like(self.lengths) if self.image_counts is None else self.image_counts

    @property
    def first_units(self) -> Tensor:
        """Return (S,) int64: the number of each sequence's first unit, in 0..U-1."""
        return self.units.cumsum(0) - self.units

    @property
    def unit_ids(self) -> Tensor:
        """Return (L,) int64: the unit of each token, in 0..U-1."""
        first = torch.repeat_interleave(self.first_units, self.lengths)
        return first if self.turns is None else first + self.turns

    @property
    def response_lengths(self) -> Tensor:
        """Return (S,) int64: number of tokens of each sequence in ``response_mask``."""
        owners = torch.repeat_interleave(torch.arange(len(self)), self.lengths)
        return torch.zeros_like(self.lengths).index_add(0, owners, self.response_mask.long())

    def add_extra(self, name: str, column: Column, values: Tensor) -> None:
        """Add a column of a user's loss. ``minibatch`` and ``pack`` then process it too.

        Raises:
            InputError: ``name`` is a column of every batch, or the dtype or shape of ``values`` differs from
                ``column``.
        """
        if name in COLUMNS:
            raise InputError(
                f"column {name!r} exists in every batch: give the loss's own column another name"
            )
        self._check(name, column, values)
        self.extra = self.extra | {name: values}
        self.extra_columns = self.extra_columns | {name: column}

    def mapped(
        self, change: Callable[[Column, Tensor], Tensor], leave_out: Set[str] = frozenset()
    ) -> dict[str, Any]:
        """Return the existing columns after ``change``, as keyword arguments of the constructor."""
        names = COLUMNS.keys() - leave_out
        present = {
            name: values for name in COLUMNS if name in names and (values := getattr(self, name)) is not None
        }
        return {
            **{name: change(COLUMNS[name], values) for name, values in present.items()},
            "extra": {name: change(self.extra_columns[name], values) for name, values in self.extra.items()},
        }

    def token_index(self, sequences: Tensor) -> Tensor:
        """Return the indices of the tokens of these rows in the flat columns, (tokens,) int64."""
        return ranges(self.starts[sequences], self.lengths[sequences])

    def take(self, sequences: Tensor) -> TrainBatch:
        """Return a batch of these rows, with copies of their columns and without a plan."""

        def rows_of(sizes: Tensor) -> Tensor:
            return ranges((sizes.cumsum(0) - sizes)[sequences], sizes[sequences])

        tokens = rows_of(self.lengths)
        index = {"sequence": sequences, "unit": rows_of(self.units), "image": rows_of(self.image_sizes)}
        taken = self.mapped(lambda column, v: v[index.get(column.aligned_to, tokens)])
        return TrainBatch(**taken, extra_columns=self.extra_columns)

    def minibatch(self, number: int) -> TrainBatch:
        """Return views of the sequences of one optimizer step of the plan."""
        part = self.plan[number]
        first, end = part.rows

        def of_rows(sizes: Tensor) -> slice:
            return slice(int(sizes[:first].sum()), int(sizes[:end].sum()))

        tokens = of_rows(self.lengths)
        index = {"sequence": slice(first, end), "unit": of_rows(self.units)}
        index["image"] = of_rows(self.image_sizes)
        rows = [[row - first for row in members] for members in part.microbatches]
        return TrainBatch(
            **self.mapped(lambda column, v: v[index.get(column.aligned_to, tokens)]),
            extra_columns=self.extra_columns,
            plan=[replace(part, rows=(0, end - first), microbatches=rows)],
            own_experts=self.own_experts,
            own_scores=self.own_scores,
        )

    def save(self, path: Path) -> None:
        """Write all columns to a safetensors file by name; columns in ``extra`` are called ``extra.NAME``."""
        tensors = self.mapped(lambda _, values: values.clone())  # safetensors refuses views of one tensor
        extra = {f"extra.{name}": values for name, values in tensors.pop("extra").items()}
        safetensors.torch.save_file(tensors | extra, path)


def turn_numbers(response_mask: Tensor, lengths: Tensor) -> Tensor:
    """Return (L,) int32: the number of each token's turn in its sequence, from 0.

    A turn is a run of True in the mask. Tokens before the first turn have 0, and an observation has the
    number of the turn before it.
    """
    begins = response_mask.clone()
    begins[1:] &= ~response_mask[:-1]
    begun = begins.cumsum(0, dtype=torch.int32)
    # no sequence begins with a turn
    before = torch.repeat_interleave(begun[lengths.cumsum(0) - lengths], lengths)
    return (begun - before - 1).clamp_(min=0)


COLUMNS: dict[str, Column] = {f.name: f.metadata["column"] for f in fields(TrainBatch) if f.metadata}
"""The declaration of every column of a ``TrainBatch``, except columns in ``extra``."""


@dataclass
class Microbatch(OptionalColumns):
    """One packed pipeline unit on one context-parallel rank (T local slots, S sequences, U units).

    Each slot holds an input token and the token it predicts. "predicted" columns are aligned to the logits,
    "input" columns to the inputs of the routers. The optional columns have the shapes of ``OptionalColumns``
    with T in place of L.

    Attributes:
        tokens: (T,) int64 inputs.
        labels: (T,) int64 predicted tokens, 0 on slots without one.
        position_ids: (T,) int64 position of the input in its sequence.
        cu_seqlens: (S + 1,) int32 padded boundaries of the sequences over all context-parallel ranks (THD
            layout).
        bounds: the numbers of ``cu_seqlens``, which the host reads without waiting for the device.
        mask: (T,) bool, True if the predicted token carries loss.
        loss_slots: (P,) int64 slots whose predicted token carries loss, in ascending order.
        sequence_ids: (T,) int64 in 0..U-1, the unit of the slot's predicted token; padding belongs to a unit
            too. The loss sees units as its sequences, and attention sees those of ``cu_seqlens``.
        flat_index: (T,) int64, index of the predicted token in the TrainBatch's flat columns, -1 on slots
            without one.
        input_index: (T,) int64, index of the input token, -1 on padding.
        rope_positions: (T, 3) int32 position of the input in time, height and width; None without vision.
        images: the images of the microbatch; None if no context-parallel rank has one.
        advantages: (U,) fp32. Like every column aligned to a sequence, it is repeated for its units.
        rollout_logprobs: (T,) fp32 or None.
        routed_experts: (T', MoE layers of a chunk, topk) int16 experts to replay or compare, for the slots
            that this rank's routers see; -1 where they are not known. ``Routing.cut`` sets them.
        router_scores: the old policy's log scores of these experts, fp32, or None.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    bounds: list[int]
    mask: Tensor
    loss_slots: Tensor
    sequence_ids: Tensor
    flat_index: Tensor
    input_index: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor | None = None
    routed_experts: Tensor | None = None
    router_scores: Tensor | None = None
    rope_positions: Tensor | None = None
    images: MicrobatchImages | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Microbatch:
        """Return the microbatch with ``change`` of every tensor."""

        def changed(tensors: dict[str, Any]) -> dict[str, Any]:
            return {name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)}

        images = self.images and replace(self.images, **changed(vars(self.images)))
        return replace(self, **changed(vars(self)), extra=changed(self.extra), images=images)

    def to(self, device: torch.device) -> Microbatch:
        """Move every tensor to ``device``, without waiting if it is in pinned memory."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=True))
