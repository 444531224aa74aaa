"""What train.py prints and writes around its loop: the opening, the closing table, examples, what to
type next.

Numbers and answers come in, text goes out.
"""
import math
import shlex

import torch

from lib.files import UserError
from lib.runs import aligned
from lib.text import decode, side_by_side

ABOUT = ("Train a policy on preference pairs. Without arguments: on the lab in tiny/, about a minute on "
         "a CPU. `--pairs tiny/pairs/honest` is its other world, `--steps 20` an instant trial.")
HEAD = " step    loss  penalty  margin    acc      L0      L1       lr  tokens/s"
LINE = ("{:5d}  {loss:6.3f}  {penalty:7.3f}  {margin:6.3f}  {accuracy:5.1%}  {l0:6.1f}  {l1:6.3f}"
        "  {lr:.1e}  {tokens_per_s:8.0f}")
BROKEN = 0.03        # a fall of well-formed answers, as a share, that is told


def line(step, row):
    """One line of the log, of a policy that steers nothing as well."""
    return LINE.format(step, **({"l0": 0.0, "l1": 0.0} | row))


def announce(config):
    where = config.sae if isinstance(config.sae, str) else " and ".join(config.sae)
    what = f"features of {where}" if not config.policy else config.policy
    print(f"Training on {config.pairs}: {what}.", end=" ")
    if config.model == "tiny/model":
        minutes = 0.4 + config.steps * config.batch_size * config.accumulation / 32 / 700
        long = config.steps > 100
        print(f"About {max(1, round(minutes))} min on 2 CPU cores." if long else "Some seconds.")
    else:
        print("The bar below shows how long it takes.")


def cut(config, name, left, n):
    """Says how many pairs of a split were cut or dropped; a split of which nothing is left is an
    error."""
    if not left:
        raise UserError(f"{config.pairs}: no pair of {name} is left; all {n['dropped']} have the same "
                        f"answer twice within --max-length {config.max_length}")
    if n["cut"] or n["dropped"]:
        print(f"{name}: {n['cut']} pairs cut to {config.max_length} tokens, {n['dropped']} dropped "
              f"(both answers the same), {left} left")


def headline(m, judge, prompts):
    """The few rates that a table begins with, if the judge knows any.

    parse_greedy, parse_sampled: shares of well-formed answers. truth: fact questions answered truly.
    style: mean rate of the style choices that are rewarded. answers: how many prompts. The last three:
    sampled at T=1.
    """
    if "sampled" not in m:
        return {}
    rewarded = [name for name in judge.groups["style"] if judge.weights.get(name, 0) > 0]
    style = sum(m["sampled"][name] for name in rewarded) / max(1, len(rewarded))
    return {"parse_greedy": m["greedy"]["parse"], "parse_sampled": m["sampled"]["parse"],
            "truth": m["sampled"]["truth"], "style": style, "answers": prompts}


def masked(features, d_sae):
    if len(features) == d_sae:
        raise UserError(f"all {d_sae} features are masked: nothing is left to steer with")
    if features:
        print(f"Masked: {len(features)} of {d_sae} features may not be steered")


def not_a_number(config, folder, step):
    saved = step // config.save_every * config.save_every
    there = f"{folder} keeps the policy of step {saved}" if saved else f"{folder} holds no policy yet"
    return (f"the loss or its gradient is not a number at step {step + 1}; {there}; a lower --lr is the "
            "first thing to try")


def early_warnings(preference, side, shown, parameters):
    """A policy that does nothing, and side terms that drown the preference, are told early.

    preference, side: the two parts of the loss (B,); shown: what the log shows of it.
    """
    if "l0" in shown and not shown["l0"].any():
        yield ("warning: L0 is 0, so no feature is steered: the penalty is too heavy (lower --l1), or "
               "the adapter started where its activation passes no gradient (a relu at exactly zero)")

    def size(loss):
        if not loss.requires_grad:
            return 0.0
        found = torch.autograd.grad(loss.mean(), parameters, retain_graph=True, allow_unused=True)
        return sum(g.square().sum().item() for g in found if g is not None) ** .5
    wanted, other = size(preference), size(side)
    if other > 10 * wanted > 0:
        yield (f"warning: the gradient of penalty and NLL is {other / wanted:.0f} times that of the "
               "preference: what is learned is hardly the preference (lower --l1 or --nll-weight)")


def opening(tokenizer, pair, model, policy, gap):
    """What nothing does, what is trained, and what is scored of one pair."""
    steerings = getattr(policy, "steerings", [])
    state = "Steering at strength 0" if steerings else "The untrained policy"
    print(f"{state} against the base model: max difference of log-probabilities {gap}")
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    every = {id(p): p.numel() for part in (model, policy) for p in part.parameters()}
    print(f"Trainable {trainable:,} of {sum(every.values()):,} parameters", end="")
    print("".join(f"; {s.sae.d_sae} features on layer {s.sae.layer}" for s in steerings))

    def pieces(ids):
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        return "|".join(texts).replace("\n", "⏎")
    print("One of the pairs; what is scored stands between ⟦ and ⟧, tokens parted by |:")
    print(f"  prompt    {tokenizer.decode(list(pair.prompt), skip_special_tokens=False)!r}")
    print(f"  chosen    ⟦{pieces(pair.chosen)}⟧\n  rejected  ⟦{pieces(pair.rejected)}⟧", flush=True)


