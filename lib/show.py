"""What train.py prints around its loop: the opening, the closing table, examples, what to type next.

Numbers and answers come in, text goes out.
"""
import math
import shlex

import torch

from lib.files import UserError
from lib.runs import aligned
from lib.text import decode, side_by_side

ABOUT = ("Train a policy on preference pairs. Without arguments: on the lab in tiny/, a minute or "
         "two on a CPU. `--pairs tiny/pairs/honest` is its other world, `--steps 20` an instant trial.")
HEAD = " step    loss  penalty  margin    acc      L0      L1       lr  tokens/s"
LINE = ("{:5d}  {loss:6.3f}  {penalty:7.3f}  {margin:6.3f}  {accuracy:5.1%}  {l0:6.1f}  {l1:6.3f}"
        "  {lr:.1e}  {tokens_per_s:8.0f}")
BROKEN = 0.03        # a fall of well-formed answers, as a share, that is told


# ---- before the loop -----------------------------------------------------------------------------

def announce(config):
    saes = config.sae if isinstance(config.sae, str) else " and ".join(config.sae)
    print(f"Training on {config.pairs}: {config.policy or f'features of {saes}'}.")


def cut(config, name, left, n):
    """Says how many pairs of a split were cut or dropped; that none is left is an error."""
    if not left:
        raise UserError(f"{config.pairs}: no pair of {name} is left; all {n['dropped']} have the same "
                        f"answer twice within --max-length {config.max_length}")
    if any(n.values()):
        print(f"{name}: {n['cut']} pairs cut, {n['dropped']} with the same answer twice left out")


def masked(features, d_sae):
    if len(features) == d_sae:
        raise UserError(f"all {d_sae} features are masked: nothing is left to steer with")
    if features:
        print(f"Masked: {len(features)} of {d_sae} features may not be steered")


def opening(tokenizer, pair, model, policy, gap):
    """What nothing does, what is trained, and what is scored of one pair."""
    steerings = getattr(policy, "steerings", [])
    state = "Steering at strength 0" if steerings else "The policy before training"
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    every = {id(p): p.numel() for part in (model, policy) for p in part.parameters()}
    layers = "".join(f"; {s.sae.d_sae} features on layer {s.sae.layer}" for s in steerings)

    def pieces(ids):
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        return "|".join(texts).replace("\n", "⏎")
    prompt = tokenizer.decode(list(pair.prompt), skip_special_tokens=False)
    print(f"{state} against the base model: max difference of log-probabilities {gap}\n"
          f"Trainable {trained:,} of {sum(every.values()):,} parameters{layers}\n"
          "One of the pairs; what is scored stands between ⟦ and ⟧, tokens parted by |:\n"
          f"  prompt    {prompt!r}\n"
          f"  chosen    ⟦{pieces(pair.chosen)}⟧\n"
          f"  rejected  ⟦{pieces(pair.rejected)}⟧", flush=True)


# ---- in the loop ---------------------------------------------------------------------------------

def line(step, row):
    """One line of the log, of a policy that steers nothing as well."""
    return LINE.format(step, **({"l0": 0.0, "l1": 0.0} | row))


def stopped(folder, step):
    return f"stopped after step {step}; `python train.py --resume {shlex.quote(str(folder))}` goes on"


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
    sizes = []
    for loss in (preference, side):
        slopes = []
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss.mean(), parameters, retain_graph=True, allow_unused=True)
        sizes.append(sum(g.square().sum().item() for g in slopes if g is not None) ** .5)
    wanted, other = sizes
    if other > 10 * wanted > 0:
        yield (f"warning: the gradient of penalty and NLL is {other / wanted:.0f} times that of the "
               "preference: what is learned is hardly the preference (lower --l1 or --nll-weight)")


# ---- after it ------------------------------------------------------------------------------------

