"""Settings: one dataclass is the list of options, their help, their bounds and the command line.

    @dataclass
    class Config:
        steps: int = setting(800, "optimiser steps", low=1, group="optimisation")

        def __post_init__(self):
            check(self)

`command` makes a script's main of it: parse, run, and tell a user's mistake in one sentence, exit code
2.
"""
import argparse
import ast
import math
import sys
from dataclasses import MISSING, field, fields

import torch

from lib.files import UserError


def setting(default, text, **checks):
    """A field with its help. checks: low / high (inclusive), above (exclusive), choices, positional (no
    flag), many (a list; the flag takes several, more than once), group (of this and what follows)."""
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**how, metadata={"help": text, **checks})


def default_of(f):
    return f.default_factory() if f.default is MISSING else f.default


def kind_of(f):
    """The type of a value (of each, where there are many): the field's annotation."""
    return str if f.metadata.get("many") else f.type


def flag_of(f):
    name = f.name.replace("_", "-")
    return name if f.metadata.get("positional") else "--" + name


def one_of(name, value, allowed):
    if value not in allowed:
        raise UserError(f"{name} is {value}; it has to be one of {', '.join(allowed)}")


def check(config):
    """Raises UserError for the first field of the wrong type or out of bounds; 1 becomes 1.0 for a
    float."""
    for f in fields(config):
        value, m, flag, kind = getattr(config, f.name), f.metadata, flag_of(f), kind_of(f)
        if value is None or m.get("many"):
            continue
        if kind is float and type(value) is int:
            value = float(value)
            setattr(config, f.name, value)
        if type(value) is not kind:
            raise UserError(f"{flag} is {value!r}; it has to be of type {kind.__name__}")
        if kind is float and not math.isfinite(value):
            raise UserError(f"{flag} is {value}; it has to be a finite number")
        if "low" in m and value < m["low"]:
            raise UserError(f"{flag} is {value}; it has to be at least {m['low']}")
        if "high" in m and value > m["high"]:
            raise UserError(f"{flag} is {value}; it has to be at most {m['high']}")
        if "above" in m and value <= m["above"]:
            raise UserError(f"{flag} is {value}; it has to be above {m['above']}")
        if "choices" in m:
            one_of(flag, value, m["choices"])


def numbers_of(cls, raw, path):
    """The numbers that a JSON object of the file `path` gives for the fields of a dataclass. -> dict"""
    found = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
    if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in found]:
        raise UserError(f"{path}: {missing[0]} is missing")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{path}: {name} is {value!r}; a number is needed")
    return found


def parser(cls, prog, description=""):
    """The command line of a dataclass of settings."""
    def wide(prog):
        return argparse.HelpFormatter(prog, max_help_position=30, width=120)
    how = {"description": description, "allow_abbrev": False, "formatter_class": wide}
    out = argparse.ArgumentParser(prog, **how)
    groups, group = {}, None
    for f in fields(cls):
        m, kind, default = f.metadata, kind_of(f), default_of(f)
        group = m.get("group", group)
        if group not in groups:
            groups[group] = out.add_argument_group(group)
        quiet = default in (None, "", []) or kind is bool or "default:" in m["help"]
        how = {"help": m["help"] + ("" if quiet else f" [{default}]")}
        how["default"] = None if m.get("many") else default      # "extend" would add to a default list
        if kind is bool:
            how["action"] = "store_true"
        else:
            how |= {"type": kind, "choices": m.get("choices")}
            if "choices" not in m and not m.get("positional"):
                how["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        if m.get("many"):
            how |= {"nargs": "*"} if m.get("positional") else {"nargs": "+", "action": "extend"}
        elif m.get("positional") and default is None:
            how["nargs"] = "?"
        name = f.name if m.get("positional") else flag_of(f)
        groups[group].add_argument(name, **how)
    return out


def command(prog, cls, run, argv=None, description=""):
    """The main of a script: run(settings), its mistakes as one sentence on stderr. -> exit code"""
    try:
        given = parser(cls, prog, description).parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        result = run(cls(**{k: v for k, v in vars(given).items() if v is not None}))
        return result if isinstance(result, int) else 0
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; what was saved is kept", file=sys.stderr)
        return 130


def key_values(given, flag):
    """["rank=8", "bias=False"] -> {"rank": 8, "bias": False}; what is no Python literal stays text."""
    out = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {item}: write name=value")
        try:
            out[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            out[key] = value
    return out


def choose_device(device="auto", dtype="auto"):
    """Names of a device and a dtype -> (device, torch dtype).

    auto: the best device there is, bf16 on cuda, float32 elsewhere.
    """
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device} cannot be used here ({reason})") from None
    if device.startswith("mps") and dtype == "float64":
        raise UserError("--dtype float64: mps has no float64; use cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, getattr(torch, dtype)
