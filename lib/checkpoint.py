"""Stopping and going on: checkpoints of a training, and what has to be the same when it is resumed.

RUN/checkpoint/ holds the two newest, each a step-N.safetensors (what is trained, the optimiser's state,
the random numbers' state, the numbers since the last line of the log) and a step-N.json with its digest.
The order of the pairs and the learning rate follow from the step; what never changes of a pair, and so
is computed once (`kept_rows`), is computed again. A lock there dies with its process.
"""
import hashlib
import os
import signal
import sys
import threading
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from lib.files import UserError, atomically, explained, read_json, write_json
from lib.plugins import run_config
from lib.runs import evaluations

try:
    import fcntl
except ImportError:                                           # Windows: no lock there
    fcntl = None

MAY_CHANGE = ("steps", "log_every", "save_every", "threads", "keep_prefix", "resume")


def kept_rows(cache, batch, index, compute):
    """compute() -> (B,...), a row for each pair, from `cache` ({index of a pair: its row without
    padding}; None: nothing is kept) once all of them are there."""
    if cache is None:
        return compute()
    if not all(i in cache for i in index):
        rows = compute()
        lengths = (batch.branch >= 0).sum(-1).tolist()
        cache |= {i: row[:n].clone() for i, row, n in zip(index, rows, lengths)}
        return rows
    return pad_sequence([cache[i] for i in index], batch_first=True)


# ---- settings of a run that goes on ------------------------------------------------------------------

def resumed(config):
    """The settings of the run in the folder config.resume. Any that is given now, and is another than
    then, is refused, but those that MAY_CHANGE."""
    folder, usual = Path(config.resume), asdict(type(config)())
    then, given = run_config(folder), {}
    for name, value in asdict(config).items():
        if value != usual[name] and value != then.get(name):
            if name not in MAY_CHANGE:
                raise UserError(f"--resume {folder}: {name} was {then.get(name)!r} and is {value!r} "
                                f"now; only {', '.join(MAY_CHANGE[:-1])} may change")
            given[name] = value
    old = {f.name: then[f.name] for f in fields(config) if f.name in then}
    config = replace(config, **{**old, **given, "resume": str(folder)})
    trained = evaluations(folder).get("trained", {"step": -1})
    if trained["step"] >= config.steps:
        raise UserError(f"{folder} is finished, after {trained['step']} steps; a larger --steps goes on")
    return config


# ---- a stop that is asked for ------------------------------------------------------------------------

class Stop:
    """Ctrl-C and SIGTERM ask a training to save after its step; a second one stops it at once."""
    asked = False

    def __enter__(self):
        def ask(number, frame):
            self.asked = True
            signal.signal(number, signal.default_int_handler)
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, ask)

    def __exit__(self, *error):
        self.asked = False
        for number, handler in self.before.items():
            signal.signal(number, handler)


STOP = Stop()


# ---- checkpoints -------------------------------------------------------------------------------------

class Checkpoint:
    """The checkpoints of one run. Raises UserError if another process trains there."""

    def __init__(self, run, parameters, optimizer):
        self.run, self.folder = run, Path(run) / "checkpoint"
        self.parameters, self.optimizer = parameters, optimizer
        with explained(self.folder, "cannot be written to"):
            self.folder.mkdir(exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run}: another process is training there") from None
        for leftover in self.folder.glob("*.tmp"):                    # of a process that was killed
            leftover.unlink()

    def save(self, step, window, tokens):
        """window: [{name: (B,)}] since the last line of the log, tokens: how many."""
        tensors = {"rng": torch.get_rng_state()}
        for i, p in enumerate(self.parameters):
            tensors[f"parameter.{i}"] = p.detach()
            for name, x in self.optimizer.state[p].items():
                tensors[f"optimizer.{i}.{name}"] = x
        for i, shown in enumerate(window):
            tensors |= {f"window.{i}.{name}": x for name, x in shown.items()}
        tensors = {name: x.cpu().contiguous() for name, x in tensors.items()}
        path = self.folder / f"step-{step}.safetensors"

        def write(temporary):
            save_file(tensors, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        with explained(path, "the checkpoint cannot be written; older ones are kept"):
            atomically(path, write)
            facts = {"step": step, "tokens": tokens, "sha256": digest(path)}
            write_json(path.with_suffix(".json"), facts)
            for _, old in self.there()[2:]:
                old.with_suffix(".json").unlink(missing_ok=True)
                old.unlink(missing_ok=True)

    def there(self):
        """(step, path) of each, the newest first."""
        found = [(int(path.stem[5:]), path) for path in self.folder.glob("step-*.safetensors")]
        return sorted(found, reverse=True)

    def restore(self):
        """The newest that is whole, put back. -> step, window, tokens; without one 0, [], 0"""
        for step, path in self.there():
            facts = path.with_suffix(".json")
            if not facts.is_file() or read_json(facts).get("sha256") != digest(path):
                print(f"note: {path} is damaged; the one before is used", file=sys.stderr)
                continue
            with explained(path, "it does not fit this policy"):
                return self.put_back(step, load_file(path), read_json(facts)["tokens"])
        return 0, [], 0

    @torch.no_grad()
    def put_back(self, step, tensors, tokens):
        torch.set_rng_state(tensors.pop("rng"))
        window = {}
        for i, p in enumerate(self.parameters):
            p.copy_(tensors[f"parameter.{i}"])
            self.optimizer.state[p] = {}
        for name, x in tensors.items():
            kind, i, *rest = name.split(".", 2)
            if kind == "optimizer":
                p = self.parameters[int(i)]
                x = x if rest[0] == "step" else x.to(p.device)
                self.optimizer.state[p][rest[0]] = x
            elif kind == "window":
                window.setdefault(int(i), {})[rest[0]] = x.to(self.parameters[0].device)
        return step, [window[i] for i in sorted(window)], tokens


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
