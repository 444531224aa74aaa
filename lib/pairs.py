"""Preference pairs as text, in the layouts that are found in the world: JSONL, parquet, the Hub's data
sets.

Every record that comes out is {"prompt": text or messages, "chosen": text, "rejected": text, "at": file
and line}.
"""
import itertools
from pathlib import Path

from lib.files import UserError, explained, fetch, json_lines
from lib.text import turns

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
    files = [path]
    if not path.is_file():
        patterns = [pattern.format(split) for pattern in PATTERNS]
        folder = fetch(source, patterns, kind="dataset")
        found = (sorted(folder.glob(pattern)) for pattern in patterns)
        files = next(filter(None, found), [])
    rows = (row for file in files for row in rows_of(file))
    records = [record(raw, at) for at, raw in itertools.islice(rows, limit)]
    if not records:
        raise UserError(f"{source}: no pairs of the split {split!r} there "
                        f"({split}.jsonl or {split}-*.parquet)")
    return records


def read_held_out(source, split="test", limit=None):
    """Records of a split. Of a single file the last tenth is every split but "train"."""
    if not Path(source).expanduser().is_file():
        return read_pairs(source, split, limit)
    records = read_pairs(source)
    if len(records) < 2:
        raise UserError(f"{source}: one pair is too few; one has to be held out")
    tenth = max(1, len(records) // 10)
    return (records[:-tenth] if split == "train" else records[-tenth:])[:limit]


def read_splits(source, held_split, train_limit=None, held_limit=None):
    """-> {"train": records, held_split: records}"""
    if held_split == "train":
        raise UserError("--eval-split train: held-out pairs are those that are not trained on")
    if Path(source).expanduser().is_file():
        print(f"{source} is one file: its last tenth is held out")
    limits = {"train": train_limit, held_split: held_limit}
    return {split: read_held_out(source, split, limit) for split, limit in limits.items()}


def rows_of(path):
    """(where, row) of a file."""
    if path.suffix != ".parquet":
        yield from json_lines(path)
        return
    with explained(path, "cannot be read as parquet, which needs pyarrow"):
        import pyarrow.parquet
        groups = pyarrow.parquet.ParquetFile(path).iter_batches(256)
        rows = (raw for group in groups for raw in group.to_pylist())
        for number, raw in enumerate(rows, 1):
            yield f"{path}, row {number}", raw


def record(raw, at):
    """One pair as it was found -> as it is used. Raises UserError that says what is missing where."""
    if not isinstance(raw, dict):
        raise UserError(f"{at}: a pair is an object with prompt, chosen and rejected")
    out, asked = {"at": at}, []
    for side in ("chosen", "rejected"):
        out[side] = given(raw.get(side), side, at)
        if isinstance(out[side], list):                           # messages: the answer is the last one
            *before, last = out[side]
            if last["role"] != "assistant":
                raise UserError(f"{at}: {side} is a list that does not end with an assistant message")
            asked.append(before)
            out[side] = given(last["content"], side, at)
    if len(asked) == 2 and asked[0] != asked[1]:
        raise UserError(f"{at}: chosen and rejected answer different prompts")
    prompts = (*asked, raw.get("prompt"), raw.get("instruction"))
    out["prompt"] = given(next(filter(None, prompts), None), "prompt", at)
    turns(out["prompt"], f"{at}: the prompt")
    return out


def given(value, name, at):
    """A text that is not empty, or a list of messages with role and content alone."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        messages = [{key: message.get(key) for key in ("role", "content")} for message in value]
        if all(isinstance(text, str) for message in messages for text in message.values()):
            return messages
    raise UserError(f'{at}: {name} is {str(value)[:60]!r}; it has to be a text that is not empty, or a '
                    'list of messages {"role": ..., "content": text}')


def fitted(prompt, chosen, rejected, max_length):
    """Lists of ids cut so that the prompt plus the longer answer fit into max_length, 3 or more.

    Tokens go from the prompt's left first (<bos> and one more stay), then from the answers' ends.
    """
    over = len(prompt) + max(len(chosen), len(rejected)) - max_length
    if over > 0:
        prompt = prompt[:1] + prompt[-max(1, len(prompt) - 1 - over):]
        chosen, rejected = (ids[:max_length - len(prompt)] for ids in (chosen, rejected))
    return prompt, chosen, rejected
