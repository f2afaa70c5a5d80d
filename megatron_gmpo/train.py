"""Train with GMPO: ``torchrun --nproc-per-node N -m megatron_gmpo.train CONFIG.toml --section.key value ...``

Every step syncs the rollout engine's weights, samples and scores groups of responses, turns rewards into
advantages, computes the log probabilities that the loss needs before the first update, and then makes one
optimizer step per minibatch.
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
from dataclasses import replace

from torch import Tensor

from .batch.assembly import make_train_batch
from .batch.columns import TrainBatch
from .batch.samples import SampleGroup
from .checkpoint import clear_unfinished
from .config import Config
from .distributed import barrier, rank
from .errors import NonFiniteError
from .evaluate import evaluate
from .losses.adaptive_clip import make_adaptive_clip
from .losses.advantages import group_advantages
from .losses.correction import correct, rollout_mismatch
from .losses.objective import Objective, make_objective
from .metrics.figures import Metric, reduce_metrics
from .metrics.logger import MetricLogger, Timer, throughput
from .metrics.progress import Progress
from .policy.observed import TokenRecorder
from .rollout.collect import Collected, replayed
from .rollout.engine import RolloutEngine
from .rollout.replay import append_transcripts, check_groups, load_share, save_groups
from .run import Run, closing_reward, prepare, start_command
from .state import TrainingState
from .supervision.attempt import Attempt

log = logging.getLogger("megatron_gmpo.train")  # __name__ is "__main__" when this module runs as the command


def train(run: Run, attempt: Attempt) -> None:
    """Train from the newest checkpoint, if any, to ``train.num_steps`` or until the run is asked to stop."""
    cfg = run.cfg
    objective = make_objective(
        cfg.algorithm, is_moe=run.description.is_moe, max_new_tokens=cfg.max_sequence_tokens
    )
    clip = make_adaptive_clip(cfg.algorithm, objective)
    run.start()
    warning = cfg.rollout_ratio_warning(is_moe=run.description.is_moe)
    if warning and rank() == 0:
        log.warning(warning)
    run.verify_checkpoint()
    if run.step >= cfg.train.num_steps:
        if rank() == 0:
            print(
                f"{run.checkpoint} has {run.step} of {cfg.train.num_steps} steps: nothing to do; "
                "raise train.num_steps to continue"
            )
        return
    if run.damage and cfg.rollout.replay_path:  # an older checkpoint needs earlier steps
        check_groups(cfg.rollout.replay_path, range(run.step, cfg.train.num_steps))
    if rank() == 0:
        clear_unfinished(run.checkpoint_dir)
    attempt.start(run.device, *run.needed_space())
    with (
        closing_reward(run.reward),
        closing(run.engine()) if run.prompts or run.eval_sets else nullcontext() as engine,
        closing(TrainingState(run, objective, clip, engine)) as state,  # loads weights while servers start
    ):
        run.write_config()
        Loop(run, attempt, state, engine).run_steps()


class Loop:
    """The training loop of one attempt.

    Args:
        run: the checked config and what it loads.
        attempt: decides whether the run stops early.
        state: the state that changes from step to step.
        engine: None if saved rollouts are replayed and nothing is evaluated.
    """

    def __init__(
        self, run: Run, attempt: Attempt, state: TrainingState, engine: RolloutEngine | None
    ) -> None:
        self.run, self.cfg, self.attempt, self.state, self.engine = run, run.cfg, attempt, state, engine
        self.timer = Timer(attempt.enter)
        self.logger = MetricLogger(
            run.run_dir,
            tensorboard=run.cfg.log.tensorboard,
            wandb_project=run.cfg.log.wandb_project,
            config=run.cfg.model_dump(mode="json"),
            resume_step=state.step,
        )
        self.recorder = TokenRecorder(
            run.run_dir / "tokens", run.cfg.log.tokens_per_step, run.tokenizer, state.policy.leads_replica
        )
        self.exchange = run.exchange(state.policy.replica)
        # the newest minibatch, which is written to the run folder if it causes an error
        self.minibatch: TrainBatch | None = None

    def run_steps(self) -> None:
        """Take steps until ``train.num_steps``, or until the attempt stops; then save.

        Raises:
            NonFiniteError: a loss, a gradient or a weight is not finite; the line names the files written.
        """
        cfg, state, num_steps = self.cfg, self.state, self.cfg.train.num_steps
        if state.step:
            self.logger.event("resume", step=state.step, checkpoint=str(self.run.checkpoint))
        if self.run.damage:
            self.logger.event("fall_back", step=state.step, reason=self.run.damage)
        log.info(self.run.headline(state.objective.description))
        with Progress(num_steps, done=state.step, enabled=cfg.log.progress) as progress:
            try:
                if state.step == 0 and cfg.eval.before and (before := self.evaluate(progress)):
                    progress.results("before training", self.logger.log(0, before))
                self.timer.take()
                while state.step < num_steps and not self.attempt.stops(state.step, saving=state.saving):
                    self.step(progress)
                self.finish_save()
                if state.step < num_steps:  # the run was asked to stop
                    self.start_save()
                    self.finish_save()
                    self.attempt.saved(state.step)
            except NonFiniteError as error:
                with self.timer("checkpoint"):
                    raise state.stopped_by(error, self.minibatch, self.logger) from None
            barrier()
        self.logger.close()

    def step(self, progress: Progress) -> None:
        """Collect groups, train on them and log; evaluate and save at their intervals."""
        cfg, state = self.cfg, self.state
        collected = self.collect()
        self.finish_save(wait=False)
        self._write_rollouts(collected.groups)  # before training, which takes the samples
        advantages = group_advantages(collected.index, state.objective.advantage)
        objective = self.recorder.observe(state.objective, collected.groups)
        learned = self.learn(self.make_batch(collected, advantages), objective)
        if cfg.log.tokens_per_step:
            with self.timer("record"):
                self.recorder.write(state.step + 1, collected.index)
        clips = {"policy/clip_low": state.objective.clip_low, "policy/clip_high": state.objective.clip_high}
        self.logger.add(learned | clips)
        if advantages.any():  # else the clip fractions say nothing
            state.adapt_clip(learned)
        state.step += 1
        self.logger.add(collected.metrics)

        last = state.step == cfg.train.num_steps
        results = self.evaluate(progress) if last or _due(cfg.eval.interval, state.step) else {}
        collapse = state.find_collapse(self.logger.figures)
        due = _due(cfg.checkpoint.save_interval, state.step) or (last and cfg.checkpoint.save_final)
        if due and not (collapse and cfg.collapse.action != "warn"):
            self.start_save(background=cfg.checkpoint.async_save and not last)
        seconds, tokens = self.timer.take(), int(collected.index.length.sum())
        self.logger.add(throughput(tokens, seconds) | seconds)
        figures = self.logger.log(state.step, results)
        progress.update(state.step, figures)
        # after the step's line is written: a run that resumes from the checkpoint does not log it again
        self.finish_save(wait=last)
        if collapse:
            progress.note(state.react(collapse, self.logger))

    def collect(self) -> Collected:
        """Return the step's scored groups, sampled now or read from ``rollout.replay_path``."""
        state, replay_path = self.state, self.cfg.rollout.replay_path
        if replay_path:
            vocab_size, images = self.run.description.hf.vocab_size, self.run.images
            return replayed(load_share(replay_path, state.step, vocab_size, images))
        assert self.engine
        assert state.collector
        with self.timer("weight_sync"):
            self.engine.update_weights(state.policy.export_hf(), version=state.step)
        with self.timer("rollout"):
            collected = state.collector.collect(steps_left=self.cfg.train.num_steps - state.step)
            self.engine.sleep()
        return replace(collected, metrics=collected.metrics | self.engine.take_metrics())

    def make_batch(self, collected: Collected, advantages: Tensor) -> TrainBatch:
        """Return this replica's batch with log probabilities, corrections and own columns."""
        cfg, policy, objective = self.cfg, self.state.policy, self.state.objective
        self.minibatch = None  # its columns keep the last step's file in memory
        index = collected.index.without_truncated() if cfg.algorithm.mask_truncated else collected.index
        plan = policy.plan(index, advantages, objective)
        with self.timer("exchange"):
            batch = make_train_batch(
                collected.groups,
                index,
                advantages,
                plan,
                self.exchange,
                policy.replica,
                cfg.algorithm.unit,
                self.run.description.vision,
            )
        with self.timer("logprobs"):
            self.logger.add(policy.prepare(batch))
            self.logger.add(policy.over_replicas(correct(batch, cfg.algorithm)))
            if "ref_logprobs" in objective.needs:
                batch.ref_logprobs = policy.reference_logprobs(batch)
            objective.add_columns(batch)
        return batch

    def learn(self, batch: TrainBatch, objective: Objective) -> dict[str, Metric]:
        """Make one optimizer step per minibatch and return the metrics of all minibatches."""
        policy = self.state.policy
        updates: list[dict[str, Metric]] = []
        policy.begin_step(self.state.step)
        minibatches = policy.minibatches(batch)
        with self.timer("train"):
            for minibatch in minibatches:
                self.minibatch = minibatch
                updates.append(policy.train_step(minibatch, objective))
        known = [minibatch for minibatch in minibatches if minibatch.old_logprobs is not None]
        return reduce_metrics(updates) | policy.over_replicas(rollout_mismatch(*known))

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Return the results on every benchmark of ``eval.sets``."""
        cfg = self.cfg
        if not (self.engine and self.run.eval_sets):
            return {}
        with self.timer("evaluation"):
            self.engine.update_weights(self.state.policy.export_hf(), version=self.state.step)
            results = evaluate(
                self.engine,
                self.run.eval_sets,
                self.run.reward,
                cfg.eval,
                cfg.rollout.max_new_tokens,
                cfg.rollout.stop,
                progress=progress,
            )
            self.engine.sleep()
        return results

    def start_save(self, *, background: bool = False) -> None:
        """Write a checkpoint unless this step already has one. A save in progress is completed first."""
        self.finish_save()
        if self.state.saved_step != self.state.step:
            with self.timer("checkpoint"):
                self.state.start_save(background=background)

    def finish_save(self, *, wait: bool = True) -> None:
        """Complete the save in progress, if any, when all ranks have written it."""
        if self.state.saving:
            with self.timer("checkpoint"):
                seconds = self.state.finish_save(self.logger, wait=wait)
            if seconds is not None:
                self.attempt.wrote_checkpoint(seconds)

    def _write_rollouts(self, groups: dict[int, SampleGroup]) -> None:
        step, cfg = self.state.step, self.cfg
        append_transcripts(self.run.transcripts, step + 1, groups, cfg.log.transcripts_per_step)
        if cfg.rollout.save_path:
            images = self.run.images
            save_groups(cfg.rollout.save_path, step, groups, images and images.folder)


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def main(cfg: Config) -> None:
    """Train the run that ``cfg`` describes."""
    with Attempt(cfg) as attempt:
        train(prepare(cfg, train=True), attempt)


if __name__ == "__main__":
    start_command(main)
