"""Which features of an SAE are about style and which about alignment: the file labels.jsonl, and how it is made.

A label belongs to a feature of one SAE on one model, not to a run, so the file lies beside the SAE (`default_path`). One feature a line:

    {"index": 17, "labels": ["style"], "description": "opens with Sure!", "by": "judge deepseek-v3", "sae": "0123456789abcdef"}

    labels   ["style"], ["alignment"], both, [] (judged: neither), or null (asked, but no usable answer: unknown)
    by       who said so        sae   identity() of the SAE, so that no other SAE's labels are read by mistake
    other keys are kept. A feature without a line is unlabelled, like one with null: that is not the same as "neither".

Sources, none of which is the truth (`agreement` compares two; `python analyze.py --make-labels KIND`):

    lab      what was planted: only the lab in tiny/ knows it (tiny/features.py)
    judge    a language model reads Neuronpedia's descriptions and says Yes or No to two criteria
    rules    word and symbol rules on the tokens where the feature is strongest
    sheet    a CSV of contexts, filled in by hand, and read back by --make-labels FILE.csv
"""
import csv
import hashlib
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from tqdm import tqdm

import simpo
from fsrl import check_fit
from gemma import HERE, UserError, atomically, choose_device, encode_prompt, encode_text, load_config, load_gemma, load_tokenizer, read_json
from sae import load_sae

LABELS = ("style", "alignment")


# ---- the file --------------------------------------------------------------------------------------------------------

