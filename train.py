"""`python train.py`: trains an FSRL adapter on preference pairs. Without arguments: on the lab in tiny/, about two minutes on a CPU.

Top to bottom: the settings, the run's folder, the loop (`train`), the tables it prints, the command line.
"""
import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

import fsrl
import labels
import simpo
from gemma import UserError, choose_device, decode, generate, load_config, load_gemma, load_tokenizer, write_json
from sae import load_sae


# ---- settings --------------------------------------------------------------------------------------------------------

def setting(default, group, text, **checks):
    """One field of TrainConfig. checks: low / high (inclusive), above (exclusive), choices, type (of a field that may be None)."""
    return field(default=default, metadata={"group": group, "help": text, **checks})


@dataclass
class TrainConfig:
    """Every setting of a run. The defaults are the lab's recipe; each field is a command-line option of the same name."""
    model: str = setting("tiny/model", "what to train on", "a Gemma-2: local folder or Hub repo id")
    sae: str = setting("tiny/sae", "what to train on", "its SAE: local folder, or repo:path/inside on the Hub")
    pairs: str = setting("tiny/pairs/style", "what to train on", "preference pairs: folder with train.jsonl and test.jsonl, a Hub data set, or one file, whose last tenth is held out")
    eval_split: str = setting("test", "what to train on", "split that the closing table is measured on (tune on dev)")
    max_length: int = setting(2048, "what to train on", "tokens of prompt plus longer answer; the prompt is cut from its left first", low=3)
    train_pairs: int = setting(None, "what to train on", "use only the first N pairs (default: all)", low=1, type=int)
    eval_pairs: int = setting(None, "what to train on", "held-out pairs (and lab prompts) of an evaluation (default: 1000, or 200 up to 100 steps)", low=2, type=int)

    adapter: str = setting(None, "the policy", "your own adapter, FILE.py:ClassName (README: \"Your own adapter\")", type=str)
    activation: str = setting("soft", "the policy", "of the built-in adapter", choices=fsrl.ACTIVATIONS)
    init: float = setting(1e-6, "the policy", "W_a starts uniform in ± this, thresholds at it", above=0)
    bandwidth: float = setting(0.001, "the policy", "of jumprelu's gradient towards its thresholds", above=0)
    fusion: str = setting("additive", "the policy", "additive: x + v W_dec; relu: x + max(v, -f) W_dec", choices=fsrl.FUSIONS)
    positions: str = setting("text", "the policy", "tokens that are steered: all but BOS, only those that predict an answer, or BOS too", choices=fsrl.POSITIONS)
    top_k: float = setting(None, "the policy", "per token only the K largest features act (a number below 1: that share of F)", above=0, type=float)
    mask: str = setting("", "the policy", "features that may not be steered: 3,17,900")
    mask_labels: str = setting("", "the policy", "features so labelled may not be steered either: style, alignment, or style,alignment")
    labels: str = setting(None, "the policy", "the label file of --mask-labels (default: labels.jsonl beside the SAE)", type=str)
    mask_random: int = setting(0, "the policy", "instead of the features that --mask-labels names, mask N random others (without it: N of all)", low=0)

    loss: str = setting("sigmoid", "the objective", "SimPO's, or its hinge form", choices=("sigmoid", "hinge"))
    beta: float = setting(10.0, "the objective", "scale of the margin", above=0)
    gamma_ratio: float = setting(0.5, "the objective", "target margin γ/β in nats a token (a ratio: γ itself is beta times this)", low=0)
    label_smoothing: float = setting(0.0, "the objective", "share of pairs taken to be labelled the wrong way round", low=0, high=0.5)
    simpo_weight: float = setting(1.0, "the objective", "weight of SimPO's own term; 0 leaves imitation of the chosen answers", low=0)
    nll_weight: float = setting(5.0, "the objective", "weight of -mean log p(chosen); 0 is the paper's loss", low=0)
    l1: float = setting(0.03, "the objective", "weight of Σ|v| a steered token (effective v)", low=0)
    l1_warmup: float = setting(0.0, "the objective", "share of the steps over which l1 rises from 0", low=0, high=1)

    steps: int = setting(800, "optimisation", "optimiser steps", low=1)
    batch_size: int = setting(32, "optimisation", "pairs a forward pass", low=1)
    accumulation: int = setting(1, "optimisation", "forward passes a step; the gradient is that of all their pairs at once", low=1)
    lr: float = setting(2e-3, "optimisation", "peak learning rate of AdamW", above=0)
    warmup: float = setting(0.1, "optimisation", "share of the steps over which lr rises", low=0, high=1)
    schedule: str = setting("cosine", "optimisation", "what lr does after that", choices=("cosine", "linear", "constant"))
    threshold_lr: float = setting(1.0, "optimisation", "the thresholds' lr is lr times this", above=0)
    weight_decay: float = setting(0.0, "optimisation", "on W_a only", low=0)
    grad_clip: float = setting(1.0, "optimisation", "largest gradient norm (0: any)", low=0)
    keep_prefix: float = setting(1.0, "optimisation", "keep the frozen lower half's output of each pair for later epochs if all of it fits in this many GB (0: never)", low=0)
    seed: int = setting(0, "optimisation", "of the adapter, the order of the pairs and the sampled answers", low=0)

    run: str = setting(None, "the run", "name of the folder under --runs (default: the next free PAIRS-1, PAIRS-2, ...)", type=str)
    runs: str = setting("runs", "the run", "where runs are kept")
    log_every: int = setting(50, "the run", "steps between two lines", low=1)
    save_every: int = setting(100, "the run", "steps between two savings of the adapter", low=1)
    device: str = setting("auto", "the run", "cpu, cuda, mps, or auto: the best there is")
    dtype: str = setting("auto", "the run", "of the frozen weights; auto: bfloat16 on cuda, float32 elsewhere", choices=("auto", "float32", "bfloat16", "float64"))
    threads: int = setting(0, "the run", "CPU threads (0: as torch chooses)", low=0)

    def __post_init__(self):
        for f in fields(self):
            value, m, flag = getattr(self, f.name), f.metadata, "--" + f.name.replace("_", "-")
            if value is None:
                continue
            kind = m.get("type") or type(f.default)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                setattr(self, f.name, value := float(value))
            if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
                raise UserError(f"{flag} is {value!r}; it has to be of type {kind.__name__}")
            if kind is float and not math.isfinite(value):
                raise UserError(f"{flag} is {value}; it has to be a finite number")
            for bound, bad, words in (("low", lambda v, b: not v >= b, "at least"), ("high", lambda v, b: not v <= b, "at most"),
                                      ("above", lambda v, b: not v > b, "above"), ("choices", lambda v, b: v not in b, "one of")):
                if bound in m and bad(value, m[bound]):
                    allowed = ", ".join(m[bound]) if bound == "choices" else m[bound]
                    raise UserError(f"{flag} is {value}; it has to be {words} {allowed}")
        if self.loss == "hinge" and self.label_smoothing:
            raise UserError("--label-smoothing belongs to --loss sigmoid; the hinge has none")
        if not self.simpo_weight and not self.nll_weight:
            raise UserError("--simpo-weight and --nll-weight are both 0: nothing is left to learn from")
        if self.top_k is not None and self.top_k >= 1 and self.top_k != int(self.top_k):
            raise UserError(f"--top-k is {self.top_k}; a number of features has to be whole, a share of them below 1")
        if self.run is not None and (not self.run or Path(self.run).name != self.run or self.run in (".", "..")):
            raise UserError(f"--run is {self.run!r}; it has to be the plain name of a folder")
        if self.adapter and self.activation != "soft":
            raise UserError("--activation belongs to the built-in adapter and --adapter replaces that one: give one of the two")
        try:
            self.masked = sorted({int(i) for i in self.mask.split(",") if i.strip()})
        except ValueError:
            raise UserError(f"--mask is {self.mask!r}; it has to be feature numbers with commas between them") from None
        if self.mask_labels and not set(self.mask_labels.split(",")) <= set(labels.LABELS):
            raise UserError(f"--mask-labels is {self.mask_labels}; it has to be {', '.join(labels.LABELS)}, or {','.join(labels.LABELS)}")
        if self.labels is not None and not self.mask_labels:
            raise UserError("--labels says where the labels of --mask-labels are read: give that too")

    @property
    def held_pairs(self):
        return self.eval_pairs or (1000 if self.steps > 100 else 200)


