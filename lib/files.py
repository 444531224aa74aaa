"""Files: JSON in and out, whole or not at all; the Hub; safetensors, piece by piece; a user's own code.

Nothing here knows of language models. A user's mistake is a UserError: one sentence, printed by the
scripts, exit code 2.
"""
import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """A mistake of the user's, told in one sentence; the scripts print it and exit with code 2."""


@contextlib.contextmanager
def explained(where, what="cannot be read"):
    """Any error within becomes the UserError "where: what (the error)"; a UserError stays as it is.

    Readers of files and a user's own code fail in a hundred ways, and no list of them is complete.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:          # a user's file may call sys.exit
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UserError(f"{where}: {what} ({reason})") from error


# ---- JSON and text -------------------------------------------------------------------------------

def read_json(path):
    with explained(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def atomically(path, write):
    """write(temporary path), then rename: a file is there whole or not at all."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, data, indent=2):
    write_text(path, json.dumps(data, indent=indent) + "\n")


def text_lines(path):
    """(where, line) of a text file or a .gz, blank lines left out; `where` names file and line."""
    opened = gzip.open if str(path).endswith(".gz") else open
    with explained(path), opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()


def json_lines(path):
    """(where, object) of each line of a .jsonl or .jsonl.gz."""
    for where, line in text_lines(path):
        with explained(where, "not valid JSON"):
            found = json.loads(line)
        if "\\u" in line:                         # JSON can write half a character, no text can hold it
            with explained(where, "half a character"):
                json.dumps(found, ensure_ascii=False).encode()
        yield where, found


def whole_lines(path):
    """The lines of a file that is written line by line, without one that a kill has cut; [] if there is
    no file."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]


def short_digest(*parts):
    """16 hexadecimal digits that name these bytes (or texts)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


# ---- folders, here or on the Hub -----------------------------------------------------------------

def fetch(source, patterns, *, kind="model"):
    """A local folder for `source`: itself, or what the Hub repo of that name holds under `patterns`."""
    path = Path(source).expanduser()
    for folder in (path, ROOT / path):          # tiny/... from wherever a script is started
        if folder.is_dir():
            return folder
    if path.exists():
        raise UserError(f"{source} is a file; a folder or a Hub repo id is needed here")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source}: no such folder, and not a Hub repo id of the form name/repo")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError
    with explained(source, "no such folder, and the Hub could not be asked"):
        try:
            return Path(snapshot_download(str(source), repo_type=kind, allow_patterns=patterns))
        except RepositoryNotFoundError:                  # of a gated one, too
            page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{source}"
            raise UserError(f"{source}: no such folder, and the Hub shows no such {kind}; if it is "
                            f"gated, accept the licence on {page} and run `hf auth login`") from None


# ---- safetensors ---------------------------------------------------------------------------------

def tensor_files(folder):
    """{tensor name: file} of a model's folder: of model.safetensors, or of the files its index names."""
    index, found = folder / "model.safetensors.index.json", {}
    names = ["model.safetensors"]
    if index.is_file():
        with explained(index, "there is no weight_map in it"):
            names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        with explained(folder / name), safe_open(folder / name, "pt") as file:
            found |= dict.fromkeys(file.keys(), folder / name)
    return found


def copy_tensor(path, name, out):
    """Reads one tensor of a safetensors file into `out` (any dtype, any device), 32 MB at a time.

    The file is opened anew for every piece: what has been read of a memory-mapped file counts as held
    until it is closed.
    """
    with safe_open(path, "pt") as file:
        stored = file.get_slice(name)
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != tuple(out.shape) or dtype not in ("F32", "F16", "BF16", "F64"):
        raise UserError(f"{path}: {name} is {dtype} {shape}; floats {tuple(out.shape)} are needed")
    rows = max(1, 2**23 // max(1, out[0].numel())) if out.dim() else 1
    with torch.no_grad():
        for i in range(0, len(out), rows):
            with safe_open(path, "pt") as file:
                out[i:i + rows].copy_(file.get_slice(name)[i:i + rows])


def load_tensors(module, files, prefix, dtype, device, ignore=()):
    """Fills a module made on torch's meta device, frozen. files: {prefix + name: file}. -> the module

    Strict: every tensor must be there, with its shape, and no other one but those of `ignore` may be.
    """
    wanted, there = {prefix + name for name, _ in module.named_parameters()}, set(files) - set(ignore)
    folder = next(iter(files.values())).parent
    for names, what in ((wanted - there, "missing"), (there - wanted, "not part of the model")):
        if names:
            raise UserError(f"{folder}: tensor {min(names)} is {what} ({len(names)} such)")
    for name, meta in list(module.named_parameters()):
        weight = torch.empty(meta.shape, dtype=dtype, device=device)
        copy_tensor(files[prefix + name], prefix + name, weight)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return module


# ---- a user's own code ---------------------------------------------------------------------------

def source_of(spec):
    """The file of FILE.py:Name; experiments/... from wherever a script is started."""
    path = Path(str(spec).rpartition(":")[0])
    return path if path.is_file() or not (ROOT / path).is_file() else ROOT / path


def import_from(spec, flag):
    """The object behind FILE.py:Name, given with the command-line option `flag`."""
    path, name = source_of(spec), str(spec).rpartition(":")[2]
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"{flag} {spec}: there is no such file; write FILE.py:Name")
    found = importlib.util.spec_from_file_location(f"users_{path.stem}", path)
    with explained(f"{flag} {spec}", "it cannot be imported"):
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module                      # dataclasses look a class's module up
        sys.path.insert(0, str(path.resolve().parent))        # so that it can import a file beside it
        try:
            found.loader.exec_module(module)
        finally:
            sys.path.pop(0)
        return getattr(module, name)
