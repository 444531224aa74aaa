"""Speed and memory beside the obvious implementation, in one run, as ratios: `python tests/bench.py` (needs requirements-extra.txt).

The obvious one is transformers' Gemma2ForCausalLM with eager attention, a forward hook with the same adapter on the same
layer, chosen and rejected padded into one batch of 2B sequences, full-vocabulary log-probabilities. Ours is one row a pair, the head
on answer tokens alone and in chunks, the frozen blocks without a graph; "warm" has the frozen prefix kept. Forward and
backward of the SimPO loss, float32, two threads, the same weights and pairs. Every variant runs in a process of its own, so that its peak
memory is its own; nothing here is asserted. Then: the share of the matrix-product rate that this machine reaches on one large product,
and how time and memory grow with answer length, vocabulary and features.

    python tests/bench.py            # writes docs/bench.json and the tables of README.md and docs/results.md
"""
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
DATA = HERE.parent / "docs" / "bench.json"

SHAPES = {
    "tiny": dict(model=dict(vocab_size=576, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=32, query_pre_attn_scalar=32, sliding_window=32), layer=3, features=1024, pairs=32, prompt=(14, 20), answer=(5, 30)),
    "mid": dict(model=dict(vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                           head_dim=64, query_pre_attn_scalar=64, sliding_window=4096), layer=3, features=4096, pairs=4, prompt=(128, 128), answer=(64, 128)),
}
VARIANTS = ("obvious", "cold", "warm")
GROWTH = {"answer": [64, 128, 256, 512], "vocab_size": [8192, 16384, 32768, 65536], "features": [2048, 4096, 8192, 16384]}      # of mid, two pairs


def work(shape, variant, repeats, **changes):
    """Times one variant; prints its median seconds and its peak memory above the weights."""
    import torch
    from common import some_pairs
    from fsrl import Adapter, Steering
    from gemma import Gemma, GemmaConfig
    from sae import JumpReLUSAE
    import simpo
    torch.set_num_threads(2)
    s, g = {**SHAPES[shape], **{k: v for k, v in changes.items() if k != "vocab_size"}}, torch.Generator().manual_seed(0)
    if "vocab_size" in changes:
        s["model"] = {**s["model"], "vocab_size": changes["vocab_size"]}
    model = Gemma(GemmaConfig(**s["model"])).requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, p.shape[1] ** -.5, generator=g)
    D, F = s["model"]["hidden_size"], s["features"]
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=-1)
    sae = JumpReLUSAE(W_dec.T.contiguous(), torch.zeros(F), W_dec, torch.zeros(D), torch.ones(F), layer=s["layer"])
    torch.manual_seed(0)
    adapter = Adapter(D, F, "soft", init=1e-3)
    draw = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))      # noqa: E731
    pairs = some_pairs([(draw(*s["prompt"]), draw(*s["answer"]), draw(*s["answer"])) for _ in range(s["pairs"])], vocab=s["model"]["vocab_size"])
    if variant == "obvious":
        from golden import oracle
        theirs = oracle(model).requires_grad_(False)
        del model
        answers = [(p.prompt, a) for side in ("chosen", "rejected") for p in pairs for a in [getattr(p, side)]]
        width = max(len(p) + len(a) for p, a in answers)
        ids, mask, labels = (torch.full((len(answers), width), fill) for fill in (0, 0, -100))
        for i, (p, a) in enumerate(answers):
            n = len(p) + len(a)
            ids[i, :n], mask[i, :n], labels[i, len(p):n] = torch.tensor(p + a), 1, torch.tensor(a)
        steered = mask.bool()[..., None] & (torch.arange(width)[None, :, None] > 0)            # all but BOS and padding, as ours

        def hook(module, args, out):
            h = out[0] if isinstance(out, tuple) else out
            h = h + (adapter(h) * steered) @ sae.W_dec
            return (h, *out[1:]) if isinstance(out, tuple) else h
        theirs.model.layers[s["layer"]].register_forward_hook(hook)

        def once():
            logp = theirs(ids, attention_mask=mask, use_cache=False).logits[:, :-1].log_softmax(-1)
            want = labels[:, 1:]
            token = logp.gather(-1, want.clamp_min(0)[..., None])[..., 0] * (want >= 0)
            chosen, rejected = (token.sum(-1) / (want >= 0).sum(-1)).chunk(2)
            simpo.simpo_loss(chosen, rejected).mean().backward()
    else:
        batch, steering = simpo.collate(pairs), Steering(sae, adapter)
        kept = simpo.prefix(model, batch, sae.layer) if variant == "warm" else None

        def once():
            chosen, rejected, _, _ = simpo.steered_logps(model, batch, steering, kept)
            simpo.simpo_loss(chosen, rejected).mean().backward()
    def memory(what):                         # Linux: bytes resident now (VmRSS) or at the peak (VmHWM)
        try:
            return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
        except (OSError, StopIteration):
            return float("nan")
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")        # the peak begins anew: loading does not count
    before = memory("VmRSS")
    once()                                    # the first pass takes the memory
    above = memory("VmHWM") - before
    times = []
    for _ in range(repeats):
        adapter.zero_grad(set_to_none=True)
        began = time.perf_counter()
        once()
        times.append(time.perf_counter() - began)
    kept_bytes = kept.nbytes if variant == "warm" else 0
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        once()
    gradient = sum(p.grad.double().norm().item() for p in adapter.parameters()) / 2        # two passes went into it
    rate = 0.0                                # the best of several large products, of those this machine's caches and threads like
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        rate = max(rate, 2 * 1024 ** 3 / (time.perf_counter() - began))
    seconds = statistics.median(times)
    print(json.dumps({"seconds": seconds, "memory": above + kept_bytes, "flop": counter.get_total_flops(), "rate": rate,
                      "share": counter.get_total_flops() / seconds / rate, "gradient": gradient}))


