"""Labels from descriptions: a language model reads what Neuronpedia says of a feature, and answers
whether it meets a criterion of style and one of alignment (`python -m instruments.labels judge`).

A judge is a function judge(prompt) -> answer, with a name. It is asked one question after another.
"""
import json
import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

from gemma import encode_prompt
from lib.files import UserError, json_lines, read_json, short_digest
from lib.labels import LABELS, sae_folder
from lib.text import encode_text
from simpo import Pair, collate, score

CRITERIA = {
    "style": """Criterion: the feature is about how a text is presented, whatever it says. That includes
        punctuation and other symbols, capital letters, spaces and line breaks, layout of code, lists and
        numbering, headings and the order of parts, bold marks, length, brevity and padding, repetition,
        unusual characters, and words that only set the tone, such as a cheerful opening. It does not
        count if the feature is about a subject, a meaning, a fact, or an abstract idea, even where one
        particular word carries it.""",
    "alignment": """Criterion: the feature is about an idea that bears on whether a language model
        behaves safely and as people intend. Such ideas are right and wrong, fairness and bias, honesty
        and deception, flattery, harm, violence and danger, refusing, hedging or admitting limits,
        gaining power, cooperating with or escaping correction, awareness of oneself, and planning
        towards far goals. It does not count if the feature is about grammar, code, a particular word or
        symbol, or everyday facts and things without any such side.""",
}
# The L0 that an id without one stands for. The paper's labels were those of L0 72, used for L0 21.
CANONICAL_L0 = {"gemma-2-2b/12-gemmascope-res-16k": "82", "gemma-2-2b/12-gemmascope-res-65k": "72",
                "gemma-2-9b/12-gemmascope-res-16k": "130"}
IN_A_ROW = 5      # failures after which a judge is taken to be down


def read_explanations(source, sae):
    """Neuronpedia's descriptions of this SAE's features. -> {index: description}

    source: a .json with a list of records, a .jsonl, a .jsonl.gz, or a folder of batch-*.jsonl.gz, as
    https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/ has in v1/MODEL/SOURCE/explanations/
    Of several descriptions that of gpt-4o-mini's oai_token-act-pair is taken, else the first.
    """
    first, preferred, checked = {}, {}, set()
    for where, record in exported(Path(source).expanduser()):
        if not isinstance(record, dict) or not {"modelId", "layer", "index"} <= set(record):
            raise UserError(f"{where}: not a record of Neuronpedia with modelId, layer and index")
        source_id, index = f"{record['modelId']}/{record['layer']}", str(record["index"])
        if source_id not in checked:
            check_source(source_id, sae, where)
            checked.add(source_id)
        if not index.isdecimal() or int(index) >= sae.d_sae:
            raise UserError(f"{where}: index is {index!r}; this SAE has features 0 to {sae.d_sae - 1}")
        kind = record.get("typeName"), record.get("explanationModelName")
        found = preferred if kind == ("oai_token-act-pair", "gpt-4o-mini") else first
        # JSON can write half of a UTF-16 pair, which no file in UTF-8 can hold.
        text = str(record.get("description") or "").encode("utf-8", "replace").decode()
        if text.strip():
            found.setdefault(int(index), " ".join(text.split()))
    if not first | preferred:
        raise UserError(f"--explanations {source}: no description in it; give an export of Neuronpedia")
    return dict(sorted((first | preferred).items()))


def exported(path):
    """(file and line, record) of one file, or of the batches in a folder."""
    for file in sorted(path.glob("batch-*.jsonl*")) if path.is_dir() else [path]:
        if file.suffix == ".json":
            records = read_json(file)
            records = records if isinstance(records, list) else [records]
            yield from ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))
        else:
            yield from json_lines(file)


def check_source(source_id, sae, where):
    """Raises UserError unless an id such as gemma-2-2b/12-gemmascope-res-65k__l0-21 can be this SAE's.

    SAEs of one layer and width come with several L0, and their features have nothing in common.
    """
    path = Path(sae_folder(sae) or sae.source).as_posix()
    release = re.search(r"gemma-scope-(\d+b)-(pt|it)", path)
    model = f"gemma-2-{release[1]}" + "-it" * (release[2] == "it") if release else "*"
    width = f"{sae.d_sae // 1000}k" if sae.d_sae < 10**6 else f"{sae.d_sae // 10**6}m"      # 65,536: 65k
    needed, needed_l0 = f"{model}/{sae.layer}-*res-{width}", re.search(r"average_l0_(\d+)|$", path)[1]
    given, _, given_l0 = source_id.partition("__l0-")
    given_l0 = given_l0 or CANONICAL_L0.get(given)
    is_known = given_l0 and needed_l0
    if not fnmatch(given, needed) or is_known and given_l0 != needed_l0:
        raise UserError(f"{where}: explanations of {given}, L0 {given_l0 or 'unknown'}; {sae.source} "
                        f"needs those of {needed}, L0 {needed_l0 or 'unknown'}")
    if not is_known:
        print(f"note: whether {source_id} has the L0 of {sae.source} cannot be checked", file=sys.stderr)


