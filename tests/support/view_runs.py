"""Run folders to look at, written by the functions that a run writes with, from a seeded generator."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_gmpo.batch.images import ImageFolder, ImageRef, digest_of
from megatron_gmpo.batch.samples import Episode, Prompt, Sample, SampleGroup
from megatron_gmpo.metrics.token_records import Record, choose, write_records
from megatron_gmpo.rollout.images import StoredImage
from megatron_gmpo.rollout.replay import append_transcripts

MARKUP = (
    "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"
    "</script><script>document.title='owned'</script>"
)
"""Text that changes the page's title if it is read as markup."""
WORDS = (
    " the",
    " sum",
    " is",
    " 7",
    " +",
    " 35",
    ",",
    "\n",
    " so",
    " x",
    " =",
    " therefore",
    " answer",
    " Ω",
    ".",
)


def write_run(folder: Path, steps: int, *, num_steps: int | None = None, seed: int = 0) -> Path:
    """Write a run of ``steps`` steps: config, metrics, transcripts, events, heartbeats and tokens.

    The run is finished unless ``num_steps`` is larger than ``steps``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_steps = num_steps or steps
    (folder / "config.toml").write_text(
        f'[train]\nnum_steps = {num_steps}\n[reward]\nname = "math"\n[model]\npath = "tiny"\n'
        '[algorithm]\nloss = "gmpo"\nclip_low = 0.4\nclip_high = 0.4\n'
    )
    rng = np.random.default_rng(seed)
    add_steps(folder, 1, steps, rng)
    for step in range(max(1, steps - 2), steps + 1):
        add_samples(folder, step, rng)
    now = time.time()
    events = [
        {"event": "checkpoint", "step": step, "path": f"iter_{step}"} for step in range(10, steps + 1, 10)
    ]
    events.append({"event": "rollback", "step": steps // 2, "from_step": steps // 2 + 3, "rollbacks": 1})
    (folder / "events.jsonl").write_text("".join(json.dumps({"time": now - 60} | e) + "\n" for e in events))
    for rank in range(4):
        add_heartbeat(folder, rank, steps, now)
    if num_steps == steps:
        outcome = {"code": 0, "reason": "all steps are done", "step": steps, "time": now}
        (folder / "outcome.json").write_text(json.dumps(outcome))
    return folder


def add_steps(folder: Path, first: int, last: int, rng: np.random.Generator) -> None:
    """Append the lines of the steps ``first`` to ``last`` to metrics.jsonl; each is about 2 KB."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            file.write(json.dumps(figures(step, rng)) + "\n")


def figures(step: int, rng: np.random.Generator) -> dict[str, float]:
    learned = 1 - np.exp(-step / 60)
    noise = rng.normal(size=8)
    line = {
        "step": step,
        "reward/mean": 0.1 + 0.6 * learned + 0.04 * noise[0],
        "response_length/mean": 120 + 80 * learned + 4 * noise[1],
        "response_length/max": 380 + 9 * noise[2],
        "rollout/truncated_fraction": abs(0.02 * noise[3]),
        "loss": 0.01 * noise[0],
        "grad_norm": 0.4 + 0.1 * abs(noise[1]),
        "policy/entropy": 0.9 - 0.5 * learned + 0.02 * noise[2],
        "policy/kl_old": 1e-3 * abs(noise[3]),
        "policy/log_ratio_min": -0.8 - 0.3 * abs(noise[4]),
        "policy/log_ratio_max": 0.8 + 0.3 * abs(noise[5]),
        "policy/log_ratio_q001": -0.4 - 0.1 * abs(noise[4]),
        "policy/log_ratio_q999": 0.4 + 0.1 * abs(noise[5]),
        "policy/sequence_ratio_min": 0.92 - 0.01 * abs(noise[4]),
        "policy/sequence_ratio_max": 1.08 + 0.01 * abs(noise[5]),
        "policy/clip_fraction_low": 0.004 * abs(noise[6]),
        "policy/clip_fraction_high": 0.006 * abs(noise[7]),
        "rollout/logprob_diff_mean": 0.01 + 0.001 * abs(noise[0]),
        "rollout/logprob_diff_max": 0.4 + 0.1 * abs(noise[1]),
        "moe/load_max": 2 + 0.2 * abs(noise[2]),
        "moe/dead_experts": 0.0,
        "moe/router_entropy": 1.7 + 0.02 * noise[3],
        "time/rollout": 12 + abs(noise[4]),
        "time/train": 6 + 0.3 * abs(noise[5]),
        "time/weight_sync": 0.8,
        "time/other": 0.1,
        "time/step": 18.9 + abs(noise[4]) + 0.3 * abs(noise[5]),
        "throughput/tokens_per_second": 5000 + 100 * noise[6],
    }
    if step % 10 == 0:
        solved = min(1.0, 0.1 + 0.5 * learned)
        line |= {"eval/math500/pass@1": solved, "eval/math500/problems": 500.0}
        line |= {"eval/math500/ci_low@1": solved - 0.0625, "eval/math500/ci_high@1": solved + 0.03125}
    return {name: float(value) if name != "step" else step for name, value in line.items()}


def add_heartbeat(folder: Path, rank: int, step: int, now: float) -> None:
    (folder / "heartbeats").mkdir(exist_ok=True)
    beat = {"rank": rank, "node": f"node{rank // 2}", "pid": 7, "step": step, "phase": "rollout"}
    beat |= {"since": now - 30, "time": now - 2}
    (folder / "heartbeats" / f"rank_{rank:05d}.json").write_text(json.dumps(beat))


