"""A rollout engine inside the trainer's processes: the transformers model, one whole copy on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..batch.samples import FinishReason, Prompt, Sample, SampleGroup
from ..distributed import all_gather_objects, rank, world_size
from ..errors import InputError, NonFiniteError
from ..metrics.figures import Metric
from ..models import fp8_blocks
from ..models.hub import hub_names
from .engine import SamplingParams, end_token_ids, response_text


class EmbeddedEngine:
    """Samples with a transformers causal language model; a ``RolloutEngine``.

    The responses are dealt out evenly over the ranks. Samples, and noise on routers, depend only on the weights, the prompts, ``seed``, the
    policy version, the number of ``generate`` calls since ``update_weights``, ``batch_size`` and the rank: a resumed run draws what the
    first would have.

    Args:
        model_path: Hugging Face folder or hub name.
        tokenizer: its tokenizer.
        device: where the model lives.
        dtype: precision of weights and activations; sampling itself is fp32.
        batch_size: responses decoded together on a rank.
        seed: of the sampling.
        routed_experts: record the experts of every token; the model is a MoE.
        quantized: round new weights to the values they have in block-wise FP8 (see ``models.fp8_blocks``).
    """

    def __init__(
        self,
        model_path: str,
        tokenizer: Any,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        batch_size: int,
        seed: int,
        routed_experts: bool = False,
        quantized: bool = False,
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
        self.model: Any = model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.seed = seed
        self.version = 0
        self._calls = 0
        self._quantized = quantized
        self._slots = _weight_slots(self.model)
        self._end_ids = end_token_ids(self.model.generation_config, tokenizer)
        self._routing = _RoutedExperts(self.model) if routed_experts else None
        self._noise = _RouterNoise(self.model)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[SampleGroup]:
        """See ``RolloutEngine.generate``.

        ``rollout_logprobs`` belong to the distribution sampled from, after temperature, top-k and top-p; for greedy decoding to
        the model's own, at temperature 1. With ``router_noise`` they, and the recorded experts, are those of the disturbed model.

        Raises:
            NonFiniteError: the weights give logits that are NaN or infinite.
        """
        # Neighbours in length share a batch, and each rank gets every world_size-th of them.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
        mine = [(i, s) for i in by_length for s in range(sampling.n)][rank() :: world_size()]
        drawn: dict[tuple[int, int], Sample] = {}
        problem = None
        try:
            for number, start in enumerate(range(0, len(mine), self.batch_size)):
                batch = mine[start : start + self.batch_size]
                key = np.random.SeedSequence([self.seed, self.version, self._calls, number, rank()])
                generator = torch.Generator(self.device).manual_seed(int(key.generate_state(1, np.uint64)[0]))
                samples = self._decode([prompts[i].input_ids for i, _ in batch], sampling, generator)
                drawn.update(zip(batch, samples, strict=True))
        except NonFiniteError as error:  # perhaps on this rank alone
            problem = error
        self._calls += 1
        parts = all_gather_objects((problem, drawn))
        for found, _ in parts:
            if found:
                raise found
        everyone = {at: sample for _, part in parts for at, sample in part.items()}
        return [
            SampleGroup(prompt, [everyone[i, s] for s in range(sampling.n)])
            for i, prompt in enumerate(prompts)
        ]

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine.update_weights``."""
        missing = set(self._slots)
        for name, tensor in fp8_blocks.rounded(named_tensors) if self._quantized else named_tensors:
            slot = self._slots.get(name)
            if slot is None:
                raise InputError(
                    f"weight sync: the rollout model has no tensor {name!r}; do policy and rollout read the same model.path?"
                )
            if name not in missing:
                raise InputError(f"weight sync: tensor {name!r} came twice")
            if slot.shape != tensor.shape:
                raise InputError(
                    f"weight sync: {name!r} has shape {tuple(tensor.shape)}, the rollout model {tuple(slot.shape)}"
                )
            slot.copy_(tensor)
            missing.remove(name)
        if missing:
            raise InputError(
                f"weight sync: {len(missing)} tensors of the rollout model were not sent: {', '.join(sorted(missing)[:8])}"
            )
        self.version = version
        self._calls = 0

    def sleep(self) -> None:
        """Keeps its memory: a copy of the weights, which the next sync overwrites."""

    def take_metrics(self) -> dict[str, Metric]:
        """There is nothing to tell."""
        return {}

    def close(self) -> None:
        """It started nothing."""

    @torch.inference_mode()
    def _decode(
        self, prompts: list[list[int]], sampling: SamplingParams, generator: torch.Generator
    ) -> list[Sample]:
        """One batch of B responses, token by token."""
        self._noise.std, self._noise.generator = sampling.router_noise, generator
        distinct = sorted({tuple(ids) for ids in prompts}, key=len)
        place = {ids: row for row, ids in enumerate(distinct)}
        width = len(distinct[-1])
        assert len(distinct[0]) > 0, "a prompt without input_ids"
        ids = torch.tensor(
            [[0] * (width - len(p)) + list(p) for p in distinct], device=self.device
        )  # (D, P) left-padded
        pad = torch.tensor([width - len(p) for p in distinct], device=self.device)[:, None]  # (D, 1)
        positions = (torch.arange(width, device=self.device)[None] - pad).clamp(min=0)  # (D, P)

        # Every prompt is read once; its responses start from copies of its cache.
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, positions, pad, cache)  # (D, V)
        prompt_experts = self._routing.latest(len(ids)) if self._routing else None  # (D, P, layers, topk)
        spread = torch.tensor([place[tuple(p)] for p in prompts], device=self.device)
        logits, pad = logits[spread], pad[spread]
        cache.batch_select_indices(spread)

        rows = torch.arange(len(prompts), device=self.device)  # (b,) rows of the batch still in the cache
        tokens = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(len(prompts), sampling.max_new_tokens, device=self.device)
        experts = (
            None
            if prompt_experts is None
            else prompt_experts.new_zeros(*tokens.shape, *prompt_experts.shape[2:])
        )
        lengths = torch.zeros(
            len(prompts), dtype=torch.int64, device=self.device
        )  # 0 while a response goes on
        end_tokens = torch.tensor(sorted(self._end_ids), dtype=torch.int64, device=self.device)
        warpers = _warpers(sampling)
        for step in range(sampling.max_new_tokens):
            token, logprob = _sample(
                logits, warpers, generator, greedy=sampling.temperature == 0
            )  # (b,), (b,)
            tokens[rows, step], logprobs[rows, step] = token, logprob
            ends = torch.isin(token, end_tokens)
            if sampling.stop:
                ends |= self._ends_with_stop(tokens[rows, : step + 1], sampling.stop)
            lengths[rows] = torch.where(ends & (lengths[rows] == 0), step + 1, lengths[rows])
            going = (lengths[rows] == 0).nonzero()[:, 0]
            if len(going) == 0 or step + 1 == sampling.max_new_tokens:
                break
            if len(going) <= 0.75 * len(rows):  # dropping rows copies the cache, as every step does
                rows, token, pad = rows[going], token[going], pad[going]
                cache.batch_select_indices(going)
            logits = self._forward(token[:, None], width + step - pad, pad, cache)
            if self._routing and experts is not None:
                experts[rows, step] = self._routing.latest(len(rows))[:, 0]

        samples = []
        for i, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
            response = slice(length or None)
            routed = None
            if prompt_experts is not None and experts is not None:
                of_prompt = prompt_experts[spread[i], width - len(prompt) :]
                of_response = experts[i, response][:-1]
                routed = torch.cat([of_prompt, of_response]).cpu().numpy()
            samples.append(
                self._sample_of(
                    prompt, tokens[i, response], logprobs[i, response], length > 0, sampling, routed
                )
            )
        return samples

    def _forward(self, ids: Tensor, positions: Tensor, pad: Tensor, cache: DynamicCache) -> Tensor:
        """(B, T) new tokens after the cached ones -> (B, V) fp32 logits of the last; ``pad`` (B, 1) are empty slots on the left."""
        slots = torch.arange(cache.get_seq_length() + ids.shape[1], device=self.device)
        mask = (slots >= pad).long() if bool(pad.any()) else None
        out = self.model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        if not logits.isfinite().all():
            raise NonFiniteError(
                f"the rollout model's logits are not finite under the weights of step {self.version}"
            )
        return logits

    def _ends_with_stop(self, tokens: Tensor, stop: tuple[str, ...]) -> Tensor:
        """(b,) bool: a stop string stands in the tail of (b, T) tokens. A token spells at least one byte, so that the tail is enough."""
        tail = tokens[:, -max(len(s.encode()) for s in stop) :]
        texts = self.tokenizer.batch_decode(tail.tolist(), skip_special_tokens=True)
        return torch.tensor([any(s in text for s in stop) for text in texts], device=self.device)

    def _sample_of(
        self,
        prompt: list[int],
        response: Tensor,
        logprobs: Tensor,
        stopped: bool,
        sampling: SamplingParams,
        routed_experts: np.ndarray | None,
    ) -> Sample:
        reason: FinishReason = "stop" if stopped else "length"
        return Sample.from_response(
            prompt,
            response.cpu().numpy(),
            logprobs.cpu().numpy(),
            text=response_text(self.tokenizer, response.tolist(), self._end_ids, sampling.stop),
            finish_reason=reason,
            policy_version=self.version,
            routed_experts=routed_experts,
        )


