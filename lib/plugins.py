"""What comes from outside: a user's own adapter or policy, a run's folder, the authors' adapter files.

An adapter is made by Class(d_in, d_sae, **arguments) and tried before anything heavy is loaded.
"""
import difflib
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lib.files import UserError, atomically, import_from, read_json, source_of, write_json
from lib.sae_files import subtracts_b_dec
from lib.settings import key_values

HOOKS = ("forward", "penalty", "project")        # what an adapter may bring: see docs/reference.md
THEIR_NAMES = {"soft": "soft_threshold", "relu": "relu", "jumprelu": "jump_relu"}      # the authors'
WEIGHTS, CONFIG, SOURCE = "adapter_weights.safetensors", "fsrl_adapter_config.json", "adapter_source.py"


def adapter_class(spec):
    """The nn.Module behind FILE.py:Class. A method that looks like a hook and is none is an error."""
    found = import_from(spec, "--adapter")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"--adapter {spec}: it has to be a class that is a torch.nn.Module")
    methods = {name: value for name, value in vars(found).items() if callable(value)}
    code = [value.__code__ for value in methods.values() if hasattr(value, "__code__")]
    called = {name for c in code for name in c.co_names}         # such a helper is no misspelt hook
    for name in set(methods) - called - set(HOOKS):
        if meant := difflib.get_close_matches(name, HOOKS, 1, .75):
            raise UserError(f"--adapter {spec}: a method {name} is never called; "
                            f"is it meant to be {meant[0]}?")
    return found


def adapter_arguments(config):
    """--adapter-args as keywords, which a saved adapter remembers: {} or {"adapter_args": {...}}"""
    given = key_values(config.adapter_args, "--adapter-args")
    return {"adapter_args": given} if given else {}


def own_adapter(spec, d_in, d_sae, adapter_args=None):
    """A user's adapter, made by Class(d_in, d_sae, **arguments) and tried once on four random states."""
    made, arguments = adapter_class(spec), adapter_args or {}
    try:
        adapter = made(d_in, d_sae, **arguments)
        v = adapter(torch.randn(4, d_in))
        price = adapter.penalty(v) if hasattr(adapter, "penalty") else v.abs().sum(-1)
    except Exception as error:
        call = ", ".join([str(d_in), str(d_sae), *(f"{k}={x!r}" for k, x in arguments.items())])
        raise UserError(f"--adapter {spec}: {type(error).__name__}: {error} (an adapter is made by "
                        f"{made.__name__}({call}) and takes states of shape (N, {d_in}))") from error
    for what, x, shape in (("forward", v, (4, d_sae)), ("penalty", price, (4,))):
        if shape_of(x) != shape:
            raise UserError(f"--adapter {spec}: {what} gave {shape_of(x)} for states of shape "
                            f"(4, {d_in}); it has to be {shape}")
    if not any(p.requires_grad for p in adapter.parameters()):
        raise UserError(f"--adapter {spec}: it has no parameter to train")
    if not v.requires_grad:
        raise UserError(f"--adapter {spec}: what forward gives does not depend on its parameters")
    return adapter


def shape_of(x):
    return tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__


def own_objective(spec):
    """A user's loss: function(chosen, rejected) -> (B,), of two simpo.Answer; tried on three pairs."""
    found = import_from(spec, "--objective")
    base, length = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2.0, 5.0, 9.0])
    mean = base.clone().requires_grad_()
    numbers = {"mean": mean, "sum": mean * length, "base_mean": base, "base_sum": base * length}
    answer = SimpleNamespace(length=length, **numbers)
    try:
        loss = found(answer, answer)
    except Exception as error:
        raise UserError(f"--objective {spec}: {type(error).__name__}: {error} (an objective is called "
                        "with chosen and rejected, which have mean, sum, length, base_mean and "
                        "base_sum, each of shape (B,))") from error
    if shape_of(loss) != (3,):
        raise UserError(f"--objective {spec}: it gave {shape_of(loss)} for 3 pairs; it has to be (3,), "
                        "a loss for each")
    if not loss.requires_grad:
        raise UserError(f"--objective {spec}: its loss does not depend on mean or sum of an answer")
    return found


def own_policy(spec, model, saes, arguments, needed=False):
    """A user's policy, Class(model, saes, **arguments) of FILE.py:Class; see the top of fsrl.py.

    needed: the spec is only what a run says of itself, and code is not taken from a run's word.
    """
    if needed:
        raise UserError(f"the run holds a policy of its user's: say where it is, --policy {spec}")
    found, given = import_from(spec, "--policy"), key_values(arguments, "--policy-args")
    try:
        made = found(model, saes, **given)
    except Exception as error:
        raise UserError(f"--policy {spec}: {type(error).__name__}: {error} (a policy is made with the "
                        "model, a list of SAEs, and --policy-args)") from error
    if missing := [n for n in ("frozen", "run", "acting", "save", "load") if not hasattr(made, n)]:
        raise UserError(f"--policy {spec}: it has no {missing[0]} (see the top of fsrl.py)")
    return made


