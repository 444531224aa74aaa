"""Settings: one dataclass is the list of options, their help, their bounds and the command line.

    @dataclass
    class Config:
        steps: int = setting(800, "optimiser steps", low=1, group="optimisation")

        def __post_init__(self):
            check(self)

`command` makes a script's main of it: parse, run, and tell a user's mistake in one sentence.
"""
import argparse
import ast
import contextlib
import functools
import math
import operator
import sys
import tomllib
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch

from lib.files import UserError, explained

BOUNDS = {"low": (operator.ge, "at least"), "high": (operator.le, "at most"),
          "above": (operator.gt, "above")}
EXIT_CODES = {UserError: 2, FloatingPointError: 1, KeyboardInterrupt: 130}


def setting(default, text, **checks):
    """A field with its help. checks: low / high (inclusive), above (exclusive), choices, positional (no
    flag), many (a list; the flag takes several, more than once), group (of this and what follows)."""
    how = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**how, metadata={"help": text, **checks})


def flag_of(f):
    return f.name if "positional" in f.metadata else "--" + f.name.replace("_", "-")


def one_of(name, value, allowed):
    if value not in allowed:
        raise UserError(f"{name} is {value}; it has to be one of {', '.join(allowed)}")


def check(config):
    """Raises UserError for a field of the wrong type or out of bounds; 1 becomes 1.0 for a float."""
    for f in fields(config):
        value, flag = getattr(config, f.name), flag_of(f)
        if value is None or "many" in f.metadata:
            continue
        if f.type is float and type(value) is int:
            value = float(value)
            setattr(config, f.name, value)
        if type(value) is not f.type:
            raise UserError(f"{flag} is {value!r}; it has to be of type {f.type.__name__}")
        if f.type is float and not math.isfinite(value):
            raise UserError(f"{flag} is {value}; it has to be a finite number")
        for name, (holds, words) in BOUNDS.items():
            if name in f.metadata and not holds(value, f.metadata[name]):
                raise UserError(f"{flag} is {value}; it has to be {words} {f.metadata[name]}")
        if "choices" in f.metadata:
            one_of(flag, value, f.metadata["choices"])


def numbers_of(cls, raw, path):
    """The numbers that a JSON object of the file `path` gives for the fields of a dataclass. -> dict"""
    found = {f.name: raw.get(f.name) for f in fields(cls) if f.name in raw or f.default is MISSING}
    for name, value in found.items():
        if type(value) not in (int, float):
            raise UserError(f"{path}: {name} is {value!r}; a number is needed")
    return found


def parser(cls, prog, description=""):
    """The command line of a dataclass of settings."""
    wide = functools.partial(argparse.HelpFormatter, max_help_position=30, width=120)
    how = {"description": description, "allow_abbrev": False, "formatter_class": wide}
    group = out = argparse.ArgumentParser(prog, **how)
    for f in fields(cls):
        m, default = f.metadata, f.default
        if "group" in m:
            group = out.add_argument_group(m["group"])
        how = {"help": m["help"], "default": None}     # so that what is given can be told
        if not {"positional", "choices"} & m.keys() and f.type is not bool:
            how["metavar"] = {int: "N", float: "X"}.get(f.type, "TEXT")
        if f.type is bool:
            how["action"] = "store_true"
        elif "many" in m:
            how |= {"nargs": "*"} if "positional" in m else {"nargs": "+", "action": "extend"}
        else:
            how |= {"type": f.type, "choices": m.get("choices")}
            if default not in (None, ""):
                how["help"] += f" [{default}]"
            if "positional" in m and default is None:
                how["nargs"] = "?"
        group.add_argument(flag_of(f), **how)
    return out


def preset(name, file, cls):
    """The settings of a name in a TOML file of tables, or of a user's FILE.toml, a single one."""
    path = Path(name) if name.endswith(".toml") else file
    with explained(path):
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    if path is file:
        one_of("--preset", name, found)
        found = found[name]
    if unknown := set(found) - {f.name for f in fields(cls)}:
        raise UserError(f"{path}: {min(unknown)!r} is no setting; --help lists them, with _ for -")
    return found


def command(prog, cls, run, argv=None, description="", presets=None):
    """The main of a script: run(settings), its mistakes as one sentence on stderr. -> exit code
    presets: a TOML file of named settings; --preset NAME takes one, and flags win over it"""
    try:
        options = parser(cls, prog, description)
        if presets:
            words = f"settings by name, of {presets.name}, or FILE.toml; flags win over them"
            options.add_argument("--preset", help=words, metavar="NAME")
        given = {name: value for name, value in vars(options.parse_args(argv)).items()
                 if value is not None}
        if name := given.pop("preset", None):
            given = preset(name, presets, cls) | given
        result = run(cls(**given))
        return result if isinstance(result, int) else 0
    except SystemExit as stop:                       # argparse has said what there is to say
        return stop.code
    except tuple(EXIT_CODES) as error:
        print(f"{prog}: {str(error) or 'interrupted; what was saved is kept'}", file=sys.stderr)
        return EXIT_CODES[type(error)]


def key_values(given, flag):
    """["rank=8", "bias=False"] -> {"rank": 8, "bias": False}; what is no Python literal stays text."""
    out = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{flag} {item}: write name=value")
        out[key] = value
        with contextlib.suppress(ValueError, SyntaxError):
            out[key] = ast.literal_eval(value)
    return out


def choose_device(device="auto", dtype="auto"):
    """Names -> (device, torch dtype); auto: the best device there is, bf16 on cuda, else float32."""
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    with explained(f"--device {device} --dtype {dtype}", "cannot be used here"):
        torch.zeros(1, device=device, dtype=getattr(torch, dtype))
    return device, getattr(torch, dtype)
