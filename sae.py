"""A JumpReLU sparse autoencoder (SAE): encode, decode, load, save, train.

    f = jumprelu(x W_enc + b_enc),   jumprelu(p) = max(p, 0) · [p > threshold]         (…,D) -> (…,F)
    x̂ = f W_dec + b_dec                                                               (…,F) -> (…,D)

(Rajamanoharan et al., arXiv 2407.14435; Gemma Scope, arXiv 2408.05147.) b_dec is not subtracted from the input, and
released Gemma Scope weights take the residual stream as it is: their training's normalisation is folded into them.
They were trained without BOS, whose norm is ten times the others': never encode it, never count it.

    python sae.py --model tiny/model --layer 3 --text my.txt --out my_sae        # train one; see --help
"""
import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm

from gemma import UserError, atomically, choose_device, encode_text, fetch, load_config, load_gemma, load_tokenizer, read_json


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, threshold, bandwidth):
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(p > threshold, p.clamp_min(0), 0.0)

    @staticmethod
    def backward(ctx, g):
        p, threshold = ctx.saved_tensors
        near = (p - threshold).abs() < ctx.bandwidth / 2
        slope = -(threshold / ctx.bandwidth) * (near * g)
        return g * ((p > threshold) & (p > 0)), slope.reshape(-1, p.shape[-1]).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, threshold, bandwidth):
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx, g):
        p, threshold = ctx.saved_tensors
        near = (p - threshold).abs() < ctx.bandwidth / 2
        return None, (-1 / ctx.bandwidth * (near * g)).reshape(-1, p.shape[-1]).sum(0), None


def jumprelu(p, threshold, bandwidth=0.001):
    """max(p, 0) · [p > threshold].  p (…,F), threshold (F,) -> (…,F)

    The step has no useful derivative in the threshold; the straight-through one is that of a step smeared over
    `bandwidth`: -threshold/bandwidth where |p - threshold| < bandwidth/2 (arXiv 2407.14435, eq. 11). Towards p it is [p > threshold].
    """
    return _JumpReLU.apply(p, threshold, bandwidth)


def step(p, threshold, bandwidth=0.001):
    """[p > threshold], so that its sum is L0, with the straight-through derivative -1/bandwidth near the threshold."""
    return _Step.apply(p, threshold, bandwidth)


