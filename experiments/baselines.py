"""Other ways to change the model, each a policy (see the top of fsrl.py): what does steering buy?

    Constant         one trained vector, added to one layer at every token       (bias-only steering)
    MeanDifference   the same vector, not trained but measured: mean state of chosen answers less that
                     of rejected ones (CAA, arXiv 2312.06681)
    ConditionalMap   features steered by what other features say, measured too (after DSPA, 2603.21461)
    LoRA             low-rank changes of some blocks' matrices (arXiv 2106.09685)
    Full             every weight of the model

    python train.py --policy experiments/baselines.py:LoRA --policy-args rank=8 blocks=2-

Steering several layers, through random directions or through an SAE of which only the encoder was
trained needs no class: it is train.py with another --sae (`python -m tiny.make saes` trains some).
"""
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as nnf

import simpo
from fsrl import Steering
from lib.counts import answer_means
from lib.files import UserError, atomically, explained

FILE = "policy.safetensors"
MATRICES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj")}
MATRICES["all"] = MATRICES["attention"] + MATRICES["mlp"]


class Learned:
    """What the policies share: their files hold what was learned, not the frozen model or SAE."""

    def learned(self):
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return {name: x for name, x in self.state_dict().items() if name not in frozen}

    def save(self, folder, **facts):
        tensors = {name: x.cpu().contiguous() for name, x in self.learned().items()}
        atomically(Path(folder) / FILE, lambda path: save_file(tensors, path))

    def load(self, folder):
        with explained(Path(folder) / FILE, "it does not hold what such a policy learned"):
            tensors = load_file(Path(folder) / FILE)
        if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in self.learned().items()}:
            raise UserError(f"{folder}/{FILE} was written by a policy of other settings")
        self.load_state_dict(tensors, strict=False)


# ---- one vector ------------------------------------------------------------------------------------

class Constant(Learned, nn.Module):
    """x + strength · b at every steered token, b (D,) trained: nothing of the state is read.

    layer: whose output it is added to (default: the SAE's).
    """
    positions = "text"

    def __init__(self, model, saes, layer=None, strength=1.0):
        super().__init__()
        self.layer = saes[0].layer if layer is None else layer
        self.frozen, self.strength = self.layer + 1, strength
        if not 0 <= self.layer < len(model.layers):
            raise UserError(f"layer is {layer}; this model has layers 0 to {len(model.layers) - 1}")
        b = torch.zeros(model.config.hidden_size, device=model.device)
        self.vector = nn.Parameter(b)

    def forward(self, h, where):
        added = self.strength * self.vector
        return h + where[..., None] * added.to(h.dtype)

    def run(self, model, h, batch):
        how = {"position_ids": batch.position_ids, "mask": batch.mask()}
        h = self(h, batch.where(self.positions))
        h = model.blocks(h, self.frozen, len(model.layers), **how)
        return h, h.new_zeros(len(h)), {}

    def acting(self, model):
        return model, {self.layer: self}


class MeanDifference(Constant):
    """b is the mean over pairs of (mean state of the chosen answer - mean state of the rejected one)."""

    def __init__(self, model, saes, layer=None, strength=1.0, pairs=1000):
        super().__init__(model, saes, layer, strength)
        self.pairs = pairs
        b = self.vector.detach()
        del self.vector
        self.register_buffer("vector", b)

    @torch.no_grad()
    def fit(self, model, pairs):
        total, count = 0.0, 0
        for _, batch in simpo.batches(pairs[:self.pairs], 32):
            batch = batch.to(model.device)
            h = simpo.prefix(model, batch, self.frozen)
            chosen, rejected = answer_means(batch, h)
            total, count = total + (chosen - rejected).sum(0), count + len(h)
        self.vector.copy_(total / count)


# ---- features, without training --------------------------------------------------------------------

class ConditionalMap(Learned, Steering):
    """v_j = strength · mean of M_ij over the features i that fire, for features j that fire themselves.

    M_ij is a conditional mean: over the pairs in whose prompt feature i fires, how much more j fires in
    the chosen answer than in the rejected one. Only the `top` features j whose mean differs most are
    steered. DSPA keeps the prompt's features for the whole answer; here each token uses those that fire
    on itself, which needs no memory between tokens.
    """

    def __init__(self, model, saes, top=64, strength=1.0, pairs=1000):
        super().__init__(saes[0], Map(saes[0], min(top, saes[0].d_sae)), strength=strength)
        self.pairs = pairs

    @torch.no_grad()
    def fit(self, model, pairs):
        fires, differs = [], []
        for _, batch in simpo.batches(pairs[:self.pairs], 32):
            batch = batch.to(model.device)
            f = self.sae.encode(simpo.prefix(model, batch, self.frozen))               # (B,T,F)
            prompt = batch.where("text") & (batch.branch == 0)
            fires.append(((f > 0) & prompt[..., None]).any(1))
            chosen, rejected = answer_means(batch, f)
            differs.append(chosen - rejected)
        self.adapter.learn(torch.cat(fires).float(), torch.cat(differs))


