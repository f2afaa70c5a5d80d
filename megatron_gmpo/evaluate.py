"""Measure pass@1, pass@k and maj@k on benchmarks.

Usage::

    python -m megatron_gmpo.evaluate CONFIG.toml --section.key value ...
    python -m megatron_gmpo.evaluate --compare A B
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    import signal
    import sys

    from .command_line import one_line_errors, parse_options_and_config
    from .metrics.comparison import Comparison, compare

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run starts: no traceback of the imports

    with one_line_errors():
        options, _ = parse_options_and_config(Comparison, sys.argv[1:], "megatron-gmpo evaluate")
        if options.compare:
            print(compare(options.compare))
            sys.exit()

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from . import files
from .batch.index import StepIndex
from .batch.samples import Prompt, SampleGroup
from .config import Config, EvalConfig
from .distributed import agreed, rank, world_size
from .errors import InputError
from .metrics.evaluations import Evaluated, pass_rates, report, table
from .metrics.intervals import interval
from .metrics.progress import SILENT, Progress
from .rewards.votes import majority, votes
from .rollout.collect import Reward, score
from .rollout.engine import RolloutEngine, SamplingParams
from .rollout.replay import append_transcripts
from .run import closing_reward, prepare, start_command


def evaluate(
    engine: RolloutEngine,
    sets: dict[str, list[Prompt]],
    reward: Reward,
    cfg: EvalConfig,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    records: dict[str, Evaluated] | None = None,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Sample and score every benchmark. Collective; all ranks get equal results.

    Args:
        engine: rollout engine with the weights to evaluate.
        sets: benchmarks by name.
        reward: function that scores a response. A response passes if its score is at least
            ``cfg.pass_reward``.
        cfg: number of samples per prompt, temperature and values of k.
        max_new_tokens: maximum length of a response if ``cfg`` does not set one.
        stop: strings that end a response.
        records: dictionary that receives the samples of each benchmark.
        progress: shows the share of the responses that are finished.

    Returns:
        For each benchmark ``eval/{set}/pass@{k}`` with the ends of its 95 % interval over problems,
        ``ci_low@{k}`` and ``ci_high@{k}``, and ``maj@{k}``, the share of problems whose majority answer among
        the first k > 1 samples passes; the means ``reward``, ``response_length`` and ``truncated_fraction``;
        ``timeouts``, the number of responses whose check exceeded its time limit; ``problems``; and the
        figures of ``success_rates``.
    """
    sampling = SamplingParams(
        n=cfg.samples_per_prompt,
        max_new_tokens=cfg.max_new_tokens or max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        stop=stop,
    )
    results: dict[str, float] = {}
    for name, prompts in sets.items():
        with progress.part(f"evaluation of {name}", len(prompts) * sampling.n) as finished:
            groups = engine.generate(prompts, replace(sampling, report=finished))
        timeouts = score(groups, reward)
        index = StepIndex.gather(groups, len(prompts))
        passed = np.array([int((rewards >= cfg.pass_reward).sum()) for rewards in index.rewards_of_groups()])
        figures = pass_rates(passed, sampling.n, cfg.k)
        figures |= majority_rates(groups, len(prompts), reward, cfg)
        figures |= success_rates(groups, len(prompts), sampling.n)
        figures |= {
            "reward": fmean(index.reward.tolist()),
            "response_length": fmean(index.response_length.tolist()),
            "truncated_fraction": fmean(index.truncated.tolist()),
            "timeouts": timeouts,
            "problems": len(prompts),
        }
        results |= {f"eval/{name}/{figure}": value for figure, value in figures.items()}
        if records is not None:
            records[name] = Evaluated(prompts, passed, figures, groups)
    return results


