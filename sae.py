"""A sparse autoencoder (SAE): it names what a residual stream holds.

    p = x W_enc + b_enc                         pre-activations            (…,D) -> (…,F)
    f = max(p, 0) · [p > threshold]             JumpReLU: few of F fire    (…,F) -> (…,F)
    x̂ = f W_dec + b_dec                         row i of W_dec: feature i  (…,F) -> (…,D)

(Rajamanoharan et al., arXiv 2407.14435; Gemma Scope, arXiv 2408.05147.) b_dec is not subtracted from
the input, and released Gemma Scope weights take the residual stream as it is: the normalisation of their
training is folded into them. They were trained without BOS, whose norm is ten times the others': never
encode it, never count it.

    python sae.py --text my.txt --out my_sae          # or --pairs tiny/pairs/style; see --help
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gemma import encode_answer, encode_prompt, encode_text, load_config, load_gemma, load_tokenizer
from lib.documents import read_documents
from lib.files import UserError
from lib.pairs import read_pairs
from lib.sae_files import NAMES, check_tensors, digest, read_sae, write_npz
from lib.settings import check, choose_device, command, setting


# ---- JumpReLU, and how its threshold learns ------------------------------------------------------
#
# A step is flat almost everywhere: its threshold gets no gradient. The straight-through one is that of
# a ramp of width `bandwidth` in the step's place (arXiv 2407.14435, eq. 11 and 12). A threshold that
# rises by dt loses the pre-activations that lie in dt: the step a 1 for each, JumpReLU the threshold.

def jumprelu(p, threshold, bandwidth=0.001):
    """max(p, 0) · [p > threshold], with gradients for both.  p (…,F), threshold (F,) -> (…,F)"""
    return _JumpReLU.apply(p, threshold, bandwidth)


def step(p, threshold, bandwidth=0.001):
    """[p > threshold], so that its sum is L0, with a gradient for the threshold alone.  -> (…,F)"""
    return _Step.apply(p, threshold, bandwidth)


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, threshold, bandwidth):
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(p > threshold, p.clamp_min(0), 0.0)

    @staticmethod
    def backward(ctx, g):
        p, threshold = ctx.saved_tensors
        fires = (p > threshold) & (p > 0)
        return g * fires, -threshold * _at_threshold(ctx, g), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p, threshold, bandwidth):
        ctx.save_for_backward(p, threshold)
        ctx.bandwidth = bandwidth
        return (p > threshold).to(p.dtype)

    @staticmethod
    def backward(ctx, g):
        return None, -_at_threshold(ctx, g), None


def _at_threshold(ctx, g):
    """Sum over the tokens of g · slope of the ramp.  g (…,F) -> (F,)"""
    p, threshold = ctx.saved_tensors
    near = (p - threshold).abs() < ctx.bandwidth / 2
    return (near * g).reshape(-1, p.shape[-1]).sum(0) / ctx.bandwidth


class JumpReLUSAE(nn.Module):
    """W_enc (D,F), b_enc (F,), W_dec (F,D), b_dec (D,), threshold (F,), all frozen; `layer`: the block
    whose output it reads.

    Thresholds and biases stay in float32 whatever the matrices are: in bf16 a threshold moves in steps
    of 1/256 of itself. Raises UserError for shapes that do not fit each other, and for NaN.
    """

    def __init__(self, W_enc, b_enc, W_dec, b_dec, threshold, *, layer=None, source="",
                 dtype=torch.float32):
        super().__init__()
        tensors = dict(zip(NAMES, (W_enc, b_enc, W_dec, b_dec, threshold)))
        check_tensors(tensors, f"SAE {source}")
        for name, tensor in tensors.items():
            small = not name.startswith("W")
            kind = torch.float32 if small and dtype != torch.float64 else dtype
            self.register_parameter(name, nn.Parameter(tensor.to(kind), requires_grad=False))
        self.d_in, self.d_sae = W_enc.shape
        self.layer, self.source = layer, source

    def encode(self, x):
        """(…,D) -> (…,F), in the biases' dtype."""
        p = (x.to(self.W_enc.dtype) @ self.W_enc).to(self.b_enc.dtype) + self.b_enc
        return jumprelu(p, self.threshold)

    def decode(self, f):
        """(…,F) -> (…,D)"""
        return (f.to(self.W_dec.dtype) @ self.W_dec).to(self.b_dec.dtype) + self.b_dec

    def identity(self):
        """A short digest of the weights: labels and adapters belong to one SAE, whatever its folder is
        called, and in any dtype."""
        return digest({name: getattr(self, name).detach() for name in NAMES})