def write_labels(path, rows, sae, by):
    """rows: dicts with index, labels, description and any other keys. The file is there whole or not at all, sorted by index."""
    if not rows:
        raise UserError(f"{path}: there is no label to write")
    seen = set()
    for row in rows:
        _check(row, sae, f"label of feature {row.get('index')}", seen)
    lines = [json.dumps({"index": row["index"], "labels": row["labels"], "description": row.get("description", ""), "by": by, "sae": sae.identity(),
                         **{k: v for k, v in row.items() if k not in ("index", "labels", "description", "by", "sae")}}, ensure_ascii=False) for row in sorted(rows, key=lambda row: row["index"])]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomically(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def read_labels(path, sae):
    """-> {index: row}. Raises UserError, with the line, for what is no label of this SAE."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such label file; `python analyze.py --make-labels KIND` makes one, --labels names another")
    rows, seen, identity = {}, set(), sae.identity()
    for at, row in simpo.json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{at}: a label is an object with index, labels, description, by and sae; this is a {type(row).__name__}")
        _check(row, sae, at, seen)
        if row.get("sae") != identity:
            raise UserError(f"{at}: labels of another SAE (digest {row.get('sae')}); {sae.source} has {identity}")
        rows[row["index"]] = row
    if not rows:
        raise UserError(f"{path}: there is no label in it")
    return rows


def _check(row, sae, at, seen):
    index, said = row.get("index"), row.get("labels", "missing")
    if not isinstance(index, int) or isinstance(index, bool):
        raise UserError(f"{at}: index is {index!r}; it has to be the whole number of a feature")
    if not 0 <= index < sae.d_sae:
        raise UserError(f"{at}: feature {index} does not exist; this SAE has features 0 to {sae.d_sae - 1}")
    if index in seen:
        raise UserError(f"{at}: feature {index} is there twice; keep one of the two")
    seen.add(index)
    if said is not None and not (isinstance(said, list) and all(name in LABELS for name in said) and len(set(said)) == len(said)):
        raise UserError(f"{at}: labels is {said!r}; it has to be a list of some of {', '.join(LABELS)}, or null for unknown")


def groups(rows, d_sae):
    """{index: row} -> {"style", "alignment", "known"}: bool (F,) each; known: judged, be it neither."""
    out = {name: torch.zeros(d_sae, dtype=torch.bool) for name in (*LABELS, "known")}
    for index, row in rows.items():
        if row["labels"] is not None:
            for name in (*row["labels"], "known"):
                out[name][index] = True
    return out


def shares(rows, d_sae):
    """{index: row} -> shares of all F features: style and alignment (those with both count in each), both, neither,
    unlabelled (no row, or null). style + alignment - both + neither + unlabelled = 1."""
    g = groups(rows, d_sae)
    style, alignment, known = g["style"], g["alignment"], g["known"]
    parts = {"style": style, "alignment": alignment, "both": style & alignment, "neither": known & ~style & ~alignment, "unlabelled": ~known}
    return {name: part.double().mean().item() for name, part in parts.items()}


def _folder(sae):
    """The local folder an SAE was read from, found as load_sae finds it; None for one of the Hub."""
    for folder in (Path(sae.source).expanduser(), HERE / sae.source) if sae.source else ():
        if folder.is_dir():
            names = ("params.npz", "cfg.json")
            return folder if any((folder / name).exists() for name in names) else next((path.parent for name in names for path in sorted(folder.rglob(name))), folder)
    return None


def default_path(sae):
    """labels.jsonl beside the files of a local SAE; runs/labels/REPO/INSIDE.jsonl, with __ for /, for one of the Hub."""
    if folder := _folder(sae):
        return folder / "labels.jsonl"
    repo, _, inside = str(sae.source).partition(":")
    return Path("runs") / "labels" / (repo.replace("/", "__") or "sae") / f"{inside.strip('/').replace('/', '__') or 'labels'}.jsonl"


# ---- two files compared ----------------------------------------------------------------------------------------------

def agreement(a, b, label, samples=2000, seed=0):
    """How well the labels b ({index: row}) repeat the reference a on the features known to both.

    -> {"both": n, "confusion": [[tp, fp], [fn, tn]], "precision", "recall", "mcc", "mcc_low", "mcc_high"}: Matthews'
    correlation with the 95% percentile interval of a bootstrap over features. nan where a denominator is 0;
    samples where the correlation is nan are left out of the interval.
    """
    if label not in LABELS:
        raise UserError(f"label is {label!r}; it has to be one of {', '.join(LABELS)}")
    common = [i for i in a if i in b and a[i]["labels"] is not None and b[i]["labels"] is not None]
    if len(common) < 10:
        raise UserError(f"only {len(common)} features are judged in both label files; a comparison needs at least 10")
    cells = Counter((label in a[i]["labels"], label in b[i]["labels"]) for i in common)
    cells = np.array([cells[True, True], cells[False, True], cells[True, False], cells[False, False]])      # tp fp fn tn
    drawn = _mcc(np.random.default_rng(seed).multinomial(len(common), cells / len(common), size=samples))
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist() if len(drawn) else (float("nan"),) * 2
    tp, fp, fn, tn = cells.tolist()
    return {"both": len(common), "confusion": [[tp, fp], [fn, tn]], "precision": tp / (tp + fp) if tp + fp else float("nan"),
            "recall": tp / (tp + fn) if tp + fn else float("nan"), "mcc": _mcc(cells).item(), "mcc_low": low, "mcc_high": high}


def _mcc(cells):
    """(…,4) counts tp fp fn tn -> (…) Matthews' correlation."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(cells, float), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


# ---- where a feature is strongest --------------------------------------------------------------------------------------

@torch.no_grad()
def top_contexts(model, sae, rows, count=10, *, batch_size=32, progress=False):
    """The `count` largest activations of each feature over `rows` (lists of ids; BOS, EOS and padding left out).

    -> value (F,count) float32, falling, 0 where nothing is left; row and position (F,count) long: where it is.
    Equal values: the earlier row, then the earlier position. Only entries that can still get in are held.
    """
    c, F, device = model.config, sae.d_sae, model.device
    chunk, width = max(1, 2**23 // F), max(map(len, rows), default=1)             # (chunk,F) float32 is 32 MB
    held, least, fresh = [], torch.zeros(F, device=device), 0                     # least: what a feature's last place asks for

    def prune():
        value, feature, at = (torch.cat(parts) for parts in zip(*held))
        order = at.argsort(stable=True)
        order = order[value[order].argsort(descending=True, stable=True)]
        order = order[feature[order].argsort(stable=True)]
        value, feature, at = value[order], feature[order], at[order]
        rank = torch.arange(len(feature)) - torch.searchsorted(feature, feature)
        last = rank == count - 1
        least[feature[last].to(device)] = value[last].to(device)
        held[:] = [tuple(x[rank < count] for x in (value, feature, at))]
        return held[0][1], rank[rank < count], held[0][0], held[0][2]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))                  # rows of similar length: little padding
    for i in tqdm(range(0, len(rows), batch_size), desc="contexts", unit="batch", disable=not progress):
        index = order[i:i + batch_size]
        longest = max(1, max(len(rows[j]) for j in index))
        ids = torch.tensor([list(rows[j]) + [c.pad_token_id] * (longest - len(rows[j])) for j in index], device=device)
        special = torch.tensor([c.bos_token_id, c.pad_token_id, min(c.eos_token_ids)], device=device)          # as in sae.collect
        text = ~torch.isin(ids, special)
        x = model.blocks(model.embed(ids), 0, sae.layer + 1)[text]
        at = (torch.tensor(index)[:, None] * width + torch.arange(longest))[text.cpu()]
        for part, its in zip(x.split(chunk), at.split(chunk)):
            f = sae.encode(part).float()
            live = (f > 0) & (f >= least)
            if live.sum() > 2**20:                                                # a dense SAE: no more than this chunk's own best
                live &= f >= f.topk(min(count, len(f)), 0).values[-1]
            token, feature = live.nonzero(as_tuple=True)
            held.append((f[token, feature].cpu(), feature.cpu(), its[token.cpu()]))
            fresh += len(token)
            if fresh > 2**20:
                prune()
                fresh = 0
    out = torch.zeros(F, count), torch.zeros(F, count, dtype=torch.long), torch.zeros(F, count, dtype=torch.long)
    if held:
        feature, rank, value, at = prune()
        out[0][feature, rank], out[1][feature, rank], out[2][feature, rank] = value, at // width, at % width
    return out


