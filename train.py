"""`python train.py`: trains a policy on preference pairs. Without arguments: on the lab in tiny/, one or
two minutes on a CPU.

Top to bottom: the settings, what is minimised (`objective`), the loop (`train`), what is measured and
printed, and the plumbing that opens what the settings name.
"""
import math
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import fsrl
import simpo
from gemma import encode_prompt, generate, load_config, load_gemma, load_tokenizer
from lib import show
from lib.checkpoint import STOP, Checkpoint, kept_rows, resumed
from lib.files import ROOT, UserError, explained
from lib.judge import judge_of
from lib.labels import masked_features
from lib.pairs import read_splits
from lib.plugins import adapter_arguments, own_adapter, own_objective, own_policy
from lib.runs import Log, check_free, start_folder
from lib.settings import check, choose_device, command, setting

DTYPES = ("auto", "float32", "bfloat16", "float64")


@dataclass
class TrainConfig:
    """Every setting of a run, each a command-line option; the defaults are the lab's recipe. Of bounds
    (see lib/settings.py) low and high are included, above is not."""
    # What is trained on. Several SAEs, each on a layer of its own, are steered together.
    model: str = setting("tiny/model", "a Gemma-2: local folder or Hub repo id", group="data")
    sae: list = setting(["tiny/sae"], "SAEs: folder or repo:path (default: tiny/sae)", many=True)
    pairs: str = setting("tiny/pairs/style", "preference pairs: a folder, Hub data set or file")
    eval_split: str = setting("test", "split of the closing table (tune on dev)")
    max_length: int = setting(2048, "tokens of prompt plus longer answer", low=3)
    train_pairs: int = setting(None, "only the first N pairs (default: all)", low=1)   # to try things
    eval_pairs: int = setting(None, "held-out pairs (default: 1000, or 200)", low=2)

    # The policy: the built-in adapter, an adapter of your own, or a whole policy (docs/reference.md).
    adapter: str = setting(None, "your own adapter, FILE.py:Class", group="policy")
    adapter_args: list = setting([], "arguments of its constructor, name=value", many=True)
    policy: str = setting(None, "your own policy, FILE.py:Class")
    policy_args: list = setting([], "arguments of its constructor, name=value", many=True)
    activation: str = setting("soft", "of the built-in adapter", choices=fsrl.ACTIVATIONS)
    init: float = setting(1e-6, "W_a starts uniform in ± this, thresholds at it", above=0)
    bandwidth: float = setting(0.001, "of jumprelu's gradient towards its thresholds", above=0)
    fusion: str = setting("additive", "x + v W_dec, or relu: x + max(v, -f) W_dec", choices=fsrl.FUSIONS)
    positions: str = setting("text", "steered tokens: all but BOS, those before an answer's, all",
                             choices=fsrl.POSITIONS)
    top_k: float = setting(None, "only the K largest features of a token act (below 1: that share)",
                           above=0)
    mask: str = setting("", "features that may not be steered: 3,17,900, or a file of numbers")

    # What is minimised: simpo_weight · preference + nll_weight · NLL + l1 · penalty (`objective` below).
    objective: str = setting(None, "your own, FILE.py:function, instead of SimPO",
                             group="objective")
    loss: str = setting("sigmoid", "SimPO's, or its hinge form", choices=("sigmoid", "hinge"))
    beta: float = setting(10.0, "scale of the margin", above=0)                   # the paper's
    gamma_ratio: float = setting(0.5, "target margin γ/β, nats a token", low=0)   # the paper's
    label_smoothing: float = setting(0.0, "share of wrong labels", low=0, high=0.5)
    simpo_weight: float = setting(1.0, "of the preference term; 0 leaves imitation", low=0)
    nll_weight: float = setting(5.0, "of -mean log p(chosen)", low=0)             # the paper: 0
    l1: float = setting(0.03, "of the penalty, Σ|v| a steered token", low=0)      # the paper: .1
    l1_warmup: float = setting(0.0, "share of the steps over which l1 rises", low=0, high=1)

    # How: AdamW, its learning rate up and down again.
    steps: int = setting(800, "optimiser steps", low=1, group="optimisation")  # the paper: 1 epoch
    epochs: float = setting(None, "passes over the pairs, in place of --steps", above=0)
    batch_size: int = setting(32, "pairs a forward pass", low=1)               # the paper's
    accumulation: int = setting(1, "forward passes a step", low=1)
    lr: float = setting(2e-3, "peak learning rate", above=0)                   # the paper: 5e-6
    warmup: float = setting(0.1, "share of the steps over which lr rises", low=0, high=1)  # the paper's
    schedule: str = setting("cosine", "what lr does then", choices=("cosine", "linear", "constant"))
    threshold_lr: float = setting(1.0, "the thresholds' lr is lr times this", above=0)
    weight_decay: float = setting(0.0, "on matrices only", low=0)
    grad_clip: float = setting(1.0, "largest gradient norm (0: any)", low=0)
    keep_prefix: float = setting(1.0, "GB for the frozen blocks' output", low=0)  # 0: never kept
    seed: int = setting(0, "of adapter, order of the pairs, sampled answers", low=0)

    # Where it is kept and where it runs.
    run: str = setting(None, "the folder's name (default: the next free PAIRS-1, PAIRS-2, ...)",
                       group="run")
    runs: str = setting("runs", "where runs are kept")
    resume: str = setting("", "a run's folder: go on where it stopped")
    log_every: int = setting(50, "steps between two lines", low=1)
    save_every: int = setting(100, "steps between two savings", low=1)
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    dtype: str = setting("auto", "of the frozen weights; auto: bfloat16 on cuda", choices=DTYPES)
    threads: int = setting(0, "CPU threads (0: as torch chooses)", low=0)

    def __post_init__(self):
        check(self)
        if isinstance(self.sae, list) and len(self.sae) == 1:
            self.sae = self.sae[0]                     # a single one is a text, in config.json too
        # What contradicts itself is told before anything is loaded.
        if self.loss == "hinge" and self.label_smoothing:
            raise UserError("--label-smoothing belongs to --loss sigmoid; the hinge has none")
        if not self.simpo_weight and not self.nll_weight:
            raise UserError("--simpo-weight and --nll-weight are both 0: nothing is left to learn from")
        if self.adapter and (self.activation != "soft" or self.policy):
            raise UserError("--adapter replaces --activation, and --policy replaces both: give one")
        for name in (*fsrl.KEPT, "activation", "mask") if self.policy else ():     # Steering's own
            if getattr(self, name, None) != getattr(TrainConfig, name, None):
                raise UserError(f"--policy replaces the steering, to which the setting {name} belongs")
        if self.adapter_args and not self.adapter or self.policy_args and not self.policy:
            raise UserError("--adapter-args and --policy-args belong to --adapter and --policy")