def parser():
    """The command line, made from TrainConfig's fields."""
    out = argparse.ArgumentParser(prog="train.py", usage="python train.py [--setting value ...]", allow_abbrev=False, description="Train an FSRL adapter on preference pairs. Without arguments: on the lab in "
                                  "tiny/, about two minutes on a CPU. `--pairs tiny/pairs/honest` is its other world, `--steps 20` an instant trial.",
                                  formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=120))
    groups = {}
    for f in fields(TrainConfig):
        m = f.metadata
        if m["group"] not in groups:
            groups[m["group"]] = out.add_argument_group(m["group"])
        group = groups[m["group"]]
        flag, text = "--" + f.name.replace("_", "-"), m["help"]
        shown = "" if f.default in (None, "") or "default:" in text else f" [{f.default}]"
        group.add_argument(flag, default=f.default, type=m.get("type") or type(f.default), choices=m.get("choices"),
                           metavar=None if "choices" in m else {int: "N", float: "X", str: "TEXT"}[m.get("type") or type(f.default)], help=text + shown)
    return out


# ---- the run's folder ------------------------------------------------------------------------------------------------

def new_folder(config):
    """Makes runs/NAME, or the next free runs/PAIRS-N. Only a named run that exists is an error."""
    root = Path(config.runs)
    names = [config.run] if config.run else (f"{Path(config.pairs).stem}-{n}" for n in range(1, 10**6))
    for name in names:
        try:
            (root / name).mkdir(parents=True)
            return root / name
        except FileExistsError:
            if not (root / name).exists():                # --runs itself is a file
                break
        except OSError as error:
            raise UserError(f"--runs {config.runs}: no folder can be made there ({error.strerror})") from None
    if root.exists() and not root.is_dir():
        raise UserError(f"--runs {config.runs} is not a folder")
    raise UserError(f"--run {config.run}: {root / config.run} exists; name another run or remove it")


