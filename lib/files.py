"""Files: JSON in and out, whole or not at all; the Hub; safetensors, piece by piece; a user's own code.

Nothing here knows of language models. A user's mistake is a UserError: one sentence, printed by the
scripts, exit code 2.
"""
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


# ---- JSON ----------------------------------------------------------------------------------------

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


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
    """The other half of read_json."""
    write_text(path, json.dumps(data, indent=indent) + "\n")


def json_lines(path):
    """(where, object) of each line of a .jsonl or .jsonl.gz; `where` names file and line."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                if line.strip():
                    try:
                        yield where, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{where}: not valid JSON ({error})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def short_digest(*parts):
    """16 hexadecimal digits that name these bytes (or texts)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


# ---- folders, here or on the Hub -----------------------------------------------------------------

def fetch(source, patterns, *, kind="model"):
    """A local folder for `source`: itself, or what the Hub repo of that name holds under `patterns`.

    `kind` is "model" or "dataset". Raises UserError for a folder that is not there, a repo that does not
    exist, a gated one, and a machine without network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not path.is_absolute() and (ROOT / path).is_dir():
        return ROOT / path              # tiny/... from wherever a script is started
    if path.exists():
        raise UserError(f"{source} is a file; a folder or a Hub repo id is needed here")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source}: no such folder, and not a Hub repo id of the form name/repo")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{source}"
    try:
        return Path(snapshot_download(str(source), repo_type=kind, allow_patterns=patterns))
    except GatedRepoError:      # a subclass of RepositoryNotFoundError: it has to come first
        raise UserError(f"{source} is gated: accept its licence on {page}, make a token on "
                        "https://huggingface.co/settings/tokens, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"{source}: no such folder here and no such {kind} on the Hub "
                        "(or it is private: run `hf auth login`)") from None
    except Exception as error:      # no network, a proxy: the hub's errors have no common class
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise UserError(f"{source}: no such folder, and the Hub could not be asked ({reason})") from None


# ---- safetensors ---------------------------------------------------------------------------------

def tensor_names(path):
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def tensor_files(folder):
    """{tensor name: file} of a model's folder, one safetensors file or several with an index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        return dict.fromkeys(tensor_names(path), path)
    try:
        files = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: there is no weight_map in it") from None
    for path in sorted(set(files.values())):
        listed = {name for name, file in files.items() if file == path}
        if lost := sorted(listed - tensor_names(path)):
            raise UserError(f"{path}: tensor {lost[0]} is not in it, though the index says so")
    return files


def copy_tensor(path, name, out):
    """Reads one tensor of a safetensors file into `out` (any dtype, any device), 32 MB at a time.

    The file is opened anew for every piece: what has been read of a memory-mapped file counts as held
    until it is closed.
    """
    with safe_open(path, "pt") as file:
        shape, dtype = file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()
    if tuple(shape) != tuple(out.shape):
        wanted = tuple(out.shape)
        raise UserError(f"{path}: tensor {name} has shape {tuple(shape)}, this model needs {wanted}")
    if dtype not in ("F32", "F16", "BF16", "F64"):
        raise UserError(f"{path}: tensor {name} has dtype {dtype}; weights are floating-point numbers")
    rows = max(1, 2**23 // max(1, out[0].numel())) if out.dim() else 1
    with torch.no_grad():
        for i in range(0, len(out), rows):
            with safe_open(path, "pt") as file:
                out[i:i + rows].copy_(file.get_slice(name)[i:i + rows])


def load_tensors(module, files, prefix, dtype, device, ignore=()):
    """Fills a module made on torch's meta device, frozen. files: {prefix + name: file}. -> the module

    Strict: every tensor must be there, with its shape, and no other one but those of `ignore` may be.
    """
    wanted = {prefix + name for name, _ in module.named_parameters()}
    folder = next((path.parent for path in files.values()), "the model")
    if missing := sorted(wanted - set(files)):
        count = f"{len(missing)} of {len(wanted)} are"
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({count})")
    if extra := sorted(set(files) - wanted - set(ignore)):
        raise UserError(f"{folder}: tensor {extra[0]} is not part of the model ({len(extra)} such)")
    for name, meta in list(module.named_parameters()):
        weight = torch.empty(meta.shape, dtype=dtype, device=device)
        copy_tensor(files[prefix + name], prefix + name, weight)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return module


# ---- a user's own code ---------------------------------------------------------------------------

def source_of(spec):
    """The file of FILE.py:Name."""
    return Path(str(spec).rpartition(":")[0])


def import_from(spec, flag):
    """The object behind FILE.py:Name, given with the command-line option `flag`."""
    path, name = source_of(spec), str(spec).rpartition(":")[2]
    if path.suffix != ".py":
        raise UserError(f"{flag} {spec}: write FILE.py:Name")
    if not path.is_file():
        raise UserError(f"{flag} {spec}: there is no file {path}")
    found = importlib.util.spec_from_file_location(f"users_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module                          # dataclasses look a class's module up
    sys.path.insert(0, str(path.resolve().parent))            # so that it can import a file beside it
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{flag} {spec}: {path} cannot be imported ({reason})") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        raise UserError(f"{flag} {spec}: {path} has nothing of the name {name}")
    return getattr(module, name)
