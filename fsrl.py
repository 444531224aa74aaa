"""FSRL's policy: an adapter that reads the residual stream and steers the features of a frozen SAE.

    x  (…,D)   the output of block L                                        (gemma.py)
    v  (…,F) = act(W_a x + b_a)              the policy's action: how far to move each feature   Adapter
    x' (…,D) = x + v W_dec                   additive fusion: the same as decode(f + v) + error  Steering
               x + max(v, -f) W_dec          relu fusion: no feature falls below zero

(arXiv 2509.12934, section 3; relu fusion in the authors' final code, additive in the paper's v1 and v2.)
Decoding is linear, so the SAE's bias and error term cancel: only W_dec is needed, and f for relu fusion.
What counts is the EFFECTIVE steering, what is really added: v, or max(v, -f). Every penalty, L0 and
share is computed on it, and over steered positions only, never over padding.

A *policy* is what train.py trains and everything else reads: an nn.Module, Steering or another, with

    frozen               how many of the lowest blocks it leaves alone: their output can be kept; None:
                         not even the embedding
    run(model, h, batch) -> (h after the last block, penalty of each pair, {name: (B,)} for the log)
    acting(model)        -> (model, edits): what scores, generates and is analysed
    save(folder, **facts), load(folder)
    fit(model, pairs)    (it may have) measures it on the pairs, before any training or instead of it
    strength             (it may have) 0 is the base model

    python fsrl.py runs/style-1        # talk to the base and the steered model, side by side
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as nnf

from gemma import decode, encode_prompt, generate, load_gemma, load_tokenizer
from lib.files import UserError
from lib.plugins import (THEIR_NAMES, WEIGHTS, adapter_class, authors_keys, check_fit, feature_count,
                         feature_numbers, fill, made_again, note_source, own_policy, read_adapter,
                         run_config, same_digest, write_adapter)
from lib.settings import check, choose_device, command, one_of, setting
from lib.text import side_by_side, typed_prompts
from sae import jumprelu, load_sae

ACTIVATIONS, FUSIONS = ("soft", "relu", "jumprelu"), ("additive", "relu")
POSITIONS = ("text", "response", "all")                            # see gemma.steerable
KEPT = ("fusion", "positions", "strength", "top_k", "masked")      # what a saved Steering remembers


class Adapter(nn.Module):
    """v = act(W_a x + b_a).  x (…,D) -> v (…,F), float32 (float64 for float64 states)

        relu       v = max(p, 0)
        soft       v = sign(p) · max(|p| - θ, 0)       θ (F,) learned, kept >= 0 by `project`
        jumprelu   v = p · [p > exp(log θ)]            log θ (F,) learned through sae.jumprelu

    W_a starts uniform in ±init, not at zero: at zero relu and soft pass no gradient. Names are those of
    the authors' files; `steering_magnitude` (F,), a gate in [0, 1] on v, is only in adapters of theirs.
    """

    def __init__(self, d_in, d_sae, activation="soft", *, init=1e-6, bandwidth=0.001):
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        self.activation, self.bandwidth = activation, bandwidth
        self.steering_magnitude = None
        self.adapter_linear = nn.Linear(d_in, d_sae)                               # W_a, b_a
        nn.init.uniform_(self.adapter_linear.weight, -init, init)
        nn.init.zeros_(self.adapter_linear.bias)
        if activation == "soft":
            self.soft_threshold = nn.Parameter(torch.full((d_sae,), init))
        elif activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((d_sae,), init).log())

    def forward(self, x):
        wide = torch.promote_types(torch.float32, x.dtype)
        p = nnf.linear(x, self.adapter_linear.weight).to(wide) + self.adapter_linear.bias
        if self.activation == "relu":
            v = p.relu()
        elif self.activation == "jumprelu":
            v = jumprelu(p, self.log_threshold.exp(), self.bandwidth)
        else:
            sign = p.detach().sign()        # |p| is sign · p, and the sign has no gradient
            v = sign * (sign * p).sub_(self.soft_threshold).relu_()
        return v if self.steering_magnitude is None else v * self.steering_magnitude.clamp(0, 1)

    @torch.no_grad()
    def project(self):
        """After each step: a soft threshold below zero would make every feature fire everywhere."""
        if self.activation == "soft":
            self.soft_threshold.clamp_(min=0)


class Steerings(nn.Module):
    """A policy that steers at one layer or several, with an SAE and an adapter each."""
    def __init__(self, steerings):
        super().__init__()
        self.steerings = nn.ModuleList(sorted(steerings, key=lambda s: s.sae.layer))
        layers = [s.sae.layer for s in self.steerings]
        if len(set(layers)) < len(layers):
            raise UserError(f"two SAEs on one layer (layers {layers}); each needs a layer of its own")

    @property
    def frozen(self):
        return self.steerings[0].sae.layer + 1

    def run(self, model, h, batch):
        """h (B,T,D), the frozen blocks' output, through all the others, steered on the way."""
        how = {"position_ids": batch.position_ids, "mask": batch.mask()}
        penalty, shown, start = 0.0, {}, self.frozen
        for s in self.steerings:
            layer = s.sae.layer
            h = model.blocks(h, start, layer + 1, **how) if start <= layer else h
            where = batch.where(s.positions)
            v = s.action(h[where])                                            # (N,F)
            price, seen = s.cost(v, where)                                    # of each pair
            penalty = penalty + price
            shown = {name: x + shown[name] if shown else x for name, x in seen.items()}
            h, start = s.add(h, where, v), layer + 1
        return model.blocks(h, start, model.config.num_hidden_layers, **how), penalty, shown

    def acting(self, model):
        return model, {s.sae.layer: s for s in self.steerings}

    def project(self):
        for s in self.steerings:
            if hasattr(s.adapter, "project"):
                s.adapter.project()

    def save(self, folder, **facts):
        for s in self.steerings:
            s.save(Path(folder) / f"layer_{s.sae.layer}", **facts)


