"""A rollout engine in the trainer's processes: a transformers model with a complete copy on each rank."""

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
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from ..batch.samples import Prompt, Sample, SampleGroup
from ..config import Config
from ..distributed import agreed, rank, world_size
from ..errors import InputError, NonFiniteError
from ..metrics.figures import Metric
from ..models import fp8_blocks
from ..models.description import DTYPES
from ..models.fp32_head import fp32_product
from ..models.hub import hub_names
from .ending import Ending, end_token_ids
from .engine import SamplingParams


def check_embedded_fits(cfg: Config, parameters: int, world_size: int, memory: int, *, train: bool) -> None:
    """Check that the embedded engine's whole model has room beside this rank's share of the policy.

    The share is the smallest one possible: an equal part of the weights and, for training, of fp32 gradients,
    main weights and moments. ``megatron-gmpo plan`` counts what the layout really needs.

    Args:
        parameters: elements of the model.
        memory: bytes of a GPU.
    """
    engine = parameters * DTYPES[cfg.rollout.dtype or cfg.model.dtype].itemsize
    per_parameter = DTYPES[cfg.model.dtype].itemsize + (4 + 12 if train else 0)
    share = parameters * per_parameter // world_size
    if engine + share > memory:
        raise InputError(
            f"rollout.engine = 'embedded' holds the whole model on each GPU: {engine / 2**30:.1f} GiB and at "
            f"least {share / 2**30:.1f} GiB of the policy, do not fit into {memory / 2**30:.1f}: use 'sglang'"
        )


