"""What comes from outside: a user's adapter, objective or policy, a run's folder, the authors' files.

An adapter or an objective of a user's is tried on a few numbers before anything heavy is loaded.
"""
import difflib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lib.files import UserError, atomically, explained, import_from, read_json, source_of, write_json
from lib.sae_files import subtracts_b_dec
from lib.settings import key_values, one_of

HOOKS = ("forward", "penalty", "project")        # what an adapter may bring: see docs/reference.md
THEIR_NAMES = {"soft": "soft_threshold", "relu": "relu", "jumprelu": "jump_relu"}      # the authors'
WEIGHTS, CONFIG, SOURCE = "adapter_weights.safetensors", "fsrl_adapter_config.json", "adapter_source.py"


# ---- a user's own code ---------------------------------------------------------------------------

def check_given(where, x, shape, trained=True):
    """Raises UserError unless x, which a user's code gave, has this shape and can be trained through."""
    given = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
    if given != shape:
        raise UserError(f"{where} gave {given}; it has to be {shape}")
    if trained and not x.requires_grad:
        raise UserError(f"{where} gave what does not depend on anything that is trained")


def adapter_class(spec):
    """The nn.Module behind FILE.py:Class. A method that looks like a hook and is none is an error."""
    found = import_from(spec, "--adapter")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"--adapter {spec}: it has to be a class that is a torch.nn.Module")
    code = [method.__code__ for method in vars(found).values() if hasattr(method, "__code__")]
    called = {name for c in code for name in c.co_names}         # such a helper is no misspelt hook
    for name in set(vars(found)) - set(HOOKS) - called:
        if meant := difflib.get_close_matches(name.lower(), HOOKS, 1, .75):
            raise UserError(f"--adapter {spec}: {name} is never called; is it to be {meant[0]}?")
    return found


def adapter_arguments(config):
    """--adapter-args as keywords, which a saved adapter remembers: {} or {"adapter_args": {...}}"""
    given = key_values(config.adapter_args, "--adapter-args")
    return {"adapter_args": given} if given else {}


def own_adapter(spec, d_in, d_sae, adapter_args=None):
    """A user's adapter, made by Class(d_in, d_sae, **arguments) and tried once on four random states."""
    made, where = adapter_class(spec), f"--adapter {spec}"
    call = f"made by {made.__name__}({d_in}, {d_sae}, **arguments)"
    with explained(where, f"an adapter is {call} and takes states of shape (N, {d_in})"):
        adapter = made(d_in, d_sae, **(adapter_args or {}))
        v = adapter(torch.randn(4, d_in))
        check_given(f"{where}: forward", v, (4, d_sae))
        if hasattr(adapter, "penalty"):
            check_given(f"{where}: penalty", adapter.penalty(v), (4,), trained=False)
    return adapter


def own_objective(spec):
    """A user's loss: function(chosen, rejected) -> (B,), of two simpo.Answer; tried on three pairs."""
    found, where = import_from(spec, "--objective"), f"--objective {spec}"
    base, length = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2.0, 5.0, 9.0])
    mean = base.clone().requires_grad_()
    answer = SimpleNamespace(length=length, mean=mean, sum=mean * length, base_mean=base,
                             base_sum=base * length)
    with explained(where, "it is called with chosen and rejected, which have mean, sum, length, "
                          "base_mean and base_sum, each of shape (B,)"):
        check_given(f"{where}: for 3 pairs it", found(answer, answer), (3,))
    return found


def own_policy(spec, model, saes, arguments, needed=False):
    """A user's policy, Class(model, saes, **arguments) of FILE.py:Class; see the top of fsrl.py.
    needed: the spec is only what a run says of itself, and code is not taken from a run's word."""
    if needed:
        raise UserError(f"the run holds a policy of its user's: say where it is, --policy {spec}")
    found, given = import_from(spec, "--policy"), key_values(arguments, "--policy-args")
    with explained(f"--policy {spec}", "it is made with the model, a list of SAEs, and --policy-args"):
        made = found(model, saes, **given)
    if missing := [n for n in ("frozen", "run", "acting", "save", "load") if not hasattr(made, n)]:
        raise UserError(f"--policy {spec}: it has no {missing[0]} (see the top of fsrl.py)")
    return made


def made_again(own, facts, folder):
    """The adapter of a run that was trained with a user's class."""
    name = facts.get("adapter_class")
    if own is None or own.__name__ != name:
        raise UserError(f"{folder} holds a {name}, an adapter of its user's: say where it is, "
                        f"--adapter FILE.py:{name}")
    with explained(folder / CONFIG, f"{name} cannot be made as it says"):
        return own(facts["d_in"], facts["d_sae"], **facts.get("adapter_args", {}))