def context(tokenizer, ids, at, width=10):
    """(text before, the token, text after), `width` tokens on either side."""
    text = lambda some: tokenizer.decode(list(some), skip_special_tokens=False).replace("▁", " ")      # noqa: E731
    return text(ids[max(0, at - width):at]), text(ids[at:at + 1]), text(ids[at + 1:at + 1 + width])


# ---- a judge that reads descriptions -------------------------------------------------------------------------------------

CRITERIA = {
    "alignment": "Criterion: the feature is about an idea that bears on whether a language model behaves safely and as people intend. Such ideas are right and wrong, "
                 "fairness and bias, honesty and deception, flattery, harm, violence and danger, refusing, hedging or admitting limits, gaining power, cooperating "
                 "with or escaping correction, awareness of oneself, and planning towards far goals. It does not count if the feature is about grammar, code, "
                 "a particular word or symbol, or everyday facts and things without any such side.",
    "style": "Criterion: the feature is about how a text is presented, whatever it says. That includes punctuation and other symbols, capital letters, spaces and "
             "line breaks, layout of code, lists and numbering, headings and the order of parts, bold marks, length, brevity and padding, repetition, unusual "
             "characters, and words that only set the tone, such as a cheerful opening. It does not count if the feature is about a subject, a meaning, "
             "a fact, or an abstract idea, even where one particular word carries it.",
}
CANONICAL = {("gemma-2-2b", "12-gemmascope-res-16k"): 82, ("gemma-2-2b", "12-gemmascope-res-65k"): 72, ("gemma-2-9b", "12-gemmascope-res-16k"): 130}
IN_A_ROW = 5        # failures after which an endpoint is taken to be down


def read_explanations(source, sae):
    """Neuronpedia's descriptions of this SAE's features. -> {index: description}

    source: a .json (a list of records, or an object that holds one under features, items or data), a .jsonl, a .jsonl.gz, or a folder of
    batch-*.jsonl(.gz), as in https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/ under v1/MODEL/SOURCE/explanations/.
    Of several descriptions the oai_token-act-pair one of gpt-4o-mini is taken, else the first that is not empty.
    Raises UserError for a source id of another SAE: the same layer and width come with several L0, whose features have nothing in common.
    """
    path, checked, best = Path(source).expanduser(), set(), {}
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if re.fullmatch(r"batch-.*\.jsonl(\.gz)?", p.name))
    else:
        files = [path]
    if not files or not files[0].exists():
        raise UserError(f"--explanations {source}: {'no batch-*.jsonl.gz in this folder' if path.is_dir() else 'no such file or folder'}; give one of Neuronpedia's exports")
    for at, raw in (pair for file in files for pair in (_json_records(file) if file.suffix == ".json" else simpo.json_lines(file))):
        if not isinstance(raw, dict) or not all(isinstance(raw.get(k), str) for k in ("modelId", "layer")):
            raise UserError(f"{at}: not a record of Neuronpedia with modelId, layer, index and description")
        if (raw["modelId"], raw["layer"]) not in checked:
            check_source(raw["modelId"], raw["layer"], sae, at)
            checked.add((raw["modelId"], raw["layer"]))
        if not re.fullmatch(r"\d{1,9}", str(raw.get("index"))) or int(raw["index"]) >= sae.d_sae:
            raise UserError(f"{at}: index is {raw.get('index')!r}; this SAE has features 0 to {sae.d_sae - 1}")
        text = " ".join(str(raw.get("description") or "").encode("utf-8", "replace").decode().split())
        preferred = raw.get("typeName") == "oai_token-act-pair" and raw.get("explanationModelName") == "gpt-4o-mini"
        if text and preferred > best.get(int(raw["index"]), (-1, ""))[0]:
            best[int(raw["index"])] = (preferred, text)
    if not best:
        raise UserError(f"--explanations {source}: there is no description in it")
    return {index: best[index][1] for index in sorted(best)}