def closing(base, trained, judge, config, policy):
    """The table base beside trained, as text."""
    rows = []

    def row(name, key, form="{:.3f}", error=None, part=None):
        cells = []
        for m in (base, trained):
            m = m[part] if part else m
            cells.append(form.format(m[key]) + (f" ± {form.format(m[error])}" if error else ""))
        rows.append((name, *cells))
    best = f" (best possible {judge.best_accuracy:.3f})" if judge.best_accuracy else ""
    row(f"{config.objective or 'SimPO'} loss (± s.e.)", "loss", error="loss_se")
    row("accuracy" + best, "accuracy", error="accuracy_se")
    row("margin, nats a token", "margin", error="margin_se")
    if features := sum(s.sae.d_sae for s in getattr(policy, "steerings", [])):
        row(f"L0, features a token (of {features})", "l0", "{:.1f}")
        row("L1 a token", "l1")
    title, notes = f"held-out {config.eval_split}: {base['pairs']} pairs", []
    if "answers" in base:
        title += f", {base['answers']} prompts"
        row("well-formed answers, greedy", "parse_greedy", "{:.1%}")
        row("well-formed answers, T=1", "parse_sampled", "{:.1%}")
        rows.append(("rate of each choice, T=1 (its planted weight)", "", ""))
        for name in (name for name in base["sampled"] if name != "parse"):
            weight = f"  {name} ({judge.weights.get(name, 0):+g})"
            row(weight + ": truthfulness" * (name == "truth"), name, "{:.1%}", part="sampled")
        if broken(base, trained):
            notes.append("The text broke: fewer answers are well-formed than before. A low loss does "
                         "not make up for that; raise --nll-weight or lower --lr.")
    if config.loss == "sigmoid" and not config.label_smoothing and not config.objective:
        flat = math.log1p(math.exp(config.beta * config.gamma_ratio))      # softplus of it
        notes.append(f"(Loss {flat:.3f} is that of no preference at all; shrinking every margin towards "
                     "0 also leads there.)")
    return "\n".join([aligned([(title, "base", "trained"), *rows]), *notes])


def broken(base, trained):
    return trained["parse_sampled"] < base["parse_sampled"] - BROKEN


def examples(tokenizer, judge, base, trained, seed, count=3):
    """Prompts on which one sees what moved, with the base's and the policy's sampled answer.

    Chosen by how far an answer's choices go the way that all answers went. Where the text broke, one of
    the answers that broke is among them. Without a judge that knows: the first prompts.
    """
    def change(text):
        before, after = judge.outcome(text, base[text]), judge.outcome(text, trained[text])
        return {name: after[name] - before[name] for name in before}
    changes = {text: change(text) for text in base}
    total = {}
    for moved in changes.values():
        for name, x in moved.items():
            total[name] = total.get(name, 0.0) + x / len(changes)

    def agrees(text):
        return sum(x * total[name] for name, x in changes[text].items())
    shown = sorted(base, key=agrees, reverse=True)[:count]
    torn = [text for text, moved in changes.items() if moved.get("parse", 0.0) < 0]
    if torn and total["parse"] < -BROKEN and not set(torn) & set(shown):
        shown[-1] = torn[0]
    why = ", chosen to show it:" if total else ":"
    print(f"\nWhat moved, in answers sampled at T=1 (seed {seed}){why}")
    for text in shown:
        answers = {"base": base[text], "trained": trained[text]}
        titles = [", ".join([who, *judge.mark(text, ids)]) for who, ids in answers.items()]
        both = (decode(tokenizer, ids) for ids in answers.values())
        print(f"\n> {text}\n{side_by_side(*both, titles=titles)}")


def next_commands(config, folder, prompt, seconds):
    """What to type next, ready to be pasted into a shell."""
    given = {name: getattr(config, name) for name in ("adapter", "policy", "objective")}
    flags = [x for name in ("adapter", "policy") if given[name] for x in ("--" + name, given[name])]
    own = ["--objective", given["objective"]] if given["objective"] else []
    first = prompt.splitlines()[0]
    ask = ["--prompt", first] if len(first) <= 80 else []
    talk = shlex.join(["python", "fsrl.py", str(folder), *flags, *ask])
    read = shlex.join(["python", "analyze.py", str(folder), *flags, *own])
    return (f"\n{seconds:.0f} s. The run lies in {folder}. Next: ask it something\n    {talk}\n"
            f"or see what it rewards:\n    {read}")