class Steering(Steerings):
    """Steering at one layer: an edit (see Gemma.blocks) that adds what the adapter says after it.

    fusion     "additive" or "relu"
    positions  "text", "response" or "all"; training, evaluation and generation share it
    strength   v is multiplied by this; 0 gives the base model bit for bit
    top_k      per token only the k largest |effective v| act: an int, or a fraction of F below 1
    masked     features that may not be steered
    """

    def __init__(self, sae, adapter, *, fusion="additive", positions="text", strength=1.0, top_k=None,
                 masked=()):
        nn.Module.__init__(self)
        one_of("fusion", fusion, FUSIONS)
        one_of("positions", positions, POSITIONS)
        self.sae, self.adapter, self.fusion = sae, adapter, fusion
        self.positions, self.strength = positions, strength
        self.top_k = feature_count(top_k, sae.d_sae)
        self.masked = feature_numbers(masked, sae.d_sae)

    @property
    def steerings(self):
        return [self]

    def action(self, x):
        """The effective steering at some tokens.  x (N,D) -> (N,F)"""
        half = x.dtype in (torch.bfloat16, torch.float16)     # products in it, master weights float32
        with torch.autocast(x.device.type, dtype=x.dtype if half else torch.bfloat16, enabled=half):
            v = self.adapter(x)
        v = v.to(torch.promote_types(torch.float32, v.dtype))        # sums over v would saturate in bf16
        if self.strength != 1:
            v = v * self.strength
        if self.masked:                                    # before top_k: they use up no budget
            v = v.index_fill(-1, torch.tensor(self.masked, device=v.device), 0.0)
        if self.fusion == "relu":
            with torch.no_grad():
                floor = -self.sae.encode(x).to(v.dtype)
            v = torch.where(v < floor, floor, v)       # not `maximum`: it halves the gradient at ties
        if self.top_k is not None and self.top_k < v.shape[-1]:
            kept = v.abs().topk(int(self.top_k), -1).indices
            v = torch.zeros_like(v).scatter(-1, kept, v.gather(-1, kept))
        return v

    def add(self, h, where, v):
        """h (B,T,D) with v (N,F) decoded and added at the N tokens of `where` (B,T)."""
        delta = (v.to(self.sae.W_dec.dtype) @ self.sae.W_dec).to(h.dtype)
        token = where.flatten().nonzero()[:, 0]                   # of the B·T
        return h.flatten(0, 1).index_add(0, token, delta).view_as(h)

    def forward(self, h, where):
        return self.add(h, where, self.action(h[where]))                      # the edit

    def cost(self, v, where):
        """v (N,F) at the N tokens of where (B,T) -> penalty (B,), {"l0", "l1": (B,)}, means over tokens.
        The penalty is Σ|v|, or what the adapter's own `penalty(v) -> (N,)` says."""
        row, count = where.nonzero()[:, 0], where.sum(-1).clamp_min(1)

        def of_pairs(x):
            return x.new_zeros(len(where)).index_add(0, row, x) / count
        l1, l0 = v.abs().sum(-1), v.detach().sign().abs_().sum(-1)
        shown = {"l0": of_pairs(l0), "l1": of_pairs(l1)}
        own = hasattr(self.adapter, "penalty")
        return (of_pairs(self.adapter.penalty(v)) if own else shown["l1"]), shown

    def save(self, folder, **facts):
        """The adapter in the authors' two files, and what decides the forward pass, in keys of ours."""
        sae, kept = self.sae, {name: getattr(self, name) for name in KEPT}
        ours = {"sae_source": sae.source, "sae_identity": sae.identity(), "d_in": sae.d_in,
                "d_sae": sae.d_sae, "layer": sae.layer}
        theirs = authors_keys(sae.source, facts.get("base_model", ""))
        save_adapter(self.adapter, folder, **theirs, **ours, **kept, **facts)


