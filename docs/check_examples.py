"""Run the Python of Markdown pages: python docs/check_examples.py README.md CONTRIBUTING.md docs

A block marked ``python`` is executed; where it has ``>>>`` prompts its output is compared, as doctest does, and an
ellipsis stands for anything. The blocks of one page share their names, from top to bottom; torch's seed is 0 at the
start of a page; files that a block writes go to a temporary folder. ``<!-- not run: REASON -->`` above a block leaves
it out. Exits with 1 when a block fails.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SKIP = r"(?P<skip><!-- not run: [^\n]+ -->\n+)?"
BLOCK = re.compile(SKIP + r"^```(?:python|pycon)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Code of a page, the line it begins on, and whether it is to be run."""

    code: str
    line: int
    wanted: bool


def blocks(text: str) -> Iterator[Block]:
    """The Python blocks of a page in order."""
    for match in BLOCK.finditer(text):
        yield Block(match["code"], text[: match.start("code")].count("\n") + 1, match["skip"] is None)


def failure(block: Block, page: Path, names: dict[str, Any]) -> str | None:
    """Run a block; what went wrong, or ``None``."""
    if ">>>" in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, names, page.name, str(page), block.line - 1)
        report = io.StringIO()
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.write, clear_globs=False)
        names.update(test.globs)
        return report.getvalue() if result.failed else None
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    except BaseException:
        return f"{page}, block at line {block.line}:\n{printed.getvalue()}{traceback.format_exc()}"
    return None


def check_page(page: Path) -> tuple[int, int]:
    """How many blocks ran and how many of them failed; failures are printed."""
    import torch

    torch.manual_seed(0)
    module = types.ModuleType(f"page_{page.stem}")
    # Classes of a page are copied and inspected like those of any module, which must be found for that.
    sys.modules[module.__name__] = module
    names = module.__dict__
    ran = failed = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        if not block.wanted:
            continue
        problem = failure(block, page, names)
        ran, failed = ran + 1, failed + (problem is not None)
        if problem is not None:
            print(problem)
    return ran, failed


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    given = [Path(argument).resolve() for argument in arguments]
    pages = [page for path in given for page in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]
    pages = [page for page in pages if "_build" not in page.parts]
    ran = failed = 0
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for page in pages:
            counts = check_page(page)
            print(f"{os.path.relpath(page, Path(__file__).parent.parent)}: {counts[0]} blocks, {counts[1]} failed")
            ran, failed = ran + counts[0], failed + counts[1]
    print(f"{ran} blocks of {len(pages)} pages ran, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