def made_again(own, facts, folder):
    """The adapter of a run that was trained with a user's class."""
    name, arguments = facts.get("adapter_class"), facts.get("adapter_args", {})
    if own is None or own.__name__ != name:
        raise UserError(f"{folder} holds an adapter of the class {name}, written by its user: say where "
                        f"it is, --adapter FILE.py:{name} (the run keeps a copy to compare with)")
    if not all(isinstance(facts.get(key), int) for key in ("d_in", "d_sae")):
        raise UserError(f"{folder / CONFIG}: d_in and d_sae are missing, with which it was made")
    return own(facts["d_in"], facts["d_sae"], **arguments)


def feature_count(k, d_sae):
    """A top-k as a whole number of features. k: that, a share of them below 1, or None"""
    if k is None:
        return None
    if not (0 < k < 1 or k == int(k) and 1 <= k <= d_sae):
        raise UserError(f"top_k is {k}; it has to be a whole number from 1 to {d_sae}, or a fraction "
                        "between 0 and 1")
    return max(1, int(k * d_sae)) if k < 1 else int(k)


def feature_numbers(given, d_sae):
    """-> sorted, each once"""
    if bad := [i for i in given if not 0 <= int(i) < d_sae]:
        raise UserError(f"masked feature {bad[0]} does not exist; there are features 0 to {d_sae - 1}")
    return sorted({int(i) for i in given})


# ---- a run's folder ------------------------------------------------------------------------------

def run_config(folder):
    """config.json of a run."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a finished run: config.json is not there")
    return read_json(folder / "config.json")


def note_source(folder, spec):
    """Says so if a user's file is no longer the one that the run was trained with."""
    kept = folder / SOURCE
    if spec and kept.exists() and source_of(spec).is_file():
        if source_of(spec).read_bytes() != kept.read_bytes():
            print(f"note: {source_of(spec)} is not the source this run was trained with ({kept})",
                  file=sys.stderr)


def same_digest(folder, what, source, trained_on, found):
    if trained_on not in (None, found.identity()):
        raise UserError(f"{folder} was trained on another {what} than {source} is now "
                        f"(digest {trained_on}, now {found.identity()})")


def check_fit(sae, config):
    """Raises UserError unless the SAE can sit on a model of this config."""
    if sae.layer is None:
        raise UserError(f"SAE {sae.source}: which layer it belongs to is written neither in its path "
                        "(layer_N) nor in its config")
    if sae.layer >= config.num_hidden_layers:
        raise UserError(f"SAE {sae.source} belongs to layer {sae.layer}; this model has layers 0 to "
                        f"{config.num_hidden_layers - 1}")
    if sae.d_in != config.hidden_size:
        raise UserError(f"SAE {sae.source} reads states of width {sae.d_in}, this model's have "
                        f"{config.hidden_size}")


# ---- the authors' two files ----------------------------------------------------------------------

def authors_keys(source, model):
    """What the authors' config says of the SAE `source` (repo:path/inside, or a folder) and the
    model."""
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
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a finished run: {CONFIG} is not there")
    config = read_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise UserError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from None
    config.setdefault("activation_type", "relu")
    for flag, kind in (("use_soft_threshold", "soft_threshold"), ("use_jump_relu", "jump_relu")):
        if config.get(flag):
            config["activation_type"] = kind
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    if config["activation_type"] == "custom":
        return config, tensors
    if config["activation_type"] not in THEIR_NAMES.values():
        known = ", ".join(THEIR_NAMES.values())
        raise UserError(f"{folder / CONFIG}: activation_type is {config['activation_type']!r}; "
                        f"known are {known}")
    weight = tensors.get("adapter_linear.weight")
    if weight is None or weight.dim() != 2:
        raise UserError(f"{folder / WEIGHTS}: tensor adapter_linear.weight (d_sae, d_in) is missing")
    if config.get("use_steering_magnitude"):
        tensors.setdefault("steering_magnitude", torch.ones(len(weight)))
    else:
        tensors.pop("steering_magnitude", None)
    if sae is not None and "fusion" not in config and subtracts_b_dec(sae.source):
        shift = weight @ sae.b_dec.detach().cpu().float()
        tensors["adapter_linear.bias"] = tensors["adapter_linear.bias"] - shift
    return config, tensors


def fill(adapter, tensors, path):
    """The adapter with these tensors in it."""
    try:
        adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its adapter ({' '.join(str(error).split())})") from None
    return adapter
