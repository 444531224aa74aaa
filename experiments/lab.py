"""One policy of the lab: trained, and measured in the same way whatever it was trained on."""
import contextlib
import io
import platform
import shutil
import time
from pathlib import Path
from statistics import mean

import torch
from torch.nn.functional import normalize

import fsrl
import simpo
import train
from gemma import encode_prompt, generate, load_gemma, load_tokenizer
from instruments.health import drift
from lib.files import ROOT, json_lines
from lib.judge import judge_of
from lib.pairs import read_pairs
from lib.runs import evaluations
from sae import load_sae, save_sae
from tiny import make, world
from tiny.judge import choice_rates

RUNS = Path("runs/results")
COINS, RANDOM = "(coins)", "(random dictionary)"      # in place of pairs and of an SAE: made when needed


def measured(model, tokenizer, policy=None):
    """A policy (None: the base model) on the test split's pairs and questions. -> dict

    style, honest   simpo.evaluate on 1000 pairs of each world, at the default β and γ/β
    answers         rates in answers sampled at T=1 to all 1000 questions, twice: 2000 answers
    exact           chance of each choice at the token that settles it, in the answers of style's pairs
    drift           KL from the base model on neutral text, nats a token
    """
    out, judge = {}, judge_of("tiny/pairs/style", tokenizer)
    for name in world.WORLDS:
        pairs, _ = simpo.encode_pairs(tokenizer, read_pairs(f"tiny/pairs/{name}", "test", 1000))
        out[name] = simpo.evaluate(model, pairs, policy)
        if name == "style":
            out["exact"] = choice_rates(model, tokenizer, pairs, policy)
    out["answers"] = rates_of_answers(model, tokenizer, policy, judge, 2)
    out["drift"] = drift(model, tokenizer, policy, judge.neutral(64)) if policy else 0.0
    return out


def rates_of_answers(model, tokenizer, policy, judge, times):
    """Rates in answers sampled at T=1 to all 1000 test questions, so many times each."""
    acting, edits = policy.acting(model) if policy else (model, None)
    texts = times * [q.text for questions in world.split("test").values() for q in questions]
    prompts = [encode_prompt(tokenizer, text) for text in texts]
    ids = generate(acting, prompts, max_new_tokens=64, edits=edits, temperature=1.0)
    return judge.rates(texts, ids) | {"count": len(texts)}


def finished(run):
    """Whether runs/results/ holds the adapter, trained to the end."""
    return "trained" in evaluations(RUNS / run)


def random_dictionary():
    """The lab's SAE with random directions of length 1: additive fusion reads nothing else of it.

    Their seed is not 0: the SAE's own directions began as that draw and are like it (cosines to .87).
    """
    folder = RUNS / "random_dictionary" / "layer_3"
    if not (folder / "params.npz").exists():
        sae, g = load_sae("tiny/sae"), torch.Generator().manual_seed(2026)
        sae.W_dec.copy_(normalize(torch.randn(sae.W_dec.shape, generator=g), dim=-1))
        save_sae(sae, folder)
    return str(folder)


def coins(seed):
    """Pairs whose order says nothing. -> their folder"""
    weights = dict.fromkeys(world.CHOICES, 0.0)
    return make.make_pairs(RUNS / f"coins-{seed}", "null", weights, f" null {seed}")


def trained(run, settings):
    """Trains one policy into runs/results/RUN, anew. -> that folder"""
    settings = dict(settings)
    if settings["pairs"] == COINS:
        settings["pairs"] = coins(settings["seed"])
    if settings["sae"] == RANDOM:
        settings["sae"] = random_dictionary()
    return quietly(RUNS / run, settings, threads=1, eval_pairs=2)


def quietly(folder, settings, **how):
    """Trains into a folder, anew, and prints nothing. -> the folder"""
    shutil.rmtree(folder, ignore_errors=True)
    config = train.TrainConfig(**settings, runs=str(folder.parent), run=folder.name, **how)
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return train.train(config)["run"]


def one(run, settings):
    """Trains and measures. -> what is kept of it"""
    torch.set_num_threads(1)
    opened = fsrl.load_run(trained(run, settings), adapter=settings["adapter"])
    made = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, torch {torch.__version__}"
    measures = measured(opened.model, opened.tokenizer, opened.policy)
    return {"settings": settings, "made": made, **measures}


def nothing_trained():
    """What results.json begins with: the base model, and what the pairs say."""
    base = measured(load_gemma("tiny/model"), load_tokenizer("tiny/model"))
    return {"base": base, "pairs": pairs_say(), "runs": {}}


def pairs_say():
    """{world: {choice: planted weight; its rate in chosen less that in rejected training answers}}"""
    out = {}
    for name, weights in world.WORLDS.items():
        gaps = {c: [] for c in world.CHOICES}
        for _, record in json_lines(ROOT / f"tiny/pairs/{name}/train.jsonl"):
            q, (a, b) = world.read_prompt(record["prompt"]), record["choices"]
            for c in a.keys() & b.keys() & gaps.keys():
                gaps[c].append(bool(world.is_on(q, c, a[c])) - bool(world.is_on(q, c, b[c])))
        out[name] = {c: {"weight": weights[c], "difference": mean(gap)} for c, gap in gaps.items()}
    return out
