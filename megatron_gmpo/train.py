"""GMPO training: ``torchrun --nproc-per-node N -m megatron_gmpo.train CONFIG.toml --section.key value ...``

Every step: sync the rollout engine's weights, sample and score groups of responses, turn rewards into advantages, take the policy's log
probabilities before the first update, then make one optimizer step for each minibatch.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    import sys

    from .supervision.signals import listen

    listen()

    from .command_line import load_config, one_line_errors

    with one_line_errors():
        load_config(sys.argv[1:])

import logging
from contextlib import closing, nullcontext

from .batch.assembly import make_train_batch
from .batch.columns import TrainBatch
from .batch.samples import SampleGroup
from .checkpoint import latest_checkpoint
from .config import Config
from .distributed import barrier, rank, world_size
from .errors import NonFiniteError
from .evaluate import evaluate
from .losses.adaptive_clip import AdaptiveClip, make_adaptive_clip
from .losses.advantages import group_advantages
from .losses.correction import correct, rollout_mismatch
from .losses.objective import Objective, make_objective
from .metrics.figures import Metric, reduce_metrics
from .metrics.logger import MetricLogger, Timer
from .metrics.progress import Progress
from .rollout.collect import Collected, rollout_figures
from .rollout.engine import RolloutEngine
from .rollout.replay import append_transcripts, load_groups, save_groups
from .run import Run, closing_reward, prepare, start_command
from .state import TrainingState
from .supervision.attempt import Attempt

log = logging.getLogger(__name__)

WORK = ("rollout", "logprobs", "train", "weight_sync")
"""The phases of a step that throughput counts; evaluation and checkpoints are not in it."""


def train(run: Run, attempt: Attempt) -> None:
    """Goes on from the newest checkpoint, if there is one, to ``train.num_steps`` or until it is asked to stop."""
    cfg = run.cfg
    objective = make_objective(
        cfg.algorithm, is_moe=run.description.is_moe, max_new_tokens=cfg.rollout.max_new_tokens
    )
    clip = make_adaptive_clip(cfg.algorithm, objective)
    run.start()
    step = run.step
    if step >= cfg.train.num_steps:
        if rank() == 0:
            print(
                f"{run.checkpoint} has {step} of {cfg.train.num_steps} steps: nothing to do; to go on raise train.num_steps"
            )
        return
    attempt.start(run.device, run.checkpoint_bytes)
    with (
        closing_reward(run.reward),
        closing(run.engine()) if run.prompts or run.eval_sets else nullcontext() as engine,
    ):
        _train(run, attempt, objective, clip, engine)


def _train(
    run: Run, attempt: Attempt, objective: Objective, clip: AdaptiveClip | None, engine: RolloutEngine | None
) -> None:
    cfg, num_steps = run.cfg, run.cfg.train.num_steps
    state = TrainingState(run, objective, clip, engine)  # while servers start
    policy = state.policy
    run.write_config()
    logger = MetricLogger(
        run.run_dir,
        tensorboard=cfg.log.tensorboard,
        wandb_project=cfg.log.wandb_project,
        config=cfg.model_dump(mode="json"),
        resume_step=state.step,
    )
    if state.step:
        logger.event("resume", step=state.step, checkpoint=str(run.checkpoint))
    timer = Timer(attempt.enter)
    routing = run.description.routing if cfg.needs_rollout_routing else None

    def rollout() -> Collected:
        if cfg.rollout.replay_path:
            groups = load_groups(cfg.rollout.replay_path, state.step)
            return Collected(groups, rollout_figures(groups))
        assert engine
        assert state.collector
        with timer("weight_sync"):
            engine.update_weights(policy.export_hf(), version=state.step)
        with timer("rollout"):
            collected = state.collector.collect(steps_left=num_steps - state.step)
            engine.sleep()
        return Collected(collected.groups, collected.metrics | engine.take_metrics())

    def evaluation() -> dict[str, float]:
        if not (engine and run.eval_sets):
            return {}
        with timer("evaluation"):
            engine.update_weights(policy.export_hf(), version=state.step)
            results = evaluate(
                engine, run.eval_sets, run.reward, cfg.eval, cfg.rollout.max_new_tokens, cfg.rollout.stop
            )
            engine.sleep()
        return results

    def save() -> None:
        with timer("checkpoint"):
            state.save(logger)

    log.info(_headline(run, objective.description))
    minibatch: TrainBatch | None = None
    with Progress(num_steps, done=state.step, enabled=cfg.log.progress) as progress:
        try:
            if state.step == 0 and cfg.eval.before and (before := evaluation()):
                progress.note(_results("before training", logger.log(0, before)))
            timer.take()

            while state.step < num_steps and not attempt.stops(state.step):
                collected = rollout()
                advantages = group_advantages(collected.groups, cfg.algorithm.advantage)
                batch = make_train_batch(collected.groups, advantages, routing)
                with timer("logprobs"):
                    logger.add(policy.set_old_logprobs(batch))
                    logger.add(correct(batch, cfg.algorithm))
                    if "ref_logprobs" in objective.needs:
                        batch.ref_logprobs = policy.reference_logprobs(batch)
                    objective.add_columns(batch)
                updates: list[dict[str, Metric]] = []
                with timer("train"):
                    for minibatch in batch.split(cfg.train.minibatches_per_step):  # one optimizer step each
                        updates.append(policy.train_step(minibatch, state.objective))
                learned = reduce_metrics(updates)
                logger.add(
                    learned
                    | {
                        "policy/clip_low": state.objective.clip_low,
                        "policy/clip_high": state.objective.clip_high,
                    }
                )
                state.adapt_clip(learned)
                state.step += 1

                logger.add(collected.metrics | rollout_mismatch(batch))
                results = (
                    evaluation() if _due(cfg.eval.interval, state.step) or state.step == num_steps else {}
                )
                spent = timer.take()
                logger.add(
                    {
                        "throughput/tokens_per_second": len(batch.tokens)
                        / sum(spent.get(f"time/{name}", 0) for name in WORK)
                    }
                    | spent
                )
                _write_rollouts(run, state.step, collected.groups)
                figures = logger.log(state.step, results)
                progress.update(state.step, figures)
                if results:
                    progress.note(_results(f"after step {state.step}", results))
                if collapse := state.find_collapse(figures):
                    progress.note(state.react(collapse, logger))
                # last: what a kill leaves logged beyond the checkpoint, the resumed run does again
                due = _due(cfg.checkpoint.save_interval, state.step) or (
                    state.step == num_steps and cfg.checkpoint.save_final
                )
                if due and state.saved_step != state.step:  # it was, if the run has gone back
                    save()
            if state.step < num_steps:  # asked to stop
                if state.saved_step != state.step:
                    save()
                attempt.saved(state.step)
        except NonFiniteError as error:
            raise _stopped(error, state.step + 1, minibatch, run, logger) from None
        barrier()
    logger.close()


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _write_rollouts(run: Run, step: int, groups: list[SampleGroup]) -> None:
    append_transcripts(run.transcripts, step, groups, run.cfg.log.transcripts_per_step)
    if run.cfg.rollout.save_path:
        save_groups(run.cfg.rollout.save_path, step - 1, groups)


def _headline(run: Run, loss: str) -> str:
    kind = "MoE" if run.description.is_moe else "dense"
    problems = f"{len(run.prompts)} problems" if run.prompts else f"replay of {run.cfg.rollout.replay_path}"
    resumed = f"; resumed at step {run.step}" if run.step else ""
    return f"{run.description.hf.model_type} ({kind}) on {world_size()} ranks; {problems}; loss {loss}; run_dir {run.run_dir}{resumed}"


def _results(when: str, figures: dict[str, float]) -> str:
    shown = [
        f"{name.removeprefix('eval/')} {value:.3f}" for name, value in figures.items() if "/pass@" in name
    ]
    return f"evaluation {when}: " + ", ".join(shown)


def _stopped(
    error: NonFiniteError, step: int, minibatch: TrainBatch | None, run: Run, logger: MetricLogger
) -> NonFiniteError:
    """Writes the last minibatch, the one that broke the run, and says where it and the last checkpoint are."""
    line = f"step {step}: {error}"
    if (
        minibatch is not None and rank() == 0
    ):  # no collective here: a rollout may have failed on one rank alone
        file = run.run_dir / f"nonfinite_step_{step:06d}.safetensors"
        minibatch.save(file)
        line += f"; the last minibatch is in {file}"
    if kept := latest_checkpoint(run.checkpoint_dir):
        line += f"; the last checkpoint is {kept}"
    logger.event("nonfinite", step=step, reason=line)
    return NonFiniteError(line)


def main(cfg: Config) -> None:
    with Attempt(cfg) as attempt:
        train(prepare(cfg, train=True), attempt)


if __name__ == "__main__":
    start_command(main)