class Log:
    """metrics.jsonl: one row a log step, one an evaluation."""

    def __init__(self, folder):
        self.path = folder / "metrics.jsonl"

    def __call__(self, **row):
        def plain(x):                                     # JSON has no NaN: a rate over no questions is null
            return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else None if isinstance(x, float) and not math.isfinite(x) else x
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row)) + "\n")


# ---- the loop ----------------------------------------------------------------------------------------------------------

def pair_order(pairs, per_step, seed):
    """Without end: the indices of the pairs of each step, every pair once an epoch (but for a remainder, drawn anew each time).

    An epoch is shuffled, cut into pools of 16 steps, sorted by length within a pool, so that rows of a step are alike
    and little is padding, and its steps are shuffled again.
    """
    length = [len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs]
    epoch = 0
    while True:
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(pairs), generator=g).tolist()
        while len(order) < per_step:                      # fewer pairs than one step wants: go round
            order += order
        del order[len(order) // per_step * per_step:]     # the remainder goes before the sorting: after it, it would be the longest
        steps = []
        for i in range(0, len(order), 16 * per_step):
            pool = sorted(order[i:i + 16 * per_step], key=length.__getitem__)
            steps += [pool[j:j + per_step] for j in range(0, len(pool) - per_step + 1, per_step)]
        for j in torch.randperm(len(steps), generator=g).tolist():
            yield steps[j]
        epoch += 1


def lr_at(step, config):
    """Learning rate of step 0, 1, ...: up over `warmup`, then as `schedule` says, down to 0 unless constant."""
    up = config.warmup * config.steps
    if step < up:
        return config.lr * (step + 1) / (up + 1)
    t = (step - up) / max(1, config.steps - up)
    return config.lr * {"constant": 1.0, "linear": 1 - t, "cosine": 0.5 * (1 + math.cos(math.pi * t))}[config.schedule]


def kept_prefix(model, batch, index, layer, kept):
    """The output of the frozen blocks 0..layer, from `kept` ({index of a pair: its states}) where every row has been there before.

    kept None: nothing is kept.
    """
    if kept is None:
        return simpo.prefix(model, batch, layer)
    if all(i in kept for i in index):
        return torch.stack([torch.nn.functional.pad(kept[i], (0, 0, 0, batch.ids.shape[1] - len(kept[i]))) for i in index])
    h = simpo.prefix(model, batch, layer)
    kept |= {i: row[:tokens].clone() for i, row, tokens in zip(index, h, (batch.branch >= 0).sum(-1).tolist())}
    return h


def objective(model, batch, steering, config, l1, length, h=None):
    """The training loss of each pair, (B,), and what the log shows of it.

    length: tokens of a chosen answer, the mean over the training pairs. The NLL term is that of whole answers, divided by
    this one number: a mean over tokens, as in supervised fine-tuning. A mean of each answer's own mean would weigh short answers'
    tokens more, and a policy would learn to be brief from pairs that say nothing (README, "The recipe").
    """
    chosen, rejected, l0, norm = simpo.steered_logps(model, batch, steering, h)
    loss = simpo.simpo_loss(chosen, rejected, config.beta, config.gamma_ratio, kind=config.loss, label_smoothing=config.label_smoothing)
    penalty = l1 * norm
    total = config.simpo_weight * loss + penalty - (config.nll_weight / length * chosen * batch.lengths[:len(chosen)] if config.nll_weight else 0)
    shown = {"loss": loss, "penalty": penalty, "margin": chosen - rejected, "accuracy": (chosen > rejected).float(), "l0": l0, "l1": norm, "nll": -chosen}
    return total, {name: x.detach() for name, x in shown.items()}


def prepare(config):
    """Looks at everything that a user can get wrong, in the order of what it costs, and loads it; nothing is written.

    -> model, tokenizer, steering, pairs, held-out pairs, and the lab's (meta, world), ({}, None) elsewhere
    """
    device, dtype = choose_device(config.device, config.dtype)
    if config.run and (Path(config.runs) / config.run).exists():
        new_folder(config)                               # says so and stops
    own = fsrl.import_adapter(config.adapter) if config.adapter else None
    tokenizer, judge, sets = load_tokenizer(config.model), simpo.judge_of(config.pairs), []
    for name, records in zip(("train", config.eval_split), read_splits(config)):
        pairs, n = simpo.encode_pairs(tokenizer, records, config.max_length)
        if not pairs:
            raise UserError(f"{config.pairs}: no pair of {name} is left; all {n['dropped']} have the same answer twice within --max-length {config.max_length}")
        if n["cut"] or n["dropped"]:
            print(f"{name}: {n['cut']} pairs cut to {config.max_length} tokens, {n['dropped']} dropped (both answers the same), {len(pairs)} left")
        sets.append(pairs)
    sae = load_sae(config.sae, dtype=dtype, device=device)
    fsrl.check_fit(load_config(config.model), sae)
    torch.manual_seed(config.seed)
    adapter = fsrl.make_adapter(own, sae.d_in, sae.d_sae, spec=config.adapter, activation=config.activation, init=config.init, bandwidth=config.bandwidth)
    steering = fsrl.Steering(sae, adapter.to(device, fsrl.master_dtype(dtype)), fusion=config.fusion, positions=config.positions,
                             top_k=config.top_k, masked=masked_features(config, sae))
    return load_gemma(config.model, dtype=dtype, device=device), tokenizer, steering, *sets, judge


def masked_features(config, sae):
    """The features that --mask, --mask-labels and --mask-random keep from being steered. -> list of indices; prints how many and why

    Random ones are drawn by config.seed, and are never among those that the labels or --mask name.
    """
    masked, why, named = set(config.masked), [f"{len(config.masked)} by --mask"] if config.masked else [], set()
    if config.mask_labels:
        path = config.labels or labels.default_path(sae)
        groups = labels.groups(labels.read_labels(path, sae), sae.d_sae)
        named = {i for name in config.mask_labels.split(",") for i in groups[name].nonzero()[:, 0].tolist()}
        if not config.mask_random:
            why.append(f"{len(named)} labelled {config.mask_labels.replace(',', ' or ')} in {path}")
    if config.mask_random:
        taken = named | masked
        free = [i for i in range(sae.d_sae) if i not in taken]
        if config.mask_random > len(free):
            raise UserError(f"--mask-random is {config.mask_random}; only {len(free)} of the SAE's {sae.d_sae} features are left to draw from")
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(config.seed))
        why.append(f"{config.mask_random} at random" + (f", none of the {len(named)} labelled {config.mask_labels.replace(',', ' or ')}" if config.mask_labels else ""))
        named = {free[i] for i in order[:config.mask_random].tolist()}
    if len(masked | named) == sae.d_sae:
        raise UserError(f"all {sae.d_sae} features are masked: nothing is left to steer with")
    if why:
        print(f"Masked: {len(masked | named)} of {sae.d_sae} features may not be steered ({'; '.join(why)})")
    return sorted(masked | named)


