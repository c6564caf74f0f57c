"""What the stages keep between two starts of the program. Files are written under a temporary name and renamed."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.errors import UserError
from benchmarks.quality.settings import Settings


class Cache:
    """A folder for one set of settings; other settings have another, so nothing old is ever taken for new."""

    def __init__(self, root: Path, settings: Settings):
        self.folder = root / settings.digest()
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "settings.json").exists():
                self.save("settings.json", settings.facts())

    def path(self, name: str) -> Path:
        return self.folder / name

    def save(self, name: str, value: Any) -> None:
        """JSON, or tensors for a name that ends in .pt."""
        target = self.path(name)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        with explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                if name.endswith(".pt"):
                    torch.save(value, temporary)
                else:
                    temporary.write_text(json.dumps(value))
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)

    def load(self, name: str) -> Any | None:
        """None where there is no such file."""
        path = self.path(name)
        if not path.exists():
            return None
        try:
            if name.endswith(".pt"):
                return torch.load(path, weights_only=True, mmap=True)
            return json.loads(path.read_text())
        except Exception as error:  # damaged tensors raise whatever the bytes happen to say
            what = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be read ({what}): delete it and start again") from None

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    @contextmanager
    def claim(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Whether this process has `name` to itself; another's claim ends with that process, however it ends."""
        path = self.path(f"{name}.lock")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """A full disk or a folder without permission in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except RuntimeError as error:  # torch.save's word for a full disk
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None