def headline(m, judge, prompts):
    """The few rates that a table begins with, if the judge knows any: shares of well-formed answers,
    fact questions answered truly, mean rate of the style choices that are rewarded (both at T=1)."""
    if "sampled" not in m:
        return {}
    rewarded = [name for name in judge.groups["style"] if judge.weights.get(name, 0) > 0]
    style = sum(m["sampled"][name] for name in rewarded) / max(1, len(rewarded))
    return {"parse_greedy": m["greedy"]["parse"], "parse_sampled": m["sampled"]["parse"],
            "truth": m["sampled"]["truth"], "style": style, "answers": prompts}


def closing(base, trained, judge, config, policy):
    """The table base beside trained, as text."""
    best = f" (best possible {judge.best_accuracy:.3f})" if judge.best_accuracy else ""
    rows = {f"{config.objective or 'SimPO'} loss (± s.e.)": "{loss:.3f} ± {loss_se:.3f}",
            f"accuracy{best}": "{accuracy:.3f} ± {accuracy_se:.3f}",
            "margin, nats a token": "{margin:.3f} ± {margin_se:.3f}"}
    if features := sum(s.sae.d_sae for s in getattr(policy, "steerings", [])):
        rows |= {f"L0, features a token (of {features})": "{l0:.1f}", "L1 a token": "{l1:.3f}"}
    title, notes = f"held-out {config.eval_split}: {base['pairs']} pairs", []
    if "answers" in base:
        title += f", {base['answers']} prompts"
        rows |= {"well-formed answers, greedy": "{parse_greedy:.1%}",
                 "well-formed answers, T=1": "{parse_sampled:.1%}",
                 "rate of each choice, T=1 (its planted weight)": ""}
        for name in (name for name in base["sampled"] if name != "parse"):
            meaning = ": truthfulness" if name == "truth" else ""
            rows[f"  {name} ({judge.weights.get(name, 0):+g}){meaning}"] = f"{{sampled[{name}]:.1%}}"
        if trained["parse_sampled"] < base["parse_sampled"] - BROKEN:
            notes.append("The text broke: fewer answers are well-formed than before. A low loss does "
                         "not make up for that; raise --nll-weight or lower --lr.")
    if config.loss == "sigmoid" and not config.label_smoothing and not config.objective:
        flat = math.log1p(math.exp(config.beta * config.gamma_ratio))      # softplus of it
        notes.append(f"(Loss {flat:.3f} is that of no preference at all; shrinking every margin towards "
                     "0 also leads there.)")
    table = [(name, form.format(**base), form.format(**trained)) for name, form in rows.items()]
    return "\n".join([aligned([(title, "base", "trained"), *table]), *notes])


def examples(tokenizer, judge, base, trained, seed, count=3):
    """Prompts on which one sees what moved, with the base's and the policy's sampled answer.

    Chosen by how far an answer's choices go the way that all answers went. Where the text broke, one of
    the answers that broke is among them. Without a judge that knows: the first prompts.
    """
    changes, total = {}, {}
    for text in base:
        before, after = judge.outcome(text, base[text]), judge.outcome(text, trained[text])
        changes[text] = {name: after[name] - before[name] for name in before}
        for name, x in changes[text].items():
            total[name] = total.get(name, 0.0) + x / len(base)
    agrees = {text: sum(x * total[name] for name, x in moved.items()) for text, moved in changes.items()}
    shown = sorted(base, key=agrees.get, reverse=True)[:count]
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
    flags = {name: [f"--{name}", value] for name in ("adapter", "policy", "objective")
             if (value := getattr(config, name))}
    own = flags.get("adapter", []) + flags.get("policy", [])
    first = prompt.splitlines()[0]
    ask = ["--prompt", first] if len(first) <= 80 else []
    talk = shlex.join(["python", "fsrl.py", str(folder), *own, *ask])
    read = shlex.join(["python", "analyze.py", str(folder), *own, *flags.get("objective", [])])
    return (f"\n{seconds:.0f} s. The run lies in {folder}. Next: ask it something\n    {talk}\n"
            f"or see what it rewards:\n    {read}")