def start_folder(config, model, steering, pairs, held):
    """Makes the run's folder with config.json: every setting, and what exactly was trained on what."""
    folder = new_folder(config)
    if config.adapter:
        fsrl.keep_source(config.adapter, folder)
    write_json(folder / "config.json", {
        **asdict(config), "device": model.device.type, "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "model_identity": model.identity(), "sae_identity": steering.sae.identity(), "d_sae": steering.sae.d_sae, "pairs_sha256": simpo.digest(pairs), "eval_pairs_sha256": simpo.digest(held),
        "date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}})
    return folder


def make_optimizer(adapter, config):
    """AdamW; weight decay on matrices alone, a learning rate of their own for thresholds."""
    groups = {"matrix": [], "vector": [], "threshold": []}
    for name, p in adapter.named_parameters():
        groups["threshold" if name.endswith("threshold") else "matrix" if p.dim() > 1 else "vector"].append(p)
    return torch.optim.AdamW([{"params": some, "weight_decay": config.weight_decay if kind == "matrix" else 0.0,
                               "scale": config.threshold_lr if kind == "threshold" else 1.0} for kind, some in groups.items() if some], lr=config.lr)


def train(config):
    """Trains, prints, saves. -> {"base": m, "trained": m, "run": folder}; m: see `measure`."""
    started = time.time()
    if config.threads:
        torch.set_num_threads(config.threads)
    minutes = round(0.4 + config.steps * config.batch_size * config.accumulation / 32 / 600)
    how_long = "the bar below shows how long it takes" if config.model != "tiny/model" else f"about {minutes} minutes" if minutes > 1 else "about a minute" if config.steps > 100 else "some seconds"
    print(f"Training an FSRL adapter with SimPO on {config.pairs}, steering the features of {config.sae}: {how_long}"
          + (" on 2 CPU cores." if config.model == "tiny/model" else "."), flush=True)
    model, tokenizer, steering, pairs, held, (meta, world) = prepare(config)
    adapter, layer = steering.adapter, steering.sae.layer
    folder = start_folder(config, model, steering, pairs, held)
    log = Log(folder)
    opening(model, tokenizer, pairs, steering)
    base = measure(model, tokenizer, held, None, config, meta, world, "before")
    log(step=0, evaluation="base", **base)

    adapter.train()
    optimizer = make_optimizer(adapter, config)
    order = pair_order(pairs, config.batch_size * config.accumulation, config.seed)
    length = sum(len(p.chosen) for p in pairs) / len(pairs)
    size = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) * model.config.hidden_size * model.norm.weight.element_size()
    kept = {} if size <= config.keep_prefix * 1e9 else None         # all of it fits, or keeping some of it hardly ever helps
    window, tokens, since = [], 0, time.time()
    bar = tqdm(range(config.steps), desc="train", unit="step", dynamic_ncols=True)
    bar.write(" step    loss  penalty  margin    acc      L0      L1       lr  tokens/s")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, config) * group["scale"]
        l1 = config.l1 * min(1.0, (step + 1) / max(1.0, config.l1_warmup * config.steps))
        index = next(order)
        optimizer.zero_grad(set_to_none=True)
        for i in range(0, len(index), config.batch_size):
            part = index[i:i + config.batch_size]
            batch = simpo.collate([pairs[j] for j in part], model.config.pad_token_id).to(model.device)
            h = kept_prefix(model, batch, part, layer, kept)
            total, shown = objective(model, batch, steering, config, l1, length, h)
            (total.sum() / len(index)).backward()                  # a mean over all pairs of the step, however it is cut
            window.append(shown)
            tokens += int((batch.branch >= 0).sum())
        norm = torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.grad_clip or math.inf)
        if not (all(torch.isfinite(shown["loss"]).all() for shown in window) and torch.isfinite(norm)):
            bar.close()                                            # before the step: the adapter is still the last good one
            saved = step // config.save_every * config.save_every
            raise FloatingPointError(f"the loss or its gradient is not a number at step {step + 1}; "
                                     + (f"{folder} keeps the adapter of step {saved}" if saved else f"nothing was saved yet in {folder}")
                                     + "; a lower --lr is the first thing to try")
        optimizer.step()
        if callable(project := getattr(adapter, "project", None)) and not isinstance(project, torch.nn.Module):
            project()
        last = step + 1 == config.steps
        if (step + 1) % config.log_every == 0 or last:
            row = {name: torch.cat([shown[name] for shown in window]).mean().item() for name in window[0]}
            row |= {"lr": optimizer.param_groups[0]["lr"], "tokens_per_s": tokens / (time.time() - since)}
            bar.write(f"{step + 1:5d}  {row['loss']:6.3f}  {row['penalty']:7.3f}  {row['margin']:6.3f}  {row['accuracy']:5.1%}  {row['l0']:6.1f}  "
                      f"{row['l1']:6.3f}  {row['lr']:.1e}  {row['tokens_per_s']:8.0f}")
            log(step=step + 1, **row)
            window, tokens, since = [], 0, time.time()
        if (step + 1) % config.save_every == 0 or last:
            fsrl.save_adapter(adapter, folder, **fsrl.steering_facts(steering, config.model), step=step + 1)

    adapter.eval()
    trained = measure(model, tokenizer, held, steering, config, meta, world, "after")
    seconds = time.time() - started
    log(step=config.steps, evaluation="trained", seconds=seconds, **trained)
    print("\n" + closing(base, trained, meta, config, steering.sae.d_sae))
    examples(model, tokenizer, held, steering)
    flag = f" --adapter {config.adapter}" if config.adapter else ""
    print(f"\n{seconds:.0f} s. The run lies in {folder}. Next: ask it something (the lab's model knows its own world only), such as\n"
          f'    python fsrl.py {folder}{flag} --prompt "{held[-1].text.splitlines()[0][:80]}"\n'
          f"or see what it rewards:\n    python analyze.py {folder}{flag}")
    return {"base": base, "trained": trained, "run": str(folder)}