class _RoutedExperts:
    """The routing of a transformers MoE in its latest forward pass, read where the experts of each layer are given it."""

    def __init__(self, model: Any) -> None:
        self._shape = (model.config.num_hidden_layers, model.config.num_experts_per_tok)
        self._latest: dict[int, Tensor] = {}
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(partial(self._note, number))

    def _note(self, layer: int, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._latest[layer] = inputs[
            1
        ]  # (hidden states, experts (B * T, topk), their weights), in every family

    def latest(self, batch_size: int) -> Tensor:
        """Return (B, T, layers, topk) int32 expert ids, 0 in layers without experts."""
        layers, topk = self._shape
        some = next(iter(self._latest.values()))
        experts = some.new_zeros(len(some), layers, topk, dtype=torch.int32)
        for layer, chosen in self._latest.items():
            experts[:, layer] = chosen.int()
        return experts.view(batch_size, -1, layers, topk)


class _RouterNoise(TorchFunctionMode):
    """Gaussian noise on the router logits of a transformers MoE, and so on its choice of experts and on their weights.

    In every family a router computes its logits by the one ``linear`` in its forward pass, whose result is disturbed here.

    Attributes:
        std: of the noise; at 0 the routers are left alone.
        generator: what the noise is drawn from.
    """

    std: float = 0.0
    generator: torch.Generator | None = None

    def __init__(self, model: Any) -> None:
        super().__init__()
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.gate.forward = partial(self._route, layer.mlp.gate.forward)

    def _route(self, forward: Callable[[Tensor], Any], hidden_states: Tensor) -> Any:
        if self.std == 0:
            return forward(hidden_states)
        with self:
            return forward(hidden_states)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return out
        return out + self.std * torch.randn(
            out.shape, generator=self.generator, dtype=out.dtype, device=out.device
        )


def _warpers(sampling: SamplingParams) -> LogitsProcessorList:
    """In the order of transformers' ``generate``."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _sample(
    logits: Tensor, warpers: LogitsProcessorList, generator: torch.Generator, *, greedy: bool
) -> tuple[Tensor, Tensor]:
    """(B, V) fp32 logits -> (B,) tokens and their (B,) log probabilities."""
    if not greedy:
        logits = warpers(None, logits)  # pyright: ignore[reportArgumentType]
    logprobs = logits.log_softmax(-1)
    token = (
        logprobs.argmax(-1, keepdim=True)
        if greedy
        else torch.multinomial(logprobs.exp(), 1, generator=generator)
    )
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def _weight_slots(model: Any) -> dict[str, Tensor]:
    """Name in the Hugging Face checkpoint -> the memory that holds it, for routed experts a part of what transformers stacks.

    Tied weights appear under their first name, as in checkpoints.
    """
    slots: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        names = hub_names(name, model.config.model_type)
        if "{e}" not in names[0]:
            slots[names[0]] = value
            continue
        for e, expert in enumerate(value):
            slots |= {
                part.format(e=e): slot for part, slot in zip(names, expert.chunk(len(names)), strict=True)
            }
    return slots
