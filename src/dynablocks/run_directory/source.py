"""The code that computes certificates and attacks, as one hash: between two releases the version stays the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMPUTING = (
    "ball.py",
    "blocks.py",
    "fields",
    "integrators",
    "lifting.py",
    "linear",
    "norms.py",
    "models",
    "modes.py",
    "numerics",
    "properties",
    "robustness",
    "seeding.py",
    "switching",
)
"""Attacks and certificates, the networks they are of, and all that those are made of: modules and folders of them."""


def source_hash(package: Path) -> str:
    """SHA-256 of names and contents of the modules in :data:`COMPUTING`.

    Every byte counts, those of comments too: which change leaves all results as they were, no program can tell.

    Args:
        package: the folder of the package. Where it holds no source (an archive, compiled files alone), nothing is
            hashed, and the version must tell releases apart.

    Example:
        >>> import dynablocks
        >>> len(source_hash(Path(dynablocks.__file__).parent))
        64
    """
    digest = hashlib.sha256()
    for entry in COMPUTING:
        place = package / entry
        for file in sorted([place, *place.rglob("*.py")]):
            if file.is_file():
                content = file.read_bytes()
                digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def is_hashed(module: str) -> bool:
    """Whether the hash covers the source of a module.

    Example:
        >>> is_hashed("dynablocks.models.paper"), is_hashed("dynablocks.experiments.fig5"), is_hashed("mine")
        (True, False, False)
    """
    package, _, rest = module.partition(".")
    return package == "dynablocks" and rest.partition(".")[0] in {entry.removesuffix(".py") for entry in COMPUTING}
