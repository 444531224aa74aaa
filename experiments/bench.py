"""Speed and memory beside the obvious implementation, in one run, as ratios.

The obvious one is transformers' Gemma2ForCausalLM with eager attention, a hook with the same adapter on
the same layer, chosen and rejected padded into one batch of 2B sequences, log-probabilities over the
full vocabulary. Ours is one row a pair, the head on answer tokens alone, the frozen blocks without a
graph; "warm" has their output kept. Forward and backward of the SimPO loss, float32, two threads, the
same weights and pairs, of similar length as train.py puts them into one step. Each measurement has a
process of its own, so that its peak of memory is its own.

    python -m experiments.bench          # writes docs/bench.json and the tables of docs/speed.md
"""
import gc
import platform
import re
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import simpo
from experiments.results import fill, markdown
from fsrl import Adapter, Steering
from gemma import Gemma, GemmaConfig
from lib.files import ROOT, UserError, read_json, write_json
from lib.settings import command, setting
from sae import JumpReLUSAE

DATA = ROOT / "docs" / "bench.json"
MODELS = {
    "tiny": {"vocab_size": 576, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
             "query_pre_attn_scalar": 32, "sliding_window": 32},
    "mid": {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
            "query_pre_attn_scalar": 64, "sliding_window": 4096}}
# Tokens of prompts and answers: from, to.
SHAPES = {
    "tiny": {"features": 1024, "pairs": 32, "prompt": (14, 20), "answer": (5, 30)},
    "mid": {"features": 4096, "pairs": 4, "prompt": (128, 128), "answer": (64, 128)}}
LAYER = 3
VARIANTS = ("obvious", "cold", "warm")
# Of mid, two pairs, cold.
GROWTH = {"answer": (64, 128, 256, 512), "vocab_size": (8192, 16384, 32768, 65536),
          "features": (2048, 4096, 8192, 16384)}
WORDS = {"answer": "tokens an answer", "vocab_size": "vocabulary V", "features": "features F"}


def build(shape, changes):
    """Random weights, and the pairs of a step of usual length. -> model, steering, pairs"""
    s, g = {**MODELS[shape], **SHAPES[shape], **changes}, torch.Generator().manual_seed(0)
    model = Gemma(GemmaConfig(**{name: s[name] for name in MODELS[shape]})).requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, p.shape[1] ** -.5, generator=g)
    V, D, F = s["vocab_size"], s["hidden_size"], s["features"]
    W_dec = normalize(torch.randn(F, D, generator=g), dim=-1)
    W_enc = W_dec.T.contiguous()
    sae = JumpReLUSAE(W_enc, torch.zeros(F), W_dec, torch.zeros(D), torch.ones(F), layer=LAYER)
    torch.manual_seed(0)
    steering = Steering(sae, Adapter(D, F, init=1e-3))

    def some(low, high):
        count = int(torch.randint(low, high + 1, (1,), generator=g))
        return tuple(torch.randint(4, V, (count,), generator=g).tolist())
    epoch = []                                # of 16 steps
    for _ in range(16 * s["pairs"]):
        prompt, chosen, rejected = (some(*s[name]) for name in ("prompt", "answer", "answer"))
        epoch.append(simpo.Pair((2, *prompt[1:]), chosen, rejected))
    epoch.sort(key=simpo.tokens)
    return model, steering, epoch[8 * s["pairs"]:9 * s["pairs"]]


def obvious(model, steering, pairs):
    """-> a function that gives s(chosen), s(rejected)"""
    from transformers import Gemma2Config, Gemma2ForCausalLM
    config = Gemma2Config(**vars(model.config), attn_implementation="eager")
    theirs = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    theirs.model.load_state_dict(model.state_dict())
    theirs.tie_weights()
    answers = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    shape = len(answers), max(len(prompt) + len(answer) for prompt, answer in answers)
    ids, mask, scored = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for i, (prompt, answer) in enumerate(answers):
        n = len(prompt) + len(answer)
        ids[i, :n] = torch.tensor(prompt + answer)
        mask[i, :n] = 1
        scored[i, len(prompt):n] = 1
    steered = mask[..., None] * (torch.arange(shape[1])[:, None] > 0)       # all but BOS and padding

    def hook(module, args, out):
        h = out[0] if isinstance(out, tuple) else out
        h = h + (steering.adapter(h) * steered) @ steering.sae.W_dec
        return (h, *out[1:]) if isinstance(out, tuple) else h
    theirs.model.layers[LAYER].register_forward_hook(hook)

    def score():
        logits = theirs(ids, attention_mask=mask, use_cache=False).logits
        logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return ((logp * scored[:, 1:]).sum(-1) / scored.sum(-1)).chunk(2)
    return score