def majority_rates(
    groups: dict[int, SampleGroup], problems: int, reward: Reward, cfg: EvalConfig
) -> dict[str, float]:
    """Return ``maj@{k}`` for each k > 1. Collective.

    Args:
        groups: this rank's scored groups.
        problems: number of problems on all ranks.
    """
    ks = [k for k in cfg.k if k > 1]
    counts = torch.zeros(len(ks), dtype=torch.int64)

    def passes(group: SampleGroup) -> list[bool]:
        """Return for each k whether the majority of the first k samples passes."""
        passed = [value >= cfg.pass_reward for value in group.rewards]
        if not any(passed):
            return [False] * len(ks)
        found = votes(reward, group, passed)
        return [(winner := majority(found, k)) is not None and passed[winner] for k in ks]

    with agreed(), ThreadPoolExecutor() as pool:
        for won in pool.map(passes, groups.values() if ks else ()):
            counts += torch.tensor(won)
    if world_size() > 1:
        dist.all_reduce(counts)
    return {f"maj@{k}": count / problems for k, count in zip(ks, counts.tolist(), strict=True)}


def success_rates(groups: dict[int, SampleGroup], problems: int, n: int) -> dict[str, float]:
    """Return the figures of episodes; none without episodes. Collective.

    ``success`` is the share of episodes that the environment calls a success, with the ends of its 95 %
    interval over problems, ``ci_low@success`` and ``ci_high@success``. ``environment_errors`` counts the
    episodes in which the environment failed; they are no success.

    Args:
        groups: this rank's groups.
        problems: number of problems on all ranks.
        n: number of samples of a problem.
    """
    counts = torch.zeros(4, problems, dtype=torch.int64)  # episodes, told, successes, errors
    for position, group in groups.items():
        for episode in (sample.episode for sample in group.samples if sample.episode):
            told, failed = episode.success is not None, episode.ended == "error"
            counts[:, position] += torch.tensor([1, told, bool(episode.success) and not failed, failed])
    if world_size() > 1:
        dist.all_reduce(counts)
    episodes, told, _, errors = counts.sum(1).tolist()
    figures: dict[str, float] = {"environment_errors": errors} if episodes else {}
    if told:
        shares = counts[2].numpy() / n
        figures["success"] = fmean(shares.tolist())
        figures["ci_low@success"], figures["ci_high@success"] = interval(shares)
    return figures


def sampling_of(cfg: Config) -> dict[str, Any]:
    """Return the settings by which responses are sampled and judged, ready for JSON."""
    settings = cfg.eval.model_dump(mode="json", exclude={"sets", "interval", "before", "folder"})
    settings["max_new_tokens"] = cfg.eval.max_new_tokens or cfg.rollout.max_new_tokens
    return settings | {"stop": list(cfg.rollout.stop), "reward": cfg.reward.name}


def main(cfg: Config) -> None:
    """Evaluate the newest checkpoint of ``run_dir``, else ``model.path``, on all ``eval.sets``."""
    if not cfg.eval.sets:
        raise InputError(
            "eval.sets is empty: name a benchmark, e.g. --eval.sets.math500 {} or "
            "--eval.sets.mine.path problems.parquet"
        )
    run = prepare(cfg, train=False)
    run.start()
    run.verify_checkpoint()
    evaluated = cfg.model.path
    with (
        closing(run.engine()) as engine,
        closing_reward(run.reward),
        Progress(enabled=cfg.log.progress) as progress,
    ):
        policy = run.policy(trainable=False)
        if run.checkpoint:
            policy.load_weights(run.checkpoint)
            evaluated = str(run.checkpoint)
        engine.update_weights(policy.export_hf(), version=run.step)
        records: dict[str, Evaluated] = {}
        results = evaluate(
            engine,
            run.eval_sets,
            run.reward,
            cfg.eval,
            cfg.rollout.max_new_tokens,
            cfg.rollout.stop,
            records,
            progress,
        )
    transcripts = {name: run.run_dir / f"evaluation_{name}.jsonl" for name in records}
    with agreed():
        if rank() == 0:
            run.run_dir.mkdir(parents=True, exist_ok=True)
            about = {"evaluated": evaluated, "step": run.step, "sampling": sampling_of(cfg)}
            sets = report(records, cfg.eval)
            files.write(run.run_dir / "evaluation.json", json.dumps(about | {"sets": sets}, indent=1))
            # a file has no width, and rich would take 80 columns
            Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(table(sets))
            print(json.dumps({"evaluated": evaluated, **results}), flush=True)
            for file in transcripts.values():
                file.unlink(missing_ok=True)
    for name, file in transcripts.items():
        append_transcripts(file, engine.version, records[name].groups, limit=len(run.eval_sets[name]))


if __name__ == "__main__":
    start_command(main)
