"""A run's folder: its name, its log, and tables for the terminal."""
import json
import math
import platform
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch

from lib.files import UserError, explained, source_of, whole_lines, write_json, write_text
from lib.plugins import SOURCE, run_config


def check_free(config):
    """Raises UserError unless the run's name (None: the next free one) can be a new folder's."""
    runs, name = config.runs, None if config.resume else config.run
    if name is not None and (Path(name).name != name or name in ("", ".", "..")):
        raise UserError(f"--run is {name!r}; it has to be the plain name of a folder")
    if name and (Path(runs) / name).exists():
        raise UserError(f"--run {name}: {Path(runs) / name} exists; name another run or remove it")


def new_folder(config):
    """Makes runs/NAME, or without a name the next free runs/PAIRS-N."""
    name, stem, root = config.run, Path(config.pairs).stem, Path(config.runs)
    for folder in [root / name] if name else (root / f"{stem}-{n}" for n in range(1, 10**6)):
        with explained(f"--runs {root}", "no folder can be made there"):
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    check_free(config)


def start_folder(config, model, policy, **digests):
    """Makes the run's folder with config.json: every setting, and what exactly was trained on what. One
    that is resumed has to be trained on the same."""
    saes = [s.sae for s in getattr(policy, "steerings", [])]
    identity, width = [sae.identity() for sae in saes], [sae.d_sae for sae in saes]
    if len(saes) == 1:
        identity, width = identity[0], width[0]
    trained = {"model_identity": model.identity(), "sae_identity": identity, "d_sae": width,
               "pairs_sha256": digests["train"], "eval_pairs_sha256": digests["held"]}
    dtype = str(model.norm.weight.dtype).removeprefix("torch.")
    where = {"device": model.device.type, "dtype": dtype, "date": time.strftime("%Y-%m-%d"),
             "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
             "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    if config.resume:
        folder = Path(config.resume)
        then = run_config(folder)
        if other := [name for name, value in trained.items() if then.get(name) != value]:
            raise UserError(f"--resume {folder}: {other[0]} is {trained[other[0]]} now, and was "
                            f"{then.get(other[0])}")
        write_json(folder / "config.json", then | {"steps": config.steps})
        return folder
    folder = new_folder(config)
    for spec in filter(None, (config.adapter, config.policy)):
        shutil.copyfile(source_of(spec), folder / SOURCE)            # to be read, never to be run
    write_json(folder / "config.json", asdict(config) | trained | where)
    return folder


def metrics(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in whole_lines(Path(folder) / "metrics.jsonl")]


def evaluations(folder):
    """{"base": row, "trained": row} of these, as far as the run has come."""
    return {row["evaluation"]: row for row in metrics(folder) if "evaluation" in row}


class Log:
    """metrics.jsonl: one row a log step, one an evaluation. A run that goes on after `start` steps loses
    the rows of later ones, which come again. first: the row that a new one begins with."""

    def __init__(self, folder, start=0, **first):
        self.path = Path(folder) / "metrics.jsonl"
        rows = [row for row in metrics(folder) if row["step"] <= start]
        rows = [row for row in rows if row.get("evaluation") != "trained"]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        if first and not rows:
            self(**first)

    def __call__(self, **row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(row)) + "\n")


def finite(x):
    """JSON has no NaN: a rate over no questions is null."""
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def aligned(rows):
    """Rows of three texts, the first two columns as wide as their widest."""
    name, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{name}}  {b:>{middle}}  {c}".rstrip() for a, b, c in rows)