class EmbeddedEngine:
    """A ``RolloutEngine`` that samples with a transformers causal language model.

    The ranks share the prompts evenly. Samples and router noise depend only on the weights, the prompts,
    ``seed``, the policy version, the number of ``generate`` calls since ``update_weights``, ``batch_size``
    and the rank. So a resumed run draws the same samples as an uninterrupted run.

    Args:
        model_path: Hugging Face folder or hub name.
        tokenizer: the model's tokenizer.
        device: device of the model.
        dtype: dtype of weights and activations; sampling always uses fp32.
        batch_size: number of responses decoded together on a rank.
        seed: seed of the sampling.
        routed_experts: record the experts of every token; requires a MoE.
        quantized: round new weights to their values in block-wise FP8 (see ``models.fp8_blocks``).
        fp32_head: compute the logits of a bf16 model in fp32, see ``fp32_product``.
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
        fp32_head: bool = False,
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa"
        )
        self.model: Any = model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.seed = seed
        self.version = 0
        self._calls = 0
        self._quantized = quantized
        self._slots = _weight_slots(self.model)
        self._end_ids = end_token_ids(self.model.config, self.model.generation_config, tokenizer)
        self._routing = _RoutedExperts(self.model) if routed_experts else None
        self._noise = _RouterNoise(self.model)
        if fp32_head and dtype == torch.bfloat16:
            head = self.model.get_output_embeddings()
            head.forward = partial(_fp32_logits, head)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> dict[int, SampleGroup]:
        """See ``RolloutEngine.generate``.

        ``rollout_logprobs`` refer to the distribution after temperature and before top-k and top-p, like
        those of the policy and of SGLang. For greedy decoding they refer to the model's distribution at
        temperature 1. With ``router_noise``, log probabilities and recorded experts include the effect of the
        noise.

        Raises:
            NonFiniteError: the weights give logits that are NaN or infinite.
        """
        # prompts of similar length share a batch; each rank takes every world_size-th prompt
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
        groups = {i: SampleGroup(prompts[i], []) for i in by_length[rank() :: world_size()]}
        mine = [i for i in groups for _ in range(sampling.n)]
        with agreed():
            for number, start in enumerate(range(0, len(mine), self.batch_size)):
                batch = mine[start : start + self.batch_size]
                key = np.random.SeedSequence([self.seed, self.version, self._calls, number, rank()])
                generator = torch.Generator(self.device).manual_seed(int(key.generate_state(1, np.uint64)[0]))
                samples = self._decode([prompts[i].input_ids for i in batch], sampling, generator)
                for i, sample in zip(batch, samples, strict=True):
                    groups[i].samples.append(sample)
        self._calls += 1
        return groups

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine.update_weights``."""
        missing = set(self._slots)
        for name, tensor in fp8_blocks.rounded(named_tensors) if self._quantized else named_tensors:
            slot = self._slots.get(name)
            if slot is None:
                raise InputError(
                    f"weight sync: the rollout model has no tensor {name!r}; "
                    "do policy and rollout read the same model.path?"
                )
            if name not in missing:
                raise InputError(f"weight sync: tensor {name!r} came twice")
            if slot.shape != tensor.shape:
                raise InputError(
                    f"weight sync: {name!r} has shape {tuple(tensor.shape)}, "
                    f"the rollout model {tuple(slot.shape)}"
                )
            slot.copy_(tensor)
            missing.remove(name)
        if missing:
            raise InputError(
                f"weight sync: {len(missing)} tensors of the rollout model were not sent: "
                f"{', '.join(sorted(missing)[:8])}"
            )
        self.version = version
        self._calls = 0

    def sleep(self) -> None:
        """Do nothing, because the engine has its own copy of the weights."""

    def take_metrics(self) -> dict[str, Metric]:
        """Return no metrics."""
        return {}

    def close(self) -> None:
        """Do nothing, because there are no resources to release."""

    @torch.inference_mode()
    def _decode(
        self, prompts: list[list[int]], sampling: SamplingParams, generator: torch.Generator
    ) -> list[Sample]:
        """Decode one batch of B responses, token by token."""
        self._noise.std, self._noise.generator = sampling.router_noise, generator
        logits, pad, cache, prompt_experts = self._prefill(prompts)
        width = cache.get_seq_length()
        rows = torch.arange(len(prompts), device=self.device)  # (b,) rows of the batch still in the cache
        tokens = torch.zeros(len(prompts), sampling.max_new_tokens, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(len(prompts), sampling.max_new_tokens, device=self.device)
        experts = None
        if prompt_experts:
            experts = prompt_experts[0].new_zeros(*tokens.shape, *prompt_experts[0].shape[1:])
        lengths = torch.zeros_like(rows)  # 0 for unfinished responses
        end_tokens = torch.tensor(sorted(self._end_ids), dtype=torch.int64, device=self.device)
        truncation = _truncation(sampling)
        ending = Ending(self.tokenizer, self._end_ids, sampling.stop)
        for step in range(sampling.max_new_tokens):
            # (b,) each
            token, logprob = _sample(logits, sampling.temperature, truncation, generator)
            tokens[rows, step], logprobs[rows, step] = token, logprob
            ends = torch.isin(token, end_tokens)
            if sampling.stop:
                tails = tokens[rows, max(0, step + 1 - ending.window) : step + 1].cpu().numpy()
                stopped = [ending.length(tail) is not None for tail in tails]
                ends |= torch.tensor(stopped, device=self.device)
            lengths[rows] = torch.where(ends & (lengths[rows] == 0), step + 1, lengths[rows])
            unfinished = (lengths[rows] == 0).nonzero()[:, 0]
            if len(unfinished) == 0 or step + 1 == sampling.max_new_tokens:
                break
            if len(unfinished) <= 0.75 * len(rows):  # removing rows copies the cache, as each step does
                rows, token, pad = rows[unfinished], token[unfinished], pad[unfinished]
                cache.batch_select_indices(unfinished)
            logits = self._forward(token[:, None], width + step - pad, pad, cache)
            if self._routing and experts is not None:
                experts[rows, step] = self._routing.latest(len(rows))[:, 0]

        samples = []
        for i, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True)):
            response = tokens[i, : length or None].cpu().numpy()
            end = ending.length(response)
            response = response[:end]
            routed = None
            if prompt_experts and experts is not None:
                routed = torch.cat([prompt_experts[i], experts[i, : len(response) - 1]]).cpu().numpy()
            sample = Sample.from_response(
                prompt,
                response,
                logprobs[i, : len(response)].cpu().numpy(),
                text=ending.text(response),
                finish_reason="length" if end is None else "stop",
                policy_version=self.version,
                routed_experts=routed,
            )
            samples.append(sample)
        return samples

    def _prefill(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor, DynamicCache, list[Tensor]]:
        """Prefill every distinct prompt once and copy its cache for each of the B responses.

        Returns:
            (B, V) logits of the first response token; (B, 1) number of empty slots on the left; the cache of
            B rows; (tokens, layers, topk) experts of each response's prompt, [] if they are not recorded.
        """
        distinct = sorted({tuple(ids) for ids in prompts}, key=len)
        place = {ids: row for row, ids in enumerate(distinct)}
        width = len(distinct[-1])
        assert len(distinct[0]) > 0, "a prompt without input_ids"
        padded = [[0] * (width - len(p)) + list(p) for p in distinct]
        ids = torch.tensor(padded, device=self.device)  # (D, P) left-padded
        pad = torch.tensor([width - len(p) for p in distinct], device=self.device)[:, None]  # (D, 1)
        positions = (torch.arange(width, device=self.device)[None] - pad).clamp(min=0)  # (D, P)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, positions, pad, cache)  # (D, V)
        experts: list[Tensor] = []
        if self._routing:
            by_prompt = self._routing.latest(len(ids))  # (D, P, layers, topk)
            experts = [by_prompt[place[tuple(p)], width - len(p) :] for p in prompts]
        spread = torch.tensor([place[tuple(p)] for p in prompts], device=self.device)
        cache.batch_select_indices(spread)
        return logits[spread], pad[spread], cache, experts

    def _forward(self, ids: Tensor, positions: Tensor, pad: Tensor, cache: DynamicCache) -> Tensor:
        """Run (B, T) new tokens after the cached ones; return (B, V) fp32 logits of the last token.

        ``pad`` is (B, 1), the number of empty slots on the left.
        """
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