# ---- what is measured and printed ----------------------------------------------------------------------------------------

def read_splits(config):
    """Training and held-out records; of a single file the last tenth is held out."""
    held = simpo.read_held_out(config.pairs, config.eval_split, config.held_pairs)
    if not Path(config.pairs).is_file():
        return simpo.read_pairs(config.pairs, "train", config.train_pairs), held
    records = simpo.read_pairs(config.pairs)
    tenth = max(1, len(records) // 10)
    print(f"{config.pairs} is one file: its last {tenth} of {len(records)} pairs are held out")
    return records[:-tenth][:config.train_pairs], held


def measure(model, tokenizer, pairs, steering, config, meta, world, when):
    """simpo.evaluate, and on the lab what the answers do:

    parse_greedy, parse_sampled (shares of well-formed answers), truth (fact questions answered truly, sampled),
    style (mean rate of the style choices that are rewarded, sampled), greedy and sampled (the rate of every choice)
    """
    questions = [q for q in dict.fromkeys(world.read_prompt(p.text) for p in pairs) if q] if world else []
    with tqdm(total=len(pairs) + 2 * len(questions), desc=f"evaluation {when}", leave=False, dynamic_ncols=True) as bar:
        m = simpo.evaluate(model, pairs, steering, beta=config.beta, gamma_ratio=config.gamma_ratio, kind=config.loss,
                           label_smoothing=config.label_smoothing, progress=bar.update)
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)) if questions else ():
            m[kind], _ = simpo.behave(model, tokenizer, questions, world, steering and steering.edits(), temperature=temperature, seed=config.seed)
            bar.update(len(questions))
    if questions:
        rewarded = [name for name in world.STYLE if meta["weights"].get(name, 0) > 0]
        m |= {"parse_greedy": m["greedy"]["parse"], "parse_sampled": m["sampled"]["parse"], "truth": m["sampled"]["truth"],
              "style": sum(m["sampled"][name] for name in rewarded) / max(1, len(rewarded)), "answers": len(questions)}
    return m