# ---- what is minimised -----------------------------------------------------------------------------

def objective(scored, config, l1, length, own=None):
    """-> preference, side terms (penalty and imitation), each (B,); {name: (B,)} for the log

    length: tokens of a chosen answer, the mean over the training pairs. The NLL of whole answers is
    divided by this one number: a mean over tokens, as in supervised fine-tuning. A mean of each answer's
    own mean would weigh short answers' tokens more, and a policy would learn to be brief from pairs that
    say nothing (docs/tuning.md).
    """
    chosen, rejected = scored.chosen, scored.rejected
    # what the policy should learn, and what keeps it small and its text whole
    loss = simpo.preference_loss(chosen, rejected, vars(config), own)         # SimPO, or the user's own
    penalty = l1 * scored.penalty                          # Σ|v|, or what the adapter says instead
    nll = -chosen.sum / length
    side = penalty + config.nll_weight * nll if config.nll_weight else penalty
    margin = chosen.mean - rejected.mean                   # nats a token, without β
    shown = {"loss": loss, "penalty": penalty, "margin": margin, "accuracy": (margin > 0).float(),
             "nll": -chosen.mean, **scored.shown}
    shown = {name: x.detach() for name, x in shown.items()}
    return config.simpo_weight * loss, side, shown


# ---- the loop --------------------------------------------------------------------------------------