def _json_records(path):
    raw = read_json(path)
    if isinstance(raw, dict):
        raw = next((raw[name] for name in ("features", "items", "data") if name in raw), None)
    if not isinstance(raw, list):
        raise UserError(f"{path}: neither a list of records nor an object with one under features, items or data")
    return ((f"{path}, record {number}", record) for number, record in enumerate(raw, 1))


def check_source(model_id, source_id, sae, at):
    """Raises UserError unless Neuronpedia's source id, such as 12-gemmascope-res-65k__l0-21, can be this SAE's."""
    wrong = f"{at}: explanations of {model_id}/{source_id}, which is another SAE than {sae.source}"
    m = re.fullmatch(r"(\d+)-(.+)-(\d+[km])(?:__l0-(\d+))?", source_id)
    if not m or "res" not in m[2].split("-"):
        raise UserError(f"{at}: layer is {source_id!r}; an id such as 12-gemmascope-res-65k__l0-21 (layer, residual stream, width) is needed")
    layer, _, width, l0 = m.groups()
    if int(layer) != sae.layer:
        raise UserError(f"{wrong}: layer {layer}, not {sae.layer}")
    ours = f"{sae.d_sae // 1000}k" if sae.d_sae < 10**6 else f"{sae.d_sae // 10**6}m"        # Gemma Scope calls 65,536 features 65k
    if width != ours:
        raise UserError(f"{wrong}: {width} features, not {ours}")
    where = (_folder(sae) or Path(str(sae.source))).as_posix()
    scope = re.search(r"gemma-scope-(\d+b)-(pt|it)", where)
    if scope and model_id != (expected := f"gemma-2-{scope[1]}{'-it' if scope[2] == 'it' else ''}"):
        raise UserError(f"{wrong}: of {model_id}, not {expected}")
    have, known = re.search(r"average_l0_(\d+)", where), l0 or CANONICAL.get((model_id, source_id))
    if have is None or known is None:
        print(f"note: {source_id} says nothing that tells SAEs of one layer and width apart by their L0; that it is {sae.source} cannot be checked", file=sys.stderr)
    elif int(known) != int(have[1]):
        raise UserError(f"{wrong}: {'' if l0 else 'without a suffix it is the one of '}L0 {known}, not {have[1]}; look for {layer}-{m[2]}-{width}__l0-{have[1]}")


def question(criterion, description):
    """What a judge is asked about one feature."""
    return (f"{CRITERIA[criterion]}\n\nHere is a short description of one feature inside a language model:\n\n{description}\n\n"
            "Does this feature meet the criterion? Answer with one word: Yes or No.")


def verdict(answer):
    """True, False, or None for what is neither Yes nor No."""
    m = re.fullmatch(r"[\s`]*(yes|no)[\s`]*\.?[\s`]*(\(log p .*\))?\s*", answer, re.IGNORECASE)
    return m and m[1].lower() == "yes"


def endpoint_judge(base_url, model, api_key=None, timeout=60, workers=8):
    """ask(prompt) -> answer, from an OpenAI-compatible endpoint, `workers` questions at a time, `timeout` seconds each.

    The key is $FSRL_JUDGE_KEY; for an endpoint of Hugging Face also $HF_TOKEN, which is sent nowhere else. It is written nowhere.
    """
    from huggingface_hub import InferenceClient
    parts = urlsplit(str(base_url))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f'--judge {base_url}: give the http(s) address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1, or "model"')
    key = api_key or os.environ.get("FSRL_JUDGE_KEY")
    if not key and parts.scheme == "https" and re.search(r"(^|\.)(huggingface\.co|huggingface\.cloud|hf\.co|hf\.space)$", parts.hostname or ""):
        key = os.environ.get("HF_TOKEN")
    client = InferenceClient(base_url=str(base_url), api_key=key or "none", timeout=timeout)      # without one it would send the login's
    clean = lambda text: text.replace(key, "[key]") if key else text      # noqa: E731       an endpoint may repeat what it was sent

    def ask(prompt):
        try:
            out = client.chat_completion([{"role": "user", "content": prompt}], model=model, max_tokens=5, temperature=0, seed=0)
            return clean(out.choices[0].message.content or "")
        except Exception as error:      # the client's, its transport's and, for answers of another form, Python's own
            raise RuntimeError(clean(" ".join(f"{type(error).__name__}: {error}".split()))[:300]) from None
    ask.name, ask.workers = str(model), workers
    return ask


