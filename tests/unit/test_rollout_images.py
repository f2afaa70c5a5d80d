"""Samples with images: the embedded engine against transformers, saved rollouts, and requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.config import Config
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import read_hf_config, vision_of
from megatron_gmpo.rollout.embedded import EmbeddedEngine
from megatron_gmpo.rollout.engine import SamplingParams
from megatron_gmpo.rollout.environments import EnvironmentFault, Observation, image_part, text_part
from megatron_gmpo.rollout.episode_images import with_names
from megatron_gmpo.rollout.images import RunImages, run_images
from megatron_gmpo.rollout.player import make_player
from megatron_gmpo.rollout.replay import append_transcripts, load_groups, load_share, save_groups
from megatron_gmpo.rollout.sglang.image_requests import ImageRequests
from megatron_gmpo.testing.tiny_models import make_tiny_model

from ..support.groups import in_order
from ..support.vision import SIZES, VisionReference, picture

References = Callable[[str], VisionReference]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """Return a function that returns the tiny model of a family, which it makes once."""

    @cache
    def reference(family: Any) -> VisionReference:
        folder = tmp_path_factory.mktemp(family)
        make_tiny_model(folder, family=family, num_layers=2, randomize_norms=True)
        return VisionReference(folder)

    return reference


def images_of(model: Path, run_dir: Path) -> RunImages:
    made = run_images(
        Config.model_validate({"model": {"path": str(model)}, "run_dir": str(run_dir)}),
        vision_of(read_hf_config(str(model))),
    )
    assert made
    return made


def engine_of(reference: VisionReference, images: RunImages, **others: Any) -> EmbeddedEngine:
    """Return an engine in fp32; ``others`` are further arguments."""
    return EmbeddedEngine(
        str(reference.folder),
        reference.tokenizer,
        device="cpu",
        dtype=torch.float32,
        batch_size=10,
        seed=1,
        images=images,
        **others,
    )


def prompts_of(reference: VisionReference, folder: Path) -> list[Prompt]:
    """Return a prompt of text, one with each of two images, and one with both, of different lengths."""
    one, other = (picture(*size, seed=i) for i, size in enumerate(SIZES[:2]))
    parts: list[list[str | bytes]] = [
        ["1 + 2?"],
        [one, "What?"],
        [other, "Which?"],
        ["Of ", one, " and ", other],
    ]
    return [reference.prompt(str(i), folder, part) for i, part in enumerate(parts)]


@pytest.mark.parametrize(
    ("family", "n"),
    [
        ("qwen3_vl", 1),
        pytest.param("qwen2_5_vl", 4, marks=pytest.mark.slow),
        pytest.param("qwen3_vl", 4, marks=pytest.mark.slow),
        pytest.param("qwen3_vl_moe", 4, marks=pytest.mark.slow),
    ],
)
def test_embedded_samples_with_images_are_what_transformers_says(
    references: References, family: str, n: int, tmp_path: Path
) -> None:
    """Prompts without, with one and with two images are padded to one length and share a prefill per group.

    transformers computes the positions itself, from a forward pass of the whole sample.
    """
    reference = references(family)
    model = reference.folder
    prompts = prompts_of(reference, tmp_path / "data")
    images = images_of(model, tmp_path / "run")
    engine = engine_of(reference, images, routed_experts=family == "qwen3_vl_moe")
    engine._end_ids = set()
    groups = in_order(engine.generate(prompts, SamplingParams(n=n, max_new_tokens=20, temperature=1.5)))
    stored = tmp_path / "run" / "images"
    assert sorted(file.name for file in stored.iterdir()) == sorted(
        {image.ref.name for prompt in prompts for image in prompt.images}
    )
    image_token_sampled = False
    for group in groups:
        for sample in group.samples:
            assert sample.images == group.prompt.image_refs
            expected = reference.logprobs(sample, stored, temperature=1.5)
            found = torch.from_numpy(sample.rollout_logprobs[sample.response_mask])
            assert_close(found, expected, atol=1e-5, rtol=0)
            if family == "qwen3_vl_moe":
                reference.assert_experts(sample)
            image_token_sampled |= reference.image_token in sample.tokens[sample.response_mask]
    assert image_token_sampled or n == 1  # which is then text
    blank = reference.prompt("blank", tmp_path / "data", [picture(*SIZES[0], seed=9), "What?"])
    sample = groups[1].samples[0]
    others = reference.logprobs(replace(sample, images=blank.image_refs), tmp_path / "data", temperature=1.5)
    assert (others - reference.logprobs(sample, stored, temperature=1.5)).abs().max() > 1e-2


def test_a_weight_sync_may_leave_out_the_tower_but_no_part_of_it(
    references: References, tmp_path: Path
) -> None:
    reference = references("qwen3_vl")
    model = reference.folder
    engine = engine_of(reference, images_of(model, tmp_path / "run"))
    doubled = {name: 2 * tensor for name, tensor in reference.hub_tensors().items()}
    language = {name: tensor for name, tensor in doubled.items() if ".visual." not in name}
    engine.update_weights(language.items(), 1)
    held = dict(engine.model.named_parameters())
    before = dict(reference.model.named_parameters())
    for name, tensor in held.items():
        assert torch.equal(tensor, before[name] * (1 if ".visual." in name else 2))
    engine.update_weights(doubled.items(), 2)
    assert all(torch.equal(tensor, 2 * before[name]) for name, tensor in held.items())
    with pytest.raises(InputError, match="1 tensors of the rollout model were not sent: model"):
        engine.update_weights(
            [item for item in doubled.items() if item[0] != "model.visual.merger.norm.weight"], 3
        )


def saved(reference: VisionReference, folder: Path) -> SampleGroup:
    """Return a group of two samples of a prompt with two images, whose files are in ``folder``."""
    one, other = picture(56, 84), picture(30, 30, seed=1)
    prompt = reference.prompt("set/1", folder, ["Of ", one, " and ", other, "?"])
    samples = [
        Sample.from_response(
            prompt.input_ids,
            [reference.image_token, 5],
            [-1.5, -0.5],
            text="b",
            finish_reason="length",
            policy_version=1,
            reward=float(i),
            images=prompt.image_refs,
        )
        for i in range(2)
    ]
    return SampleGroup(prompt, samples)


def test_saved_rollouts_bring_their_images(references: References, tmp_path: Path) -> None:
    reference = references("qwen3_vl")
    group = saved(reference, tmp_path / "first/images")
    first, second = (images_of(reference.folder, tmp_path / run) for run in ("first", "second"))
    save_groups(tmp_path / "saved", 0, {0: group}, first.folder)
    save_groups(tmp_path / "saved", 1, {0: group}, first.folder)
    names = sorted(image.ref.name for image in group.prompt.images)
    assert sorted(file.name for file in (tmp_path / "saved/images").iterdir()) == names
    shutil.rmtree(tmp_path / "first")
    loaded = load_share(tmp_path / "saved", 0, 2**31, second)[0]
    assert loaded.samples == group.samples
    assert replace(loaded.prompt, images=()) == replace(group.prompt, images=())
    assert loaded.prompt.image_refs == group.prompt.image_refs
    for image in loaded.prompt.images:
        assert second.folder.path(image.ref).read_bytes() == image.read()
    append_transcripts(tmp_path / "transcripts.jsonl", 1, {0: loaded}, 1)
    written = json.loads((tmp_path / "transcripts.jsonl").read_text())
    assert written["images"] == [ref.name for ref in group.prompt.image_refs]
    assert [part["type"] for part in written["prompt"][0]["content"]] == [
        "text",
        "image",
        "text",
        "image",
        "text",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s["images"].pop(), r"it has \d+ image tokens for images of \d+ tokens"),
        (lambda s: s["images"][0].update(digest="../../x"), "digest"),
        (lambda s: s["images"][0].update(digest="0" * 32), "its image .*images/0{32}.jpg is missing"),
        (lambda s: s["images"][0].update(suffix=".sh"), "suffix"),
        (lambda s: s["images"][0].update(grid=[1, 0, 4]), "grid"),
        (lambda s: s["images"][0].update(grid=[1, 2**60, 4]), "image tokens for images of"),
        (lambda s: s["images"][0].update(grid=[1, 1, 24]), "the model has no image of 1 x 1 x 24 patches"),
        (lambda s: s["images"][0].update(grid=[6, 2, 2]), "the model has no image of 6 x 2 x 2 patches"),
        (lambda s: s.update(images=7), "list"),
    ],
)
def test_a_sample_whose_images_cannot_be_trained_on_is_named(
    references: References, tmp_path: Path, change: Any, line: str
) -> None:
    reference = references("qwen3_vl")
    images = images_of(reference.folder, tmp_path / "run")
    save_groups(tmp_path, 0, {0: saved(reference, images.folder.folder)}, images.folder)
    file = tmp_path / "step_000000/rank_00000.jsonl"
    record = json.loads(file.read_text())
    change(record["samples"][1])
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=rf"line 1, sample 1 of .* is broken \(.*{line}.*\): ") as error:
        load_groups(tmp_path, 0, 2**31, images=images)
    assert "\n" not in str(error.value)


def test_a_saved_image_that_has_changed_is_refused(references: References, tmp_path: Path) -> None:
    reference = references("qwen3_vl")
    first, second = (images_of(reference.folder, tmp_path / run) for run in ("first", "second"))
    group = saved(reference, first.folder.folder)
    save_groups(tmp_path, 0, {0: group}, first.folder)
    changed = tmp_path / "images" / group.samples[0].images[0].name
    changed.write_bytes(picture(56, 84, seed=3))
    with pytest.raises(InputError, match=rf"{changed} is damaged: .*\. Copy it again"):
        load_share(tmp_path, 0, 2**31, second)


def test_saved_images_need_a_model_with_vision(references: References, tmp_path: Path) -> None:
    reference = references("qwen3_vl")
    images = images_of(reference.folder, tmp_path / "run")
    save_groups(tmp_path, 0, {0: saved(reference, images.folder.folder)}, images.folder)
    with pytest.raises(InputError, match="it has images, and the model has no vision"):
        load_groups(tmp_path, 0, 2**31)


def test_a_request_has_one_token_for_each_image(references: References, tmp_path: Path) -> None:
    """The request's ids are those of the template's text, which has one token for each image."""
    reference = references("qwen2_5_vl")
    images = images_of(reference.folder, tmp_path / "run")
    prompt = reference.prompt(
        "p", tmp_path, ["Of ", picture(56, 84), picture(200, 61), " and ", picture(30, 30)]
    )
    rendered = reference.tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    sent = images.without_repeats(np.array(prompt.input_ids), prompt.image_refs)
    assert sent.tolist() == reference.tokenizer(rendered)["input_ids"]
    with pytest.raises(ValueError, match="image tokens for images of"):
        images.without_repeats([*prompt.input_ids, reference.image_token], prompt.image_refs)


def test_a_jpeg_with_a_byte_behind_it_is_the_same_image(references: References, tmp_path: Path) -> None:
    """With a GPU, SGLang takes only files that end as a JPEG does away from Pillow."""
    images = images_of(references("qwen2_5_vl").folder, tmp_path / "run")
    image = references("qwen2_5_vl").stored(picture(200, 61), tmp_path)
    url = ImageRequests(images)._load(image)
    assert url.startswith("data:image/jpeg;base64,")
    sent = base64.b64decode(url.partition(",")[2])
    assert not sent.endswith(b"\xff\xd9")
    plain, padded = (np.asarray(Image.open(io.BytesIO(data))) for data in (image.read(), sent))
    assert np.array_equal(plain, padded)


def test_a_client_keeps_the_images_that_it_used_last(
    references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = references("qwen2_5_vl")
    requests = ImageRequests(images_of(reference.folder, tmp_path / "run"))
    first, second, third = (reference.stored(picture(80, 61, seed=seed), tmp_path) for seed in range(3))

    async def kept_after(*images: Any) -> set[bytes]:
        for image in images:
            await requests._encoded(image)
        return set(requests._ready)

    room = sum(len(requests._load(image)) for image in (first, second, third)) - 1  # not for all three
    # to reach the real limit, the test would have to make 256 MiB of images
    monkeypatch.setattr("megatron_gmpo.rollout.sglang.image_requests.KEPT_BYTES", room)
    kept = asyncio.run(kept_after(first, second, first, third))
    assert kept == {first.ref.digest, third.ref.digest}


def in_mode(mode: str, kind: str = "PNG", transparency: bool = False) -> bytes:
    """Return a picture in a mode of Pillow.

    Args:
        transparency: make the colour of a pixel transparent.
    """
    image = Image.open(io.BytesIO(picture(40, 30, seed=2))).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **({"transparency": image.getpixel((0, 0))} if transparency else {}))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        in_mode("RGBA"),
        in_mode("RGBA", "WEBP"),
        in_mode("LA"),
        in_mode("P", transparency=True),
        in_mode("P", "GIF", transparency=True),
        in_mode("RGB", transparency=True),
        in_mode("P"),
        in_mode("L"),
        in_mode("CMYK", "TIFF"),
    ],
)
def test_servers_see_the_colours_of_the_trainer(references: References, tmp_path: Path, data: bytes) -> None:
    """SGLang drops alpha and transparent colours: ``_load_single_item`` converts what is not RGB to RGB."""
    reference = references("qwen2_5_vl")
    image = reference.stored(data, tmp_path)
    url = ImageRequests(images_of(reference.folder, tmp_path / "run"))._load(image)
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    there = sent if sent.mode == "RGB" else sent.convert("RGB")
    here = reference.processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"]
    assert np.array_equal(reference.processor(there, return_tensors="np")["pixel_values"], here)


def play(
    references: References, tmp_path: Path, pictures: list[bytes]
) -> tuple[VisionReference, Prompt, list[Sample]]:
    """Return samples of episodes that ``ShowsPictures`` plays, of a prompt with a picture of its own."""
    reference = references("qwen3_vl")
    model = reference.folder
    prompt = reference.prompt("p", tmp_path / "data", ["Begin ", picture(*SIZES[0], seed=5), "."])
    encoded = [base64.b64encode(data).decode() for data in pictures]
    rollout = {
        "environment": "tests.support.environments:ShowsPictures",
        "environment_args": {"pictures": encoded},
        "max_new_tokens": 5,
        "max_episode_tokens": 600,
    }
    cfg = Config.model_validate({"model": {"path": str(model)}, "rollout": rollout})
    images = images_of(model, tmp_path / "run")
    player = make_player(cfg, reference.tokenizer, 2048, images)
    engine = engine_of(reference, images, player=player)
    with closing(engine):
        (group,) = in_order(engine.generate([prompt], SamplingParams(n=6, max_new_tokens=5)))
    return reference, prompt, group.samples


@pytest.mark.slow
def test_observations_show_images(references: References, tmp_path: Path) -> None:
    """The tokens are those of transformers' template for the whole conversation, and so are the numbers."""
    pictures = [picture(*size, seed=i) for i, size in enumerate((*SIZES[:2], SIZES[3]))]
    reference, prompt, samples = play(references, tmp_path, pictures)
    stored = tmp_path / "run/images"
    refs = [*prompt.image_refs, *(reference.stored(data, tmp_path / "others").ref for data in pictures)]
    whole = [sample for sample in samples if sample.finish_reason == "stop"]
    assert len(whole) >= 3, [sample.episode for sample in samples]
    for sample in whole:
        assert list(sample.images) == refs
        assert_close(
            torch.from_numpy(sample.rollout_logprobs[sample.response_mask]),
            reference.logprobs(sample, stored),
            atol=1e-5,
            rtol=0,
        )
        assert sample.episode
        shown = [part["image"] for turn in sample.episode.messages for part in parts_of(turn)]
        assert shown == [ref.name for ref in refs[1:]]
        # what lies between the turns, with an image token for each image
        between = np.flatnonzero(~sample.response_mask[1:] & sample.response_mask[:-1]) + 1
        ends = np.flatnonzero(sample.response_mask[1:] & ~sample.response_mask[:-1]) + 1
        for start, end, ref in zip(between, ends[1:], refs[2:], strict=True):
            text = reference.tokenizer.decode(sample.tokens[start:end])
            pads = "<|image_pad|>" * (ref.patches // reference.merge_size**2)
            user = f"<|im_start|>user\nAgain: <|vision_start|>{pads}<|vision_end|>?<|im_end|>\n"
            assert text.removeprefix("<|im_end|>") == f"\n{user}<|im_start|>assistant\n"
    for sample in samples:
        if sample not in whole:
            assert sample.episode
            assert sample.episode.error.startswith("the policy sampled the image token")


def parts_of(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    return [part for part in content if part["type"] == "image"] if isinstance(content, list) else []


def with_a_bad_chunk(data: bytes) -> bytes:
    """Return a PNG file with a chunk between its pixels whose name is not text."""
    start = data.index(b"IDAT") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    pixels = data[start + 8 : end - 4]

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    middle = chunk(b"IDAT", pixels[:500]) + chunk(b"\1\2\3\4", b"") + chunk(b"IDAT", pixels[500:])
    return data[:start] + middle + data[end:]


@pytest.mark.parametrize(
    "data",
    [b"no image", picture(40, 40)[:-90], picture(4000, 8), with_a_bad_chunk(picture(40, 40, seed=1))],
    ids=["noise", "cut", "strip", "chunk"],
)
@pytest.mark.parametrize("ranks", ["1", "1000"])
def test_an_observation_with_a_broken_image_is_a_fault(
    references: References, tmp_path: Path, data: bytes, ranks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that plays an episode decodes its images, whatever its share of the data set."""
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("RANK", str(int(ranks) - 1))
    images = images_of(references("qwen3_vl").folder, tmp_path)
    message = {"role": "user", "content": [image_part(data)]}
    with pytest.raises(EnvironmentFault, match="an observation has an image that cannot be used: ") as fault:
        asyncio.run(with_names([message], images))
    assert "\n" not in str(fault.value)
    with pytest.raises(EnvironmentFault, match="an observation has an image, and the model"):
        asyncio.run(with_names([message], None))


def test_content_parts_of_observations_are_checked() -> None:
    Observation([{"role": "user", "content": [text_part("a"), image_part(b"b")]}])
    for part in (
        {"type": "video", "video": "x"},
        {"type": "image"},
        {"type": "text", "text": 3},
        "text",
        None,
    ):
        with pytest.raises(ValueError, match="neither a text_part nor an image_part"):
            Observation([{"role": "user", "content": [part]}])


def test_rollouts_in_fp8_have_no_tower(references: References, tmp_path: Path) -> None:
    """Servers in FP8 start without weights, and a frozen tower is not sent."""
    model = references("qwen3_vl").folder
    cfg = Config.model_validate({"model": {"path": str(model)}, "rollout": {"quantization": "fp8"}})
    with pytest.raises(InputError, match="quantization = 'fp8': the model has a vision tower"):
        run_images(cfg, vision_of(read_hf_config(str(model))))
