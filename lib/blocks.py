"""What a section says: blocks of plain data, made once, printed by `as_text`, laid out by the page.

Strings are plain text, `code` between backticks. An interval is {"value" or "mean", "low", "high"}. A
group gives a thing its colour: style, alignment, both, or anything else.
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
    return next((group for group, names in groups.items() if name in names), "other")


@dataclass(frozen=True)
class Text:
    text: str
    kind: str = ""             # or note (on the page alone), heading, verdict, alarm, missing


@dataclass(frozen=True)
class Table:
    head: list
    rows: list                 # of strings; the first of a row is its heading
    note: str = ""
    brief: bool = False        # printed in the terminal, too
    plots: list = None         # of each row a picture, or None: {x: interval, group, start: of a line
    #                            to x (else 0), control: interval}


@dataclass(frozen=True)
class Tokens:
    tokens: list               # (text, fires, pushed): a feature; or (text, 0, nats)
    most: tuple                # of both amounts: what has the full shade
    kind: str = "feature"      # or "nats"


@dataclass(frozen=True)
class Answers:
    prompt: str
    columns: list              # (title, text or Tokens, marks: short words such as "true")
    says: str = ""


@dataclass(frozen=True)
class Card:                    # folds
    title: str
    group: str
    amount: str
    says: str
    blocks: list


def as_text(blocks, width=100):
    """For the terminal: running text, alarms, what is missing, brief tables."""
    out = []
    for block in blocks:
        if isinstance(block, Table) and block.brief:
            rows = [[" ".join(str(cell).split()) for cell in row] for row in (block.head, *block.rows)]
            widest = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for first, *rest in rows:
                out.append("  ".join(["", first.ljust(widest[0]), *map(str.rjust, rest, widest[1:])]))
        elif isinstance(block, Text) and block.kind in ("", "verdict", "alarm", "missing"):
            text = "RED: " * (block.kind == "alarm") + block.text
            out.append(textwrap.fill(text, width, break_on_hyphens=False))
    return "\n".join(out)
