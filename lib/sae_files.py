"""The weights of an SAE in the two formats that are found in the world: Gemma Scope's and SAELens'.

Both come out as the same five tensors of an SAE that takes the residual stream as it is:

    W_enc (D,F), b_enc (F,), W_dec (F,D), b_dec (D,), threshold (F,)
"""
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lib.files import UserError, atomically, explained, fetch, read_json, short_digest
from lib.settings import one_of

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
MARKS = ("params.npz", "cfg.json")             # one of them says: this folder is an SAE
# Shapes cannot tell an SAE of the MLP's output from one of the residual stream; names can.
ELSEWHERE = re.compile(r"gemma-scope[\w.-]*-(mlp|att|transcoder)\w*"       # Gemma Scope's repositories
                       r"|blocks\.\d+\.(\w+\.)*hook_(?!resid_post)\w+"      # SAELens' folders
                       r"|(?<=/)(mlp|attn)_out(?=/|_)")                     # Gemma Scope 2's folders
OUTPUT = "this project steers the output of a block (blocks.L.hook_resid_post, gemma-scope-...-res)"


def check_tensors(tensors, what):
    """Raises UserError for shapes that do not fit each other, NaN and infinity."""
    F, D = tensors["W_dec"].shape if tensors["W_dec"].ndim == 2 else (0, 0)
    for name, shape in zip(NAMES, ((D, F), (F,), (F, D), (D,), (F,))):
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UserError(f"{what}: {name} has shape {tuple(tensor.shape)}, W_dec asks for {shape}")
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
        raise UserError(f"{source}: its name says {other[0]}; {OUTPUT}")
    numbers = re.findall(r"layer_(\d+)(?=/|$)", path)
    layer = int(numbers[-1]) if numbers else None
    with explained(folder, "it does not hold an SAE"):
        if (folder / "params.npz").exists():
            return read_npz(folder / "params.npz"), layer
        block = checked_config(read_json(folder / "cfg.json"), folder)
        return read_saelens(folder), layer if block is None else block


def folder_of(source):
    """The folder that holds the files, after a download if need be."""
    repo, _, inside = source.partition(":")
    if inside and not Path(source).is_dir():
        inside = inside.strip("/")
        files = (*MARKS, "sae_weights.safetensors")
        folder = fetch(repo, [f"{inside}/{name}" for name in files]) / inside
    else:
        folder = fetch(source, [])
    # the folder itself, or the one SAE of a tree, such as tiny/sae
    found = sorted({path.parent for name in MARKS for path in folder.rglob(name)})
    if folder in found:
        return folder
    if len(found) != 1:
        example = found[0] if found else "repo:layer_12/width_16k/average_l0_82 on the Hub"
        raise UserError(f"{source}: neither params.npz (Gemma Scope) nor cfg.json (SAELens) is there; "
                        f"name one SAE, such as {example}")
    return found[0]


def read_npz(path):
    """Gemma Scope's file: compressed, and up to 19 GB large. No pickles."""
    with np.load(path, allow_pickle=False) as arrays:
        stored = {name.lower(): name for name in arrays.files}            # some write w_enc
        return {name: torch.from_numpy(arrays[stored[name.lower()]]) for name in NAMES}


def write_npz(folder, tensors):
    """Writes params.npz, float32."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: t.detach().float().cpu().numpy() for name, t in tensors.items()}

    def write(path):
        with open(path, "wb") as file:         # given a name, numpy would append .npz to it
            np.savez(file, **arrays)
    atomically(folder / "params.npz", write)


def subtracts_b_dec(source):
    """Whether the SAE takes x - b_dec: SAELens' may, and does by default, Gemma Scope's never do."""
    if not source or (folder_of(source) / "params.npz").exists():
        return False
    return read_json(folder_of(source) / "cfg.json").get("apply_b_dec_to_input", True)


def read_saelens(folder):
    """-> the five tensors of an SAE that takes x as it is"""
    cfg, stored = read_json(folder / "cfg.json"), load_file(folder / "sae_weights.safetensors")
    if cfg.get("architecture", "standard") == "standard":
        stored["threshold"] = torch.zeros_like(stored["b_enc"])        # a ReLU is a JumpReLU at 0
    elif "log_threshold" in stored:                                    # a training checkpoint
        stored["threshold"] = stored["log_threshold"].float().exp()
    tensors = {name: stored[name] for name in NAMES}
    # (x - b_dec) W_enc, SAELens' default, is x W_enc with another bias. A large b_dec cancels in it:
    # in half precision the bias would be off by more than a threshold.
    if cfg.get("apply_b_dec_to_input", True):
        shift = tensors["b_dec"].float() @ tensors["W_enc"].float()
        tensors["b_enc"] = tensors["b_enc"].float() - shift
    # A fine-tuned SAE decodes f · factor. Some older files hold a factor of ones under another name.
    factor = stored.get("finetuning_scaling_factor", stored.get("scaling_factor"))
    if factor is not None and (factor != 1).any():
        if not cfg.get("finetuning_scaling_factor"):
            raise UserError(f"{folder} holds a scaling factor that its config does not ask for")
        tensors["W_dec"] = factor.float()[:, None] * tensors["W_dec"].float()
    return tensors


def checked_config(cfg, where):
    """Raises UserError for an SAE of another kind. -> the block that the hook's name says, or None"""
    inner = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    norm = cfg.get("normalize_activations") or "none"
    one_of(f"{where}: architecture", cfg.get("architecture", "standard"), ("jumprelu", "standard"))
    one_of(f"{where}: activation", inner, ["relu"])
    one_of(f"{where}: normalize_activations", norm, ["none"])
    # Since version 6 the hook's name lies under metadata; the oldest files call it hook_point.
    metadata = cfg.get("metadata") or {}
    hook = metadata.get("hook_name") or cfg.get("hook_name") or cfg.get("hook_point")
    hook = str(hook or cfg.get("reshape_activations") or "none")     # hook_z: the heads' outputs
    if hook != "none" and not hook.endswith("hook_resid_post"):
        raise UserError(f"{where}: hook {hook!r}; {OUTPUT}")
    number = re.search(r"blocks\.(\d+)\.", hook)
    return int(number[1]) if number else None
