"""Measure pass@1 and pass@k on benchmarks.

Usage::

    python -m megatron_gmpo.evaluate CONFIG.toml --section.key value ...
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    import signal
    import sys

    from .command_line import load_config, one_line_errors

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run starts: no traceback of the imports

    with one_line_errors():
        load_config(sys.argv[1:], "megatron-gmpo evaluate")

import json
from contextlib import closing
from math import comb
from statistics import fmean

from .batch.index import StepIndex
from .batch.samples import Prompt, SampleGroup
from .config import Config, EvalConfig
from .distributed import rank
from .errors import InputError
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
    records: dict[str, dict[int, SampleGroup]] | None = None,
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
        records: dictionary that receives this rank's scored groups of each benchmark.

    Returns:
        The means ``eval/{set}/pass@{k}``, ``eval/{set}/reward`` and ``eval/{set}/response_length`` over the
        benchmark, ``eval/{set}/timeouts``, the number of responses whose check exceeded its time limit, and
        ``eval/{set}/problems``.
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
        groups = engine.generate(prompts, sampling)
        timeouts = score(groups, reward)
        index = StepIndex.gather(groups, len(prompts))
        passed = [int((rewards >= cfg.pass_reward).sum()) for rewards in index.rewards_of_groups()]
        for k in cfg.k:
            results[f"eval/{name}/pass@{k}"] = fmean(pass_at_k(sampling.n, c, k) for c in passed)
        results[f"eval/{name}/reward"] = fmean(index.reward.tolist())
        results[f"eval/{name}/response_length"] = fmean(index.response_length.tolist())
        results[f"eval/{name}/timeouts"] = timeouts
        results[f"eval/{name}/problems"] = len(prompts)
        if records is not None:
            records[name] = groups
    return results


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that at least one of ``k`` samples passes if ``c`` of ``n`` samples passed.

    The estimate 1 - C(n-c, k) / C(n, k) is unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    assert 0 <= c <= n, (c, n)
    assert 1 <= k <= n, (k, n)
    return 1 - comb(n - c, k) / comb(n, k)


def main(cfg: Config) -> None:
    """Evaluate the newest checkpoint of ``run_dir``, else ``model.path``, on all ``eval.sets``."""
    if not cfg.eval.sets:
        raise InputError(
            "eval.sets is empty: name a benchmark, e.g. --eval.sets.math500.path math500.parquet"
        )
    run = prepare(cfg, train=False)
    run.start()
    run.verify_checkpoint()
    evaluated = cfg.model.path
    with closing(run.engine()) as engine, closing_reward(run.reward):
        policy = run.policy(trainable=False)
        if run.checkpoint:
            policy.load_weights(run.checkpoint)
            evaluated = str(run.checkpoint)
        engine.update_weights(policy.export_hf(), version=run.step)
        records: dict[str, dict[int, SampleGroup]] = {}
        results = evaluate(
            engine, run.eval_sets, run.reward, cfg.eval, cfg.rollout.max_new_tokens, cfg.rollout.stop, records
        )
    for name, groups in records.items():
        file = run.run_dir / f"evaluation_{name}.jsonl"
        if rank() == 0:
            run.run_dir.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
        append_transcripts(file, engine.version, groups, limit=len(run.eval_sets[name]))
    if rank() == 0:
        print(json.dumps({"evaluated": evaluated, **results}))


if __name__ == "__main__":
    start_command(main)
