"""Count names and words that are not the field's: `python tools/check_words.py`; exit 1 where a limit is exceeded.

Readers search with grep, so functions are verbs or the thing they return, and prose uses the terms of PyTorch,
transformers and the papers. Counted in src/: functions whose name is one participle, and functions whose name begins or
ends with a preposition; in src/, README.md and docs/: words of `TERMS`. A line that ends in `# words: ok` is passed
over.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_PARTICIPLES, MOST_PREPOSITIONS = 0.01, 0.03

PREPOSITIONS = frozenset(
    "about above after as at before behind below beside between beyond by for from in into like near of on onto over "
    "per than through to under until via with within without".split()
)
IRREGULAR = frozenset(
    "built cut drawn fed found given held kept left led made put read seen sent shown split spread taken told "
    "written".split()
)
# Ends like a participle and is a noun, a verb or the name that everybody uses.
NOUNS = frozenset(
    "embed embedding encoding decoding coding feed fed heading length need padding rounding sampling scaling "
    "seed setting speed spread string token training warning ring given read split grouped".split()
)
# Names that PyTorch, transformers or Python's own libraries use in the same way.
CONVENTIONAL = frozenset(
    "from_dict to_dict from_spec to_spec from_json to_json from_config from_pretrained on_device to_device "
    "straight_through is_in load_from".split()
)

# What is not said -> what is.
TERMS = {
    r"\bwaist\b": "core interface, base class",
    r"\bbits a weight\b": "bits per weight",
    r"\b(tokens|numbers|bytes) a (window|token|matrix|second|weight)\b": "per",
    r"\bside bytes\b": "overhead",
    r"\bat hand\b": "loaded",
    r"\bforetold\b|\bforetells?\b": "predicted, expected",
    r"\banew\b": "again",
    r"\bnudged?\b": "adjusted",
    r"\bunwilling\b": "swap penalty",
    r"\bby heart\b": "overfit",
    r"\blikeliest\b": "top-k",
    r"(?<!-to-)\bend loss\b": "end-to-end loss",
    r"(?<!second )(?<!second_)\bmoments\b": "second moments, Hessian",
    r"\bhollow\b": "meta",
    r"\bwhole file\b": "artifact",
    r"\bcompanions?\b": "auxiliary files",
    r"\bstranger'?s?\b": "untrusted",
    r"\bon the way forwards?\b": "straight-through estimator",
    r"\bcome_alive\b|\bgo_on_from\b|\bwhy_whole\b": "see docs/layout.md",
}


def main() -> int:
    """Print the counts and every place beyond a limit; return the exit code."""
    names = [(path, node.name, node.lineno) for path in _sources() for node in _functions(path)]
    participles = [row for row in names if is_participle(row[1])]
    prepositions = [row for row in names if has_preposition(row[1])]
    terms = list(_terms())
    failed = bool(terms)
    for title, found, most in (
        ("participle", participles, MOST_PARTICIPLES),
        ("preposition", prepositions, MOST_PREPOSITIONS),
    ):
        share = len(found) / len(names)
        print(f"{title}: {len(found)} of {len(names)} functions, {100 * share:.1f} %, at most {100 * most:.0f} %")
        if share > most:
            failed = True
            for path, name, line in found:
                print(f"  {path.relative_to(ROOT)}:{line}: {name}")
    print(f"terms: {len(terms)}, at most 0")
    for path, line, word, better in terms:
        print(f"  {path.relative_to(ROOT)}:{line}: {word!r} -> {better}")
    return int(failed)


def is_participle(name: str) -> bool:
    """Whether a function's name is one participle: `decided`, `_told`."""
    words = name.strip("_").split("_")
    if len(words) != 1 or words[0] in NOUNS:
        return False
    return words[0] in IRREGULAR or re.search(r"(ed|ing|own|olen)$", words[0]) is not None


def has_preposition(name: str) -> bool:
    """Whether a function's name begins or ends with a preposition: `of_columns`, `tables_of`."""
    words = name.strip("_").split("_")
    return name.strip("_") not in CONVENTIONAL and (words[0] in PREPOSITIONS or words[-1] in PREPOSITIONS)


def _sources() -> list[Path]:
    return sorted((ROOT / "src").rglob("*.py"))


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__"):
            yield node


def _terms() -> Iterator[tuple[Path, int, str, str]]:
    """File, line, word and what to say instead."""
    pages = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "experiments" not in page.parts]
    for path in [*_sources(), ROOT / "README.md", *pages]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.endswith("# words: ok"):
                continue
            for pattern, better in TERMS.items():
                if found := re.search(pattern, line, re.IGNORECASE):
                    yield path, number, found[0], better


if __name__ == "__main__":
    sys.exit(main())
