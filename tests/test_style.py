"""The writing is held like the numbers: width, statements of one thought, density, one-way imports, the reading budget.

`python tests/test_style.py [FILE ...]` prints what is wrong with some files, or with all of them.
"""
import ast
import io
import re
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {"gemma.py": 420, "sae.py": 300, "fsrl.py": 330, "simpo.py": 340, "train.py": 420, "analyze.py": 600}
TOGETHER = 2400                               # lines of the six
EVERYTHING = 10230                            # of all Python outside tests: it only goes down
STATEMENT, DENSITY, COMMENTS = 60, 12.5, .35  # tokens a statement, tokens a code line, comment lines a code line
LEVELS = ["lib", "gemma", "sae", "fsrl", "simpo", ("train", "analyze"),
          ("instruments", "experiments", "exercises", "tiny")]     # imports go from right to left only
# The exceptions that the design names: the judge's factory, and the instruments that analyze.py calls if they are
# there.
DOORS = {("lib/judge.py", "tiny"), ("analyze.py", "instruments")}
# The path of a pair, from its row to the ledger: what the README's two evenings read, at most 9,000 tokens.
PATH_TOKENS = 9000
PATH = {
    "simpo.py": ["Pair", "by_the_book", "dense_logps", "Batch", "collate", "score", "mean_logps", "simpo_loss"],
    "gemma.py": ["GemmaConfig", "RMSNorm", "rope_table", "rotate", "Attention", "MLP", "Block", "Gemma"],
    "sae.py": ["jumprelu", "JumpReLUSAE"],
    "fsrl.py": ["Adapter", "Steerings", "Steering"],
    "train.py": ["pair_order", "lr_at", "objective", "train"],
    "analyze.py": ["token_ledger", "integrated", "feature_ledger", "masking"],
}


def files():
    return sorted(p for p in ROOT.rglob("*.py") if not {"runs", "venv", ".venv"} & set(p.relative_to(ROOT).parts))


def name(path):
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def tokens(source):
    """The source's tokens without layout and comments, an f-string as one."""
    skip = (tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
    start, end = (getattr(tokenize, f"FSTRING_{x}", None) for x in ("START", "END"))
    out, depth = [], 0
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == end and start is not None:
            depth -= 1
        elif depth == 0 and t.type not in skip:
            out.append(t)
        depth += t.type == start and start is not None
    return out


def docstrings(tree):
    """Line numbers of docstrings."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            out |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return out


def literal_tables(tree):
    """First lines of assignments whose value is a literal: data, not thought."""
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            try:
                ast.literal_eval(node.value)
                out.add(node.lineno)
            except ValueError:
                pass
    return out


@cache
def measured(path):
    """-> (findings, tokens a code line, comment and docstring lines a code line)"""
    source, test = path.read_text(encoding="utf-8"), path.is_relative_to(ROOT / "tests")
    tree, found, lines = ast.parse(source), [], source.splitlines()
    width, docs, tables = 120 if test else 105, docstrings(ast.parse(source)), literal_tables(tree)
    found += [f"line {n}: {len(x)} columns" for n, x in enumerate(lines, 1) if len(x) > width]
    found += [f"line {n}: noqa" for n, x in enumerate(lines, 1) if re.search(r"#\s*no" + "qa", x)]
    found += [f"line {node.lineno}: a lambda with a name" for node in ast.walk(tree)
              if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda)]
    statement, code, code_lines = [], 0, set()
    for t in tokens(source):
        if t.type == tokenize.NEWLINE:
            if statement and len(statement) > STATEMENT and statement[0].start[0] not in tables:
                found.append(f"line {statement[0].start[0]}: a statement of {len(statement)} tokens")
            statement = []
            continue
        statement.append(t)
        if t.start[0] not in docs:
            code += 1
            code_lines |= set(range(t.start[0], t.end[0] + 1))
    comments = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    return found, code / max(1, len(code_lines)), (len(comments) + len(docs)) / max(1, len(code_lines))


def imports(path):
    """(line, first part of the module) of each import of the project's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from ((node.lineno, n.partition(".")[0]) for n in names)


def level(module):
    return next((i for i, x in enumerate(LEVELS) if module == x or module in x and isinstance(x, tuple)), None)


def upward(path):
    """Imports that go up, or from train.py to analyze.py and back."""
    mine = name(path).partition("/")[0].removesuffix(".py")
    for line, other in imports(path):
        a, b = level(mine), level(other)
        if a is None or b is None or mine == other or (name(path), other) in DOORS:
            continue
        if b > a or a == b and mine in ("train", "analyze"):
            yield f"line {line}: {name(path)} may not import {other}"


def path_tokens():
    """Tokens of what the two evenings read, docstrings and comments left out."""
    total = 0
    for file, names in PATH.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        nodes = {n.name: n for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        assert set(names) <= set(nodes), f"{file} has no {sorted(set(names) - set(nodes))}"
        docs = docstrings(ast.parse(source))
        spans = [(nodes[n].lineno, nodes[n].end_lineno) for n in names]
        for t in tokens(source):
            inside = any(a <= t.start[0] <= b for a, b in spans)
            total += inside and t.type != tokenize.NEWLINE and t.start[0] not in docs
    return total


@pytest.mark.parametrize("path", files(), ids=name)
def test_every_file(path):
    assert not measured(path)[0] + list(upward(path))


@pytest.mark.parametrize("file", BUDGET)
def test_the_six(file):
    _, density, comments = measured(ROOT / file)
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= BUDGET[file]
    assert density <= DENSITY and comments >= COMMENTS


def test_the_whole():
    count = {name(p): len(p.read_text(encoding="utf-8").splitlines()) for p in files()}
    assert sum(count[f] for f in BUDGET) <= TOGETHER
    assert sum(n for f, n in count.items() if not f.startswith("tests/")) <= EVERYTHING
    assert path_tokens() <= PATH_TOKENS
    assert {p.name for p in ROOT.glob("*.py")} == set(BUDGET)


def test_the_evenings_are_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [f"{f} {n}" for f, names in PATH.items() for n in names if f"`{n}`" not in readme]


def test_it_notices(tmp_path):
    """What this file forbids, written down, is found."""
    bad = tmp_path / "bad.py"
    bad.write_text("f = lambda x: x  # no" + "qa\n" + "y = [" + ", ".join(f"f({i})" for i in range(20)) + "]\n"
                   + "z = {" + ", ".join(f"'{i}': 'some text'" for i in range(20)) + "}\nw = f\"{1}{2}{3}{4}\"\n")
    found = measured(bad)[0]
    assert len(found) == 5 and "noqa" in found[2] and "lambda" in found[3] and "statement of 103 tokens" in found[4]
    wrong = tmp_path / "x.py"
    wrong.write_text("import train\n")
    assert level("train") > level("gemma") and not list(upward(wrong)) and level("torch") is None


if __name__ == "__main__":
    for given in [Path(a).resolve() for a in sys.argv[1:]] or files():
        found, density, comments = measured(given)
        lines = len(given.read_text(encoding="utf-8").splitlines())
        print(f"{name(given)}: {lines} lines, {density:.1f} tokens a code line, comments {comments:.2f}")
        for x in found + list(upward(given)):
            print("   ", x)
