"""The run directory: every path in it, atomic publishing, completion records, hashes, and the lock.

Rules that the whole package keeps (DESIGN in CONTRIBUTING.md):

* an output is written to a sibling ``<name>.partial`` and renamed into place; what is published is never edited;
* a stage is done when its completion record (``done.json``, written last) exists and what it names is there;
* one process at a time holds a run.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from motkit.checkpoint import PRUNED
from motkit.errors import UserError

_PRUNABLE = ("checkpoint/", "steps/")
_STORAGE_ERRNOS = {
    errno.ENOSPC: "no space left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some or choose another folder",
    errno.EROFS: "the file system is read-only; choose a folder that can be written",
    errno.EACCES: "permission denied; choose a folder that can be written",
    errno.EPERM: "operation not permitted; choose a folder that can be written",
    errno.EFBIG: "the file is larger than this account or file system allows; raise the limit or choose another folder",
    errno.EIO: "the disk reports an input/output error; check it or choose another folder",
}


@contextlib.contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the errors of a full, read-only or failing disk into a `UserError` that names ``where``.

    torch and safetensors wrap these in exceptions of their own, which are recognised too.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        raise UserError(f"{error.filename or where}: {_STORAGE_ERRNOS[error.errno]}") from error
    except Exception as error:
        text = str(error)
        for number, remedy in _STORAGE_ERRNOS.items():
            if f"os error {number})" in text:
                raise UserError(f"{where}: {remedy}") from error
        if "PytorchStreamWriter failed" in text or "unexpected pos" in text:
            raise UserError(
                f"{where}: writing failed; is the disk full? free some space or choose another folder"
            ) from error
        raise


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(folder: Path) -> dict[str, dict[str, Any]]:
    """``{relative path: {"sha256": …, "bytes": …}}`` of every file below ``folder``, sorted by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size} for path in files
    }


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(target: Path) -> Path:
    """The sibling in which ``target`` is written before it is renamed into place."""
    return target.with_name(target.name + ".partial")


