"""Model folders from elsewhere: links, code, kernels, forged headers and indexes, absurd configs, old files.

Each is refused with one line, or read as transformers reads it.
"""

from __future__ import annotations

import ast
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import megatron_gmpo
from megatron_gmpo.errors import InputError
from megatron_gmpo.models.description import read_hf_config
from megatron_gmpo.weights.companions import copy_companions
from megatron_gmpo.weights.safetensors_folder import SafetensorsFolder
from megatron_gmpo.weights.weight_files import INDEX

SINGLE = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3", num_layers=1), tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    written = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(written | changes))


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 3000
    return message


# Links


@pytest.mark.parametrize("name", ["vocab.txt", SINGLE, "config.json", "README.md"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    source = folder / name
    secret.write_bytes(source.read_bytes() if source.exists() else b"secret")
    source.unlink(missing_ok=True)
    source.symlink_to(secret)
    message = refusal(lambda: read_hf_config(str(folder)))
    assert message.startswith(f"model.path = {str(folder)!r}: {name!r} is a link to {str(secret)!r}")


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("vocab.txt")
    read_hf_config(str(folder))  # it stays in the folder and leads nowhere
    copy_companions(folder, folder.parent / "copy")
    assert not (folder.parent / "copy" / "vocab.txt").exists()


def test_links_inside_the_folder_and_into_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """The layout of huggingface_hub/file_download.py; the run's path may itself be a link."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "more.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        assert read_hf_config(str(path)).model_type == "qwen3"
        assert EMBEDDING in SafetensorsFolder(path).names


def test_only_known_files_are_copied(folder: Path, tmp_path: Path) -> None:
    for name in ("modeling.py", "notes.txt", "training_args.bin", "trainer_state.json", "merges.txt"):
        (folder / name).write_text("{}")
    copy_companions(folder, tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
    } & {file.name for file in folder.iterdir()}


# Code


@pytest.mark.parametrize(
    ("file", "auto_map"),
    [
        ("config.json", {"AutoConfig": "evil.Config"}),
        ("config.json", {"AutoModelForCausalLM": "evil.Model"}),
        ("config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
        ("config.json", {"AutoModelForCausalLM": "someone/else--evil.Model"}),
        ("config.json", "evil"),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
        ("tokenizer_config.json", ["evil.Tokenizer", None]),
    ],
)
@pytest.mark.parametrize("model_type", ["qwen3", "of_tomorrow"])
def test_code_in_the_folder_is_refused_and_not_run(
    folder: Path, file: str, auto_map: Any, model_type: str
) -> None:
    ran = folder / "ran"
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nModel = Tokenizer = Config\n"
    )
    edit(folder / "config.json", model_type=model_type)
    edit(folder / file, auto_map=auto_map)
    message = refusal(lambda: read_hf_config(str(folder)))
    assert f"{file} names code of the folder to run" in message
    assert not ran.exists()


def test_code_that_transformers_replaces_is_ignored(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """DeepSeek's own folders on the hub name modules that are part of transformers now."""
    folder = Path(shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "model"))
    edit(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModelForCausalLM": "deepseek-ai/DeepSeek-V3.1--modeling_deepseek.DeepseekV3ForCausalLM",
        },
    )
    for module in ("configuration_deepseek", "modeling_deepseek"):
        (folder / f"{module}.py").write_text("raise SystemExit")
    assert type(read_hf_config(str(folder))).__module__.startswith("transformers.")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_code_of_a_processor_is_refused(tiny_model: Callable[..., Path], tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen3_vl"), tmp_path / "model"))
    edit(folder / file, auto_map={"AutoImageProcessor": "evil.Processor"})
    assert f"{file} names code of the folder to run" in refusal(lambda: read_hf_config(str(folder)))


@pytest.mark.parametrize(
    ("part", "field", "value", "expected"),
    [
        ("text_config", "num_hidden_layers", 10**12, "num_hidden_layers = 1000000000000, which is no number"),
        ("vision_config", "depth", 10**12, "depth = 1000000000000, which is no number from 1 to 1000"),
        ("vision_config", "num_position_embeddings", 10**12, "which is no number from 1 to"),
        ("vision_config", "spatial_merge_size", 0, "which is no number from 1 to"),
        ("vision_config", "patch_size", [14, 14], "which is no number from 1 to"),
        ("vision_config", "attn_implementation", "someone/kernel", "names the kernel attn_implementation"),
        ("text_config", "_experts_implementation", "a/b", "names the kernel _experts_implementation"),
    ],
)
def test_the_parts_of_a_vision_language_model_have_the_same_checks(
    tiny_model: Callable[..., Path], tmp_path: Path, part: str, field: str, value: Any, expected: str
) -> None:
    about = json.loads((tiny_model("qwen3_vl_moe") / "config.json").read_text())
    about[part][field] = value
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert expected in refusal(lambda: read_hf_config(str(tmp_path)))


@pytest.mark.parametrize("prefix", ["", "_"])
@pytest.mark.parametrize("field", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize(
    "value", ["someone/kernel", "kernels-community/flash-attn3:f", "deepgemm", {"": "a/b"}]
)
def test_a_kernel_to_fetch_is_refused(folder: Path, prefix: str, field: str, value: Any) -> None:
    edit(folder / "config.json", **{prefix + field: value})
    assert f"names the kernel {prefix + field} = {value!r}" in refusal(lambda: read_hf_config(str(folder)))


def test_every_call_of_transformers_refuses_code_and_names_the_attention() -> None:
    loaders = {
        "AutoConfig": set(),
        "AutoTokenizer": set(),
        "AutoImageProcessor": set(),
        "AutoModel": {"attn_implementation"},
        "AutoModelForCausalLM": {"attn_implementation"},
        "AutoModelForImageTextToText": {"attn_implementation"},
        "auto_class": {"attn_implementation"},
    }
    seen = 0
    for file in Path(megatron_gmpo.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                of, function = call.func.value, call.func.attr
                name = getattr(of.func if isinstance(of, ast.Call) else of, "id", None)
                made_here = file.name == "tiny_models.py"  # from_config of a config that no folder holds
                if name in loaders and function in ("from_pretrained", "from_config") and not made_here:
                    arguments = {word.arg: ast.unparse(word.value) for word in call.keywords}
                    assert arguments.get("trust_remote_code") == "False", (file, call.lineno)
                    assert arguments.keys() >= loaders[name], (file, call.lineno)
                    seen += 1
    assert seen >= 12


# Which files hold the weights


def shards(folder: Path, **changes: Any) -> None:
    """Write the weights as two shards with an index, beside what is there."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in files.items():
        save_file({name: tensors[name] + 1 for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map} | changes))


def read_by_transformers(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()[EMBEDDING]


def test_two_sets_of_weights_are_refused(folder: Path) -> None:
    """transformers would load the single file, and SGLang the shards."""
    single = load_file(folder / SINGLE)[EMBEDDING]
    shards(folder)
    assert torch.equal(read_by_transformers(folder), single)
    message = refusal(lambda: SafetensorsFolder(folder))
    assert "two sets of weights, model.safetensors and the files of" in message
    assert "'model-00001-of-00002.safetensors': remove the older set" in message
    (folder / SINGLE).unlink()
    assert torch.equal(SafetensorsFolder(folder).get(EMBEDDING), single + 1)
    assert torch.equal(read_by_transformers(folder), single + 1)


def test_an_index_that_save_pretrained_left_behind(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert not (folder / SINGLE).exists()
    model.state_dict()[EMBEDDING].add_(1)
    model.save_pretrained(folder)
    assert (folder / INDEX).exists()
    assert torch.equal(SafetensorsFolder(folder).get(EMBEDDING), model.state_dict()[EMBEDDING])
    assert torch.equal(read_by_transformers(folder), model.state_dict()[EMBEDDING])
    (warning,) = caplog.messages
    assert "model.safetensors is read, and model.safetensors.index.json is ignored" in warning


def test_a_single_file_that_save_pretrained_left_behind(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert "two sets of weights" in refusal(lambda: SafetensorsFolder(folder))


def test_an_index_of_the_single_file(folder: Path) -> None:
    names = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert SafetensorsFolder(folder).names == names.keys()


def test_a_tensor_in_two_files(folder: Path) -> None:
    shards(folder)
    (folder / SINGLE).unlink()
    first = folder / "model-00001-of-00002.safetensors"
    save_file(load_file(first) | {HEAD: torch.ones(2), EMBEDDING: torch.ones(2)}, first)
    assert "both hold" in refusal(lambda: SafetensorsFolder(folder))


@pytest.mark.parametrize(
    "name",
    ["training_args.bin", "optimizer.pt", "pytorch_model.bin", "rng_state.pth", "consolidated.safetensors"],
)
def test_what_is_not_the_weights_is_ignored(folder: Path, name: str) -> None:
    """Every checkpoint of transformers' Trainer has the first two."""
    (folder / name).write_bytes(b"not read")
    assert EMBEDDING in SafetensorsFolder(folder).names
    read_by_transformers(folder)


def test_pickles_alone_are_refused(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "only 'pytorch_model.bin', a pickle, which can run code" in refusal(
        lambda: SafetensorsFolder(folder)
    )


def test_other_files_that_transformers_prefers(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "shard-00000-model-00001-of-00001.safetensors")
    assert "'shard-00000-model-00001-of-00001.safetensors'" in refusal(lambda: SafetensorsFolder(folder))


def test_other_weights_and_adapters_are_refused(folder: Path) -> None:
    edit(folder / "config.json", transformers_weights="other.safetensors")
    assert "transformers_weights = 'other.safetensors'" in refusal(lambda: read_hf_config(str(folder)))
    edit(folder / "config.json", transformers_weights=None)
    (folder / "adapter_config.json").write_text("{}")
    assert "both a model and an adapter" in refusal(lambda: read_hf_config(str(folder)))


def test_a_tied_model_that_stores_the_head_only(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen3", tie_word_embeddings=True), tmp_path / "model"))
    tensors = load_file(folder / SINGLE)
    weight = tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert torch.equal(read_by_transformers(folder), weight)
    source = SafetensorsFolder(folder)
    source.check_tied()
    assert torch.equal(source.get(EMBEDDING), weight)
    assert HEAD not in source.names


# Forged indexes and headers


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../x"},
        {"a": "/etc/passwd"},
        {"a": "sub/model.safetensors"},
        {"a": ".."},
        {"a": ""},
        {"a": 5},
        {"a": ["model.safetensors"]},
        {"a": None},
        {"a": "x\ny.safetensors"},
        {"a": "x\0"},
        {"a": "x" * 5000},
        {"a": "absent.safetensors"},
        {"a": INDEX},
        [],
        ["ab"],
        {},
        5,
        None,
    ],
    ids=str,
)
def test_forged_weight_maps(folder: Path, weight_map: Any) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refusal(lambda: SafetensorsFolder(folder))


@pytest.mark.parametrize("text", ["", "[]", "5", "{", "[" * 100_000, "\xff", '{"weight_map": 1e999}'])
@pytest.mark.parametrize("name", [INDEX, "config.json", "tokenizer_config.json"])
def test_broken_json(folder: Path, name: str, text: str) -> None:
    if name == INDEX:
        (folder / SINGLE).unlink()
    (folder / name).write_bytes(text.encode("latin-1"))
    if name == "tokenizer_config.json" and text.startswith('{"'):
        return
    refusal(lambda: (read_hf_config(str(folder)), SafetensorsFolder(folder)))


def tensor(start: int, end: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


HEADERS: dict[str, Any] = {
    "overlapping": {"a": tensor(0, 48), "b": tensor(16, 64)},
    "twice the same": {"a": tensor(0, 64), "b": tensor(0, 64)},
    "hole": {"a": tensor(0, 16), "b": tensor(32, 64)},
    "short": {"a": tensor(0, 64, shape=[32])},
    "negative": {"a": tensor(-32, 0, shape=[8]), "b": tensor(0, 64)},
    "backwards": {"a": tensor(32, 0, shape=[8]), "b": tensor(32, 64)},
    "rest": {"a": tensor(0, 32)},
    "beyond the end": {"a": tensor(0, 128)},
    "negative shape": {"a": tensor(0, 64, shape=[-4, -4])},
    "overflow": {"a": tensor(0, 0, shape=[2**40, 2**40])},
    "fraction": {"a": tensor(0, 64) | {"data_offsets": [0.0, 64.0]}},
    "text": {"a": tensor(0, 64) | {"shape": "16"}},
    "no dtype": {"a": {"shape": [16], "data_offsets": [0, 64]}},
    "unknown dtype": {"a": tensor(0, 64, "F7")},
    "complex": {"a": tensor(0, 64, "C64", [8])},
    "half a byte": {"a": tensor(0, 64, "F4", [128])},
    "list": [1, 2],
    "long name": {"a" * 5000: tensor(0, 64)},
    "control characters": {"a\0\n\x1b[31m_scale_inv": tensor(0, 64)},
    "format in a name": {
        "model.layers.0.{e:>9999999999}.mlp.experts.gate_up_proj": tensor(0, 64, shape=[2, 2, 4])
    },
    "field in a name": {
        "model.layers.{0.__class__}.mlp.experts.gate_up_proj": tensor(0, 64, shape=[2, 2, 4])
    },
    "a million experts": {
        "model.layers.0.mlp.experts.gate_up_proj": tensor(0, 0, shape=[10**12, 2, 0]),
        "a": tensor(0, 64),
    },
}


VALID_HEADERS = {"format in a name", "field in a name", "a million experts"}
"""Headers whose tensors are refused later, because config.json does not require them."""


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_forged_headers(family: str, name: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model(family), tmp_path / "model"))
    header = json.dumps(HEADERS[name]).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    if name in VALID_HEADERS:
        assert len(SafetensorsFolder(folder).names) <= 4
    else:
        refusal(lambda: SafetensorsFolder(folder))


@pytest.mark.parametrize("length", [0, 1, 2**26, 2**63, 2**64 - 1])
def test_forged_header_lengths(folder: Path, length: int) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}" + bytes(64))
    assert "cannot be read as safetensors" in refusal(lambda: SafetensorsFolder(folder))


@pytest.mark.slow
def test_too_many_tensors(folder: Path) -> None:
    header = json.dumps({str(n): tensor(n, n + 1, "U8", [1]) for n in range(400_001)}).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(400_001))
    assert "holds 400001 tensors" in refusal(lambda: SafetensorsFolder(folder))


# Absurd configs


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -3),
        ("num_experts", 10**12),
        ("hidden_size", 10**12),
        ("vocab_size", 10**12),
        ("num_nextn_predict_layers", 10**12),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("decoder_sparse_step", 0),
    ],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2", "deepseek_v3"])
def test_sizes_have_bounds(
    family: str, field: str, value: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A list with an item for each of 10^12 layers would fill the memory."""
    (tmp_path / "config.json").write_text((tiny_model(family) / "config.json").read_text())
    edit(tmp_path / "config.json", **{field: value})
    assert f"config.json has {field} = {value}, which is no number from" in refusal(
        lambda: read_hf_config(str(tmp_path))
    )
