"""Preference pairs as text, in the layouts that are found in the world: JSONL, parquet, the Hub's data
sets.

Every record that comes out is {"prompt": text or messages, "chosen": text, "rejected": text, "at": file
and line}.
"""
from pathlib import Path

from lib.files import UserError, fetch, json_lines

# Where a split lies in a folder or data set; the first pattern that fits is taken.
PATTERNS = ("{}.jsonl", "{}-*.parquet", "data/{}-*.parquet", "data/{}_prefs-*.parquet")


def read_pairs(source, split="train", limit=None):
    """Reads preference pairs. -> list of records

    source: a .jsonl or .parquet file, a folder that holds SPLIT.jsonl (or SPLIT-*.parquet, also under
    data/), or a Hub data set. prompt is a string or a list of messages; chosen and rejected are
    strings, or lists of messages that end with the answer and may repeat the prompt (UltraFeedback's
    layout).
    """
    path = Path(source).expanduser()
    records = []
    for file in [path] if path.is_file() else split_files(source, split):
        for at, raw in parquet_rows(file) if file.suffix == ".parquet" else json_lines(file):
            if limit is not None and len(records) >= limit:
                return records
            records.append(record(raw, at))
    if not records:
        raise UserError(f"{source}: no pairs in it")
    return records


def read_held_out(source, split="test", limit=None):
    """Held-out records: the split of a folder or data set, the last tenth of a single file."""
    if not Path(source).expanduser().is_file():
        return read_pairs(source, split, limit)
    records = read_pairs(source)
    if len(records) < 2:
        raise UserError(f"{source}: one pair is too few; one has to be held out")
    return records[-max(1, len(records) // 10):][:limit]


def read_splits(source, held_split, train_limit=None, held_limit=None):
    """-> {"train": records, held_split: records}; of a single file the last tenth is held out."""
    held = read_held_out(source, held_split, held_limit)
    if not Path(source).expanduser().is_file():
        return {"train": read_pairs(source, "train", train_limit), held_split: held}
    records = read_pairs(source)
    tenth = max(1, len(records) // 10)
    print(f"{source} is one file: its last {tenth} of {len(records)} pairs are held out")
    return {"train": records[:-tenth][:train_limit], held_split: held}


def split_files(source, split):
    patterns = [pattern.format(split) for pattern in PATTERNS]
    folder = fetch(source, patterns, kind="dataset")
    for pattern in patterns:
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{source}: no pairs of the split {split!r} there "
                    f"({split}.jsonl or {split}-*.parquet)")


def parquet_rows(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow), "
                        "or turn the file into JSONL") from None
    number = 0
    try:
        for group in parquet.ParquetFile(path).iter_batches(256):
            for raw in group.to_pylist():
                number += 1
                yield f"{path}, row {number}", raw
    except (OSError, ValueError) as error:         # pyarrow's own errors are ValueErrors; ours pass
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def record(raw, at):
    """One pair as it was found -> as it is used. Raises UserError that says what is missing where."""
    if not isinstance(raw, dict):
        raise UserError(f"{at}: a pair is an object with prompt, chosen and rejected, "
                        f"this is a {type(raw).__name__}")
    chosen, before_chosen = answer(raw, "chosen", at)
    rejected, before_rejected = answer(raw, "rejected", at)
    if None not in (before_chosen, before_rejected) and before_chosen != before_rejected:
        raise UserError(f"{at}: chosen and rejected answer different prompts")
    prompt = before_chosen or before_rejected or raw.get("prompt") or raw.get("instruction")
    if isinstance(prompt, list) and prompt:
        prompt = checked_messages(prompt, at, "prompt")
    elif isinstance(prompt, str) and prompt.strip():
        encodable(prompt, at, "prompt")
    else:
        raise UserError(f"{at}: prompt is missing or empty; a pair needs prompt, chosen and rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "at": at}


def answer(raw, side, at):
    """-> (text of an answer, the messages before it or None)"""
    value, before = raw.get(side), None
    if isinstance(value, list):                                   # messages: the answer is the last one
        messages = checked_messages(value, at, side)
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"{at}: {side} is a list that does not end with an assistant message")
        before, value = messages[:-1], messages[-1]["content"]
    if not isinstance(value, str):
        raise UserError(f"{at}: {side} is missing; a pair needs prompt, chosen and rejected")
    if not value.strip():
        raise UserError(f"{at}: {side} is empty; an answer needs at least one token")
    encodable(value, at, side)
    return value, before


def checked_messages(value, at, side):
    for m in value:
        if not (isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))):
            raise UserError(f'{at}: {side} holds a message that is not {{"role": ..., "content": text}}')
        encodable(m["content"], at, side)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def encodable(text, at, side):
    """JSON can write half of a UTF-16 pair; no text can hold it."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{at}: {side} holds a lone surrogate, which is no character")


def fitted(prompt, chosen, rejected, max_length):
    """Lists of ids cut so that the prompt plus the longer answer fit into max_length.

    Tokens go from the prompt's left first (<bos> and one more stay), then from the answers' ends.
    """
    if max_length < 3:
        raise UserError(f"max_length is {max_length}; <bos>, a token of the prompt and one of an answer "
                        "need 3")
    over = len(prompt) + max(len(chosen), len(rejected)) - max_length
    if over > 0:
        prompt = prompt[:1] + prompt[-max(1, len(prompt) - 1 - over):]
        chosen, rejected = (ids[:max_length - len(prompt)] for ids in (chosen, rejected))
    return prompt, chosen, rejected
