"""What analyze.py found, in words, as a page of text, and as report.html: one file, no network, everything escaped."""

# ---- the verdict -----------------------------------------------------------------------------------------------------------------

def objective(config):
    """What a run was trained with, in words."""
    nll, weight = config.get("nll_weight", 0), config.get("simpo_weight", 1)
    parts = [f"SimPO ({'hinge, ' if config.get('loss') == 'hinge' else ''}β {config.get('beta', 10):g}, γ/β {config.get('gamma_ratio', .5):g})"
             + (f" at weight {weight:g}" if weight != 1 else "")] if weight else []
    if nll:
        parts.append(f"{nll:g} × NLL of the chosen answers" if weight else "imitation alone (NLL of the chosen answers)")
    return " + ".join(parts) + f" + {config.get('l1', 0):g} × ℓ1" + (", the paper's loss" if weight and not nll else "")


def percent(x):
    return f"{100 * x['value']:.0f}% [{100 * x['low']:.0f}, {100 * x['high']:.0f}]"


def verdict(a):
    """Two sentences and the alarms. a: analysis"""
    s, trained = a["sections"], f"Trained with {a['objective']} on {a['pairs']}"
    gain = (s.get("causes") or s.get("ledger") or {}).get("gain")
    if not gain:
        return {"sentences": [f"{trained}; neither causes nor ledger were computed, so nothing is said about what is rewarded."], "alarms": s.get("behaviour", {}).get("alarms", [])}
    size = f"{gain['value']:+.3f} nats a token [{gain['low']:.3f}, {gain['high']:.3f}]"
    accuracy = s.get("causes", {}).get("accuracy")
    first = f"{trained}, the policy moved the margin of the preferred answer by {size}" + (
        f" (accuracy {accuracy['base']['value']:.1%} to {accuracy['steered']['value']:.1%})." if accuracy else ".")
    if gain["low"] <= 0 <= gain["high"]:
        return {"sentences": [first, "That cannot be told from 0, so no share of it is given to anything."], "alarms": s.get("behaviour", {}).get("alarms", [])}
    parts = []
    if groups := s.get("ledger", {}).get("token_groups"):
        parts.append("of the gain " + " and ".join(f"{percent(groups[g]['share'])} falls on tokens that settle {'a style' if g == 'style' else 'an alignment'} choice" for g in groups))
    elif tokens := s.get("ledger", {}).get("tokens"):
        best = sorted(tokens, key=lambda c: -tokens[c]["value"])[:3]
        parts.append("of the gain " + ", ".join(f"{percent(tokens[c]['share'])} falls on {c} tokens" for c in best))
    for name, x in s.get("causes", {}).get("sets", {}).items():
        if name != "both":
            control = x["matched"] if x["matched"]["claim"] else x["random"]
            kind = "of the same usage" if x["matched"]["claim"] else "of the same size; none of the same usage is left"
            parts.append(f"without the {x['steered']} steered features labelled {name}, {percent(x['mask']['share'])} is lost (random sets {kind}: {100 * control['lost']['mean']:.0f}% [{100 * control['lost']['low']:.0f}, {100 * control['lost']['high']:.0f}])")
    second = "; ".join(parts) or "No labels were there to say more"
    return {"sentences": [first, second[0].upper() + second[1:] + "."], "alarms": s.get("behaviour", {}).get("alarms", [])}


