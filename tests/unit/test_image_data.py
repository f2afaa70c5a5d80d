"""Images of data sets become tokens and pixel values as transformers makes them; bad ones have one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

from megatron_gmpo.batch.images import ImageFolder, digest_of
from megatron_gmpo.batch.pixels import PixelReader
from megatron_gmpo.batch.samples import Prompt
from megatron_gmpo.config import DataConfig
from megatron_gmpo.data.images import ModelImages
from megatron_gmpo.data.prompts import load_images, load_prompts
from megatron_gmpo.data.stream import PromptStream
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import read_hf_config, vision_of
from megatron_gmpo.testing.tiny_models import make_tiny_model
from megatron_gmpo.testing.tiny_tokenizers import text_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "vlm"
    make_tiny_model(folder, family="qwen2_5_vl", num_layers=1, hidden_size=16, ffn_hidden_size=16)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # datasets reads the variable of this name once, when it is imported
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(width: int = 70, height: int = 60, kind: str = "PNG", mode: str = "RGB", seed: int = 0) -> bytes:
    """Return the file of an image of noise."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise[:, :, 0] if bands == 1 else noise, mode).save(file, kind)
    return file.getvalue()


def loaded(model: str, **options: Any) -> list[Prompt]:
    cfg = DataConfig(**{"image_column": "images"} | options)
    images = load_images(model, cfg, "data", vision_of(read_hf_config(model)))
    return load_prompts(cfg, AutoTokenizer.from_pretrained(model), images=images)


FILES = [encoded(70, 60), encoded(200, 40, "JPEG", seed=1), encoded(30, 90, mode="RGBA", seed=2)]
ROWS = [
    ("<image>Find x.", FILES[:1], "3"),
    ("Compare <image> and <image>: which?", FILES[1:], "b"),
    ("No picture.", [], "4"),
]


def as_parquet(folder: Path, rows: list[Any]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_paths(folder: Path, rows: list[Any]) -> str:
    for row in rows:
        for number, data in enumerate(row["images"]):
            (folder / f"{digest_of(data).hex()}").write_bytes(data)
            row["images"][number] = digest_of(data).hex()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def as_images(folder: Path, rows: list[Any]) -> str:
    """Save the columns of the hub's hiyouga/geometry3k, whose images have the type ``datasets.Image``."""
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    for row in rows:
        row["images"] = [{"bytes": data, "path": None} for data in row["images"]]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "rows")
    return str(folder / "rows")


WRITERS: list[Callable[[Path, list[Any]], str]] = [as_parquet, as_paths, as_images]


def written(folder: Path, write: Callable[[Path, list[Any]], str]) -> str:
    return write(folder, [{"problem": p, "images": list(files), "answer": a} for p, files, a in ROWS])


