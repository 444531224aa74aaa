"""Sections of a report: a question, measured once, kept in a file, described in words.

A section lies in RUN/analysis/NAME.json with a digest of all it was made from. Where that is still the
same it is kept, else made anew; what other sections left behind plays no part.
"""
import inspect
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

from lib.files import UserError, read_json, short_digest, write_json
from lib.labels import default_path, read_labels
from lib.runs import finite

MACHINE = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
NEED_FEATURES = ("features", "cards", "masking", "strength", "usage", "rates", "geometry")
NEED_LABELS = ("masking", "rates")


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    question: str
    measure: Callable      # (m, options, *results of the sections `after`) -> result: plain numbers
    describe: Callable     # (result, about) -> blocks of lib/blocks.py
    after: tuple = ()


class Noted:
    """Options that note which of them are read: a section depends on no others."""

    def __init__(self, options):
        self._options, self._read = options, {}

    def __getattr__(self, name):
        self._read[name] = getattr(self._options, name)
        return self._read[name]


def chosen(only, every):
    """The names in "a,b" (None: all), and those whose results they are given."""
    wanted = list(every) if only is None else only.split(",")
    if unknown := [name for name in wanted if name not in every]:
        raise UserError(f"--only {only}: {unknown[0]!r} is no section; there are {', '.join(every)}")
    return wanted + [other for name in wanted for other in every[name].after]


def results(folder, sections, wanted, identity, options, m):
    """Measures the wanted sections that are not kept. identity: digest of what all are made from.

    -> {name: result} of all that are there, in the form in which JSON gives them back
    """
    files = {}
    for name, section in sections.items():
        given = [files[other] for other in section.after if other in files]
        code = inspect.getsource(inspect.getmodule(section.measure))      # other code, other keys
        made_of = [identity, code, *(file["made_from"] for file in given)]
        path = Path(folder) / "analysis" / f"{name}.json"
        file = read_json(path) if path.is_file() else {}
        now = {key: getattr(options, key, None) for key in file.get("options", ())}
        if file and file.get("made_from") == digest(made_of, now):
            if name in wanted:
                print(f"{name}: kept")
            files[name] = file
        elif name in wanted and len(given) == len(section.after):
            noted, started = Noted(options), time.time()
            result = section.measure(m, noted, *(file["result"] for file in given))
            made = {"section": name, "made_from": digest(made_of, noted._read), "options": noted._read}
            made |= {"seconds": round(time.time() - started, 3), "date": time.strftime("%Y-%m-%d")}
            files[name] = save(path, made | {"machine": MACHINE, "result": result})
    return {name: file["result"] for name, file in files.items()}


def digest(made_of, options):
    return short_digest(*made_of, json.dumps(options, sort_keys=True))


def save(path, file):
    """numpy's numbers as Python's, what is no finite number as null. -> the file, read back"""
    file = finite(json.loads(json.dumps(file, default=lambda x: x.item())))
    path.parent.mkdir(exist_ok=True)
    write_json(path, file)
    return file


def about_run(folder, m, objective):
    """What the words of a section may say of a run. objective: in words. -> dict"""
    layers = [str(s.sae.layer) for s in m.steerings]
    by = {str(row.get("by")) for row in (m.labels or {}).values()}
    about = {"run": Path(folder).name, "command": f"python analyze.py {folder}", "config": m.config}
    about |= {"objective": objective, "pairs": m.config["pairs"], "model": m.config["model"]}
    about |= {"held_out": f"{len(m.pairs)}, about {len(set(m.clusters))} questions"}
    about |= {"layer": " and ".join(layers) or "none", "labels": ", ".join(sorted(by))}
    return about | {"weights": m.judge.weights, "groups": m.judge.groups}


def missing(name, m):
    """Why a section cannot be asked of this run, or None."""
    if name in NEED_FEATURES and not m.steerings:
        return "This policy steers no features, so there is nothing to say here."
    if name in NEED_LABELS and not m.labels:
        return "There are no labels of this SAE’s features; `python -m instruments.labels` makes them."
    return None


def labels_of(policy, given):
    """{feature: row} of the file `given`, or of what lies beside each SAE; None where there is none."""
    found, first = {}, 0
    for s in getattr(policy, "steerings", []):
        path = Path(given or default_path(s.sae))
        if given or path.exists():
            found |= {first + i: row for i, row in read_labels(path, s.sae).items()}
        first += s.sae.d_sae
    return found or None


def identity_of(folder, m, pairs):
    """A digest of what every section is made from: the run's files, the pairs (their digest), labels,
    precision."""
    folder, made = Path(folder), ("analysis", "checkpoint", "report.html", "metrics.jsonl")
    files = [path for path in sorted(folder.rglob("*")) if path.relative_to(folder).parts[0] not in made]
    parts = [path.read_bytes() for path in files if path.is_file()]
    labels, dtype = repr(sorted((m.labels or {}).items())), str(m.model.norm.weight.dtype)
    return short_digest(*parts, pairs, labels, dtype)