def summary(a):
    """The analysis as a page of text."""
    s, lines = a["sections"], []
    interval = lambda x, f="{:.3f}": f"{f.format(x['value'])} [{f.format(x['low'])}, {f.format(x['high'])}]"      # noqa: E731
    if b := s.get("behaviour"):
        lines.append(f"\nBehaviour, {b['prompts']} held-out prompts, sampled (T=1): base -> steered")
        if "choices" in b["sampled"]:
            lines += [f"  {name:<9} {c['base']:6.1%} -> {c['steered']:6.1%}   {100 * c['change']['value']:+5.1f} points [{100 * c['change']['low']:+.1f}, {100 * c['change']['high']:+.1f}]"
                      + (f"   planted {c['weight']:+g}" if c["weight"] is not None else "") for name, c in b["sampled"]["choices"].items()]
        x, y = b["sampled"]["base"], b["sampled"]["steered"]
        lines.append("  " + ", ".join(f"{name} {x[name]:.3g} -> {y[name]:.3g}" for name in ("words", "repetition", "distinct", "markdown", "non_ascii", "perplexity")) + f", KL on neutral text {b['kl']:.3f}")
    if u := s.get("usage"):
        lines.append("\nUsage: features a token, steered | SAE's own")
        lines += [f"  {region:<9} {interval(x['steering']['l0'], '{:.1f}')} | {interval(x['sae']['l0'], '{:.1f}')}; {x['steering']['used']} of {u['d_sae']} ever steered, "
                  f"top 1% {x['steering']['top1']:.0%}, Gini {x['steering']['gini_used']:.2f} of used | {x['sae']['gini_used']:.2f}" for region, x in u["regions"].items()]
        if u["seeds"]["jaccard"]:
            lines.append(f"  top {u['seeds']['top']} features across {len(u['seeds']['runs']) + 1} seeds: Jaccard {sum(u['seeds']['jaccard']) / len(u['seeds']['jaccard']):.2f} (chance {u['seeds']['chance']:.2f})")
    if r := s.get("rates"):
        lines.append("\nLabel rates: share of active features, SAE -> steered")
        lines += [f"  {region:<9} {label:<9} {x['sae']['value']:.3f} -> {x['steering']['value']:.3f}, change {100 * x['change']['value']:+.0f}% [{100 * x['change']['low']:+.0f}, {100 * x['change']['high']:+.0f}]"
                  f"; labels shuffled [{100 * x['shuffled'][0]:+.0f}, {100 * x['shuffled'][1]:+.0f}]" for region, some in r["regions"].items() for label, x in some.items()]
    if c := s.get("causes"):
        lines.append("\nCauses: share of the gain lost when masked | left when alone; random sets of the same size | of the same usage")
        for name, x in c["sets"].items():
            three = lambda k, w: f"{100 * x[k][w]['mean']:.0f}% [{100 * x[k][w]['low']:.0f}, {100 * x[k][w]['high']:.0f}]" if k == "random" or x[k]["claim"] else f"(match {x[k]['match']:.2f}: no claim)"      # noqa: E731, B023
            lines.append(f"  {name:<9} ({x['steered']} features) lost {percent(x['mask']['share'])}, random {three('random', 'lost')}, matched {three('matched', 'lost')}"
                         f" | left {percent(x['keep']['share'])}, random {three('random', 'left')}, matched {three('matched', 'left')}")
    if x := s.get("ledger"):
        lines.append(f"\nLedger of the gain, nats a token: {interval(x['gain'], '{:+.4f}')}")
        lines += [f"  tokens    {name:<11} {interval(y, '{:+.4f}')}" + (f"   {percent(y['share'])}" if "share" in y else "") for name, y in x["tokens"].items()]
        lines += [f"  features  {name:<11} {interval(y['total'], '{:+.4f}')}" + (f"   {percent(y['total']['share'])}" if "share" in y["total"] else "") for name, y in x["groups"].items()]
        lines.append(f"  completeness error of the features {x['completeness']:.2%}; the first 10 features hold {x['concentration']['10']:.0%} of Σ|entry|")
    if g := s.get("geometry"):
        lines.append(f"\nGeometry: {g['participation']:.1f} effective directions of {g['d_in']} (90% in {g['d90']}), a constant vector explains {g['constant']:.0%}; cosine with the mean difference {g['cosine']:+.2f} (chance ±{g['chance']:.2f})")
        lines.append("  share of the gain with only the top r directions (random ones): " + ", ".join(f"{d['r']}: {d['top']['gain']:.0%} ({d['random']['gain']:.0%})" for d in g["directions"]))
    return "\n".join(lines)