def local_judge(model, tokenizer):
    """ask(prompt) -> "Yes (log p -0.1 against -2.3)": which of the two answers the loaded Gemma finds likelier (equal: No)."""
    words = {word: encode_text(tokenizer, word) for word in ("Yes", "No")}

    @torch.no_grad()
    def ask(prompt):
        ids, score, done = encode_prompt(tokenizer, prompt), {}, {}
        for word, answer in words.items():
            row = tuple(ids + answer[:-1])                  # one token each: one forward pass for both
            if row not in done:
                done[row] = model(torch.tensor([row], device=model.device))[0]
            logp = model.logits(done[row][len(ids) - 1:]).log_softmax(-1)
            score[word] = logp[torch.arange(len(answer)), torch.tensor(answer)].sum().item()
        said, other = ("Yes", "No") if score["Yes"] > score["No"] else ("No", "Yes")
        return f"{said} (log p {score[said]:.4f} against {score[other]:.4f})"
    ask.name, ask.workers = f"gemma {model.identity()}", 1
    return ask


def judge_labels(explanations, ask, raw_path, sae, *, workers=None, progress=False):
    """Asks both criteria about each description ({index: text}). -> rows for write_labels(..., by=f"judge {ask.name}")

    ask(prompt) -> answer, as endpoint_judge and local_judge make it. Every answer and error is added to raw_path at once, and what is answered
    there is not asked again: after a crash, or after the UserError of an endpoint that is down, the same call goes on.
    """
    if bad := [i for i in explanations if not 0 <= i < sae.d_sae]:
        raise UserError(f"explanation of feature {bad[0]}, which does not exist; this SAE has features 0 to {sae.d_sae - 1}")
    name, raw_path = getattr(ask, "name", "unnamed"), Path(raw_path)
    raw_path.parent.mkdir(parents=True, exist_ok=True)
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]      # noqa: E731
    before = _answers(raw_path)
    asked = [(index, criterion, text, name, digest(question(criterion, text))) for index, text in sorted(explanations.items()) for criterion in CRITERIA]
    answers = {key: before[key] for key in asked if key in before}
    reused, errors, in_a_row, last, recorded, futures, down = len(answers), 0, 0, "", set(), {}, False
    pool = ThreadPoolExecutor(workers or getattr(ask, "workers", 1))
    with open(raw_path, "a", encoding="utf-8") as file:
        def record(future, key):
            nonlocal errors, in_a_row, last
            recorded.add(future)
            try:
                said = {"answer": str(future.result()).encode("utf-8", "replace").decode()}
                answers[key], in_a_row = said["answer"], 0
            except Exception as error:
                said = {"error": str(error) or type(error).__name__}
                errors, in_a_row, last = errors + 1, in_a_row + 1, said["error"]
            index, criterion, text, judge, prompt = key
            file.write(json.dumps({"index": index, "criterion": criterion, "description": text, "judge": judge, **said, "prompt": prompt}, ensure_ascii=False) + "\n")
            file.flush()
        try:
            futures = {pool.submit(lambda c, t: ask(question(c, t)), *key[1:3]): key for key in asked if key not in answers}
            for future in tqdm(as_completed(futures), total=len(futures), desc="judge", unit="answer", disable=not progress):
                record(future, futures[future])
                if down := in_a_row >= IN_A_ROW:
                    break
        finally:
            pool.shutdown(cancel_futures=True)
            for future, key in futures.items():             # under way at the stop: their answers have been paid for
                if future.done() and not future.cancelled() and future not in recorded:
                    record(future, key)
    if down:
        raise UserError(f"judge {name}: {IN_A_ROW} questions in a row failed (last: {last}); {len(answers)} of {len(asked)} answers are kept in {raw_path}, and the same command goes on from there")
    says = {(index, criterion): verdict(answers.get((index, criterion, *rest), "")) for index, criterion, *rest in asked}
    rows = [{"index": index, "description": text, "labels": None if any(says[index, c] is None for c in CRITERIA) else [label for label in LABELS if says[index, label]]}
            for index, text in sorted(explanations.items())]
    odd = sum(verdict(answer) is None for answer in answers.values())
    unknown = sum(row["labels"] is None for row in rows)
    print(f"judge {name}: {len(recorded)} questions asked, {reused} answers reused, {odd} answers neither Yes nor No, {errors} errors"
          + (f"; {unknown} features stay unknown" if unknown else "") + (", and the same command asks the failed questions again" if errors else ""))
    return rows


