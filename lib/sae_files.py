"""The weights of an SAE in the two formats that are found in the world: Gemma Scope's and SAELens'.

Both come out as the same five tensors of an SAE that takes the residual stream as it is:

    W_enc (D,F), b_enc (F,), W_dec (F,D), b_dec (D,), threshold (F,)
"""
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lib.files import UserError, atomically, fetch, read_json, short_digest

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
MARKS = ("params.npz", "cfg.json")             # one of them says: this folder is an SAE
# Shapes cannot tell an SAE of the MLP's output from one of the residual stream; names can.
ELSEWHERE = re.compile(r"gemma-scope[\w.-]*-(mlp|att|transcoder)\w*"       # Gemma Scope's repositories
                       r"|blocks\.\d+\.(\w+\.)*hook_(?!resid_post)\w+"      # SAELens' folders
                       r"|(?<=/)(mlp|attn)_out(?=/|_)")                     # Gemma Scope 2's folders


def check_tensors(tensors, what):
    """Raises UserError for shapes that do not fit each other, NaN and infinity."""
    W_enc = tensors["W_enc"]
    D, F = W_enc.shape if W_enc.ndim == 2 else (0, 0)
    for name, shape in zip(NAMES, ((D, F), (F,), (F, D), (D,), (F,))):
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{what}: {name} has shape {tuple(tensor.shape)}, "
                            f"W_enc {tuple(W_enc.shape)} asks for {shape}")
        if not tensor.sum(dtype=torch.float32).isfinite():      # one of them in a sum is enough
            raise UserError(f"{what}: {name} holds NaN or infinity")