@pytest.mark.parametrize("write", WRITERS)
def test_prompts_equal_those_of_transformers(
    model: str, tmp_path: Path, write: Callable[[Path, list[Any]], str]
) -> None:
    prompts = loaded(model, path=written(tmp_path, write))
    tokenizer, images = (
        AutoTokenizer.from_pretrained(model),
        AutoImageProcessor.from_pretrained(model, backend="pil"),
    )
    for prompt, (problem, files, answer) in zip(prompts, ROWS, strict=True):
        found = [images(Image.open(io.BytesIO(data)), return_tensors="pt") for data in files]
        grids = [tuple(one["image_grid_thw"][0].tolist()) for one in found]
        # Qwen2VLProcessor.__call__: as many image tokens as the grid has patches, divided by merge_size^2
        text = f"<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
        for _, height, width in grids:
            pads = "<|image_pad|>" * (height * width // 4)
            text = text.replace("<image>", f"<|vision_start|>{pads}<|vision_end|>", 1)
        assert prompt.input_ids == tokenizer(text)["input_ids"]
        assert [image.ref.grid for image in prompt.images] == grids
        assert [image.read() for image in prompt.images] == files
        assert [image.ref.digest for image in prompt.images] == [digest_of(data) for data in files]
        assert prompt.answer == answer
    assert [image.ref.suffix for prompt in prompts for image in prompt.images] == [".png", ".jpg", ".png"]


@pytest.mark.parametrize("write", WRITERS)
def test_one_image_that_is_no_list(
    model: str, tmp_path: Path, write: Callable[[Path, list[Any]], str]
) -> None:
    if write is as_parquet:
        rows = [{"problem": "<image>?", "images": data, "answer": "1"} for data in FILES]
        path = as_parquet(tmp_path, rows)
    elif write is as_paths:
        (tmp_path / "a.png").write_bytes(FILES[0])
        (tmp_path / "rows.jsonl").write_text(
            json.dumps({"problem": "<image>?", "images": "a.png", "answer": 1})
        )
        path = str(tmp_path / "rows.jsonl")
    else:
        rows = {
            "problem": ["<image>?"] * 3,
            "images": [{"bytes": data} for data in FILES],
            "answer": ["1"] * 3,
        }
        saved = datasets.Dataset.from_dict(rows).cast_column("images", datasets.Image())
        saved.select([2, 0]).save_to_disk(tmp_path / "rows")
        assert [p.images[0].read() for p in loaded(model, path=str(tmp_path / "rows"))] == [
            FILES[2],
            FILES[0],
        ]
        return
    prompts = loaded(model, path=path)
    assert [prompt.images[0].read() for prompt in prompts] == FILES[: len(prompts)]


def test_a_csv_file_names_an_image_or_none(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES[0])
    (tmp_path / "rows.csv").write_text("problem,images,answer\n<image>?,a.png,1\n2+2,,4\n")
    prompts = loaded(model, path=str(tmp_path / "rows.csv"))
    assert [[image.read() for image in prompt.images] for prompt in prompts] == [FILES[:1], []]


def test_pixels_equal_the_processors(model: str, tmp_path: Path) -> None:
    tokens = vision_of(read_hf_config(model))
    assert tokens
    images = AutoImageProcessor.from_pretrained(model, backend="pil", max_pixels=28 * 28 * 6)
    limited = ModelImages(model, tokens, max_pixels=28 * 28 * 6)
    folder = ImageFolder(tmp_path)
    reader = PixelReader(folder, ModelImages(model, tokens))  # the grid alone decides, not its limits
    for data in (*FILES, encoded(400, 300, mode="L"), encoded(500, 20, "WEBP"), encoded(3, 3)):
        expected = images(Image.open(io.BytesIO(data)), return_tensors="pt")
        (image,) = limited.load([("row", _Bytes(data))])
        folder.write(image.ref, data)
        digests = torch.frombuffer(bytearray(image.ref.digest), dtype=torch.uint8)[None]
        assert torch.equal(reader.read(digests, torch.tensor([image.ref.grid])), expected["pixel_values"])
        assert torch.equal(torch.tensor([image.ref.grid]), expected["image_grid_thw"])


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.read = lambda: data


def messages(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_places_of_images_in_messages(model: str, tmp_path: Path) -> None:
    image, text = {"type": "image"}, {"type": "text", "text": "What is it?"}
    rows = [
        {"problem": messages(image, text), "images": FILES[:1], "answer": "1"},
        {
            "problem": messages({"type": "text", "text": "<image>What is it?"}),
            "images": FILES[:1],
            "answer": "1",
        },
    ]
    first, second = loaded(model, path=as_parquet(tmp_path, rows))
    assert first.messages == second.messages == messages(image, text)
    assert first.input_ids == second.input_ids


def test_the_text_of_an_image_token_in_a_problem_is_text(model: str, tmp_path: Path) -> None:
    problem = "<image>Is <|image_pad|> or <|vision_start|> a token?"
    row = [{"problem": problem, "images": FILES[:1], "answer": "1"}]
    (prompt,) = loaded(model, path=as_parquet(tmp_path, row))
    tokenizer = AutoTokenizer.from_pretrained(model)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert prompt.input_ids.count(image_token) == prompt.images[0].ref.patches // 4
    assert "Is <|image_pad|> or <|vision_start|> a token?" in tokenizer.decode(prompt.input_ids)


def one(problem: Any, images: Any, **options: Any) -> Callable[[Path], dict[str, Any]]:
    """Return what writes a row after a good one, and the options of its data set."""

    def write(folder: Path) -> dict[str, Any]:
        good = [FILES[0]] if isinstance(images, list) else FILES[0]
        rows = [{"problem": "<image>", "images": good, "answer": "1"}]
        return {
            "path": as_parquet(folder, [*rows, {"problem": problem, "images": images, "answer": "2"}])
        } | options

    return write


def with_paths(images: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "rows.jsonl").write_text(
            json.dumps({"problem": "<image>", "images": images, "answer": "1"})
        )
        return {"path": str(folder / "rows.jsonl")}

    return write


def with_a_pipe(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "pipe")
    return with_paths("pipe")(folder)


def bomb(width: int, height: int) -> bytes:
    """Return a small PNG file of a large image."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "missing file": (
        with_paths(["no.png"]),
        "row 0: the image file '.*no.png' does not exist: correct the path",
    ),
    "url": (with_paths("https://host/a.png"), "row 0: the image file .* does not exist"),
    "device": (
        with_paths("/dev/zero"),
        "row 0: an image cannot be read .'/dev/zero' is no regular file.: corr",
    ),
    "pipe": (with_a_pipe, "row 0: an image cannot be read .*pipe' is no regular file"),
    "no path": (with_paths([5]), "row 0: column 'images' holds '5', not the path of an image file"),
    "cut off": (one("<image>", [FILES[0][:-900]]), "row 1: an image cannot be used .*truncated"),
    "no image": (one("<image>", [b"GIF89a"]), "row 1: an image cannot be used .*: give a sound file"),
    "text": (one("<image>", [b"%!PS-Adobe"]), "row 1: an image cannot be used .*cannot identify image file"),
    "empty": (one("<image>", [b""]), "row 1: an image cannot be read .it is empty.: correct it"),
    "large": (
        one("<image>", [bomb(10_000, 9_000)]),
        "row 1: an image is too large .10000 x 9000 pixels.: shrink",
    ),
    "bomb": (one("<image>", [bomb(20_000, 20_000)]), "row 1: an image is too large .*400000000"),
    "elongated": (one("<image>", [encoded(401, 2)]), "row 1: an image cannot be used .*aspect ratio"),
    "too few": (one("<image><image>", [FILES[0]]), "row 1: .* places for 2 images, .* 'images' has 1: mark"),
    "too many": (one("Find x.", [FILES[0]]), "row 1: the prompt has places for 0 images, .* 'images' has 1"),
    "forged": (
        one("<image><|image_pad|>", [FILES[0]], special_tokens="token"),
        "row 1: the prompt has 2 image tokens for 1 images: .* special_tokens = 'text'",
    ),
    "forged in text": (
        one("What is <|image_pad|>?", [FILES[0]], image_column="", special_tokens="token"),
        "row 1: the prompt has 1 image tokens for 0 images",
    ),
    "type": (one("<image>", 5), r"column 'images' has the type int64, not bytes"),
    "column": (
        one("<image>", [FILES[0]], image_column="image"),
        r"data.image_column = 'image' is not a column of .*: choose one of \['problem', 'images', 'answer'\]",
    ),
    "template": (
        one("<image>", [FILES[0]], use_chat_template=False),
        "data.image_column = 'images' needs a chat template",
    ),
    "limits": (
        one("<image>", [FILES[0]], min_pixels=10**9),
        "data: images have at least 1000000000 pixels and at most .*: set min_pixels below max_pixels",
    ),
}


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # pytest shows what the run does not
@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_refused_in_one_line(model: str, tmp_path: Path, case: str) -> None:
    write, line = BAD[case]
    if case == "type":
        datasets.Dataset.from_list([{"problem": "", "images": 5, "answer": ""}]).to_parquet(
            tmp_path / "a.parquet"
        )
        options: dict[str, Any] = {"path": str(tmp_path / "a.parquet")}
    else:
        options = write(tmp_path)
    with pytest.raises(InputError, match=line) as error:
        loaded(model, **options)
    assert "\n" not in str(error.value)


def test_parts_that_name_an_image_of_their_own_are_refused(model: str, tmp_path: Path) -> None:
    rows = [{"problem": messages({"type": "image", "image": "a.png"}), "images": [FILES[0]], "answer": "1"}]
    with pytest.raises(InputError, match=r"row 0: .* content parts of text and images"):
        loaded(model, path=as_parquet(tmp_path, rows))


def test_images_need_a_model_with_vision_and_its_processor(model: str, tmp_path: Path) -> None:
    cfg, tokens = DataConfig(path="a", image_column="images"), vision_of(read_hf_config(model))
    with pytest.raises(
        InputError, match=r"data.image_column = 'images': the model .* reads no images: leave it out"
    ):
        load_images("some/text", cfg, "data", None)
    with pytest.raises(
        InputError, match=r"model.path = .* has no image processor that can be loaded .*: copy"
    ):
        load_images(str(tmp_path), cfg, "data", tokens)
    settings = json.loads((Path(model) / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"merge_size": 1}))
    with pytest.raises(
        InputError, match=r"merge_size is 1 in preprocessor_config.json, and 2 in config.json"
    ):
        load_images(str(tmp_path), cfg, "data", tokens)


def test_a_file_that_changes_during_the_run_is_refused(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES[0])
    (prompt,) = loaded(model, **with_paths("a.png")(tmp_path))
    (tmp_path / "a.png").write_bytes(encoded(70, 60, seed=9))
    with pytest.raises(InputError, match=r"an image of the data has changed during the run: .*a.png"):
        prompt.images[0].read()
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="an image of the data cannot be read any more"):
        prompt.images[0].read()


def test_each_rank_decodes_its_share(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = FILES[0][:-900]
    options = one("<image>", [broken])(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    owner = digest_of(broken)[0] % 2
    monkeypatch.setenv("RANK", str(1 - owner))
    assert len(loaded(model, **options)) == 2
    monkeypatch.setenv("RANK", str(owner))
    with pytest.raises(InputError, match="row 1"):
        loaded(model, **options)


def test_the_fingerprint_covers_the_images(model: str, tmp_path: Path) -> None:
    def state(seed: int) -> Any:
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = [{"problem": "<image>", "images": [encoded(seed=seed)], "answer": "1"}]
        stream = PromptStream(loaded(model, path=as_parquet(folder, rows)), 0, shuffle=True)
        return stream.state_dict()["fingerprint"]

    first, second = state(1), state(2)
    assert first["answers"] == second["answers"]
    assert first["prompts"] != second["prompts"]


@pytest.mark.slow  # a process of its own imports torch and transformers
def test_a_text_run_imports_nothing_of_images(tmp_path: Path) -> None:
    """transformers imports PIL.Image itself, in every run."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "2+2", "answer": "4"}))
    text_tokenizer().save_pretrained(tmp_path)
    code = f"""
import sys, transformers.utils.chat_template_utils
before = set(sys.modules)
import megatron_gmpo.train
from megatron_gmpo.config import DataConfig
from megatron_gmpo.data.prompts import load_images, load_prompts, load_tokenizer
cfg = DataConfig(path={str(tmp_path / "rows.jsonl")!r})
load_prompts(cfg, load_tokenizer({str(tmp_path)!r}), images=load_images("", cfg, "data", None))
print(*sys.modules.keys() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    found = done.stdout.split()
    assert "megatron_gmpo.data.prompts" in found, done.stderr[-2000:]
    prefixes = ("PIL", "torchvision", "transformers.image_", "transformers.models.qwen")
    own = ("megatron_gmpo.data.images", "megatron_gmpo.models.vision")
    assert [name for name in found if name.startswith(prefixes) or name in own] == []
