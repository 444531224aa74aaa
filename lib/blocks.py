"""What a section says: blocks of plain data, made once, printed by `as_text`, laid out by the page.

Strings are plain text, `code` between backticks. An interval is {"value" or "mean", "low", "high"}. A
group gives a thing its colour: style, alignment, both, neither, not judged, base or other.
"""
import math
import textwrap
from dataclasses import dataclass


def number(x, form=".3f", times=1, unit=""):
    """A number with a proper minus sign, none on a zero; – for what is no finite number."""
    if not isinstance(x, (int, float)) or not math.isfinite(x):
        return "–"
    text = f"{times * x:{form}}"
    return (text.replace("-", "−") if any(c in "123456789" for c in text) else text.lstrip("+-")) + unit


def interval(x, form=".3f", times=1, unit=""):
    """0.20 [0.18, 0.22]; without the brackets where they are not known."""
    x = x or {}
    value = number(x.get("value", x.get("mean")), form, times, unit)
    low, high = (number(x.get(end), form, times) for end in ("low", "high"))
    return value if (low, high) == ("–", "–") else f"{value} [{low}, {high}]"


def percent(x, form=".0f"):
    """A share, or an interval of shares, in percent."""
    return interval(x, form, 100, "%") if isinstance(x, dict) else number(x, form, 100, "%")


def group_of(name, groups):
    """Of a category of answers. groups: the judge's, {"style": names, ...}"""
    found = [group for group, names in groups.items() if name in names]
    return found[0] if found else "base" if groups else "other"


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = ""             # or note (on the page alone), heading, verdict, alarm, sound, missing


@dataclass(frozen=True)
class Table:
    head: list
    rows: list                 # of strings; the first of a row is its heading
    note: str = ""
    brief: bool = False        # printed in the terminal, too
    amounts: list = None       # for each row a number or None a cell behind its heading: the shade


@dataclass(frozen=True)
class Forest:                  # a dot, or a bar, with its interval a row; below it its controls
    title: str
    rows: list                 # {name, group, x: interval, start: of a line to x, bar: bool, bands}
    xlabel: str                # bands: [{low, high, mean, kind: random, usage or dealt, remark}]
    says: str = ""
    times: float = 100         # what all numbers are multiplied by


@dataclass(frozen=True)
class Curves:
    title: str
    lines: list                # {name, kind: main, control or other, x, y, low, high: around y}
    xlabel: str
    ylabel: str
    says: str = ""
    logx: bool = False
    logy: bool = False
    marks: tuple = ()          # ("x" or "y", value): dotted lines to compare with
    ticks: dict = None         # {x: word}
    ylim: tuple = None


@dataclass(frozen=True)
class Dots:
    title: str
    points: list               # {name, group, x, y, low, high}
    xlabel: str
    ylabel: str
    says: str = ""


@dataclass(frozen=True)
class Figures:                 # side by side; numbers folded below, open where nothing draws
    panels: list
    tables: list
    says: str = ""


@dataclass(frozen=True)
class Answers:
    prompt: str
    columns: list              # (title, text or Tokens, marks: short words such as "true")
    says: str = ""


@dataclass(frozen=True)
class Tokens:
    title: str
    tokens: list               # (text, amount); "feature": (text, (how it fires, how it is pushed))
    kind: str = "nats"         # or "feature", or "effect": listed with their amounts
    top: object = None         # amount (or amounts) of the full shade; None: the largest here


@dataclass(frozen=True)
class Card:                    # a card that folds
    title: str
    group: str
    lines: list                # (word, text)
    blocks: list
    says: str = ""
    amount: str = ""
    is_open: bool = False


def as_text(blocks, width=100):
    """For the terminal: running text, alarms, what is missing, brief tables, also those of figures."""
    flat = [x for block in blocks for x in (block.tables if isinstance(block, Figures) else [block])]
    out = []
    for block in flat:
        if isinstance(block, Table) and block.brief:
            rows = [[" ".join(str(cell).split()) for cell in row] for row in (block.head, *block.rows)]
            widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for first, *rest in rows:
                out.append("  ".join(["", first.ljust(widest[0]), *map(str.rjust, rest, widest[1:])]))
        elif isinstance(block, Text) and block.kind in ("", "verdict", "alarm", "missing"):
            text = "RED: " * (block.kind == "alarm") + block.text
            out.append(textwrap.fill(text, width, break_on_hyphens=False))
    return "\n".join(out)