def digest(tensors):
    """16 hexadecimal digits that name these weights, whatever dtype the matrices are kept in."""
    small = [tensors[name] for name in ("b_enc", "threshold", "b_dec")]     # always float32
    # Of the matrices some 256 features, rounded to bf16: all 65,536 would take seconds.
    every = max(1, len(tensors["W_dec"]) // 256)
    matrices = [m[::every].bfloat16() for m in (tensors["W_enc"].T, tensors["W_dec"])]
    arrays = [t.float().contiguous().cpu().numpy() for t in small + matrices]
    return short_digest(*(array.tobytes() for array in arrays))


def read_sae(source):
    """-> (tensors by name, number of the layer or None). Raises UserError; see sae.load_sae."""
    folder = folder_of(source)
    path = folder.resolve().as_posix()
    if other := ELSEWHERE.search(f"{source} {path}"):
        raise UserError(f"{source}: its name says {other[0]}; this project steers the output of a block "
                        "(blocks.L.hook_resid_post, gemma-scope-...-res)")
    if (folder / "params.npz").exists():
        tensors, layer = read_npz(folder / "params.npz"), None
    else:
        tensors, layer = read_saelens(folder)
    numbers = re.findall(r"layer_(\d+)(?=/|$)", path)
    if layer is None and numbers:
        layer = int(numbers[-1])
    return tensors, layer


def folder_of(source):
    """The folder that holds the files, after a download if need be."""
    repo, _, inside = source.partition(":")
    if inside and not Path(source).is_dir():
        inside = inside.strip("/")
        files = (*MARKS, "sae_weights.safetensors")
        folder = fetch(repo, [f"{inside}/{name}" for name in files]) / inside
        if not folder.is_dir():
            raise UserError(f"{source}: the repo {repo} has no SAE under {inside}/")
    else:
        folder = fetch(source, [])
    if any((folder / name).exists() for name in MARKS):
        return folder
    below = sorted({path.parent for name in MARKS for path in folder.rglob(name)})
    if len(below) == 1:                        # the one SAE of a tree, such as tiny/sae
        return below[0]
    example = below[0] if below else "repo:layer_12/width_16k/average_l0_82 on the Hub"
    raise UserError(f"{source}: neither params.npz (Gemma Scope) nor cfg.json (SAELens) is there; "
                    f"name one SAE, such as {example}")


def subtracts_b_dec(source):
    """Whether an SAE of SAELens takes x - b_dec, as its config says; Gemma Scope's never do."""
    folder = folder_of(source) if source else Path("nowhere")
    if (folder / "params.npz").exists() or not (folder / "cfg.json").exists():
        return False
    return bool(read_json(folder / "cfg.json").get("apply_b_dec_to_input", True))


def read_npz(path):
    """Gemma Scope's file, one array at a time: it is compressed, and up to 19 GB large. No pickles."""
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in NAMES:
                stored = name if name in arrays.files else name.lower()      # some write w_enc
                if stored not in arrays.files:
                    there = ", ".join(arrays.files)
                    raise UserError(f"{path}: array {name} is missing; it holds {there}")
                tensors[name] = torch.from_numpy(arrays[stored])
    except UserError:
        raise
    except Exception as error:                 # numpy, zipfile and zlib each have their own
        raise UserError(f"{path}: not a readable npz file ({error})") from None
    return tensors


def write_npz(folder, tensors):
    """Writes params.npz, float32."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: t.detach().float().cpu().numpy() for name, t in tensors.items()}

    def write(path):
        with open(path, "wb") as file:         # given a name, numpy would append .npz to it
            np.savez(file, **arrays)
    atomically(folder / "params.npz", write)


def read_saelens(folder):
    """-> (tensors, the block that the hook's name says, or None)"""
    cfg, path = read_json(folder / "cfg.json"), folder / "sae_weights.safetensors"
    block = checked_config(cfg, folder / "cfg.json")
    try:
        stored = load_file(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if cfg.get("architecture", "standard") == "standard" and "b_enc" in stored:
        stored["threshold"] = torch.zeros_like(stored["b_enc"])        # a ReLU is a JumpReLU at 0
    elif "log_threshold" in stored:                                    # a training checkpoint
        stored["threshold"] = stored["log_threshold"].float().exp()
    if missing := [name for name in NAMES if name not in stored]:
        raise UserError(f"{path}: tensor {missing[0]} is missing; it holds {', '.join(sorted(stored))}")
    tensors = {name: stored[name] for name in NAMES}
    # (x - b_dec) W_enc, SAELens' default, is x W_enc with another bias. A large b_dec cancels in it:
    # in half precision the bias would be off by more than a threshold.
    if cfg.get("apply_b_dec_to_input", True):
        shift = tensors["b_dec"].float() @ tensors["W_enc"].float()
        tensors["b_enc"] = tensors["b_enc"].float() - shift
    # A fine-tuned SAE decodes f · factor. Some older files hold a factor of ones under another name.
    factor = stored.get("finetuning_scaling_factor", stored.get("scaling_factor"))
    if factor is not None and not (factor == 1).all():
        if not cfg.get("finetuning_scaling_factor"):
            raise UserError(f"{path} holds a scaling factor, but cfg.json does not set "
                            "finetuning_scaling_factor; SAELens refuses such a file, too")
        tensors["W_dec"] = factor.float()[:, None] * tensors["W_dec"].float()
    return tensors, block


def checked_config(cfg, path):
    """Raises UserError for an SAE of another kind. -> the block that the hook's name says, or None"""
    if not isinstance(cfg, dict):
        raise UserError(f"{path}: not a SAELens config")
    kind = cfg.get("architecture", "standard")
    if kind not in ("jumprelu", "standard"):
        raise UserError(f"{path}: architecture {kind!r}; only 'jumprelu' and 'standard' are read")
    inner = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if inner != "relu":
        raise UserError(f"{path}: activation {inner!r}; only ReLU and JumpReLU SAEs are read")
    norm = cfg.get("normalize_activations") or "none"
    if norm != "none":
        raise UserError(f"{path}: normalize_activations is {norm!r}; only SAEs that take the residual "
                        "stream as it is are read")
    # Since version 6 the hook's name lies under metadata; the oldest files call it hook_point.
    metadata = cfg.get("metadata") or {}
    hook = str(metadata.get("hook_name") or cfg.get("hook_name") or cfg.get("hook_point") or "")
    shape = cfg.get("reshape_activations") or "none"
    if shape != "none":                        # "hook_z": the heads' outputs side by side
        hook = hook or shape
    if hook and not hook.endswith("hook_resid_post"):
        raise UserError(f"{path}: hook {hook!r}; this project steers the output of a block "
                        "(blocks.L.hook_resid_post)")
    number = re.search(r"blocks\.(\d+)\.", hook)
    return int(number[1]) if number else None