class Map(nn.Module):
    """The adapter of ConditionalMap: `table` (F,top), `steered` (top,) the features it is about."""

    def __init__(self, sae, top):
        super().__init__()
        self.encode, self.d_sae = sae.encode, sae.d_sae
        device = sae.W_dec.device
        self.register_buffer("table", torch.zeros(sae.d_sae, top, device=device))
        self.register_buffer("steered", torch.arange(top, device=device))

    def learn(self, fires, differs):
        """fires (P,F) 0 or 1, differs (P,F): of P pairs."""
        self.steered.copy_(differs.mean(0).abs().topk(len(self.steered)).indices)
        count = fires.sum(0).clamp_min(1)[:, None]
        self.table.copy_(fires.T @ differs[:, self.steered] / count)

    def forward(self, x):
        fires = (self.encode(x) > 0).float()                                           # (N,F)
        push = fires @ self.table / fires.sum(-1, keepdim=True).clamp_min(1)
        push = push * fires[..., self.steered]
        return torch.zeros_like(fires).index_copy(-1, self.steered, push)


# ---- the weights themselves --------------------------------------------------------------------------

class Tuned(Learned, nn.Module):
    """A policy that is another model: `tuned`, run from the lowest block that it changes."""

    def run(self, model, h, batch):
        how = {"position_ids": batch.position_ids, "mask": batch.mask()}
        h = self.tuned.embed(batch.ids) if self.frozen is None else h
        h = self.tuned.blocks(h, self.frozen or 0, len(self.tuned.layers), **how)
        return h, h.new_zeros(len(h)), {}

    def acting(self, model):
        return self.tuned, None


class LoRA(Tuned):
    """W + strength · 2 B A for some matrices of some blocks: A (rank,in) random, B (out,rank) zero.

    blocks     2 (that one), 1,4 (these), 2- (from there up) or all
    matrices   attention, mlp, all, or names such as q_proj,v_proj
    """

    def __init__(self, model, saes, rank=8, blocks="all", matrices="all", strength=1.0):
        super().__init__()
        # The frozen weights are shared with the base model, not copied.
        self.tuned = deepcopy(model, {id(p): p for p in model.parameters()})
        numbers = block_numbers(blocks, len(model.layers))
        self.frozen, self._strength = min(numbers), strength
        names = MATRICES.get(matrices) or str(matrices).split(",")
        if unknown := set(names) - set(MATRICES["all"]):
            raise UserError(f"matrices: {min(unknown)!r} is none of {', '.join(MATRICES['all'])}")
        self.changes = []
        for i in numbers:
            for part in (self.tuned.layers[i].self_attn, self.tuned.layers[i].mlp):
                for name in [name for name in names if hasattr(part, name)]:
                    self.changes.append(Change(getattr(part, name), rank, strength))
                    setattr(part, name, self.changes[-1])

    @property
    def strength(self):
        return self._strength

    @strength.setter
    def strength(self, value):
        self._strength = value
        for change in self.changes:
            change.strength = value


class Change(nn.Module):
    """A frozen linear map and its low-rank change."""

    def __init__(self, linear, rank, strength):
        super().__init__()
        out, into = linear.weight.shape
        if not 1 <= rank <= min(out, into):
            raise UserError(f"rank is {rank}; a matrix of {out} × {into} takes 1 to {min(out, into)}")
        self.linear, self.strength = linear, strength
        device = linear.weight.device
        self.A = nn.Parameter(torch.randn(rank, into, device=device) * into ** -.5)
        self.B = nn.Parameter(torch.zeros(out, rank, device=device))

    def forward(self, x):
        low = nnf.linear(x, self.A.to(x.dtype))
        change = nnf.linear(low, self.B.to(x.dtype))
        return self.linear(x) + 2 * self.strength * change

    def merged(self):
        """The matrix that does the same in one product."""
        return self.linear.weight + 2 * self.strength * (self.B @ self.A)


def block_numbers(blocks, count):
    """2 -> [2]; (1, 4) -> [1, 4]; "2-" -> [2, ..., count - 1]; "all" -> all of them."""
    if blocks == "all":
        return list(range(count))
    if isinstance(blocks, str) and blocks.endswith("-") and blocks[:-1].isdigit():
        numbers = list(range(int(blocks[:-1]), count))
    else:
        numbers = sorted(blocks if isinstance(blocks, tuple) else [blocks])
    if not numbers or not all(isinstance(i, int) and 0 <= i < count for i in numbers):
        raise UserError(f"blocks is {blocks!r}; write 2, 1,4, 2- or all (blocks 0 to {count - 1})")
    return numbers


class Full(Tuned):
    """A copy of the model, all of it trained, in float32: steps of lr would be rounded away in bf16 (so
    it differs from a base model in bf16 by rounding, before any step).

    The embedding is tied: it learns as input and as head. Its strength goes from the base model's
    weights (0) in a straight line to the trained ones (1).
    """
    frozen = None

    def __init__(self, model, saes):
        super().__init__()
        self.tuned = deepcopy(model).requires_grad_(True)
        if model.embed_tokens.weight.dtype != torch.float64:
            self.tuned.float()
        self.base, self.trained, self._strength = list(model.parameters()), None, 1.0

    @property
    def strength(self):
        return self._strength

    @strength.setter
    @torch.no_grad()
    def strength(self, value):
        if self.trained is None:                     # the weights as they are stand for 1
            self.trained = [p.detach().clone() for p in self.tuned.parameters()]
        self._strength = value
        for p, base, trained in zip(self.tuned.parameters(), self.base, self.trained, strict=True):
            p.copy_(base.to(p.dtype).lerp(trained, value) if value != 1 else trained)
