"""Where stage results live: one small file each, written atomically, checksummed, with its provenance beside it. All
profiles share one folder, in which a result is found by its stage and key: equal ones are computed once.

A result is `json` (plain values), `parquet` (a pandas frame), `tensors` (a dict of torch tensors) or `folder` (files
that the stage wrote itself). One whose checksum does not match counts as missing and is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

SUFFIX = {"json": ".json", "parquet": ".parquet", "tensors": ".safetensors", "folder": ""}
PROVENANCE = ".provenance.json"


@dataclass
class Store:
    """Stage results in `folder`; `recorded` folders are looked into as well, and never written."""

    folder: Path
    recorded: tuple[Path, ...] = ()

    def paths(self, stage: str, key: str, kind: str) -> list[Path]:
        """Where a result lies or would lie, the own folder first."""
        return [folder / f"{stage}-{key}{SUFFIX[kind]}" for folder in (self.folder, *self.recorded)]

    def find(self, stage: str, key: str, kind: str) -> Path | None:
        """The stored result's path, if it is there and undamaged."""
        return next((path for path in self.paths(stage, key, kind)
                     if path.exists() and checksum(path) == _note(path).get("checksum")), None)

    def provenance(self, stage: str, key: str, kind: str) -> dict[str, Any]:
        """What is recorded about a stored result; empty if it is not stored."""
        return next((note for path in self.paths(stage, key, kind) if (note := _note(path))), {})

    def scratch(self, stage: str, key: str) -> Path:
        """A folder for unfinished work of a stage, kept if the run is killed, so that the stage can go on."""
        path = self.folder / "unfinished" / f"{stage}-{key}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def lease(self, stage: str, key: str) -> Iterator[None]:
        """While it is held, another process that would compute this result waits. A dead one's is free at once: it is
        an `flock`, which ends with its holder, and on NFS 4 a minute or two after the holder's machine is gone. Where a
        file system has no locks, that of a dead process of the same machine is taken over, of another remove it."""
        path = self.scratch(stage, key).with_suffix(".lock")
        with FileLock(path):
            yield
            path.unlink(missing_ok=True)  # who waits for it sees that, and makes it anew

    def write(self, stage: str, key: str, kind: str, value: Any, provenance: dict[str, Any]) -> Path:
        """Store a result, of kind `folder` the folder to move into place; of None, the provenance alone."""
        path = self.paths(stage, key, kind)[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        note, new = (path.with_name(f".{path.name}.{os.getpid()}.{part}") for part in ("note", "new"))
        if kind == "folder":
            new = value
        elif value is not None:
            _dump(value, kind, new)
        record = {**provenance, "checksum": None if value is None else checksum(new)}
        note.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(note, path.with_name(path.name + PROVENANCE))  # killed behind this line, the checksum does not match
        if path.is_dir():  # a folder cannot be renamed over another one
            shutil.rmtree(path)
        if value is not None:
            os.replace(new, path)
        shutil.rmtree(self.folder / "unfinished" / f"{stage}-{key}", ignore_errors=True)
        return path


def _note(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads(path.with_name(path.name + PROVENANCE).read_text(encoding="utf-8"))
    return {}


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
    if kind == "json":  # NaN is not JSON, and would be unreadable elsewhere
        path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    elif kind == "parquet":
        value.to_parquet(path, index=False)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in value.items()}, path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of all file names and contents below a folder."""
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        lines = "".join(f"{file.relative_to(path).as_posix()}\0{checksum(file)}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
