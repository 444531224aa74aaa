"""What the tests share: a small Gemma-2 that hits every branch, an SAE for it, pairs, broken copies of our modules."""
import importlib.util
import sys
from pathlib import Path

import torch

from fsrl import Adapter
from gemma import Gemma, GemmaConfig
from sae import JumpReLUSAE
from simpo import Pair

ROOT = Path(__file__).resolve().parent.parent

# D is no square, H*C is not D, K < H, the window is short, and query_pre_attn_scalar is not C.
CONFIG = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=5, sliding_window=6,
              attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
# (prompt, chosen, rejected): prompts and answers of one token, and some that are longer than the window.
LENGTHS = [(1, 1, 1), (1, 9, 2), (7, 1, 13), (9, 8, 8), (3, 2, 1), (15, 4, 9), (2, 20, 3)]


def small_gemma(seed=0, dtype=torch.float32, **changes):
    """Random weights, norms included, so large that scores and logits run into their soft-caps."""
    model = Gemma(GemmaConfig(**{**CONFIG, **changes}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64))
            p.mul_(0.5 if "norm" in name else 1.0 if "embed" in name else 0.6)
            if "q_proj" in name or "k_proj" in name:
                p.mul_(2.0)
    return model.to(dtype).requires_grad_(False).eval()


def small_sae(model, features=32, layer=1, seed=1, dtype=None):
    """Random; about a third of its features fire on this model's states."""
    g, D, F = torch.Generator().manual_seed(seed), model.config.hidden_size, features
    W_dec = torch.randn(F, D, generator=g)
    W_dec /= W_dec.norm(dim=-1, keepdim=True)
    W_enc, b_enc = torch.randn(D, F, generator=g) * .3, torch.randn(F, generator=g) * .1
    b_dec, threshold = torch.randn(D, generator=g), torch.rand(F, generator=g) * 2
    dtype = dtype or model.embed_tokens.weight.dtype
    return JumpReLUSAE(W_enc, b_enc, W_dec, b_dec, threshold, layer=layer, source="random", dtype=dtype)


def lively_adapter(sae, activation="soft", seed=3):
    """One that moves many features, as after a training."""
    adapter = Adapter(sae.d_in, sae.d_sae, activation, init=0.05).to(sae.W_dec.dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.adapter_linear.bias.copy_(torch.randn(sae.d_sae, generator=g) * .2)
    return adapter


def some_pairs(lengths, vocab=97, seed=0):
    """Pairs of random ids with (prompt, chosen, rejected) of these lengths; id 2 (BOS) comes first."""
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        return tuple(torch.randint(4, vocab, (n,), generator=g).tolist())
    return [Pair((2, *draw(p - 1)), draw(c), draw(r)) for p, c, r in lengths]


def mutant(name, *changes):
    """A copy of our module `name` ("train", "lib.stats") with each (old, new) replaced in its source: a test must
    tell it from the real one.

    Every `old` has to be there exactly once, so that a mutation cannot quietly stop mutating.
    """
    path = ROOT / (name.replace(".", "/") + ".py")
    source = path.read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{path} has {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    spec = importlib.util.spec_from_loader("broken_" + name.replace(".", "_"), loader=None)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[spec.name] = module          # dataclasses look their module up
    exec(compile(source, f"broken_{path.name}", "exec"), module.__dict__)
    return module


def off(a, b):
    """max|a - b| / max(1, max|b|): the tolerance of this project."""
    return ((a - b).abs().max() / max(1.0, b.abs().max().item())).item()


def relative(a, b):
    """‖a - b‖ / ‖b‖: for gradients."""
    return ((a - b).norm() / b.norm()).item()