# ---- files: the authors' format, with more keys ----------------------------------------------------

def save_adapter(adapter, folder, **facts):
    """Writes adapter_weights.safetensors and fsrl_adapter_config.json, `facts` among its keys."""
    ours = type(adapter) is Adapter          # a subclass has a forward of its own
    config = {"activation_type": THEIR_NAMES[adapter.activation] if ours else "custom",
              "use_steering_magnitude": ours and adapter.steering_magnitude is not None}
    if not ours:
        config["adapter_class"] = type(adapter).__name__
    elif adapter.activation == "jumprelu":
        config["bandwidth"] = adapter.bandwidth
    write_adapter(folder, adapter.state_dict(), config | facts)


def load_adapter(folder, own=None, sae=None):
    """-> (adapter, facts): the module, and everything its config file says. Raises UserError.
    own: the class of a user's adapter; code is never imported from a run's folder. sae: its SAE."""
    folder = Path(folder)
    facts, tensors = read_adapter(folder, sae)
    if facts["activation_type"] == "custom":
        adapter = made_again(own, facts, folder)
    else:
        d_sae, d_in = tensors["adapter_linear.weight"].shape
        activation = next(a for a, theirs in THEIR_NAMES.items() if theirs == facts["activation_type"])
        adapter = Adapter(d_in, d_sae, activation, bandwidth=facts.get("bandwidth", 0.001))
        if "steering_magnitude" in tensors:
            adapter.steering_magnitude = nn.Parameter(torch.ones(d_sae))
    return fill(adapter, tensors, folder / WEIGHTS), facts


@dataclass
class Run:
    model: nn.Module
    tokenizer: object
    policy: nn.Module
    config: dict
    folder: Path


