"""A rollout engine in the trainer's processes: a transformers model with a complete copy on each rank."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from ..batch.samples import Prompt, Sample, SampleGroup, narrow_experts
from ..config import Config
from ..distributed import agreed, rank, world_size
from ..errors import InputError, NonFiniteError
from ..metrics.figures import Metric
from ..models import fp8_blocks
from ..models.description import DTYPES
from .embedded_model import load_model, tower_names, weight_slots
from .embedded_routers import RoutedExperts, RouterNoise
from .ending import Ending, end_token_ids
from .engine import SamplingParams, report_nothing
from .episode import Generate
from .images import RunImages
from .lockstep import in_lockstep
from .player import Player
from .response import Context, Response

if TYPE_CHECKING:
    from .embedded_vision import EmbeddedVision


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
        images: the images of the run; None for a model without vision.
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
        images: RunImages | None = None,
    ) -> None:
        if player:
            with agreed():
                player.start()
        self.model = load_model(model_path, dtype, device, fp32_head=fp32_head, vision=bool(images))
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.seed = seed
        self.version = 0
        self._calls = self._batches = 0
        self._player, self._loop = player, asyncio.Runner()
        self._quantized = quantized
        self._slots = weight_slots(self.model)
        self._end_ids = end_token_ids(self.model.config, self.model.generation_config, tokenizer)
        self._routing = RoutedExperts(self.model) if routed_experts else None
        self._noise = RouterNoise(self.model)
        self._vision: EmbeddedVision | None = None
        if images:
            from .embedded_vision import EmbeddedVision  # not for text models

            self._vision = EmbeddedVision(self.model, images)

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
            if self._vision:
                for group in groups.values():
                    self._vision.images.keep(group.prompt.images)
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
            batch = [prompts[i] for i, _ in places[start : start + self.batch_size]]
            contexts = [Context(prompt.input_ids, prompt.images) for prompt in batch]
            report = partial(_report_part, sampling.report, start, len(batch), len(places))
            of_batch = replace(sampling, report=report)
            responses = self._decode(contexts, [sampling.max_new_tokens] * len(batch), of_batch, ending)
            samples += [r.to_sample(prompt, ending) for prompt, r in zip(batch, responses, strict=True)]
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

        def decode(contexts: list[Context], limits: list[int]) -> list[Response]:
            return self._decode(contexts, limits, of_turn, ending)

        return self._loop.run(in_lockstep(len(places), self.batch_size, play, decode))

    @torch.no_grad()
    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See ``RolloutEngine.update_weights``. The vision tower may be left out: then it stays."""
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
        if self._vision and missing >= (tower := set(tower_names(self._slots))):
            missing -= tower
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
        self, contexts: list[Context], limits: list[int], sampling: SamplingParams, ending: Ending
    ) -> list[Response]:
        """Decode the next batch of B responses of this ``generate``, token by token.

        ``limits`` are B maximum numbers of new tokens, instead of ``sampling.max_new_tokens``.
        """
        generator = self._next_generator()
        self._noise.std, self._noise.generator = sampling.router_noise, generator
        logits, pad, position, cache, context_experts = self._prefill(contexts)
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
                position = position[unfinished]
                cache.batch_select_indices(unfinished)
            logits = self._forward(token[:, None], position + step, pad, cache)
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
                known = contexts[i].recorded
                routed = torch.cat([context_experts[i][known:], experts[i, : len(sampled) - 1]])
                response.routed_experts = narrow_experts(routed.cpu().numpy())
            responses.append(response)
        return responses

    def _next_generator(self) -> torch.Generator:
        key = np.random.SeedSequence([self.seed, self.version, self._calls, self._batches, rank()])
        self._batches += 1
        return torch.Generator(self.device).manual_seed(int(key.generate_state(1, np.uint64)[0]))

    def _prefill(self, contexts: list[Context]) -> tuple[Tensor, Tensor, Tensor, DynamicCache, list[Tensor]]:
        """Prefill every distinct context once and copy its cache for each of the B responses.

        Returns:
            (B, V) logits of the first response token; (B, 1) number of empty slots on the left; (B, 1)
            position of the first response token; the cache of B rows; (tokens, layers, topk) experts of each
            response's context, [] if they are not recorded.
        """
        keys = [
            (tuple(np.asarray(context.tokens).tolist()), tuple(image.ref for image in context.images))
            for context in contexts
        ]
        distinct = sorted(set(keys), key=lambda key: len(key[0]))
        place = {key: row for row, key in enumerate(distinct)}
        width = len(distinct[-1][0])
        assert len(distinct[0][0]) > 0, "a prompt without input_ids"
        padded = [[0] * (width - len(tokens)) + list(tokens) for tokens, _ in distinct]
        ids = torch.tensor(padded, device=self.device)  # (D, P) left-padded
        pad = width - torch.tensor([[len(tokens)] for tokens, _ in distinct], device=self.device)  # (D, 1)
        positions = (torch.arange(width, device=self.device)[None] - pad).clamp(min=0)  # (D, P)
        images, after = {}, width - pad
        if self._vision:
            images, positions, delta = self._vision.inputs(ids, pad, [refs for _, refs in distinct])
            after = after + delta
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, positions, pad, cache, **images)  # (D, V)
        experts: list[Tensor] = []
        if self._routing:
            by_prompt = self._routing.latest(len(ids))  # (D, P, layers, topk)
            experts = [by_prompt[place[key], width - len(key[0]) :] for key in keys]
        spread = torch.tensor([place[key] for key in keys], device=self.device)
        cache.batch_select_indices(spread)
        return logits[spread], pad[spread], after[spread], cache, experts

    def _forward(
        self, ids: Tensor, positions: Tensor, pad: Tensor, cache: DynamicCache, **images: Tensor
    ) -> Tensor:
        """Run (B, T) new tokens after the cached ones; return (B, V) fp32 logits of the last token.

        Args:
            positions: (B, T), or (3, B, T) in time, height and width.
            pad: (B, 1) number of empty slots on the left.
            images: arguments of the model for the images of the tokens.
        """
        slots = torch.arange(cache.get_seq_length() + ids.shape[1], device=self.device)
        mask = (slots >= pad).long() if bool(pad.any()) else None
        out = self.model(
            ids,
            attention_mask=mask,
            position_ids=positions.expand(3, *positions.shape[-2:]) if self._vision else positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
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


def make_embedded(
    cfg: Config,
    tokenizer: Any,
    device: torch.device,
    player: Player | None,
    images: RunImages | None = None,
) -> EmbeddedEngine:
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
        images=images,
    )


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
