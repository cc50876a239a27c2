"""Where stage results live: one small file each, written atomically, checksummed, with its provenance beside it.

A result is `json` (plain values), `parquet` (a pandas frame), `tensors` (a dict of torch tensors) or `folder` (files
that the stage wrote itself). Beside `<stage>-<key>.<ext>` lies `<stage>-<key>.provenance.json` with the checksum. A
file whose checksum does not match counts as missing and is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sts.errors import StsError

SUFFIX = {"json": ".json", "parquet": ".parquet", "tensors": ".safetensors", "folder": ""}
PROVENANCE = ".provenance.json"


class Store:
    """Stage results in `folder`; `recorded` folders are looked into as well, and never written."""

    def __init__(self, folder: Path, recorded: tuple[Path, ...] = ()):
        self.folder = Path(folder)
        self.recorded = tuple(Path(path) for path in recorded)

    def path(self, stage: str, key: str, kind: str, folder: Path | None = None) -> Path:
        """Where a result lies (or would lie).

        Raises:
            StsError: no such kind of result.
        """
        if kind not in SUFFIX:
            raise StsError(f"Results of kind {kind!r} are not known. Valid: {', '.join(SUFFIX)}.")
        return (folder or self.folder) / f"{stage}-{key}{SUFFIX[kind]}"

    def find(self, stage: str, key: str, kind: str) -> Path | None:
        """The stored result's path, if it is there and undamaged."""
        for folder in (self.folder, *self.recorded):
            path = self.path(stage, key, kind, folder)
            provenance = _read_json(_beside(path))
            if provenance is not None and path.exists() and checksum(path) == provenance.get("checksum"):
                return path
        return None

    def provenance(self, stage: str, key: str, kind: str) -> dict[str, Any]:
        """What is recorded about a stored result; empty if it is not stored."""
        for folder in (self.folder, *self.recorded):
            found = _read_json(_beside(self.path(stage, key, kind, folder)))
            if found is not None:
                return found
        return {}

    def scratch(self, stage: str, key: str) -> Path:
        """A folder for unfinished work of a stage, kept if the run is killed, so that the stage can go on."""
        path = self.folder / "unfinished" / f"{stage}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def lease(self, stage: str, key: str) -> Iterator[None]:
        """While it is held, no other process computes this result; a second one waits until it is given back.

        The lock is the operating system's own: that of a process that died is free at once.
        """
        import fcntl

        path = self.folder / "unfinished" / f"{stage}-{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with open(path, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists() or path.stat().st_ino != os.fstat(lock.fileno()).st_ino:
                    continue  # another process was done and removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    def write(self, stage: str, key: str, kind: str, value: Any, provenance: dict[str, Any]) -> Path:
        """Store a result: to a temporary name, flushed, then renamed; the provenance last, as the commit mark.

        For `folder`, `value` is the folder to move into place (usually the stage's scratch folder).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(stage, key, kind)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        # Provenance and result are renamed one after the other. Killed in between, the checksum does not match and
        # the stage is computed again; a folder, which may hold hours of work, then still lies in its scratch place.
        if kind != "folder":
            _dump(value, kind, temporary)
            _flush(temporary)
        record = {**provenance, "checksum": checksum(value if kind == "folder" else temporary)}
        note = temporary.with_name(temporary.name + ".note")
        note.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        _flush(note)
        if kind == "folder":
            if path.exists():  # a folder cannot be renamed over another one
                shutil.rmtree(temporary, ignore_errors=True)
                os.replace(path, temporary)
            os.replace(note, _beside(path))
            os.replace(value, path)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            os.replace(temporary, path)
            os.replace(note, _beside(path))
        shutil.rmtree(self.folder / "unfinished" / f"{stage}-{key}", ignore_errors=True)
        return path


def read(path: Path, kind: str) -> Any:
    """Read a stored result back."""
    if kind == "json":
        return json.loads(path.read_text(encoding="utf-8"))
    if kind == "parquet":
        import pandas

        return pandas.read_parquet(path)
    if kind == "tensors":
        from safetensors.torch import load_file

        return load_file(path)
    return path


def _dump(value: Any, kind: str, path: Path) -> None:
    if kind == "json":
        # allow_nan=False: NaN is not JSON, and would be silently unreadable elsewhere.
        path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    elif kind == "parquet":
        value.to_parquet(path, index=False)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in value.items()}, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of all file names and contents below a folder."""
    if path.is_file():
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{checksum(file)}\n".encode())
    return digest.hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + PROVENANCE)


def _flush(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
