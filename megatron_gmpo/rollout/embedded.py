"""A rollout engine in the trainer's processes: a transformers model with a complete copy on each rank."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from ..batch.samples import Prompt, Sample, SampleGroup, narrow_experts
from ..config import Config
from ..distributed import agreed, rank, world_size
from ..errors import InputError, NonFiniteError
from ..metrics.figures import Metric
from ..models import fp8_blocks
from ..models.description import DTYPES
from ..models.fp32_head import fp32_product
from ..models.hub import hub_names
from .embedded_routers import RoutedExperts, RouterNoise
from .ending import Ending, end_token_ids
from .engine import SamplingParams, report_nothing
from .episode import Generate
from .lockstep import in_lockstep
from .player import Player
from .response import Response


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
    and the rank. So a resumed run draws the same samples as an uninterrupted run, and plays the same episodes
    if their environments give the same answers.

    A turn of an episode computes its whole context anew: no cache is kept while the environment works.

    Args:
        model_path: Hugging Face folder or hub name.
        tokenizer: the model's tokenizer.
        device: device of the model.
        dtype: dtype of weights and activations; sampling always uses fp32.
        batch_size: number of responses decoded, or of episodes played, together on a rank.
        seed: seed of the sampling.
        routed_experts: record the experts of every token; requires a MoE.
        quantized: round new weights to their values in block-wise FP8 (see ``models.fp8_blocks``).
        fp32_head: compute the logits of a bf16 model in fp32, see ``fp32_product``.
        player: plays episodes; None samples single responses. The engine starts and closes it.
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
        player: Player | None = None,
    ) -> None:
        if player:
            with agreed():
                player.start()
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa"
        )
        self.model: Any = model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.seed = seed
        self.version = 0
        self._calls = self._batches = 0
        self._player, self._loop = player, asyncio.Runner()
        self._quantized = quantized
        self._slots = _weight_slots(self.model)
        self._end_ids = end_token_ids(self.model.config, self.model.generation_config, tokenizer)
        self._routing = RoutedExperts(self.model) if routed_experts else None
        self._noise = RouterNoise(self.model)
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
        places = [(i, number) for i in groups for number in range(sampling.n)]
        ending = Ending(self.tokenizer, self._end_ids, sampling.stop)
        self._batches = 0
        with agreed():
            samples = (self._play if self._player else self._respond)(prompts, places, sampling, ending)
            for (i, _), sample in zip(places, samples, strict=True):
                groups[i].samples.append(sample)
        self._calls += 1
        return groups

    def _respond(
        self, prompts: list[Prompt], places: list[tuple[int, int]], sampling: SamplingParams, ending: Ending
    ) -> list[Sample]:
        """Return a response for each of ``places``: positions of prompts and numbers of samples."""
        samples: list[Sample] = []
        for start in range(0, len(places), self.batch_size):
            batch = [prompts[i].input_ids for i, _ in places[start : start + self.batch_size]]
            report = partial(_report_part, sampling.report, start, len(batch), len(places))
            of_batch = replace(sampling, report=report)
            responses = self._decode(batch, [sampling.max_new_tokens] * len(batch), of_batch, ending)
            samples += [r.to_sample(ids, ending) for ids, r in zip(batch, responses, strict=True)]
        return samples

    def _play(
        self, prompts: list[Prompt], places: list[tuple[int, int]], sampling: SamplingParams, ending: Ending
    ) -> list[Sample]:
        """Return an episode for each of ``places``."""
        player, finished = self._player, itertools.count(1)
        assert player
        of_turn = replace(sampling, report=report_nothing)

        async def play(episode: int, generate: Generate) -> Sample:
            position, number = places[episode]
            sample = await player.play(prompts[position], position, number, sampling, ending, generate)
            sampling.report(next(finished) / len(places))
            return sample

        def decode(contexts: list[np.ndarray], limits: list[int]) -> list[Response]:
            return self._decode([context.tolist() for context in contexts], limits, of_turn, ending)

        return self._loop.run(in_lockstep(len(places), self.batch_size, play, decode))

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
        """See ``RolloutEngine.close``."""
        if self._player:
            self._player.close()
        self._loop.close()

    @torch.inference_mode()
    def _decode(
        self, contexts: list[list[int]], limits: list[int], sampling: SamplingParams, ending: Ending
    ) -> list[Response]:
        """Decode the next batch of B responses of this ``generate``, token by token.

        ``limits`` are B maximum numbers of new tokens, instead of ``sampling.max_new_tokens``.
        """
        generator = self._next_generator()
        self._noise.std, self._noise.generator = sampling.router_noise, generator
        logits, pad, cache, context_experts = self._prefill(contexts)
        width = cache.get_seq_length()
        rows = torch.arange(len(contexts), device=self.device)  # (b,) rows of the batch still in the cache
        limit = torch.tensor(limits, device=self.device)  # (B,)
        tokens = torch.zeros(len(contexts), max(limits), dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(tokens.shape, device=self.device)
        experts = None
        if context_experts:
            experts = context_experts[0].new_zeros(*tokens.shape, *context_experts[0].shape[1:])
        lengths = torch.zeros_like(rows)  # 0 for unfinished responses
        end_tokens = torch.tensor(sorted(self._end_ids), dtype=torch.int64, device=self.device)
        truncation = _truncation(sampling)
        for step in range(max(limits)):
            # (b,) each
            token, logprob = _sample(logits, sampling.temperature, truncation, generator)
            tokens[rows, step], logprobs[rows, step] = token, logprob
            ends = torch.isin(token, end_tokens)
            if sampling.stop:
                tails = tokens[rows, max(0, step + 1 - ending.window) : step + 1].cpu().numpy()
                stopped = [ending.length(tail) is not None for tail in tails]
                ends |= torch.tensor(stopped, device=self.device)
            ends |= limit[rows] == step + 1
            lengths[rows] = torch.where(ends & (lengths[rows] == 0), step + 1, lengths[rows])
            unfinished = (lengths[rows] == 0).nonzero()[:, 0]
            sampling.report(1 - len(unfinished) / len(contexts) * (1 - (step + 1) / max(limits)))
            if len(unfinished) == 0:
                break
            if len(unfinished) <= 0.75 * len(rows):  # removing rows copies the cache, as each step does
                rows, token, pad = rows[unfinished], token[unfinished], pad[unfinished]
                cache.batch_select_indices(unfinished)
            logits = self._forward(token[:, None], width + step - pad, pad, cache)
            if self._routing and experts is not None:
                experts[rows, step] = self._routing.latest(len(rows))[:, 0]

        responses = []
        for i, length in enumerate(lengths.tolist()):
            sampled = tokens[i, :length].cpu().numpy()
            end = ending.length(sampled)
            sampled = sampled[:end]
            response = Response(
                sampled.astype(np.int32),
                logprobs[i, : len(sampled)].cpu().numpy(),
                np.full(len(sampled), self.version, np.int32),
                "length" if end is None else "stop",
            )
            if context_experts and experts is not None:
                routed = torch.cat([context_experts[i], experts[i, : len(sampled) - 1]])
                response.routed_experts = narrow_experts(routed.cpu().numpy())
            responses.append(response)
        return responses

    def _next_generator(self) -> torch.Generator:
        key = np.random.SeedSequence([self.seed, self.version, self._calls, self._batches, rank()])
        self._batches += 1
        return torch.Generator(self.device).manual_seed(int(key.generate_state(1, np.uint64)[0]))

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


def _report_part(report: Callable[[float], None], before: int, size: int, total: int, share: float) -> None:
    """Report the share of ``total`` samples from that of the ``size`` samples after the first ``before``."""
    report((before + share * size) / total)


def make_embedded(cfg: Config, tokenizer: Any, device: torch.device, player: Player | None) -> EmbeddedEngine:
    """Return the engine that ``cfg`` describes; see ``EmbeddedEngine``."""
    return EmbeddedEngine(
        cfg.model.path,
        tokenizer,
        device=device,
        dtype=DTYPES[cfg.rollout.dtype or cfg.model.dtype],
        batch_size=cfg.rollout.batch_size,
        seed=cfg.seed,
        routed_experts=cfg.rollout.routed_experts,
        quantized=cfg.rollout.quantization == "fp8",
        fp32_head=cfg.uses_fp32_head,
        player=player,
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