def move_into_place(partial: Path, target: Path) -> None:
    """Make ``partial`` (file or folder) durable and rename it to ``target``, which must not exist as a folder."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [partial, *partial.rglob("*")] if partial.is_dir() else [partial]:
        if path.is_symlink():
            continue
        # safetensors writes files with mode 0600 whatever the umask, and does not sync them.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)
    os.rename(partial, target)
    sync(target.parent)


@contextlib.contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Yields a fresh, empty sibling ``<target>.partial``; on a clean exit it is made durable and renamed to ``target``,
    on an exception it is deleted. A killed process leaves the ``.partial``, which the next call deletes.

    Raises:
        UserError: ``target`` exists already, or the disk is full, read-only or failing.
    """
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists already; delete it or choose another folder")
    partial = partial_path(target)
    with storage_errors(target):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            move_into_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_text(target: Path, text: str) -> None:
    """Write a text file whole or not at all (an existing one is replaced at once).

    Raises:
        UserError: the disk is full, read-only or failing.
    """
    partial = partial_path(target)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            move_into_place(partial, target)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def write_json(target: Path, value: Any) -> None:
    """`write_text` of ``value`` as indented JSON."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class RunDir:
    """Paths, records and lock of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.environment = root / "environment.json"
        self.inputs = root / "inputs.json"
        self.traces = root / "traces"
        self.logs = root / "logs"
        self.summary = root / "summary.csv"
        self.final = root / "final"

    def round(self, number: int) -> Path:
        """Folder of a round; round 0 is the student before the first."""
        return self.root / f"round_{number:02d}"

    def branch(self, number: int, name: str) -> Path:
        """Stage folder of a branch: checkpoint/, metrics.jsonl, done.json."""
        return self.round(number) / "branches" / name

    def branch_step(self, number: int, name: str, step: int) -> Path:
        """A branch's weights after ``step`` steps, where they are kept: a part of its stage."""
        return self.branch(number, name) / "steps" / f"{step:06d}"

    def branch_work(self, number: int, name: str) -> Path:
        """Where a branch's trainer keeps its own checkpoints until the branch is published."""
        return self.round(number) / "branches" / f"{name}.training"

    def merged(self, number: int) -> Path:
        """Stage folder of a merge: checkpoint/, merge.yaml, done.json."""
        return self.round(number) / "merged"

    def published(self, number: int) -> Path:
        """Stage folder of the student as it is published: checkpoint/, done.json."""
        return self.round(number) / "published"

    def evaluation(self, number: int) -> Path:
        """Scores of a round, JSON."""
        return self.round(number) / "evaluation.json"

    def results(self, number: int, name: str) -> Path:
        """What a checkpoint answered to each problem, and whether it was right, JSONL (`motkit.evaluate`)."""
        return self.round(number) / "evaluation" / f"{name}.jsonl"

    def weights(self, number: int) -> Path:
        """What the branches of a round answered to seed problems, for ``weights: accuracy``."""
        return self.round(number) / "weights"

    def source(self, key: str) -> Path:
        """What a run fetched from the hub, once: problems or a teacher's traces, JSONL."""
        return self.root / "sources" / f"{key}.jsonl"

    def generated(self, teacher: str) -> Path:
        """Samples asked of a teacher, JSONL (`motkit.samples`)."""
        return self.root / "generated" / f"{teacher}.jsonl"

    @property
    def generated_report(self) -> Path:
        """What the samples of each teacher took: tokens, seconds, cost."""
        return self.root / "generated" / "report.json"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, however it ends.

        Raises:
            UserError: another process holds it, or there is a file in its place.
        """
        with storage_errors(self.root):
            try:
                self.root.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
                raise UserError(
                    f"{self.root}: cannot become a folder ({error.strerror}); choose another with --run"
                ) from error
            file = (self.root / ".lock").open("a+", encoding="utf-8")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UserError(
                    f"{self.root}: another process holds this run ({file.read().strip() or 'unknown'}); "
                    "wait for it, stop it, or choose another folder with --run"
                ) from None
            file.seek(0)
            file.truncate()
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()
            yield

    def link_final(self, checkpoint: Path) -> None:
        """Point ``final`` at a published checkpoint, in one step."""
        partial = partial_path(self.final)
        with storage_errors(self.root):
            partial.unlink(missing_ok=True)
            partial.symlink_to(checkpoint.relative_to(self.root))
            os.replace(partial, self.final)
            sync(self.root)

    def relative(self, path: Path) -> str:
        """The path as messages and records name it: below the run's folder."""
        return path.relative_to(self.root).as_posix()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_done(folder: Path, inputs: Mapping[str, Any], **details: Any) -> dict[str, Any]:
    """Write a stage's completion record into its (still partial) folder: what went in and what came out, hashed."""
    record = {
        "inputs": dict(inputs),
        **details,
        "outputs": hash_tree(folder),
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_json(folder / "done.json", record)
    return record


def read_done(folder: Path) -> dict[str, Any] | None:
    """The completion record of a stage; None if it is not done (or its record cannot be read).

    Once `prune_checkpoint` has begun on the stage, it holds ``pruned: True``.
    """
    record = read_json(folder / "done.json")
    if "outputs" not in record:
        return None
    return {**record, "pruned": True} if (folder / PRUNED).is_file() else record


def is_pruned(record: Mapping[str, Any], name: str) -> bool:
    """Whether an output of a stage was deleted on purpose."""
    return bool(record.get("pruned")) and name.startswith(_PRUNABLE)


def damage(folder: Path, record: Mapping[str, Any], *, hashes: bool) -> str | None:
    """What is wrong with a done stage's outputs, in words; None if they are as recorded.

    Args:
        hashes: read every file and compare its SHA-256; else only its size.
    """
    for name, recorded in record["outputs"].items():
        if is_pruned(record, name):
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != recorded["bytes"]:
            return f"{name} has {size} bytes, {recorded['bytes']} were written"
        if hashes and hash_file(path) != recorded["sha256"]:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def prune_checkpoint(folder: Path) -> bool:
    """Delete the weights of a done branch (``checkpoint/``, and ``steps/`` in between) and keep its record; returns
    whether there was anything to delete.

    First the stage notes it (``pruned.json``), then a folder loses its name, then it is deleted: killed in between, the
    stage counts as pruned and the next call finishes.
    """
    kept = [folder / name.rstrip("/") for name in _PRUNABLE]
    doomed = [path.with_name(f"{path.name}.pruned") for path in kept]
    if not any(path.exists() for path in (*kept, *doomed)):
        return False
    with storage_errors(folder):
        if not (folder / PRUNED).is_file():
            files = [path for top in kept for path in top.rglob("*") if path.is_file()]
            write_json(folder / PRUNED, {"pruned": True, "freed_bytes": sum(path.stat().st_size for path in files)})
        for path, away in zip(kept, doomed, strict=True):
            if away.exists():
                shutil.rmtree(away)
            if path.exists():
                os.rename(path, away)
                sync(folder)
                shutil.rmtree(away)
    return True


def set_aside(folder: Path) -> Path:
    """Rename a damaged stage so that it can be made again; nothing is deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{number}")).exists():
        number += 1
    with storage_errors(folder):
        os.rename(folder, aside)
    return aside


def checkpoint_digest(record: Mapping[str, Any], folder: str = "checkpoint") -> str:
    """Identity of the checkpoint that a stage made: a digest of the hashes of the files in ``folder`` of it."""
    return digest({name: entry["sha256"] for name, entry in record["outputs"].items() if name.startswith(f"{folder}/")})


def link_file(source: str | Path, target: str | Path) -> None:
    """The same file under a second name; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def link_tree(source: Path, target: Path) -> None:
    """`link_file` of every file below ``source``. Safe because what is published is never edited."""
    shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package → version, of those that are installed here."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin what cannot be stored.

    Raises:
        UserError: the disk of ``folder`` has less than ``num_bytes`` free.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(
            f"{folder}: {what} needs about {num_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free; "
            "free some or choose another folder with --run"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file or it is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