def load_sae(source, *, dtype=torch.float32, device="cpu"):
    """Reads a Gemma Scope folder (params.npz) or a SAELens one (cfg.json + sae_weights.safetensors).

    source: a local folder (or one with a single SAE below it), or "repo:path/inside" on the Hub, such as
    google/gemma-scope-2b-pt-res:layer_12/width_65k/average_l0_72. Raises UserError for what is no
    (Jump)ReLU SAE of a block's output, or needs its input normalised.
    """
    tensors, layer = read_sae(str(source))
    return JumpReLUSAE(**tensors, layer=layer, source=str(source), dtype=dtype).to(device).eval()


def save_sae(sae, folder):
    """Writes Gemma Scope's params.npz, float32."""
    write_npz(folder, {name: getattr(sae, name) for name in NAMES})


# ---- training ------------------------------------------------------------------------------------

SILENT = 100        # steps without firing after which a feature counts as dead
PULL = 1e-3         # weight of the pull on them; Adam makes the step's size, so any small weight does


def train_sae(x, width, *, l0=30.0, steps=4000, batch_size=2048, lr=2e-3, penalty=1.0, bandwidth=0.03,
              warmup=0.25, seed=0, layer=None, learn_decoder=True, progress=True):
    """Trains a JumpReLUSAE on residual-stream states x (N,D), BOS and padding left out.

    loss = E‖x - x̂‖²                           in units where the states have mean 0 and E‖x‖² = 1
         + penalty · max(0, L0 / l0 - 1)²      L0: features that fire a token; l0: how many may
         + a small pull on dead features       ReLU(threshold - p), until they fire again

    The penalty rises over the first `warmup` of the steps, so that features find something to do before
    they must be few. Decoder rows have unit norm. The pull is Anthropic's pre-activation loss (update of
    January 2025), for the dead alone: of 1,024 features on the lab's states 2% stay dead, 11% without.
    It moves no other feature. Dead features that are pointed at what is badly reconstructed do: they
    fire on many tokens at once, and the penalty then raises every threshold. learn_decoder False leaves
    W_dec as drawn, the control of arXiv 2602.14111. -> the SAE, in x's units
    """
    if len(x) < batch_size:
        raise UserError(f"{len(x)} token states are too few for an SAE; it needs {batch_size}")
    mean, scale = x.mean(0), x.var(0, unbiased=False).sum().sqrt()
    if not 0 < scale < math.inf:
        raise UserError("the token states hold NaN, or are all the same: nothing to learn from")
    g = torch.Generator().manual_seed(seed)        # each feature begins as a random direction
    W_dec = normalize(torch.randn(width, x.shape[1], generator=g), dim=-1)
    W_enc, b_enc, b_dec = W_dec.T.clone(), torch.zeros(width), torch.zeros(x.shape[1])
    log_threshold = torch.full((width,), 0.05).log()
    learned = (W_enc, b_enc, b_dec, log_threshold, *[W_dec] * learn_decoder)
    parameters = [p.requires_grad_() for p in learned]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    silent = torch.zeros(width)                 # steps since each feature last fired
    bar = tqdm(range(steps), desc="sae", unit="step", disable=not progress)
    for i in bar:
        # The rate climbs for 100 steps; the last third goes down to nothing.
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (i + 1) / 100) * min(1, 3 * (1 - i / steps))
        # Encode and decode a batch.
        batch = (x[torch.randint(len(x), (batch_size,), generator=g)] - mean) / scale
        p, threshold = batch @ W_enc + b_enc, log_threshold.exp()
        f = jumprelu(p, threshold, bandwidth)
        fvu = (batch - f @ W_dec - b_dec).square().sum(-1).mean()
        # Too many that fire, and too few.
        active = step(p, threshold, bandwidth).sum(-1).mean()
        excess = torch.relu(active / l0 - 1).square()
        dead = silent >= SILENT
        pull = torch.relu(threshold[dead] - p[:, dead]).sum(-1).mean()
        loss = fvu + penalty * min(1, i / (warmup * steps)) * excess + PULL * pull
        # A step that leaves the decoder's rows on the unit sphere.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            if learn_decoder:
                W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
            optimizer.step()
            W_dec.copy_(normalize(W_dec, dim=-1))
            silent = torch.where((f > 0).any(0), 0.0, silent + 1)
        if i % 50 == 49:
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is {loss.item()} at step {i + 1}; lower lr ({lr})")
            bar.set_postfix(fvu=f"{fvu:.4f}", l0=f"{active:.1f}", dead=int(dead.sum()), refresh=False)
    # Back to x's units: x W_enc stays, what is added or compared scales, the biases take up the mean.
    with torch.no_grad():
        b_enc, b_dec = b_enc * scale - mean @ W_enc, b_dec * scale + mean
        return JumpReLUSAE(W_enc, b_enc, W_dec, b_dec, log_threshold.exp() * scale, layer=layer)


