"""Speed and memory beside the obvious implementation, in one run, as ratios: `python tests/bench.py` (needs requirements-extra.txt).

The obvious one is transformers' Gemma2ForCausalLM with eager attention, a forward hook with the same adapter on the same
layer, chosen and rejected padded into one batch of 2B sequences, full-vocabulary log-probabilities. Ours is one row a pair, the head
on answer tokens alone and in chunks, the frozen blocks without a graph; "warm" has the frozen prefix kept. Forward and
backward of the SimPO loss, float32, two threads, the same weights and pairs. Every variant runs in a process of its own, so that its peak
memory is its own; nothing here is asserted.
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

SHAPES = {
    "tiny": dict(model=dict(vocab_size=576, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=32, query_pre_attn_scalar=32, sliding_window=32), layer=3, features=1024, pairs=32, prompt=(14, 20), answer=(5, 30)),
    "mid": dict(model=dict(vocab_size=32768, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                           head_dim=64, query_pre_attn_scalar=64, sliding_window=4096), layer=3, features=4096, pairs=4, prompt=(128, 128), answer=(64, 128)),
}
VARIANTS = ("obvious", "cold", "warm")


def work(shape, variant, repeats):
    """Times one variant; prints its median seconds and its peak memory above the weights."""
    import torch
    from common import some_pairs
    from fsrl import Adapter, Steering
    from gemma import Gemma, GemmaConfig
    from sae import JumpReLUSAE
    import simpo
    torch.set_num_threads(2)
    s, g = SHAPES[shape], torch.Generator().manual_seed(0)
    model = Gemma(GemmaConfig(**s["model"])).requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            p.normal_(0, p.shape[1] ** -.5, generator=g)
    D, F = s["model"]["hidden_size"], s["features"]
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=-1)
    sae = JumpReLUSAE(W_dec.T.contiguous(), torch.zeros(F), W_dec, torch.zeros(D), torch.ones(F), layer=s["layer"])
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
    tokens = sum(len(p.chosen) + len(p.rejected) for p in pairs)
    kept_bytes = kept.nbytes if variant == "warm" else 0
    print(json.dumps({"seconds": statistics.median(times), "memory": above + kept_bytes, "answer_tokens": tokens,
                      "gradient": sum(p.grad.double().norm().item() for p in adapter.parameters())}))


def main(argv=None):
    rounds, repeats = 3, {"tiny": 12, "mid": 3}
    print(f"{'':18}{'seconds':>9}{'speed':>8}{'memory MB':>11}{'ratio':>7}   (medians of {rounds} processes each, taken in turn; obvious = 1)")
    for shape in SHAPES:
        seen = {variant: [] for variant in VARIANTS}
        for _ in range(rounds):
            for variant in VARIANTS:          # in turn, so that a slow minute of the machine hits all of them
                done = subprocess.run([sys.executable, __file__, "--work", shape, variant, str(repeats[shape])], capture_output=True, text=True)
                if done.returncode:
                    print(f"bench.py: {variant} failed: {done.stderr.strip().splitlines()[-1]} (requirements-extra.txt installed?)", file=sys.stderr)
                    return 2
                seen[variant].append(json.loads(done.stdout.splitlines()[-1]))
        middle = {v: {k: statistics.median(r[k] for r in some) for k in some[0]} for v, some in seen.items()}
        for variant, m in middle.items():
            o = middle["obvious"]
            print(f"{shape:>6} {variant:<11}{m['seconds']:9.3f}{o['seconds'] / m['seconds']:7.2f}x{m['memory'] / 2**20:11.0f}{m['memory'] / o['memory']:7.2f}   "
                  f"gradient norm {m['gradient'] / o['gradient']:.4f} of obvious")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(main())
