"""Files that are there whole or not at all, and what is in them."""

import hashlib
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Write a file in one move: whoever reads it, and whenever the writer ends, has the old text or the new one."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