def master_dtype(dtype):
    """The adapter's own, also beside bf16 weights: there, steps of lr would be rounded away."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def load_saes(sources, config, **how):
    """One SAE or several by name, checked to sit on a model of this GemmaConfig. -> list"""
    saes = [load_sae(s, **how) for s in ([sources] if isinstance(sources, str) else sources)]
    for sae in saes:
        check_fit(sae, config)
    return saes


def load_run(folder, *, adapter=None, policy=None, device="auto", dtype=None):
    """Opens what train.py wrote: model, tokenizer and policy as they were trained. -> Run

    adapter, policy: FILE.py:Class, for a run that was trained with one. dtype: of the frozen weights, by
    name; None: as in training. Raises UserError where model or SAE is not that it was trained on.
    """
    folder, config = Path(folder), run_config(folder)
    note_source(folder, adapter or policy)
    device, dtype = choose_device(device, dtype or config.get("dtype", "float32"))
    model = load_gemma(config["model"], dtype=dtype, device=device)
    same_digest(folder, "model", config["model"], config.get("model_identity"), model)
    saes = load_saes(config["sae"], model.config, dtype=dtype, device=device)
    if config.get("policy"):
        spec = policy or config["policy"]
        made = own_policy(spec, model, saes, config["policy_args"], needed=not policy)
        made.load(folder)
    else:
        made = load_steerings(folder, saes, adapter_class(adapter) if adapter else None, dtype)
    return Run(model, load_tokenizer(config["model"]), made.eval(), config, folder)


def load_steerings(folder, saes, own, dtype):
    """The adapters of a run, one for each SAE, as one policy."""
    out = []
    for sae in saes:
        place = folder if len(saes) == 1 else folder / f"layer_{sae.layer}"
        adapter, facts = load_adapter(place, own, sae)
        same_digest(folder, "SAE", sae.source, facts.get("sae_identity"), sae)
        adapter.to(sae.W_dec.device, master_dtype(dtype))
        kept = {name: facts[name] for name in KEPT if name in facts}     # the authors' files lack some
        out.append(Steering(sae, adapter, **kept))
    return out[0] if len(out) == 1 else Steerings(out)


# ---- side by side ------------------------------------------------------------------------------------

def answers(model, tokenizer, prompts, policy=None, **how):
    """Prompts (strings or message lists) -> the answers as text. how: see gemma.generate"""
    model, edits = policy.acting(model) if policy else (model, None)
    ids = generate(model, [encode_prompt(tokenizer, p) for p in prompts], edits=edits, **how)
    return [decode(tokenizer, i) for i in ids]


@dataclass
class Chat:
    run: str = setting("", "its folder, such as runs/style-1", positional=True, group="a run")
    prompt: list = setting([], "ask this and leave; without it, one after another", many=True)
    adapter: str = setting(None, "FILE.py:Class of a run that was trained with one")
    policy: str = setting(None, "FILE.py:Class of a run that was trained with one")
    strength: float = setting(1.0, "multiplies the steering", group="answers")
    temperature: float = setting(0.0, "0: the most probable token each time", low=0)
    max_new_tokens: int = setting(128, "longest answer", low=1)
    seed: int = setting(0, "of the sampling, where the temperature is above 0", low=0)
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    __post_init__ = check


def talk(chat):
    run = load_run(chat.run, adapter=chat.adapter, policy=chat.policy, device=chat.device)
    for s in getattr(run.policy, "steerings", [run.policy]) if chat.strength != 1 else ():
        if not hasattr(s, "strength"):
            raise UserError(f"--strength {chat.strength:g}: this policy has no strength to multiply")
        s.strength *= chat.strength
    how = {"max_new_tokens": chat.max_new_tokens, "temperature": chat.temperature, "seed": chat.seed}
    for prompt in chat.prompt or typed_prompts():
        both = [answers(run.model, run.tokenizer, [prompt], p, **how)[0] for p in (None, run.policy)]
        print(f"\n> {prompt}\n{side_by_side(*both)}")


def main(argv=None):
    return command("fsrl.py", Chat, talk, argv, "Ask base and policy of a run the same, side by side.")


if __name__ == "__main__":
    sys.exit(main())