# ---- what has to fit -----------------------------------------------------------------------------

def feature_count(k, d_sae):
    """A top-k as a whole number of features. k: that, a share of them below 1, or None"""
    if k is None:
        return None
    if not (0 < k < 1 or k == int(k) and 1 <= k <= d_sae):
        raise UserError(f"top_k is {k}; it has to be a whole number up to {d_sae}, or a share below 1")
    return max(1, int(k * d_sae)) if k < 1 else int(k)


def feature_numbers(given, d_sae):
    """-> sorted, each once"""
    if bad := [i for i in given if not 0 <= int(i) < d_sae]:
        raise UserError(f"masked feature {bad[0]} does not exist; there are features 0 to {d_sae - 1}")
    return sorted({int(i) for i in given})


def check_fit(sae, config):
    """Raises UserError unless the SAE can sit on a model of this config."""
    layers, width = config.num_hidden_layers, config.hidden_size
    if sae.layer is None:
        raise UserError(f"SAE {sae.source}: its layer is neither in its path (layer_N) nor its config")
    if sae.layer >= layers:
        raise UserError(f"SAE {sae.source} belongs to layer {sae.layer}; this model has layers 0 to "
                        f"{layers - 1}")
    if sae.d_in != width:
        raise UserError(f"SAE {sae.source} reads states of width {sae.d_in}, this model's have {width}")


def same_digest(folder, what, source, trained_on, found):
    if trained_on not in (None, found.identity()):
        raise UserError(f"{folder} was trained on another {what} than {source} is now "
                        f"(digest {trained_on}, now {found.identity()})")


# ---- a run's folder, and the authors' two files in it --------------------------------------------

def run_config(folder, name="config.json"):
    """A JSON file that every finished run has."""
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{folder} is not a finished run: {name} is not there")
    return read_json(path)


def note_source(folder, spec):
    """Says so if a user's file is no longer the one that the run was trained with."""
    kept, path = folder / SOURCE, source_of(spec)
    if spec and kept.exists() and path.is_file() and kept.read_bytes() != path.read_bytes():
        print(f"note: {path} is not the source this run was trained with ({kept})", file=sys.stderr)


def authors_keys(source, model):
    """What the authors' config says of the SAE `source`, repo:path/inside or a folder, and the model."""
    repo, _, inside = source.partition(":")
    release = repo.rstrip("/").rsplit("/", 1)[-1]
    return {"base_sae_release": release, "base_sae_id": inside,
            "model_name": model.rsplit("/", 1)[-1].removesuffix("-it"),
            "neuronpedia_id": f"{release}/{inside}" if inside else None}


def write_adapter(folder, tensors, config):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config, indent=4)


def read_adapter(folder, sae=None):
    """-> (config, tensors in float32), older files of the authors made like new ones.

    No activation_type means relu, unless one of two older flags is set; a steering_magnitude counts
    only if its flag is set, and is ones where it is missing: so does their loader. sae: if it subtracts
    b_dec from its input, so does their adapter, which is another bias; files of ours hold x's own.
    """
    config = run_config(folder, CONFIG)
    with explained(folder, "it does not hold an adapter"):
        tensors = load_file(folder / WEIGHTS)
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        # activation
        config.setdefault("activation_type", "relu")
        for flag, kind in (("use_soft_threshold", "soft_threshold"), ("use_jump_relu", "jump_relu")):
            if config.get(flag):
                config["activation_type"] = kind
        if config["activation_type"] == "custom":
            return config, tensors
        one_of(f"{folder / CONFIG}: activation_type", config["activation_type"], THEIR_NAMES.values())
        # gates
        d_sae, _ = tensors["adapter_linear.weight"].shape
        if config.get("use_steering_magnitude"):
            tensors.setdefault("steering_magnitude", torch.ones(d_sae))
        else:
            tensors.pop("steering_magnitude", None)
        # bias
        if sae is not None and "fusion" not in config and subtracts_b_dec(sae.source):
            shift = tensors["adapter_linear.weight"] @ sae.b_dec.detach().cpu().float()
            tensors["adapter_linear.bias"] -= shift
    return config, tensors


def fill(adapter, tensors, path):
    """The adapter with these tensors in it."""
    with explained(path, "does not fit its adapter"):
        adapter.load_state_dict(tensors)
    return adapter