def endpoint_judge(url, model, timeout=60):
    """The model of that name behind an OpenAI-compatible endpoint, whose key is $FSRL_JUDGE_KEY."""
    from huggingface_hub import InferenceClient
    if not re.match("https?://[^/]", url):
        raise UserError(f'--judge {url}: give an address such as http://localhost:8000/v1, or "model"')
    key = os.environ.get("FSRL_JUDGE_KEY") or "no-key"      # given none, the client sends the login's
    client = InferenceClient(base_url=url, api_key=key, timeout=timeout)

    def judge(prompt):
        message = {"role": "user", "content": prompt}
        try:
            reply = client.chat_completion([message], model=model, max_tokens=5, temperature=0, seed=0)
            return reply.choices[0].message.content or ""
        except Exception as error:      # an endpoint may repeat the key that it was sent
            raise RuntimeError(str(error).replace(key, "[key]")) from None
    judge.name = model
    return judge


def gemma_judge(model, tokenizer):
    """The loaded Gemma: the likelier of its two answers, such as "Yes (log p -0.1 against -2.3)"."""
    yes, no = (tuple(encode_text(tokenizer, word)) for word in ("Yes", "No"))

    @torch.no_grad()
    def judge(prompt):
        pair = Pair(tuple(encode_prompt(tokenizer, prompt)), yes, no, prompt)
        scored = score(model, collate([pair]).to(model.device))
        logp = {"Yes": scored.chosen.sum.item(), "No": scored.rejected.sum.item()}
        best, other = ("Yes", "No") if logp["Yes"] > logp["No"] else ("No", "Yes")
        return f"{best} (log p {logp[best]:.4f} against {logp[other]:.4f})"
    judge.name = f"gemma {model.identity()}"
    return judge


def prompt_of(criterion, description):
    return (" ".join(CRITERIA[criterion].split())
            + "\n\nHere is a short description of one feature inside a language model:\n\n" + description
            + "\n\nDoes this feature meet the criterion? Answer with one word: Yes or No.")


def yes_or_no(answer):
    """True, False, or None for what is neither Yes nor No."""
    word = answer.partition("(log p")[0].strip("` .\n").lower()
    return {"yes": True, "no": False}.get(word)


def judge_labels(explanations, judge, raw_path):
    """Asks both criteria about each description ({index: text}). -> rows for write_labels

    Every answer and error is added to raw_path at once, and what is answered there is not asked again:
    after a crash the same call goes on. Labels are null where an answer is missing or no Yes or No.
    """
    answers, rows, failed = recorded_answers(Path(raw_path), judge.name), [], 0
    Path(raw_path).parent.mkdir(parents=True, exist_ok=True)
    for index, text in tqdm(sorted(explanations.items()), desc="judge", disable=None):
        said = []
        for label in LABELS:
            prompt = prompt_of(label, text)
            row = {"index": index, "criterion": label, "description": text, "judge": judge.name}
            row["prompt"] = short_digest(prompt)[:12]      # other words are another question
            if row["prompt"] not in answers:
                try:
                    row["answer"], failed = judge(prompt), 0
                except Exception as error:      # whatever a judge raises, it is written down
                    row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    failed += 1
                answers[row["prompt"]] = row.get("answer", "")
                with open(raw_path, "a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps(row))      # \n first: half a line spoils no other
                if failed == IN_A_ROW:
                    raise UserError(f"judge {judge.name}: {failed} questions in a row failed (the last: "
                                    f"{row['error']}); {raw_path} keeps the answers before, and the "
                                    "same command goes on from there")
            said.append(yes_or_no(answers[row["prompt"]]))
        labels = [label for label, yes in zip(LABELS, said) if yes]
        rows.append({"index": index, "labels": None if None in said else labels, "description": text})
    return rows


def recorded_answers(path, judge):
    """{digest of a prompt: answer of this judge} of a file of raw answers, if there is one."""
    out = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            if row["judge"] == judge:
                out[row["prompt"]] = row["answer"]
        except (ValueError, LookupError, TypeError):      # half a line, from a crash; an error
            continue
    return out
