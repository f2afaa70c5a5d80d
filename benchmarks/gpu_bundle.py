"""Build one folder with what a GPU machine without network lacks, from a build of Transformer Engine.

Run: benchmarks/gpu_bundle.sh --transformer-engine DIR [OUT] [--dry-run]

The machine has Python 3.12, torch with CUDA, Triton, transformers and their dependencies. Its transformers
may be older than this project needs, so the bundle has its own. DIR holds, built for that torch:

site.txz                     Python packages: transformer_engine and, for example, its megatron-core
libtransformer_engine.so.xz  goes to transformer_engine/wheel_lib
tetorch.so.xz                the extension transformer_engine_torch

OUT receives these files, ``activate.sh``, and wheels of the packages in gpu_bundle.txt, in the versions of
constraints-py312.txt. A package that site.txz holds is not downloaded. On the machine, ``. OUT/activate.sh``
unpacks all of it into /tmp/gpu_site and sets the environment; then ``benchmarks/gpu_campaign.sh`` runs.

The dry run builds the folder in a temporary place, with a stand-in for Transformer Engine if no DIR is given.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Annotated

from megatron_gmpo.command_line import Options, Positional, one_line_errors, parse_options
from megatron_gmpo.errors import InputError, RunError

ROOT = Path(__file__).parents[1]
LIMIT = 60 * 2**20
PARTS = ("site.txz", "libtransformer_engine.so.xz", "tetorch.so.xz")
WHEELS = [
    line for line in Path(__file__).with_suffix(".txt").read_text().split("\n") if line and line[0] != "#"
]
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
ACTIVATE = """\
# Unpack the bundle once and let Python find it: . activate.sh
bundle=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${GPU_SITE:-$bundle/site}
if ! test -e "$site/.complete"; then
  mkdir -p "$site"
  tar xJf "$bundle/site.txz" -C "$site" &&
  python3 -c 'import sys, zipfile
for wheel in sys.argv[2:]: zipfile.ZipFile(wheel).extractall(sys.argv[1])' "$site" "$bundle"/wheels/*.whl &&
  engine=$site/transformer_engine/wheel_lib/libtransformer_engine.so &&
  xz -dc "$bundle/libtransformer_engine.so.xz" >"$engine" &&
  xz -dc "$bundle/tetorch.so.xz" >"$site/transformer_engine_torch.cpython-312-x86_64-linux-gnu.so" &&
  touch "$site/.complete"
fi
export PYTHONPATH=$site CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
"""


class Bundle(Options):
    """Build one folder with what a GPU machine without network lacks."""

    out: Annotated[Path, Positional] = Path("runs/gpu_bundle")
    """Folder to create."""
    transformer_engine: Path | None = None
    """Folder with site.txz, libtransformer_engine.so.xz and tetorch.so.xz."""
    dry_run: bool = False
    """Build in a temporary folder, check the result and delete it."""


def build(engine: Path, out: Path) -> None:
    """Fill ``out``, which must not exist, and check it.

    Raises:
        InputError: ``engine`` lacks a file, ``out`` exists, or the bundle is too large.
        RunError: pip cannot download a wheel, or the bundle cannot be unpacked.
    """
    for name in PARTS:
        if not (engine / name).is_file():
            raise InputError(
                f"transformer_engine = {str(engine)!r} has no {name}: give a folder with a build of it"
            )
    if out.exists():
        raise InputError(f"out = {str(out)!r} exists: remove it, or choose another folder")
    (out / "wheels").mkdir(parents=True)
    for name in PARTS:
        shutil.copy(engine / name, out)
    download([name for name in WHEELS if key(name) not in packages_in(engine / "site.txz")], out / "wheels")
    (out / "activate.sh").write_text(ACTIVATE)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if size > LIMIT:
        raise InputError(f"the bundle has {size / 2**20:.1f} MiB, more than {LIMIT // 2**20}: {out}")
    found = unpacked_packages(out)
    if missing := [name for name in WHEELS if key(name) not in found]:
        raise RunError(f"the unpacked bundle lacks {', '.join(missing)}")
    print(json.dumps({"bundle": str(out), "MiB": round(size / 2**20, 1), "packages": len(found)}))


def key(name: str) -> str:
    """Return the name under which packages compare as equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def packages_in(site: Path) -> set[str]:
    with tarfile.open(site) as archive:
        found = [re.fullmatch(r"(?:\./)?(.+)-[^-]+\.dist-info", name) for name in archive.getnames()]
    return {key(match[1]) for match in found if match}


def download(names: list[str], folder: Path) -> None:
    """Download wheels for Python 3.12 on x86-64 Linux, through pip's configured index."""
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *platforms]
    command += ["-c", str(ROOT / "constraints-py312.txt"), "-d", str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        offline = "connection" in done.stderr.lower()  # of pip's warnings before it tries again
        raise RunError(f"pip could not {'reach its index' if offline else 'download the wheels'}: {reason}")


def unpacked_packages(bundle: Path) -> set[str]:
    """Unpack the bundle as the machine does and return the packages that Python finds in it."""
    with tempfile.TemporaryDirectory() as site:
        done = subprocess.run(
            ["bash", "-c", '. "$0/activate.sh" && test -e "$PYTHONPATH/.complete"', str(bundle)],
            env={"GPU_SITE": site, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise RunError(f"the bundle could not be unpacked: {' '.join(done.stderr.split())}")
        return {key(found.metadata["Name"]) for found in metadata.distributions(path=[site])}


def stand_in(folder: Path) -> Path:
    """Write files with the names of a build of Transformer Engine and return their folder."""
    with tarfile.open(folder / "site.txz", "w:xz") as site:
        for name, text in {
            "transformer_engine/wheel_lib/README": "",
            "transformer_engine-0.dist-info/METADATA": "Name: transformer_engine\nVersion: 0\n",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            site.addfile(entry, io.BytesIO(text.encode()))
    for name in PARTS[1:]:
        (folder / name).write_bytes(lzma.compress(b"stand-in"))
    return folder


def main(options: Bundle) -> None:
    engine = options.transformer_engine
    if not options.dry_run:
        if engine is None:
            raise InputError(
                "transformer_engine has no value: give the folder of a build of Transformer Engine"
            )
        return build(engine, options.out)
    with tempfile.TemporaryDirectory() as work:
        build(engine or stand_in(Path(work)), Path(work) / "bundle")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_options(Bundle, sys.argv[1:], "benchmarks/gpu_bundle.sh"))