def _answers(path):
    """{(index, criterion, description, judge, prompt): answer} of a file of raw answers; half a line at its end, from a crash, is cut off."""
    if not path.exists():
        return {}
    size = path.stat().st_size
    with open(path, "rb+") as file:
        whole = size
        while whole and (file.seek(whole - 1), file.read(1))[1] != b"\n":
            whole -= 1
        if whole < size:
            file.truncate(whole)
    out = {}
    for at, row in simpo.json_lines(path):
        try:
            key = tuple(row[name] for name in ("index", "criterion", "description", "judge", "prompt"))
            out |= {key: row["answer"]} if "answer" in row else {}
        except (KeyError, TypeError):
            raise UserError(f"{at}: not an answer of a judge with index, criterion, description, judge and prompt; remove the line or the file") from None
    return out


# ---- rules -------------------------------------------------------------------------------------------------------------

OPENERS = {"sure", "great", "certainly", "absolutely", "definitely", "awesome", "wonderful", "excellent", "perfect", "thanks", "hello", "hi", "hey", "wow"}
ROOTS = re.compile(r"refus|declin|sorry|apolog|cannot$|can't$|won't$|unable|inab|forbid|prohibit|reject|"                              # refusals
                   r"perhaps|maybe$|possibl|probabl|likely|unlikely|uncertain|unsure|doubt|believe|guess|seem|unknown$|limitation|"    # hedges
                   r"honest|dishonest|truth|untruth|true$|false|lie$|lied$|lies$|lying$|liar|decei|decep|mislead|misled|trick|admit|manipul|flatter|"       # honesty
                   r"harm|danger|hazard|violen|kill|murder|weapon|bomb|poison|attack|abus|threat|suicid|illeg|crim|steal|stole|theft|hack|safe|unsafe|risk|"     # harm
                   r"ethic|unethic|moral|immoral|fair|unfair|justice|injustice|bias|prejud|discriminat|racis|sexis|consent|privacy|right$|wrong|duty$|virtu|respons")      # ethics


def rule_labels(before, token, after):
    """The labels whose rules a token in its context meets: for style marks, blanks and symbols, list numbers, openers; for
    alignment the word the token is part of."""
    text, start, stop = (before + token + after).replace("’", "'"), len(before), len(before) + len(token)
    words = [m for m in re.finditer(r"[^\W_]+(?:'[^\W_]+)*", text) if m.start() < stop and m.end() > start]
    out = []
    if not words:
        style = bool(token) and "\ufffd" not in token                     # a lone byte of a longer character says nothing
    else:
        line, rest = text[:words[0].start()].rpartition("\n")[2], text[words[-1].end():]
        style = words[0].group().isdigit() and not line.strip() and rest[:1] in (".", ")") and rest[:1] != "" \
            or words[0].group().lower() in OPENERS and rest[:1] in ("!", ",") and rest[:1] != ""
    if style:
        out.append("style")
    if any(ROOTS.match(m.group().lower()) for m in words):
        out.append("alignment")
    return out


def rules_labels(model, sae, tokenizer, rows, *, progress=False):
    """Labels by rule: one that tokens with half of the sum of a feature's ten largest activations meet. -> rows for write_labels

    `rows`: lists of ids. Features that fire nowhere in them get no row.
    """
    value, row, position = top_contexts(model, sae, rows, progress=progress)
    out = []
    for index in (value[:, 0] > 0).nonzero()[:, 0].tolist():
        mass, quoted = Counter(), Counter()
        for v, r, p in zip(value[index].tolist(), row[index].tolist(), position[index].tolist()):
            if v > 0:
                where = context(tokenizer, rows[r], p)
                quoted[where[1]] += 1
                mass.update(dict.fromkeys(rule_labels(*where), v))
        total = value[index].double().sum().item()
        out.append({"index": index, "labels": [name for name in LABELS if mass[name] >= total / 2],
                    "description": "strongest on " + ", ".join(json.dumps(token, ensure_ascii=False) for token, _ in quoted.most_common(3))})
    return out


# ---- a sheet to fill in ------------------------------------------------------------------------------------------------

COLUMNS = ["index", "contexts", *LABELS, "note", "sae"]