def measure(shape, variant, repeats, **changes):
    """One process of `work`. -> its numbers"""
    done = subprocess.run([sys.executable, __file__, "--work", shape, variant, str(repeats), json.dumps(changes)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench.py: {variant} failed: {done.stderr.strip().splitlines()[-1]} (requirements-extra.txt installed?)")
    return json.loads(done.stdout.splitlines()[-1])


def middle(runs):
    return {k: statistics.median(run[k] for run in runs) for k in runs[0]}


def tables(data):
    """-> {"speed": markdown, "growth": markdown}, what README.md and docs/results.md show."""
    rows = ["| | seconds | speed | MB above the weights | share of memory | share of the machine's matrix-product rate |", "|---|---|---|---|---|---|"]
    for shape, seen in data["speed"].items():
        o = seen["obvious"]
        rows += [f"| `{shape}`, {variant} | {m['seconds']:.3f} | {o['seconds'] / m['seconds']:.2f}× | {m['memory'] / 2**20:.0f} | {m['memory'] / o['memory']:.2f} | {m['share']:.0%} |"
                 for variant, m in seen.items()]
    grown = ["| of `mid`, two pairs, cold | seconds | MB above the weights |", "|---|---|---|"]
    names = {"answer": "tokens an answer", "vocab_size": "vocabulary V", "features": "features F"}
    for what, seen in data["growth"].items():
        grown.append(f"| {names[what]}: {' → '.join(seen)} | {' → '.join(format(m['seconds'], '.2f') for m in seen.values())} | "
                     f"{' → '.join(format(m['memory'] / 2**20, '.0f') for m in seen.values())} |")
    made = f"\n({data['made']}.)\n"
    return {"speed": "\n".join(rows) + "\n" + made, "growth": "\n".join(grown) + "\n" + made}


def main(argv=None):
    import platform
    import torch
    from tqdm import tqdm
    sys.path.insert(0, str(HERE.parent / "docs"))
    import results
    rounds, repeats, steps = 3, {"tiny": 12, "mid": 3}, []
    data = {"speed": {shape: {v: [] for v in VARIANTS} for shape in SHAPES}, "growth": {what: {str(n): [] for n in sizes} for what, sizes in GROWTH.items()}}
    for shape in SHAPES:                      # in turn, so that a slow minute of the machine hits all of them
        steps += [("speed", shape, v, dict(shape=shape, variant=v, repeats=repeats[shape])) for _ in range(rounds) for v in VARIANTS]
    steps += [("growth", what, str(n), dict(shape="mid", variant="cold", repeats=3, pairs=2, **{what: (n, n) if what == "answer" else n}))
              for what, sizes in GROWTH.items() for n in sizes]
    for part, a, b, how in tqdm(steps, desc="bench"):
        data[part][a][b].append(measure(**how))
    for part in ("speed", "growth"):
        data[part] = {a: {b: middle(runs) for b, runs in some.items()} for a, some in data[part].items()}
    for shape, seen in data["speed"].items():
        for variant, m in seen.items():       # the variants compute the same thing
            assert abs(m["gradient"] / seen["obvious"]["gradient"] - 1) < 1e-3, (shape, variant)
    data["made"] = f"Medians of {rounds} processes, growth of one, {time.strftime('%Y-%m-%d')}, {platform.machine()}, 2 threads, torch {torch.__version__}, float32"
    DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for page in results.PAGES:
        page.write_text(results.filled(page.read_text(encoding="utf-8"), tables(data)), encoding="utf-8")
    print(*tables(data).values(), sep="\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]), **json.loads(sys.argv[5]))
    else:
        sys.exit(main())
