"""The size of a package in code tokens: no comments, no docstrings, and formatting has no say.

    python -m benches.tokens [FOLDER ...]

Prints, for each folder (ddpm_deploy), its tokens, the imports of its own modules inside functions, and its longest
functions.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LAYOUT: Final = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_LONGEST: Final = 3  # functions that are named


def code_tokens(source: str) -> int:
    """Tokens of a module, as Python writes it anew from its syntax tree without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    tokens = tokenize.generate_tokens(io.StringIO(ast.unparse(tree)).readline)
    return sum(token.type not in _LAYOUT for token in tokens)


def functions(source: str) -> Iterator[tuple[int, str, int]]:
    """Lines, name and imports of our own modules inside, of each function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = [child for child in ast.walk(node) if isinstance(child, ast.ImportFrom)]
            own = sum((child.module or "").startswith("ddpm_deploy") for child in inside)
            yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name, own


def main() -> None:
    """Count each folder."""
    for folder in map(Path, sys.argv[1:] or ["ddpm_deploy"]):
        sources = [path.read_text() for path in sorted(folder.rglob("*.py"))]
        found = sorted((item for source in sources for item in functions(source)), reverse=True)
        longest = ", ".join(f"{name} ({lines})" for lines, name, _ in found[:_LONGEST])
        print(
            f"{folder}: {sum(map(code_tokens, sources))} code tokens in {len(sources)} files, "
            f"{sum(own for *_, own in found)} imports of its own modules inside functions; longest functions: {longest}"
        )


if __name__ == "__main__":
    main()
