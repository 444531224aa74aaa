"""The verdict: what was trained, what its gain is made of, how far that can be believed.

Three sentences for a reader who knows no method. A text that is not sound is told first; of a gain that
cannot be told from 0 nothing is claimed.
"""
from lib.blocks import Text, interval, percent
from lib.files import ROOT, read_json
from lib.stats import leaves_out_zero

FILE = ROOT / "tiny" / "calibration.json"
CALIBRATION = ("calibration", "Calibration",
               "Do these instruments tell the truth? On policies of the lab, where the reward was "
               "planted, their readings stand beside what the policies do.")


def objective(config, steerings=()):
    """What a run was trained with, in words: its objective and its penalty, whoever wrote them."""
    weight, nll, parts = config.get("simpo_weight", 1), config.get("nll_weight", 0), []
    if weight:
        kind = "hinge, " if config.get("loss") == "hinge" else ""
        words = f"SimPO ({kind}β {config.get('beta', 10):g}, γ/β {config.get('gamma_ratio', .5):g})"
        words = f"the objective {named(config['objective'])}" if config.get("objective") else words
        parts.append(words + (f" at weight {weight:g}" if weight != 1 else ""))
    if nll:
        parts.append(f"{nll:g} × NLL of the chosen answers" + ("" if weight else " (imitation alone)"))
    if config.get("policy"):                          # whether it asks for a penalty is its own affair
        penalty = f"{config.get('l1', 0):g} × the penalty of {named(config['policy'])}"
        return f"{' + '.join([*parts, penalty])}, if it has one,"
    if config.get("l1"):
        own = [type(s.adapter).__name__ for s in steerings if hasattr(s.adapter, "penalty")]
        penalty = f"the penalty of {' and '.join(own)}" if own else "ℓ1 of the steering"
        parts.append(f"{config['l1']:g} × {penalty}")
    masked = ", with some features masked," if config.get("mask") else ""
    return " + ".join(parts) + masked


def named(spec):
    """FILE.py:Name -> Name (FILE.py), without the folder."""
    path, _, name = spec.rpartition(":")
    return f"{name} ({path.rpartition('/')[2]})"


def verdict(results, about):
    """-> blocks: alarms, then the three sentences."""
    alarms = results.get("behaviour", {}).get("alarms", [])
    trained, x = f"Trained with {about['objective']} on {about['pairs']}", results.get("ledger")
    if not x:
        said = [f"{trained}. The ledger was not computed, so nothing is said about what is rewarded."]
    else:
        before, after = (percent(x[f"accuracy_{who}"]["value"], ".1f") for who in ("base", "policy"))
        form = "+.3f" if abs(x["gain"]["value"]) > .001 else "+.1e"
        said = [f"{trained}, the policy moved its preference for the chosen answers by "
                f"{interval(x['gain'], form)} nats a token: it ranks {after} of the held-out pairs "
                f"right, the base model {before}."]
        if leaves_out_zero(x["gain"]):
            said += [made_of(x, results.get("masking", {})), trust(about)]
        else:
            said.append("That cannot be told from 0, so no part of it is given to anything.")
    return [Text(x, "alarm") for x in alarms] + [Text(sentence, "verdict") for sentence in said]


def made_of(ledger, masking):
    """What the gain is made of, by the ledger by token, and what masking says beside its control."""
    parts = []
    for row in ledger["token_groups"]:
        a = "an" if row["name"][0] in "aeiou" else "a"
        parts.append(f"{percent(row['share'])} falls on words that settle {a} {row['name']} choice")
    if not parts:
        for row in sorted(ledger["tokens"], key=lambda row: -row["nats"]["value"])[:3]:
            parts.append(f"{percent(row['share'])} falls on tokens of the kind “{row['name']}”")
    said = f"Of that gain {' and '.join(parts)}"
    rows = masking.get("rows", [])                   # each set is followed by its two controls
    for row, used_as_much in zip(rows[::3], rows[2::3]):
        share, other = row["lost"], used_as_much["lost"]
        more = ("more than" if share["value"] > other["high"] else
                "less than" if share["value"] < other["low"] else "no more than")
        named = f"{row['features']:.0f} features labelled {row['label']}"
        said += (f"; without the {named} {percent(share)} of it is lost, {more} without random ones "
                 f"used as much ({percent(other)})")
    return said + "."


def trust(about):
    """How far the instrument just quoted can be believed: the lab knows what its policies do."""
    known = calibrated().get("trust", {}).get("tokens")
    if not known:
        return ("How far to trust this is not known: the ledger says on which words the preference "
                "moved, not what the answers do.")
    lab = "" if about["weights"] else " (In the lab, on a tiny model.)"
    return f"How far to trust this: {known[0].lower()}{known[1:]}{lab}"


def calibrated():
    return read_json(FILE) if FILE.is_file() else {}


def calibration():
    """What was calibrated, as a section of the page: name, title, question, blocks."""
    said = calibrated().get("sentences", [])
    where = "The tables: `docs/calibration.md`; `python -m tiny.calibrate` makes them."
    return *CALIBRATION, [Text(sentence) for sentence in (*said, where)]