class JumpReLUSAE(nn.Module):
    """W_enc (D,F), b_enc (F,), W_dec (F,D), b_dec (D,), threshold (F,); `layer`: the block whose output it reads.

    Thresholds and biases stay in float32 whatever the matrices are: in bf16 a threshold moves in steps of 1/256 of itself.
    """

    def __init__(self, W_enc, b_enc, W_dec, b_dec, threshold, *, layer=None, source="", dtype=torch.float32):
        super().__init__()
        (D, F), like = W_enc.shape, {"b_enc": (b_enc, -1), "W_dec": (W_dec, None), "b_dec": (b_dec, 0), "threshold": (threshold, -1)}
        for name, (tensor, axis) in like.items():
            want = (F, D) if axis is None else (W_enc.shape[axis],)
            if tuple(tensor.shape) != want:
                raise UserError(f"SAE {source}: {name} has shape {tuple(tensor.shape)}, W_enc {tuple(W_enc.shape)} asks for {want}")
        for name, tensor in dict(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold).items():
            kind = dtype if name.startswith("W") or dtype == torch.float64 else torch.float32
            self.register_parameter(name, nn.Parameter(torch.as_tensor(tensor).to(kind), requires_grad=False))
        self.layer, self.source = layer, source

    @property
    def d_in(self):
        return self.W_enc.shape[0]

    @property
    def d_sae(self):
        return self.W_enc.shape[1]

    def encode(self, x):
        """(…,D) -> (…,F), in the biases' dtype."""
        p = (x.to(self.W_enc.dtype) @ self.W_enc).to(self.b_enc.dtype) + self.b_enc
        return jumprelu(p, self.threshold)

    def decode(self, f):
        """(…,F) -> (…,D)"""
        return (f.to(self.W_dec.dtype) @ self.W_dec).to(self.b_dec.dtype) + self.b_dec

    def identity(self):
        """A short digest of the weights: labels and adapters belong to one SAE, whatever its folder is called, and in any dtype."""
        digest = hashlib.sha256()
        for name in ("b_enc", "threshold", "b_dec"):                       # float32 always
            digest.update(getattr(self, name).detach().float().cpu().numpy().tobytes())
        for matrix in (self.W_enc.T, self.W_dec):                          # some 256 features in bf16: all of 65,536 would take seconds
            digest.update(matrix[::max(1, self.d_sae // 256)].detach().bfloat16().float().contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


# ---- files -----------------------------------------------------------------------------------------------------------

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def load_sae(source, *, dtype=torch.float32, device="cpu"):
    """Reads a Gemma Scope folder (params.npz) or a SAELens one (cfg.json + sae_weights.safetensors).

    source: a local folder (or one with a single SAE somewhere below it), or "repo:path/inside" on the Hub, such as
    google/gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_72
    Raises UserError for what is not there, not a JumpReLU or ReLU SAE, or needs its input normalised.
    """
    repo, _, inside = str(source).partition(":")
    if inside and not Path(source).is_dir():
        inside = inside.strip("/")
        folder = fetch(repo, [f"{inside}/{name}" for name in ("params.npz", "cfg.json", "sae_weights.safetensors")]) / inside
        if not folder.is_dir():
            raise UserError(f"{source}: the repo {repo} has no SAE under {inside}/")
    else:
        folder = fetch(source, [])
    if not any((folder / name).exists() for name in ("params.npz", "cfg.json")):
        below = sorted({path.parent for name in ("params.npz", "cfg.json") for path in folder.rglob(name)})
        if len(below) != 1:
            raise UserError(f"{source}: neither params.npz (Gemma Scope) nor cfg.json (SAELens) is there; name one SAE"
                            + (f", such as {below[0]}" if below else ", on the Hub as repo:layer_12/width_16k/average_l0_82"))
        folder = below[0]                                                  # the one SAE of a tree, such as tiny/sae
    layer = re.findall(r"layer_(\d+)(?=/|$)", folder.as_posix())
    layer = int(layer[-1]) if layer else None
    if (folder / "params.npz").exists():
        tensors = _read_npz(folder / "params.npz")
    else:
        tensors, layer = _read_saelens(folder, layer)
    return JumpReLUSAE(**tensors, layer=layer, source=str(source), dtype=dtype).to(device).eval()


def _read_npz(path):
    """One array at a time: the files are compressed and up to 19 GB large. No pickles."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            have = {name: next((n for n in (name, name.lower()) if n in arrays.files), None) for name in NAMES}
            if missing := [name for name in NAMES if have[name] is None]:
                raise UserError(f"{path}: array {missing[0]} is missing; it holds {', '.join(arrays.files)}")
            return {name: torch.from_numpy(arrays[have[name]]) for name in NAMES}
    except UserError:
        raise
    except Exception as error:       # numpy, zipfile and zlib each have their own
        raise UserError(f"{path}: not a readable npz file ({error})") from None


def _read_saelens(folder, layer):
    cfg, path = read_json(folder / "cfg.json"), folder / "sae_weights.safetensors"
    if not isinstance(cfg, dict):
        raise UserError(f"{folder}/cfg.json: not a SAELens config")
    kind = cfg.get("architecture", "standard")
    if (inner := cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu") != "relu":
        raise UserError(f"{folder}/cfg.json: activation {inner!r}; only ReLU and JumpReLU SAEs are read")
    if kind not in ("jumprelu", "standard"):
        raise UserError(f"{folder}/cfg.json: architecture {kind!r}; only 'jumprelu' and 'standard' are read")
    if (norm := cfg.get("normalize_activations") or "none") != "none":
        raise UserError(f"{folder}/cfg.json: normalize_activations is {norm!r}; only SAEs that take the residual stream as it is are read")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    if kind == "standard" and "b_enc" in tensors:
        tensors["threshold"] = torch.zeros_like(tensors["b_enc"])          # a ReLU is a JumpReLU that jumps at 0
    elif "log_threshold" in tensors:                                       # a training checkpoint
        tensors["threshold"] = tensors["log_threshold"].exp()
    if missing := [name for name in NAMES if name not in tensors]:
        raise UserError(f"{path}: tensor {missing[0]} is missing; it holds {', '.join(sorted(tensors))}")
    tensors = {name: tensors[name] for name in NAMES}
    if cfg.get("apply_b_dec_to_input", True):                              # SAELens' default; (x - b_dec) W_enc is
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]     # x W_enc with another bias
    hook = str((cfg.get("metadata") or {}).get("hook_name") or cfg.get("hook_name") or cfg.get("hook_point") or "")
    if hook and not hook.endswith("hook_resid_post"):
        raise UserError(f"{folder}/cfg.json: hook {hook!r}; this project steers the output of a block (blocks.L.hook_resid_post)")
    found = re.search(r"blocks\.(\d+)\.", hook)
    return tensors, int(found[1]) if found else layer


def save_sae(sae, folder):
    """Writes Gemma Scope's params.npz, float32."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    def write(path):
        with open(path, "wb") as file:
            np.savez(file, **{name: getattr(sae, name).detach().float().cpu().numpy() for name in NAMES})
    atomically(folder / "params.npz", write)


# ---- training --------------------------------------------------------------------------------------------------------

def train_sae(x, width, *, l0=30.0, steps=4000, batch_size=2048, lr=2e-3, penalty=1.0, bandwidth=0.03, warmup=0.25, seed=0,
              layer=None, progress=True):
    """Trains a JumpReLUSAE on residual-stream states x (N,D), BOS and padding left out. -> the SAE, with x's units folded in

    loss = ‖x - x̂‖² / E‖x - mean‖²  +  penalty · (L0 / l0 - 1)²  for a mean L0 above the target `l0`, both gradients straight-through.
    The penalty rises over the first `warmup` of the steps, so that features find something to do before they must be few.
    Decoder rows have unit norm after every step, and the gradient along them is taken out before it.
    Features that have been silent for long are given the direction of a badly reconstructed state (in the first three quarters of the steps).
    """
    g = torch.Generator().manual_seed(seed)
    N, D = x.shape
    if N < batch_size:
        raise UserError(f"{N} token states are too few to train an SAE; at least {batch_size} are needed")
    scale = x.square().sum(-1).mean().sqrt()                          # train at unit mean squared norm, as Gemma Scope
    mean = x.mean(0) / scale
    variance = (x / scale - mean).square().sum(-1).mean()
    unit = lambda w: w / w.norm(dim=-1, keepdim=True)                 # noqa: E731
    W_dec = unit(torch.randn(width, D, generator=g))
    W_enc, b_dec = W_dec.T.clone(), mean.clone()
    b_enc, log_threshold = -(b_dec @ W_enc), torch.full((width,), 0.05).log()
    parameters = [p.requires_grad_() for p in (W_enc, b_enc, W_dec, b_dec, log_threshold)]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    silent = torch.zeros(width)                                       # steps since each feature last fired
    bar = tqdm(range(steps), desc="sae", unit="step", disable=not progress)
    for i in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (i + 1) / 100) * min(1, 3 * (1 - i / steps))       # the last third goes down to nothing
        batch = x[torch.randint(N, (batch_size,), generator=g)] / scale
        p, threshold = batch @ W_enc + b_enc, log_threshold.exp()
        f = jumprelu(p, threshold, bandwidth)
        error = (batch - f @ W_dec - b_dec).square().sum(-1)
        active = step(p, threshold, bandwidth).sum(-1).mean()
        fvu = error.mean() / variance
        loss = fvu + penalty * min(1, i / (warmup * steps)) * torch.relu(active / l0 - 1).square()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
            optimizer.step()
            W_dec.copy_(unit(W_dec))
            silent = torch.where((f > 0).any(0), 0.0, silent + 1)
            if i % 100 == 99 and i < 0.75 * steps:
                dead = (silent >= 100).nonzero()[:, 0]
                worst = error.topk(min(len(dead), batch_size)).indices
                _revive(dead[:len(worst)], unit(batch[worst] - (f @ W_dec + b_dec)[worst]), parameters, optimizer)
        if i % 50 == 49:
            bar.set_postfix(fvu=f"{fvu.item():.4f}", l0=f"{active.item():.1f}", silent=int((silent >= 100).sum()), refresh=False)
    with torch.no_grad():      # back to x's units: x W_enc stays, everything that is added or compared scales
        return JumpReLUSAE(W_enc, b_enc * scale, W_dec, b_dec * scale, log_threshold.exp() * scale, layer=layer)


def _revive(dead, direction, parameters, optimizer):
    """Points features at what is badly reconstructed, with their optimiser state forgotten."""
    W_enc, b_enc, W_dec, b_dec, log_threshold = parameters
    W_dec[dead], W_enc[:, dead], log_threshold[dead] = direction, direction.T, float(np.log(0.05))
    b_enc[dead] = -(b_dec @ direction.T)
    for tensor, index in ((W_dec, dead), (W_enc, (slice(None), dead)), (b_enc, dead), (log_threshold, dead)):
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[tensor][moment][index] = 0


@torch.no_grad()
def quality(sae, x, chunk=4096):
    """How well an SAE does on states x (N,D): FVU = Σ‖x - x̂‖² / Σ‖x - mean‖², L0 = mean number of features that
    fire, dead = share of the features that fire on none of x."""
    error, fired, count = 0.0, torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device), 0
    for part in x.split(chunk):
        f = sae.encode(part)
        error += (part - sae.decode(f)).double().square().sum().item()
        count += (f > 0).sum().item()
        fired |= (f > 0).any(0)
    total = (x - x.mean(0)).double().square().sum().item()
    return {"fvu": error / total, "l0": count / len(x), "dead": 1 - fired.double().mean().item()}


@torch.no_grad()
def collect(model, rows, layer, *, batch_size=64, progress=True):
    """The output of block `layer` at every token of `rows` (lists of ids) but BOS, EOS and padding. -> (N,D) float32"""
    c, states = model.config, []
    for i in tqdm(range(0, len(rows), batch_size), desc="states", unit="batch", disable=not progress):
        part = rows[i:i + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([list(r) + [c.pad_token_id] * (width - len(r)) for r in part], device=model.device)
        special = torch.tensor([c.bos_token_id, c.pad_token_id, min(c.eos_token_ids)], device=ids.device)     # <eos> is 1, <end_of_turn> 107
        text = ~torch.isin(ids, special)                                   # right padding is seen by no text token
        states.append(model.blocks(model.embed(ids), 0, layer + 1)[text].float().cpu())
    return torch.cat(states)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a JumpReLU SAE on the residual stream of a Gemma-2 "
                                     "(all states are held in memory: 4·D bytes a token).")
    parser.add_argument("--model", default="tiny/model", help="local folder or Hub repo id of a Gemma-2")
    parser.add_argument("--layer", type=int, default=3, help="its output of this block is reconstructed (0 is the first)")
    parser.add_argument("--text", required=True, help="a .txt with one document a line, or a .jsonl with a \"text\" in each line")
    parser.add_argument("--out", required=True, help="a new folder; layer_L/width_W/average_l0_N is made in it")
    parser.add_argument("--width", type=int, default=1024, help="number of features F")
    parser.add_argument("--l0", type=float, default=30.0, help="features that may fire a token, on average")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps of 2048 tokens")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument("--max-tokens", type=int, default=500_000, help="stop reading text after this many tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the tokens")
    parser.add_argument("--device", default="auto", help="where the model runs: cpu, cuda, mps (the SAE trains on the CPU)")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        device, dtype = choose_device(args.device)
        for name in ("width", "l0", "steps", "lr", "max_tokens"):
            if not getattr(args, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be above 0")
        if Path(args.out).exists():
            raise UserError(f"--out {args.out} exists; name a folder that does not")
        if not 0 <= args.layer < (layers := load_config(args.model).num_hidden_layers):
            raise UserError(f"--layer is {args.layer}; this model has blocks 0 to {layers - 1}")
        rows, tokens, tokenizer = [], 0, load_tokenizer(args.model)
        for number, line in enumerate(_lines(args.text), 1):
            if args.text.endswith(".jsonl") and line.strip():
                try:
                    line = json.loads(line)["text"].strip()
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise UserError(f'{args.text}, line {number}: not a JSON object with a "text"') from None
            if line.strip():
                rows.append([tokenizer.token_to_id("<bos>"), *encode_text(tokenizer, line.strip())])
                tokens += len(rows[-1])
            if tokens >= args.max_tokens:
                break
        if not rows:
            raise UserError(f"{args.text}: no text in it")
        model = load_gemma(args.model, device=device, dtype=dtype)
        x = collect(model, rows, args.layer)
        held = max(1, len(x) // 10)                                        # the last tenth measures, the rest trains
        sae = train_sae(x[:-held], args.width, l0=args.l0, steps=args.steps, lr=args.lr, seed=args.seed, layer=args.layer)
        q = quality(sae, x[-held:])
        folder = Path(args.out) / f"layer_{args.layer}" / f"width_{args.width}" / f"average_l0_{q['l0']:.0f}"
        save_sae(sae, folder)
        print(f"{folder}: FVU {q['fvu']:.4f}, L0 {q['l0']:.1f}, dead {q['dead']:.1%} on {held} held-out tokens")
    except UserError as error:
        print(f"sae.py: {error}", file=sys.stderr)
        return 2
    return 0


def _lines(path):
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


if __name__ == "__main__":
    sys.exit(main())
