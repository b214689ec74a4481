"""Files that are there whole or not at all, and what is in them."""

import hashlib
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a file in one move: whoever reads it, and whenever the writer ends, has the old text or the new one."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def sampled_digest(folder: Path) -> str:
    """SHA-256 of the names and sizes of a model's safetensors, part by part, and of 64 KiB in each of their 8 MiB: whether it is
    the same model, in a second also for one of many gigabytes. A change of less than that may be missed."""
    found = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as opened:
            for start in range(0, size, 2**23):
                opened.seek(start)
                found.update(opened.read(2**16))
    return found.hexdigest()


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