def add_samples(folder: Path, step: int, rng: np.random.Generator) -> list[Record]:
    """Append two groups of four samples to the transcripts, record the tokens of four, return the records."""
    groups, records = [], []
    for number in range(2):
        prompt = Prompt(f"math/{step}-{number}", "42", f"What is 7 + 35? {MARKUP if number else ''}")
        samples = [made_sample(rng, reward=float(i % 2)) for i in range(4)]
        groups.append(SampleGroup(prompt, samples))
        records += [made_record(prompt, i, sample, rng) for i, sample in enumerate(samples)]
    append_transcripts(folder / "transcripts.jsonl", step, dict(enumerate(groups)), 2)
    extremes = np.array([np.abs(record.log_ratio).max() for record in records])
    chosen = choose(extremes, 4, seed=step)
    kept = [Record(**vars(records[i]) | {"chosen": why}) for i, why in chosen.items()]
    write_records(folder / "tokens", step, {"loss": "gmpo, clip 0.4 and 0.4"}, kept)
    return kept


def add_episodes(folder: Path, step: int) -> None:
    """Append a group of two episodes to the transcripts: one done after two turns, one failed after one."""
    said = [
        {"role": "assistant", "content": "open the door"},
        {"role": "user", "content": f"It is open. {MARKUP}"},
        {"role": "assistant", "content": "go out"},
        {"role": "tool", "content": "Free."},
    ]
    done = Episode("done", "rooms", 1.0, True, 3, 1, 0.25, said)
    failed = Episode("error", messages=said[:1], error=f"ValueError: {MARKUP}")
    samples = [
        Sample(
            [1, 2, 3, 4, 5, 6][:length],
            [False, True, True, False, False, True][:length],
            [0.0] * length,
            "open the door",
            finish_reason,
            policy_version=0,
            reward=episode.reward,
            episode=episode,
        )
        for length, finish_reason, episode in ((6, "stop", done), (3, "abort", failed))
    ]
    group = SampleGroup(Prompt("rooms/7", "", "Leave the room."), samples)
    append_transcripts(folder / "transcripts.jsonl", step, {0: group}, 1)


def add_pictures(folder: Path, step: int) -> list[str]:
    """Append two groups with images to the transcripts: two in a message; one after a text.

    The response to the latter is an episode in which the first image is shown again.

    Returns:
        The names of the three images, which are 40, 50 and 60 pixels wide and 20 pixels high.
    """
    images = []
    for width in (40, 50, 60):
        encoded = io.BytesIO()
        Image.new("RGB", (width, 20), (200, 3 * width, 30)).save(encoded, "PNG")
        ref = ImageRef(digest_of(encoded.getvalue()), (1, 2, 4), ".png")
        images.append(StoredImage(ref, ImageFolder(folder / "images")))
        images[-1].folder.write(ref, encoded.getvalue())
    parts = [{"type": "text", "text": f"Is {MARKUP}"}, {"type": "image"}, {"type": "text", "text": "like"}]
    content = [*parts, {"type": "image"}]
    prompts = [
        Prompt("pictures/1", "42", messages=[{"role": "user", "content": content}], images=images[:2]),
        Prompt("pictures/2", "42", f"What? {MARKUP}", images=images[2:]),
    ]
    said = [
        {"role": "assistant", "content": "look"},
        {"role": "user", "content": [{"type": "image", "image": images[0].ref.name}]},
    ]
    sample = made_sample(np.random.default_rng(0), 1.0)
    episode = replace(sample, episode=Episode("done", messages=said))
    groups = {0: SampleGroup(prompts[0], [sample]), 1: SampleGroup(prompts[1], [episode])}
    append_transcripts(folder / "transcripts.jsonl", step, groups, 2)
    return [image.ref.name for image in images]


def made_sample(rng: np.random.Generator, reward: float) -> Sample:
    length = int(rng.integers(40, 90))
    answer = r" The answer is \boxed{42}." if reward else r" The answer is \boxed{41}."
    text = "".join(rng.choice(WORDS, length)) + answer
    return Sample.from_response(
        [1, 2, 3],
        np.full(length, 5),
        np.full(length, -0.5),
        text=text,
        finish_reason="stop",
        policy_version=0,
        reward=reward,
    )


def made_record(prompt: Prompt, index: int, sample: Sample, rng: np.random.Generator) -> Record:
    n = sample.response_length
    advantage = 1.0 if sample.reward else -1.0
    log_ratio = rng.normal(0, 0.08, n).astype(np.float32)
    log_ratio[rng.integers(n)] = rng.choice([-1, 1]) * rng.uniform(1, 2.5)
    clipped = log_ratio > 0.4 if advantage > 0 else log_ratio < -0.4
    bounded = np.minimum(log_ratio, 0.4) if advantage > 0 else np.maximum(log_ratio, -0.4)
    ids = rng.integers(len(WORDS), size=n)
    return Record(
        prompt_id=prompt.id,
        index=index,
        prompt=prompt.text or "",
        chosen="random",
        reward=sample.reward,
        advantage=advantage,
        sequence_ratio=float(np.exp(bounded.mean())),
        ids=ids,
        text=[WORDS[i] for i in ids],
        log_ratio=log_ratio,
        clipped=clipped,
        entropy=rng.gamma(1, 0.5, n).astype(np.float32),
        rollout_difference=rng.normal(0, 0.01, n).astype(np.float32),
        layers_rerouted=rng.poisson(0.4, n),
    )