def resident(what):
    """Bytes resident now (VmRSS) or at the peak (VmHWM), on Linux."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * int(found[1])


def measure(shape, variant, repeats, changes):
    """One variant: median seconds, peak memory above the weights in bytes, the gradient's size."""
    torch.set_num_threads(2)
    model, steering, pairs = build(shape, changes)
    batch, h = simpo.collate(pairs), None
    if variant == "obvious":
        theirs, model = obvious(model, steering, pairs), None
    if variant == "warm":
        h = simpo.prefix(model, batch, steering.frozen)

    def score():
        if variant == "obvious":
            return theirs()
        s = simpo.score(model, batch, steering, h)
        return s.chosen.mean, s.rejected.mean

    def once():
        steering.zero_grad(set_to_none=True)
        simpo.simpo_loss(*score()).mean().backward()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")      # the peak begins anew: loading does not count
    before = resident("VmRSS")
    once()                                             # the first pass takes the memory
    memory = resident("VmHWM") - before + (h.nbytes if variant == "warm" else 0)
    seconds = median(timeit.repeat(once, number=1, repeat=repeats))
    gradient = sum(p.grad.double().norm().item() for p in steering.adapter.parameters())
    return {"seconds": seconds, "memory": memory, "gradient": gradient}


def blocks():
    """The tables of docs/speed.md."""
    data, speed, growth = read_json(DATA), [], []
    for shape, variants in data["speed"].items():
        first = variants["obvious"]
        for variant, m in variants.items():
            faster, memory = first["seconds"] / m["seconds"], m["memory"] / first["memory"]
            speed.append([f"`{shape}`, {variant}", f"{m['seconds']:.3f}", f"{faster:.2f}×",
                          f"{m['memory'] / 2**20:.0f}", f"{memory:.2f}"])
    for what, sizes in data["growth"].items():
        seconds = " → ".join(f"{m['seconds']:.2f}" for m in sizes.values())
        memory = " → ".join(f"{m['memory'] / 2**20:.0f}" for m in sizes.values())
        growth.append([f"{WORDS[what]}: {' → '.join(sizes)}", seconds, memory])
    head = ["", "seconds", "speed", "MB above the weights", "share of memory"]
    under = f"\n\n({data['made']}.)\n"
    grown = markdown(["of `mid`, two pairs, cold", "seconds", "MB above the weights"], growth)
    return {"speed": markdown(head, speed) + under, "growth": grown + under}


@dataclass
class BenchConfig:
    rounds: int = setting(3, "processes for each variant; the median counts", low=1, group="what")


def run(config):
    if not find_spec("transformers"):
        raise UserError("transformers is missing: pip install -r requirements-extra.txt")
    todo = []
    for shape, repeats in (("tiny", 12), ("mid", 3)):
        for _ in range(config.rounds):        # in turn, so that a slow minute hits all of them
            todo += [("speed", shape, v, (shape, v, repeats, {})) for v in VARIANTS]
    for what, sizes in GROWTH.items():
        for size in sizes:
            changes = {"pairs": 2, what: (size, size) if what == "answer" else size}
            todo.append(("growth", what, str(size), ("mid", "cold", 3, changes)))
    runs, data = {}, {"speed": {}, "growth": {}}
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as pool:
        for *place, how in tqdm(todo, desc="bench"):
            runs.setdefault(tuple(place), []).append(pool.submit(measure, *how).result())
    for (part, row, column), found in runs.items():
        middle = {name: median(m[name] for m in found) for name in found[0]}
        data[part].setdefault(row, {})[column] = middle
    for variants in data["speed"].values():
        sizes = [m["gradient"] for m in variants.values()]
        assert max(sizes) < 1.001 * min(sizes), "they do not compute the same thing"
    machine = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, 2 threads, torch {torch.__version__}"
    data["made"] = f"Medians of {config.rounds} processes, growth of one, {machine}, float32"
    write_json(DATA, data, indent=1)
    fill(blocks())
    print(*blocks().values(), sep="\n")


def main(argv=None):
    return command("python -m experiments.bench", BenchConfig, run, argv, "Speed and memory, as ratios.")


if __name__ == "__main__":
    sys.exit(main())