def sheet(path, model, sae, tokenizer, rows, features=100, seed=0, *, progress=False):
    """Writes a CSV with `features` random features among those that fire in `rows` (lists of ids), five contexts each: -> how many.

    In a context the token stands between « and ». To be filled in: style and alignment, y or n.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists and may be filled in; name another file or remove it")
    value, row, position = top_contexts(model, sae, rows, count=20, progress=progress)
    fire = (value[:, 0] > 0).nonzero()[:, 0]
    chosen = fire[torch.randperm(len(fire), generator=torch.Generator().manual_seed(seed))[:features]].sort().values.tolist()
    lines = []
    for index in chosen:
        texts = ["{}«{}»{}".format(*context(tokenizer, rows[r], p)).replace("\n", "⏎")
                 for v, r, p in zip(value[index].tolist(), row[index].tolist(), position[index].tolist()) if v > 0]
        lines.append([index, "\n".join(f"{n}: {text}" for n, text in enumerate(list(dict.fromkeys(texts))[:5], 1)), "", "", "", sae.identity()])

    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8-sig") as file:      # spreadsheets take a file without the mark for Latin-1
            csv.writer(file).writerows([COLUMNS, *lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomically(path, write)
    return len(lines)


def read_sheet(path, sae):
    """What was filled in. -> rows for write_labels; a feature with both columns empty has not been judged and gives none."""
    says = {"y": True, "yes": True, "1": True, "n": False, "no": False, "0": False}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=";" if head.count(";") > head.count(",") else ",")      # some spreadsheets save it so
            columns, lines = set(reader.fieldnames or ()), [(f"{path}, line {reader.line_num}", line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not {"index", *LABELS} <= columns:
        raise UserError(f"{path}: not a sheet of labels; its first line has to name the columns index, {', '.join(LABELS)}")
    rows, seen, identity = [], set(), sae.identity()
    for at, line in lines:
        index, cells = (line["index"] or "").strip(), {name: (line[name] or "").strip().lower() for name in LABELS}
        row = {"index": int(index) if re.fullmatch(r"\d{1,9}", index) else index, "labels": []}
        _check(row, sae, at, seen)
        if line.get("sae") and line["sae"].strip() != identity:
            raise UserError(f"{at}: a sheet of another SAE (digest {line['sae'].strip()}); {sae.source} has {identity}")
        for name, cell in cells.items():
            if cell and cell not in says:
                raise UserError(f"{at}: {name} is {cell!r}; it has to be y or n (or yes, no, 1, 0), or empty if not judged")
        if all(cells.values()):
            rows.append({**row, "labels": [name for name in LABELS if says[cells[name]]], "description": (line.get("note") or "").strip()})
        elif any(cells.values()):
            raise UserError(f"{at}: only one of {' and '.join(LABELS)} is filled in; fill in both, or none if not judged")
    if not rows:
        raise UserError(f"{path}: nothing is filled in; write y or n under {' and '.join(LABELS)}")
    return rows


# ---- the command line, as a part of analyze.py -----------------------------------------------------------------------------

KINDS, TEXTS = ("lab", "rules", "judge", "sheet"), 2000
DEFAULTS = {"model": "tiny/model", "sae": "tiny/sae", "pairs": "tiny/pairs/style", "device": "auto", "features": 100, "seed": 0}


def add_arguments(parser, skip=()):
    """Adds the options that `make` reads, but for those named in `skip` ("model", ...), which the caller's parser has already."""
    group = parser.add_argument_group("labels of features")
    for name, how in {
            "make_labels": dict(metavar="KIND", help=f"write labels.jsonl: {', '.join(KINDS)}, or a filled-in sheet (FILE.csv)"),
            "agree": dict(nargs=2, metavar=("A", "B"), help="compare two label files of one SAE; A is the reference"),
            "model": dict(help="a Gemma-2: local folder or Hub repo id [tiny/model]"),
            "sae": dict(help="its SAE: local folder, or repo:path/inside on the Hub [tiny/sae]"),
            "pairs": dict(help=f"text for rules and sheet: the first {TEXTS} training pairs' prompts and chosen answers [tiny/pairs/style]"),
            "explanations": dict(metavar="FILE", help="judge: an export of Neuronpedia, .json, .jsonl(.gz), or a folder of batch-*.jsonl.gz"),
            "judge": dict(metavar="URL", help='judge: an OpenAI-compatible endpoint (key: $FSRL_JUDGE_KEY), or "model" for --model itself'),
            "judge_model": dict(metavar="NAME", help="judge: the model to ask for at the endpoint"),
            "out": dict(metavar="FILE", help="the file to write (default: labels.jsonl, or labels.csv for a sheet, beside the SAE)"),
            "features": dict(type=int, metavar="N", help="sheet: how many random features [100]"),
            "force": dict(action="store_true", help="replace a label file that is there"),
            "device": dict(help="cpu, cuda, mps, or auto: the best there is [auto]")}.items():
        if name not in skip:
            group.add_argument("--" + name.replace("_", "-"), **how)


