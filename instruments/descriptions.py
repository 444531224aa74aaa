"""Labels from descriptions: a language model reads what Neuronpedia says of a feature, and answers
whether it meets a criterion of style and one of alignment (`python -m instruments.labels judge`).

A judge is a function judge(prompt) -> answer, with a name. It is asked one question after another.
"""
import json
import os
import re
from pathlib import Path

from tqdm import tqdm

from lib.files import UserError, explained, json_lines, short_digest, whole_lines, write_text
from lib.labels import LABELS, sae_folder

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


def read_explanations(source, sae):
    """Neuronpedia's descriptions of this SAE's features, the first of each. -> {index: description}

    source: a .jsonl, a .jsonl.gz, or a folder of batch-*.jsonl.gz, as
    https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/ has in v1/MODEL/SOURCE/explanations/
    """
    path, found = Path(source).expanduser(), {}
    for file in sorted(path.glob("batch-*.jsonl*")) if path.is_dir() else [path]:
        for where, record in json_lines(file):
            with explained(where, "not a record with modelId, layer and index"):
                model, layer, index = record["modelId"], record["layer"], int(record["index"])
            if not 0 <= index < sae.d_sae:
                raise UserError(f"{where}: index is {index}; this SAE has features 0 to {sae.d_sae - 1}")
            check_source(f"{model}/{layer}", sae, where)
            if text := " ".join(str(record.get("description") or "").split()):
                found.setdefault(index, text)
    if not found:
        raise UserError(f"--explanations {source}: no description in it; give an export of Neuronpedia")
    return dict(sorted(found.items()))


def check_source(source_id, sae, where):
    """Raises UserError unless an id such as gemma-2-2b/12-gemmascope-res-65k__l0-21 can be this SAE's.

    SAEs of one layer and width come with several L0, and their features have nothing in common. Where
    an L0 is not known, layer and width have to do.
    """
    given, _, l0 = source_id.partition("__l0-")
    l0 = l0 or CANONICAL_L0.get(given)
    width = f"{sae.d_sae // 1000}k" if sae.d_sae < 10**6 else f"{sae.d_sae // 10**6}m"   # 65,536: 65k
    own_l0 = re.search(r"average_l0_(\d+)|$", str(sae_folder(sae) or sae.source))[1]
    size = re.search(r"gemma-scope-(\d+b)-|$", sae.source)[1] or ""                # 2b or 9b, if it says
    fits = re.fullmatch(rf".*{size}/{sae.layer}-.*res-{width}", given)
    if not fits or l0 and own_l0 and l0 != own_l0:
        raise UserError(f"{where}: explanations of {given}, L0 {l0 or 'unknown'}; {sae.source} needs "
                        f"those of layer {sae.layer}, res-{width}, L0 {own_l0 or 'unknown'}")


def endpoint_judge(url, model, timeout=60):
    """The model of that name behind an OpenAI-compatible endpoint, whose key is $FSRL_JUDGE_KEY."""
    from huggingface_hub import InferenceClient
    key = os.environ.get("FSRL_JUDGE_KEY") or "no-key"      # given none, the client sends the login's
    client = InferenceClient(base_url=url, api_key=key, timeout=timeout)

    def judge(prompt):
        message = {"role": "user", "content": prompt}
        try:
            reply = client.chat_completion([message], model=model, max_tokens=5, temperature=0, seed=0)
        except Exception as error:      # of many classes; it may repeat the key that was sent
            reason = " ".join(str(error).replace(key, "[key]").split())[:300]
            raise UserError(f"judge {model} gave no answer ({reason}); those before are kept, and the "
                            "same command goes on from there") from None
        return reply.choices[0].message.content or ""
    judge.name = model
    return judge


def prompt_of(criterion, description):
    return (" ".join(CRITERIA[criterion].split())
            + "\n\nHere is a short description of one feature inside a language model:\n\n" + description
            + "\n\nDoes this feature meet the criterion? Answer with one word: Yes or No.")


def yes_or_no(answer):
    """True, False, or None for what is neither Yes nor No."""
    return {"yes": True, "no": False}.get(answer.strip("` .\n").lower())


def judge_labels(explanations, judge, raw_path):
    """Asks both criteria about each description ({index: text}). -> rows for write_labels

    Every answer is added to raw_path at once, and what is answered there is not asked again: after a
    crash the same call goes on. Labels are null where an answer is neither Yes nor No.
    """
    raw, rows = Path(raw_path), []
    if raw.exists():
        write_text(raw, "".join(whole_lines(raw)))
    kept = [row for _, row in json_lines(raw)] if raw.exists() else []
    mine = [row for row in kept if row.get("judge") == judge.name and "answer" in row]
    answers = {row["prompt"]: row["answer"] for row in mine}
    raw.parent.mkdir(parents=True, exist_ok=True)
    for index, text in tqdm(explanations.items(), desc="judge", disable=None):
        said = []
        for label in LABELS:
            prompt = prompt_of(label, text)
            asked = short_digest(prompt)[:12]      # other words are another question
            if asked not in answers:
                answers[asked] = judge(prompt)
                row = {"index": index, "criterion": label, "description": text, "judge": judge.name}
                row |= {"prompt": asked, "answer": answers[asked]}
                with open(raw, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            said.append(yes_or_no(answers[asked]))
        labels = [label for label, yes in zip(LABELS, said) if yes]
        rows.append({"index": index, "labels": None if None in said else labels, "description": text})
    return rows