class _RoutedExperts:
    """Record the routing of a transformers MoE's latest forward pass, from the inputs of the experts."""

    def __init__(self, model: Any) -> None:
        self._shape = (model.config.num_hidden_layers, model.config.num_experts_per_tok)
        self._latest: dict[int, Tensor] = {}
        for number, layer in enumerate(model.model.layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(partial(self._note, number))

    def _note(self, layer: int, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # in every family: hidden states, experts (B * T, topk), their weights
        self._latest[layer] = inputs[1]

    def latest(self, batch_size: int) -> Tensor:
        """Return (B, T, layers, topk) int32 expert ids, 0 in layers without experts."""
        layers, topk = self._shape
        some = next(iter(self._latest.values()))
        experts = some.new_zeros(len(some), layers, topk, dtype=torch.int32)
        for layer, chosen in self._latest.items():
            experts[:, layer] = chosen.int()
        return experts.view(batch_size, -1, layers, topk)


class _RouterNoise(TorchFunctionMode):
    """Add Gaussian noise to the router logits of a transformers MoE.

    The noise changes the chosen experts and their weights. In every family a router computes its logits by
    the only ``linear`` call in its forward pass; the noise is added to its result.

    Attributes:
        std: standard deviation of the noise; 0 disables it.
        generator: random generator of the noise.
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


def _fp32_logits(head: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """Return (B, T, V) fp32 logits of (B, T, H) bf16 hidden states."""
    return fp32_product(hidden.flatten(0, 1), head.weight.T).view(*hidden.shape[:2], -1)


def _truncation(sampling: SamplingParams) -> LogitsProcessorList:
    """Return the logits processors that remove tokens, in the order of transformers' ``generate``."""
    truncation = LogitsProcessorList()
    if sampling.top_k:
        truncation.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        truncation.append(TopPLogitsWarper(sampling.top_p))
    return truncation


def _sample(
    logits: Tensor, temperature: float, truncation: LogitsProcessorList, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample from (B, V) fp32 logits; return (B,) tokens and their (B,) log probabilities.

    ``truncation`` limits the tokens to sample from and does not change the log probabilities.
    """
    if temperature == 0:
        logprobs = logits.log_softmax(-1)
        token = logprobs.argmax(-1, keepdim=True)
    else:
        logprobs = (logits / temperature).log_softmax(-1)
        weights = truncation(None, logprobs).exp()  # pyright: ignore[reportArgumentType]
        token = torch.multinomial(weights, 1, generator=generator)
    return token[:, 0], logprobs.gather(1, token)[:, 0]


def _weight_slots(model: Any) -> dict[str, Tensor]:
    """Return the model's tensors by their names in the Hugging Face checkpoint.

    Transformers stacks routed experts; their entries are views of the stack. Tied weights have one entry,
    under their first name, like in checkpoints.
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
