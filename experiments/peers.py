"""One row from outside: TRL's own SimPO trainer on the same model and pairs, judged by our judge.

TRL (trl.experimental.cpo, full fine-tuning) is what a user would pick instead. It is no requirement:
`pip install trl` beside requirements-extra.txt. Its model is read by gemma.py and goes into the same
table and figure as the others (experiments/frontier.py), once by itself and once with `cpo_alpha`, its
term that keeps the text whole, at our nll_weight. It gets one learning rate and one seed: a training
takes seven minutes on one core.

    python -m experiments.peers             # into docs/policies.json
"""
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.utils.flop_counter import FlopCounterMode

import simpo
import train
from experiments import frontier
from experiments.baselines import Full
from gemma import encode_answer, encode_prompt, load_gemma, load_tokenizer
from lib.files import UserError, write_json
from lib.pairs import read_pairs
from lib.runs import metrics
from lib.settings import command, setting

MODEL, PAIRS = "tiny/model", "tiny/pairs/style"
VARIANTS = {"TRL SimPO": 0.0, "TRL SimPO, cpo_alpha 5": 5.0}


def trainer_of(alpha, config):
    """TRL's trainer with our recipe: β 10, γ/β 0.5, AdamW, cosine, 32 pairs a step."""
    from datasets import Dataset
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    ends = {"bos_token": "<bos>", "eos_token": "<end_of_turn>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{MODEL}/tokenizer.json", **ends)
    rows, ours = [], load_tokenizer(MODEL)
    for record in read_pairs(PAIRS, "train"):
        prompt = f"<start_of_turn>user\n{record['prompt']}<end_of_turn>\n<start_of_turn>model\n"
        rows.append({"prompt": prompt, "chosen": record["chosen"], "rejected": record["rejected"]})
    model = Gemma2ForCausalLM.from_pretrained(MODEL, attn_implementation="eager", dtype=torch.float32)
    loss = {"loss_type": "simpo", "cpo_alpha": alpha, "beta": 10.0, "simpo_gamma": 5.0}
    how = {"learning_rate": config.lr, "max_steps": config.steps, "lr_scheduler_type": "cosine"}
    how |= {"warmup_steps": 0.1, "per_device_train_batch_size": 32, "max_length": 512, "seed": 0}
    quiet = {"report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True}
    args = CPOConfig(output_dir=str(frontier.RUNS / "trl"), **loss, **how, **quiet)
    trainer = CPOTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    # the same tokens as ours, or nothing can be compared
    for record, row in zip(read_pairs(PAIRS, "train", 20), trainer.train_dataset):
        prompt, chosen = encode_prompt(ours, record["prompt"]), encode_answer(ours, record["chosen"])
        assert row["chosen_input_ids"] == prompt + chosen, "TRL sees other tokens"
    return trainer


def flops(trainer):
    """Of a step of 32 pairs, forward and backward."""
    batch = next(iter(trainer.get_train_dataloader()))
    with FlopCounterMode(display=False) as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    trainer.model.zero_grad()
    return counter.get_total_flops()


def train_trl(alpha, config):
    """-> what docs/policies.json keeps of a policy"""
    trainer = trainer_of(alpha, config)
    cost = {"trainable": sum(p.numel() for p in trainer.model.parameters()), "flops": flops(trainer)}
    started = time.time()
    trainer.train()
    seconds, folder = time.time() - started, frontier.RUNS / f"trl_{alpha:g}"
    trainer.save_model(str(folder))
    base, tokenizer = load_gemma(MODEL), load_tokenizer(MODEL)
    policy = Full(base, [])
    policy.tuned = load_gemma(folder)
    points = {"cost": cost, "seconds": seconds, "step": seconds / config.steps}
    for strength in frontier.STRENGTHS:
        policy.strength = strength
        points[str(strength)] = frontier.measured(base, tokenizer, policy)
    return {"curves": {f"trl-{alpha:g}": points}, "trials": []}


def our_step(settings, steps=100):
    """Seconds a step of train.py, without what it measures before and after."""
    config = train.TrainConfig(**settings, steps=steps, eval_pairs=2, runs=str(frontier.RUNS / "timing"))
    folder = train.train(config)["run"]
    rate = [row["tokens_per_s"] for row in metrics(folder) if "tokens_per_s" in row]
    pairs, _ = simpo.encode_pairs(load_tokenizer(MODEL), read_pairs(PAIRS, "train"))
    return 32 * sum(map(simpo.tokens, pairs)) / len(pairs) / rate[-1]


@dataclass
class PeersConfig:
    steps: int = setting(800, "optimiser steps of 32 pairs", low=1, group="how")
    lr: float = setting(5e-4, "peak learning rate", above=0)


def run(config):
    if missing := [name for name in ("trl", "datasets", "transformers") if not find_spec(name)]:
        raise UserError(f"{missing[0]} is missing: pip install trl datasets, beside "
                        "requirements-extra.txt")
    ours = {"FSRL": {}, "Full": {"policy": "experiments/baselines.py:Full"}}
    seconds = {name: our_step(settings) for name, settings in ours.items()}
    for name, alpha in VARIANTS.items():
        if name in frontier.kept()["policies"]:
            print(f"{name}: kept")
            continue
        made = train_trl(alpha, config)
        seconds[name] = made["curves"][f"trl-{alpha:g}"]["step"]
        data = frontier.kept()
        data["policies"][name] = made
        data["seconds a step"] = data.get("seconds a step", {}) | seconds
        write_json(frontier.DATA, data, indent=1)
    print(frontier.kept().get("seconds a step"))


def main(argv=None):
    return command("python -m experiments.peers", PeersConfig, run, argv, "TRL's SimPO beside ours.")


if __name__ == "__main__":
    sys.exit(main())
