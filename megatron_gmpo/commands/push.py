"""Upload a checkpoint of a run to the Hugging Face hub, with a model card.

Usage::

    megatron-gmpo push RUN_DIR OWNER/NAME [--private] [--folder DIR]
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from ..command_line import Options, Positional, parse_options
from ..config import Positive
from ..errors import InputError, RunError, one_line


class Push(Options):
    """Convert a checkpoint of a run to a Hugging Face folder and upload it to the hub, with a model card.

    The card has the settings, the curves and the evaluations of the run. What will be uploaded is listed
    first.
    """

    run_dir: Annotated[Path, Positional]
    """Run folder."""
    repo: Annotated[str, Positional]
    """Repository on the hub, owner/name. It is created, or it holds an earlier checkpoint of the same run."""
    step: Positive | None = None
    """Step of the checkpoint; by default the newest."""
    private: bool = False
    """Create a private repository."""
    folder: Path | None = None
    """Write the folder with model and card here, and upload nothing."""


def main(argv: list[str]) -> None:
    options = parse_options(Push, argv, "megatron-gmpo push")

    from ..view.snapshot import read
    from ..weights.run_checkpoint import step_of
    from .model_card import base_of, check_name, model_card
    from .plot_metrics import plot_runs

    # resolved, because its name goes into the card: "." has none
    run, checkpoint = read(options.run_dir.resolve()), find_checkpoint(options.run_dir, options.step)
    base = base_of(run)
    check_name(options.repo, base)
    uploads = None if options.folder else Uploads(options.repo, run.run_dir.name, options.private)
    if options.folder and options.folder.exists():
        raise InputError(f"--folder {options.folder} exists: choose another folder or remove it")
    # beside the result, because the disk of temporary files may be small
    beside = options.folder.absolute().parent if options.folder else run.run_dir
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=beside, prefix=".partial_push_") as made:
        model = Path(made) / "model"
        _convert(checkpoint, model)
        plot_runs((options.run_dir,), model / "curves.png")
        card = model_card(run, model, options.repo, step_of(checkpoint), base)
        (model / "README.md").write_text(card, encoding="utf-8")
        files = sorted(file for file in model.rglob("*") if file.is_file())
        for file in files:
            print(f"{file.stat().st_size / 1e6:>12,.3f} MB  {file.relative_to(model)}")
        if options.folder:
            model.rename(options.folder)
            print(options.folder)
        elif uploads:
            print(uploads.destination)
            print(uploads.upload(model, checkpoint.name))


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """Return the folder of the checkpoint of ``step``, or of the newest.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from ..weights.run_checkpoint import Candidates, choose_whole, find_candidates, step_of
    from ..weights.torch_dist import checkpoint_path

    folder = run_dir / "checkpoints"
    candidates = find_candidates(folder)
    if step is not None:
        path = checkpoint_path(folder, step)
        if not path.is_dir():
            there = ", ".join(str(step_of(found)) for found in candidates.checkpoints if found.is_dir())
            raise InputError(f"--step {step}: {folder} has no such checkpoint, only {there or 'none'}")
        candidates = Candidates("", [path])
    found, _ = choose_whole(candidates, remedy="give its number as --step")
    if found is None:
        raise InputError(f"{folder} has no checkpoint: give the folder of a run that has saved one")
    return found


def _convert(checkpoint: Path, target: Path) -> None:
    """Write the Hugging Face folder of a checkpoint, whose files are compared with their checksums first."""
    from ..weights.megatron_to_hf import MegatronToHF
    from ..weights.run_checkpoint import check_whole
    from .conversion_job import processes, progress

    with processes(alone=True):
        check_whole(checkpoint, "give its number as --step", "use another run")
        conversion = MegatronToHF(checkpoint, None, None)
        with progress(conversion.nbytes) as advance:
            conversion.convert(target, verify=False, advance=advance)


class Uploads:
    """A repository on the hub that may be written.

    Args:
        repo: owner/name.
        run: name of the run folder, which the cards of its checkpoints state.
        private: whether a new repository is private.

    Raises:
        InputError: there is no token for the hub, or the repository has other content.
        RunError: the hub cannot be reached, or refuses.
    """

    def __init__(self, repo: str, run: str, private: bool) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        if not get_token():
            raise InputError("there is no token for the hub: run 'hf auth login', or set HF_TOKEN")
        self.api = HfApi()
        self.repo, self.private = repo, private
        self.parent: str | None = None
        """Commit on which the upload builds; None for a repository that does not exist yet."""
        try:
            found = self.api.model_info(repo)
        except RepositoryNotFoundError:
            return
        except Exception as error:  # of HTTP
            raise RunError(f"the hub does not answer about {repo} ({one_line(error)})") from None
        files = {file.rfilename for file in found.siblings or ()} - {".gitattributes"}
        if files and (found.card_data is None or found.card_data.get("gmpo_run") != run):
            raise InputError(
                f"{repo} exists and holds {len(files)} files that are not of run {run!r}: choose another name"
            )
        self.parent = found.sha

    @property
    def destination(self) -> str:
        """Return a line that says where an upload goes."""
        kind = "a new commit" if self.parent else f"a new {'private ' if self.private else ''}repository"
        return f"uploading to {self.api.endpoint}/{self.repo}, {kind}"

    def upload(self, folder: Path, message: str) -> str:
        """Upload the files of a folder in one commit and return its address.

        Raises:
            RunError: the hub cannot be reached, or refuses; another upload came in between.
        """
        from huggingface_hub import CommitOperationAdd

        files = [file for file in folder.rglob("*") if file.is_file()]
        additions = [CommitOperationAdd(str(file.relative_to(folder)), file) for file in files]
        try:
            if self.parent is None:
                self.api.create_repo(self.repo, private=self.private or None)
            done = self.api.create_commit(
                self.repo, additions, commit_message=message, parent_commit=self.parent
            )
        except Exception as error:  # of HTTP, and of the upload of single files
            raise RunError(
                f"the upload to {self.repo} failed ({one_line(error)}): run the command again, or keep the "
                "converted model with --folder"
            ) from None
        return str(done.commit_url)