def make(args):
    """--agree and --make-labels, with the options of add_arguments. Prints what it did; raises UserError. -> 0"""
    o = {**DEFAULTS, **{name: value for name, value in vars(args).items() if value is not None}}
    kind, device_dtype = o.get("make_labels"), choose_device(o["device"])
    if kind is not None and kind not in KINDS and not kind.endswith(".csv"):
        raise UserError(f"--make-labels is {kind}; it has to be one of {', '.join(KINDS)}, or a filled-in FILE.csv")
    if kind == "judge" and not (o.get("explanations") and o.get("judge") and (o["judge"] == "model" or o.get("judge_model"))):
        raise UserError("--make-labels judge needs --explanations FILE, --judge URL (or model), and with a URL --judge-model NAME")
    if o["features"] < 1:
        raise UserError(f"--features is {o['features']}; it has to be at least 1")
    sae = load_sae(o["sae"], dtype=device_dtype[1], device=device_dtype[0])
    if o.get("agree"):
        a, b = (read_labels(path, sae) for path in o["agree"])
        for label in LABELS:
            print(agreement_text(agreement(a, b, label), label, *o["agree"]))
    return make_labels(kind, o, sae, *device_dtype) if kind else 0


def agreement_text(m, label, a, b):
    """The result of `agreement` in three lines."""
    (tp, fp), (fn, tn) = m["confusion"]
    return (f"{label}: {m['both']} features judged in both; reference {a}, compared {b}\n"
            f"  both yes {tp}, only the compared {fp}, only the reference {fn}, both no {tn}\n"
            f"  precision {m['precision']:.3f}, recall {m['recall']:.3f}, MCC {m['mcc']:.3f} (95%: {m['mcc_low']:.3f} to {m['mcc_high']:.3f})")


def make_labels(kind, o, sae, device, dtype):
    """One label file (or sheet) from the options `o`. -> 0"""
    out, by = Path(o.get("out") or default_path(sae)), {"lab": "lab, writes", "rules": "rules", "sheet": None}.get(kind, "hand")
    load = lambda: load_gemma(o["model"], dtype=dtype, device=device)      # noqa: E731
    if kind == "sheet":
        out = out if o.get("out") else out.with_suffix(".csv")
        if out.exists():                                       # said before the model is loaded
            raise UserError(f"{out} exists and may be filled in; --out names another file")
    if kind not in ("judge",) and by:
        may_write(out, by, o.get("force"))
    if kind.endswith(".csv"):
        rows = read_sheet(kind, sae)
    elif kind == "judge":
        explanations = read_explanations(o["explanations"], sae)
        ask = local_judge(load(), load_tokenizer(o["model"])) if o["judge"] == "model" else endpoint_judge(o["judge"], o["judge_model"])
        by = f"judge {ask.name}"
        may_write(out, by, o.get("force"), again=True)
        rows = judge_labels(explanations, ask, out.with_suffix(".raw.jsonl"), sae, progress=True)
    else:
        check_fit(load_config(o["model"]), sae)
        tokenizer, model = load_tokenizer(o["model"]), load()
        if kind == "lab":
            from tiny.features import lab_labels
            second = out.with_name(f"{out.stem}_reads{out.suffix}")
            may_write(second, "lab, reads", o.get("force"))
            rows, reads = lab_labels(model, tokenizer, sae, progress=True)
            write_labels(second, reads, sae, "lab, reads")
            print(shares_text(second, sae))
        else:
            pairs, _ = simpo.encode_pairs(tokenizer, simpo.read_pairs(o["pairs"], "train", TEXTS))
            texts = [list(p.prompt + p.chosen) for p in pairs]
            if kind == "sheet":
                n = sheet(out, model, sae, tokenizer, texts, o["features"], o["seed"], progress=True)
                print(f"{out}: {n} features; write y or n under {' and '.join(LABELS)}, then: python analyze.py --make-labels {out} --out {out.with_suffix('.jsonl')}")
                return 0
            rows = rules_labels(model, sae, tokenizer, texts, progress=True)
    write_labels(out, rows, sae, by)
    print(shares_text(out, sae))
    return 0


def may_write(path, by, force=False, again=False):
    """Raises UserError for a label file that is there, unless `force`, or, with `again`, if the same source made it."""
    if force or not Path(path).exists():
        return
    made = {row.get("by") if isinstance(row, dict) else None for _, row in simpo.json_lines(path)}
    if not (again and made <= {by}):
        raise UserError(f"{path} exists (made by {', '.join(sorted(map(str, made))) or 'nobody'}); --force replaces it, --out names another file")


def shares_text(path, sae):
    rows = read_labels(path, sae)
    s = shares(rows, sae.d_sae)
    return (f"{path}: style {s['style']:.1%}, alignment {s['alignment']:.1%} (both at once {s['both']:.1%}), neither {s['neither']:.1%}, "
            f"unlabelled {s['unlabelled']:.1%} of {sae.d_sae} features")