def opening(model, tokenizer, pairs, steering):
    """The proof that nothing happens when nothing should, the size of what is trained, and what is scored."""
    batch = simpo.collate(pairs[:4], model.config.pad_token_id).to(model.device)
    strength, steering.strength = steering.strength, 0.0
    with torch.no_grad():
        gap = max((a - b).abs().max().item() for a, b in zip(simpo.response_logps(model, batch), simpo.response_logps(model, batch, steering.edits())))
    steering.strength = strength
    if gap != 0:
        raise UserError(f"steering at strength 0 is not the base model: log-probabilities differ by {gap}; does the adapter give infinite or missing numbers?")
    print(f"Steering at strength 0 against the base model: max difference of log-probabilities {gap}")
    trainable = sum(p.numel() for p in steering.adapter.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) + sum(p.numel() for p in steering.sae.parameters())
    print(f"Trainable {trainable:,} of {trainable + frozen:,} parameters: the adapter. Frozen: Gemma-2 and the SAE ({steering.sae.d_sae} features on layer {steering.sae.layer})")
    piece = lambda ids: "|".join(tokenizer.decode([i], skip_special_tokens=False).replace("\n", "⏎") for i in ids)     # noqa: E731
    print(f"One of {len(pairs)} pairs; what is scored stands between ⟦ and ⟧, one token from the next by |:")
    print(f"  prompt    {tokenizer.decode(list(pairs[0].prompt), skip_special_tokens=False)!r}")
    print(f"  chosen    ⟦{piece(pairs[0].chosen)}⟧\n  rejected  ⟦{piece(pairs[0].rejected)}⟧", flush=True)