@torch.no_grad()
def quality(sae, x, chunk=4096):
    """How well an SAE does on states x (N,D): FVU = Σ‖x - x̂‖² / Σ‖x - mean‖², L0 = mean number of
    features that fire, dead = share of the features that fire on none of x."""
    error, count = 0.0, 0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=x.device)
    for part in x.split(chunk):
        f = sae.encode(part)
        error += (part - sae.decode(f)).double().square().sum().item()
        count += (f > 0).sum().item()
        fired |= (f > 0).any(0)
    total = (x - x.mean(0)).double().square().sum().item()
    return {"fvu": error / total, "l0": count / len(x), "dead": 1 - fired.double().mean().item()}


@torch.no_grad()
def collect(model, rows, layer, *, batch_size=64, progress=True):
    """The output of block `layer` at every token of `rows` (lists of ids) but BOS, EOS and padding.
    -> (N,D) float32"""
    c, states = model.config, []
    # <eos> is 1; <end_of_turn>, the other id that ends a text, is 107, and part of a conversation.
    left_out = torch.tensor([c.bos_token_id, c.pad_token_id, min(c.eos_token_ids)])
    for i in tqdm(range(0, len(rows), batch_size), desc="states", unit="batch", disable=not progress):
        part = [torch.tensor(row) for row in rows[i:i + batch_size]]
        ids = pad_sequence(part, batch_first=True, padding_value=c.pad_token_id)
        # Padding stands on the right: no token of the text sees it.
        h = model.blocks(model.embed(ids.to(model.device)), 0, layer + 1).cpu()
        states.append(h[~torch.isin(ids, left_out)].float())
    return torch.cat(states)


# ---- the command ---------------------------------------------------------------------------------

@dataclass
class SAETrain:
    model: str = setting("tiny/model", "local folder or Hub repo id of a Gemma-2", group="data")
    layer: int = setting(3, "the output of this block is reconstructed; 0 is the first", low=0)
    text: str = setting("", 'a .txt with a document a line, or a .jsonl with a "text" in each line')
    pairs: str = setting("", "preference pairs: both answers as conversations in the chat format")
    max_tokens: int = setting(500_000, "stop reading after so many (4·D bytes each in memory)", low=1)
    out: str = setting("my_sae", "a new folder; layer_L/width_W/average_l0_N is made in it")
    width: int = setting(1024, "number of features F", low=1, group="training")
    l0: float = setting(30.0, "features that may fire a token, on average", above=0)
    steps: int = setting(4000, "optimiser steps of 2048 tokens", low=1)
    lr: float = setting(2e-3, "learning rate of Adam", above=0)
    seed: int = setting(0, "of the initial weights and the order of the tokens", low=0)
    device: str = setting("auto", "where the model runs: cpu, cuda, mps (the SAE trains on the CPU)")

    def __post_init__(self):
        check(self)
        if bool(self.text) == bool(self.pairs):
            raise UserError("give --text FILE or --pairs DIR: one of the two")
        if Path(self.out).exists():
            raise UserError(f"--out {self.out} exists; name a folder that does not")


def run(s):
    """Reads, trains on nine tenths of the states, measures on the last, saves."""
    device, dtype = choose_device(s.device)
    layers = load_config(s.model).num_hidden_layers
    if s.layer >= layers:
        raise UserError(f"--layer is {s.layer}; this model has blocks 0 to {layers - 1}")
    rows, tokens = [], 0
    for row in rows_of(s, load_tokenizer(s.model)):
        rows.append(row)
        tokens += len(row)
        if tokens >= s.max_tokens:
            break
    if not rows:
        raise UserError(f"{s.text}: no text in it")
    x = collect(load_gemma(s.model, device=device, dtype=dtype), rows, s.layer)
    held_out = max(1, len(x) // 10)
    sae = train_sae(x[:-held_out], s.width, l0=s.l0, steps=s.steps, lr=s.lr, seed=s.seed, layer=s.layer)
    q = quality(sae, x[-held_out:])
    folder = Path(s.out) / f"layer_{s.layer}" / f"width_{s.width}" / f"average_l0_{q['l0']:.0f}"
    save_sae(sae, folder)
    print(f"{folder}: FVU {q['fvu']:.4f}, L0 {q['l0']:.1f}, dead {q['dead']:.1%} "
          f"on {held_out} held-out tokens")


def rows_of(s, tokenizer):
    """Ids of documents, or of both conversations of each pair as training and chat see them."""
    for _, text in read_documents(s.text) if s.text else ():
        yield [tokenizer.token_to_id("<bos>"), *encode_text(tokenizer, text)]
    for record in read_pairs(s.pairs) if s.pairs else ():
        try:
            prompt = encode_prompt(tokenizer, record["prompt"])
        except UserError as error:
            raise UserError(f"{record['at']}: {error}") from None
        yield prompt + encode_answer(tokenizer, record["chosen"])
        yield prompt + encode_answer(tokenizer, record["rejected"])


def main(argv=None):
    return command("sae.py", SAETrain, run, argv, "Train a JumpReLU SAE on a residual stream.")


if __name__ == "__main__":
    sys.exit(main())