def pair_order(pairs, per_step, seed):
    """Without end: the pairs (their indices) of each step, every pair once an epoch but for a remainder.

    An epoch is shuffled, cut into pools of 16 steps, sorted by length within a pool, so that rows of a
    step are alike and little is padding, and its steps are shuffled again.
    """
    epoch = 0
    while True:
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(pairs), generator=g).tolist()
        while len(order) < per_step:                      # fewer pairs than one step wants: go round
            order += order
        # The remainder goes before the sorting: after it, it would be the longest.
        del order[len(order) // per_step * per_step:]
        steps = []
        for i in range(0, len(order), 16 * per_step):
            pool = sorted(order[i:i + 16 * per_step], key=lambda j: simpo.tokens(pairs[j]))
            starts = range(0, len(pool) - per_step + 1, per_step)
            steps += [pool[j:j + per_step] for j in starts]
        for j in torch.randperm(len(steps), generator=g).tolist():
            yield steps[j]
        epoch += 1


def lr_at(step, config):
    """Learning rate of step 0, 1, ...: up over `warmup`, then to 0 as `schedule` says."""
    up = config.warmup * config.steps
    if step < up:
        return config.lr * (step + 1) / (up + 1)
    t = (step - up) / max(1, config.steps - up)                          # from 0 to 1 over the rest
    down = {"constant": 1.0, "linear": 1 - t, "cosine": 0.5 * (1 + math.cos(math.pi * t))}
    return config.lr * down[config.schedule]


def trainable(policy):
    return [p for p in policy.parameters() if p.requires_grad]


def make_optimizer(policy, config):
    """AdamW; weight decay on matrices alone, a learning rate of their own for thresholds."""
    groups = {}
    for name, p in policy.named_parameters():
        if p.requires_grad:
            kind = "threshold" if name.endswith("threshold") else "matrix" if p.dim() > 1 else "vector"
            groups.setdefault(kind, []).append(p)
    for kind, some in groups.items():
        decay = config.weight_decay if kind == "matrix" else 0.0
        scale = config.threshold_lr if kind == "threshold" else 1.0        # used by the loop
        groups[kind] = {"params": some, "weight_decay": decay, "scale": scale}
    return torch.optim.AdamW(groups.values(), lr=config.lr)


def train(config):
    """Trains, prints, saves. -> {"base": m, "trained": m, "run": folder}; m: see `measure`"""
    started = time.time()                                                     # loading counts, too
    # open, prove that nothing happens when nothing should, measure the base model
    config = resumed(config) if config.resume else config
    show.announce(config)
    model, tokenizer, policy, pairs, held, judge, own = prepare(config)
    gap = check_policy(model, policy, pairs)
    folder = start_folder(config, model, policy, train=simpo.digest(pairs), held=simpo.digest(held))
    show.opening(tokenizer, pairs[0], model, policy, gap)
    base, base_answers = measure(model, tokenizer, held, None, judge, config, own)     # the control

    # what the loop needs
    policy.train()
    parameters = trainable(policy)                         # none: the policy is measured, not trained
    optimizer = make_optimizer(policy, config) if parameters else None
    checkpoint = Checkpoint(folder, parameters, optimizer)
    start, window, tokens = checkpoint.restore()                  # 0, [], 0 of a run that is new
    log = Log(folder, start, step=0, evaluation="base", **base)
    order = pair_order(pairs, config.batch_size * config.accumulation, config.seed)
    length = sum(len(p.chosen) for p in pairs) / len(pairs)                   # see `objective`
    size = sum(map(simpo.tokens, pairs)) * model.config.hidden_size * model.norm.weight.element_size()
    kept, kept_base = {} if size <= config.keep_prefix * 1e9 else None, {}    # all of it, or none

    def never_changes(part):
        """A batch of these pairs, the frozen blocks' output (None: there are none), the base's means."""
        batch = simpo.collate([pairs[j] for j in part], model.config.pad_token_id).to(model.device)
        h, means = None, None
        if policy.frozen is not None:
            h = kept_rows(kept, batch, part, lambda: simpo.prefix(model, batch, policy.frozen))
        if own:                                                 # it may ask what the base model says
            means = kept_rows(kept_base, batch, part, lambda: simpo.base_means(model, batch).T)
        return batch, h, means

    def parts_of(index):
        return [index[i:i + config.batch_size] for i in range(0, len(index), config.batch_size)]
    for _ in range(start):                                      # the order goes on, what is kept too
        for part in parts_of(next(order)) if kept is not None else ():
            never_changes(part)
    since = time.time()                                                       # the last log line
    bar = tqdm(range(start, config.steps * bool(parameters)), desc="train", unit="step")
    bar.write(show.HEAD)
    for step in bar:
        # learning rate, and weight of the penalty
        for group in optimizer.param_groups:                                # thresholds have their own
            group["lr"] = lr_at(step, config) * group["scale"]
        rising = max(1.0, config.l1_warmup * config.steps)                  # steps
        l1 = config.l1 * min(1.0, (step + 1) / rising)
        last = step + 1 == config.steps
        # gradients: a mean over all pairs of the step, however it is cut into forward passes
        index = next(order)                                     # of the pairs of this step
        optimizer.zero_grad(set_to_none=True)                   # None: what gets no gradient stays
        for part in parts_of(index):
            batch, h, means = never_changes(part)               # h (B,T,D), no gradient
            scored = simpo.score(model, batch, policy, h)
            scored = simpo.with_base(scored, means.T) if own else scored
            preference, side, shown = objective(scored, config, l1, length, own)
            if step == min(50, config.steps) - 1 and part[0] == index[0]:        # two gradients more
                for text in show.early_warnings(preference, side, shown, parameters):
                    bar.write(text)
            ((preference + side).sum() / len(index)).backward()             # adds to the others'
            window.append(shown)
            tokens += int((batch.branch >= 0).sum())                     # without padding
        # guard: before the step the policy is still the last good one
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        if not (torch.isfinite(norm) and all(torch.isfinite(shown["loss"]).all() for shown in window)):
            bar.close()
            raise FloatingPointError(show.not_a_number(config, folder, step))
        # step
        optimizer.step()                                 # from here on the kept policy is an older one
        if hasattr(policy, "project"):                                   # soft thresholds stay >= 0
            policy.project()
        # log
        if (step + 1) % config.log_every == 0 or last:
            every = {name: torch.cat([shown[name] for shown in window]) for name in window[0]}
            row = {name: x.mean().item() for name, x in every.items()}        # over pairs
            row["lr"] = optimizer.param_groups[0]["lr"]
            row["tokens_per_s"] = tokens / (time.time() - since)              # logging included
            bar.write(show.line(step + 1, row))
            log(step=step + 1, **row)
            window, tokens, since = [], 0, time.time()
        # save
        if (step + 1) % config.save_every == 0 or last or STOP.asked:       # by Ctrl-C
            policy.save(folder, base_model=config.model, step=step + 1, **adapter_arguments(config))
            checkpoint.save(step + 1, window, tokens)
        if STOP.asked and not last:
            raise KeyboardInterrupt(show.stopped(folder, step + 1))
    if not parameters:                                                      # nothing has been saved
        policy.save(folder, base_model=config.model, step=0)

    # the closing table, examples, what to type next
    policy.eval()
    trained, answers = measure(model, tokenizer, held, policy, judge, config, own)
    seconds = time.time() - started
    log(step=config.steps, evaluation="trained", seconds=seconds, **trained)
    print("\n" + show.closing(base, trained, judge, config, policy))
    show.examples(tokenizer, judge, base_answers, answers, config.seed)
    print(show.next_commands(config, folder, held[-1].text, seconds))
    return {"base": base, "trained": trained, "run": str(folder)}


# ---- what is measured and printed ------------------------------------------------------------------

def measure(model, tokenizer, pairs, policy, judge, config, own=None):
    """simpo.evaluate, and what answers do. -> dict, {prompt: ids sampled at T=1}

    Of a judge that knows: greedy and sampled, the rate of every choice, and what show.headline adds.
    Of any other data a few prompts are answered, for somebody to read.
    """
    acting, edits = policy.acting(model) if policy else (model, None)
    texts = list(dict.fromkeys(p.text for p in pairs))            # each once, in order
    known = [text for text in texts if judge.question(text)]
    asked = known or texts[:3]
    prompts = [encode_prompt(tokenizer, text) for text in asked]
    kinds = {"greedy": 0.0, "sampled": 1.0} if known else {"sampled": 1.0}
    with tqdm(total=len(pairs) + len(kinds) * len(asked), desc="evaluate", leave=False) as bar:
        # likelihoods of the pairs' own answers
        m = simpo.evaluate(model, pairs, policy, config=vars(config), objective=own,
                           progress=bar.update)
        # answers of its own: a good loss can belong to broken text
        for kind, temperature in kinds.items():
            ids = generate(acting, prompts, max_new_tokens=64, edits=edits, temperature=temperature,
                           seed=config.seed)
            if known:
                m[kind] = judge.rates(asked, ids)
            bar.update(len(asked))
    return m | show.headline(m, judge, len(asked)), dict(zip(asked, ids))


@torch.no_grad()
def check_policy(model, policy, pairs, spec=None):
    """Two promises, before a policy is trained. -> largest difference of log-probabilities from the base

    Steering at strength 0 is the base model, bit for bit. Of a user's own policy (spec): what `run`
    trains is what `acting` does, which answers and is analysed, also later: all that is trained is moved
    a little for the comparison. A `frozen` that is too high shows here.
    """
    few, steerings = pairs[:4], getattr(policy, "steerings", [])
    batch = simpo.collate(few, model.config.pad_token_id).to(model.device)

    def means(policy=None):
        s = simpo.score(model, batch, policy)
        return torch.stack([s.chosen.mean, s.rejected.mean], 1)                  # (4,2)
    # off, measured, on again
    strengths = [s.strength for s in steerings]
    for s in steerings:
        s.strength = 0.0
    base = means()
    gap = (means(policy) - base).abs().max().item()
    for s, strength in zip(steerings, strengths):
        s.strength = strength
    if steerings and gap != 0:
        raise UserError(f"steering at strength 0 is not the base model: log-probabilities differ by "
                        f"{gap}; does the adapter give infinite or missing numbers?")
    # moved, measured in both ways, moved back
    if spec:
        before = [p.clone() for p in trainable(policy)]
        for p in trainable(policy):
            p.add_(0.02 * torch.randn_like(p))
        acting = base.new_tensor([simpo.by_the_book(model, pair, policy) for pair in few])
        differ = (means(policy) - acting).abs().max()
        for p, old in zip(trainable(policy), before):
            p.copy_(old)
        if not differ <= 0.1 * (base - acting).abs().max() + 0.01:                 # nan, too
            raise UserError(f"--policy {spec}: what `run` trains is not what `acting` does, their "
                            f"log-probabilities differ by {differ:.2g}; is `frozen` right?")
    return gap


# ---- opening what the settings name ----------------------------------------------------------------

def prepare(config):
    """Looks at all that a user can get wrong, in the order of what it costs, and loads it. -> model,
    tokenizer, policy, pairs, held-out pairs, judge, the user's objective or None"""
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = choose_device(config.device, config.dtype)
    # settings, files of the user's, data: cheap
    check_free(config)                                         # hours later would be too late
    own = own_objective(config.objective) if config.objective else None
    tokenizer = load_tokenizer(config.model)
    judge = judge_of(config.pairs, tokenizer)                  # what is known about answers to these
    held = config.eval_pairs or (1000 if config.steps > 100 else 200)
    records = read_splits(config.pairs, config.eval_split, config.train_pairs, held)
    encoded = []
    for name, some in records.items():
        pairs, changed = simpo.encode_pairs(tokenizer, some, config.max_length)
        show.cut(config, name, len(pairs), changed)
        encoded.append(pairs)
    if config.epochs:
        per_step = config.batch_size * config.accumulation
        config.steps = math.ceil(config.epochs * len(encoded[0]) / per_step)
    # Read against the model's config alone, the adapter tried on random states: minutes saved.
    saes = fsrl.load_saes(config.sae, load_config(config.model), dtype=dtype, device=device)
    torch.manual_seed(config.seed)
    policy = None if config.policy else make_steerings(config, saes, device, dtype)     # needs no model
    model = load_gemma(config.model, dtype=dtype, device=device)          # last: it is what takes long
    if config.policy:
        policy = own_policy(config.policy, model, saes, config.policy_args)
        with explained(f"--policy {config.policy}", "it cannot be measured or run"):
            if hasattr(policy, "fit"):
                policy.fit(model, encoded[0])
            check_policy(model, policy, encoded[0], config.policy)
    return model, tokenizer, policy, *encoded, judge, own


def make_steerings(config, saes, device, dtype):
    """A fresh adapter for each SAE, as one policy."""
    masked, out = masked_features(config.mask), []
    how = {name: getattr(config, name) for name in ("fusion", "positions", "top_k")}
    for sae in saes:
        shape = sae.d_in, sae.d_sae
        if config.adapter:
            adapter = own_adapter(config.adapter, *shape, **adapter_arguments(config))
        else:
            adapter = fsrl.Adapter(*shape, config.activation, init=config.init,
                                   bandwidth=config.bandwidth)
        adapter.to(device, fsrl.master_dtype(dtype))
        out.append(fsrl.Steering(sae, adapter, masked=masked, **how))
        show.masked(masked, sae.d_sae)
    return out[0] if len(out) == 1 else fsrl.Steerings(out)


def main(argv=None):
    with STOP:
        return command("train.py", TrainConfig, train, argv, show.ABOUT, ROOT / "presets.toml")


if __name__ == "__main__":
    sys.exit(main())