def closing(base, trained, meta, config, d_sae):
    """The table base beside trained, as text."""
    rows = []

    def row(name, key, form="{:.3f}", se=None, of=lambda m: m):
        rows.append((name, *(form.format(of(m)[key]) + (f" ± {form.format(of(m)[se])}" if se else "") for m in (base, trained))))
    row("SimPO loss (± s.e.)", "loss", se="loss_se")
    row("accuracy" + (f" (best possible {meta['bayes_accuracy']:.3f})" if "bayes_accuracy" in meta else ""), "accuracy", se="accuracy_se")
    row("margin, nats a token", "margin", se="margin_se")
    row(f"L0, features a token (of {d_sae})", "l0", "{:.1f}")
    row("L1 a token", "l1")
    n, notes = f"{base['pairs']} pairs", []
    if "answers" in base:
        n += f", {base['answers']} prompts"
        row("well-formed answers, greedy", "parse_greedy", "{:.1%}")
        row("well-formed answers, T=1", "parse_sampled", "{:.1%}")
        rows.append(("rate of each choice, T=1 (its planted weight)", "", ""))
        for name in (name for name in base["sampled"] if name != "parse"):
            row(f"  {name} ({meta['weights'].get(name, 0):+g})" + (": truthfulness" if name == "truth" else ""), name, "{:.1%}", of=lambda m: m["sampled"])
        if trained["parse_sampled"] < base["parse_sampled"] - 0.03:
            notes.append("The text broke: fewer answers are well-formed than before. A low loss does not make up for that; raise --nll-weight or lower --lr.")
    if config.loss == "sigmoid" and not config.label_smoothing:
        flat = simpo.simpo_loss(torch.zeros(1), torch.zeros(1), config.beta, config.gamma_ratio).item()
        notes.append(f"(Loss {flat:.3f} is that of no preference at all; shrinking every margin towards 0 also leads there.)")
    rows.insert(0, (f"held-out {config.eval_split}: {n}", "base", "trained"))
    left, mid = (max(len(r[i]) for r in rows) for i in (0, 1))
    return "\n".join([f"{name:<{left}}  {a:>{mid}}  {b}".rstrip() for name, a, b in rows] + notes)


def examples(model, tokenizer, pairs, steering, count=3):
    """Some held-out prompts with the base and the steered answer, greedy."""
    chosen = list(dict.fromkeys(p.text for p in pairs))[:count]
    prompts = [next(p.prompt for p in pairs if p.text == text) for text in chosen]
    both = [[decode(tokenizer, ids) for ids in generate(model, prompts, max_new_tokens=64, edits=edits)] for edits in (None, steering.edits())]
    for text, left, right in zip(chosen, *both):
        print(f"\n> {text}\n{fsrl.side_by_side(left, right)}")


def main(argv=None):
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        train(TrainConfig(**vars(args)))
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted; what was saved is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
