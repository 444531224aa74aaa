"""Text and ids: the tokenizer of a model's folder, and text that stays text.

What people wrote never becomes a control token, not even if it spells one.
"""
import contextlib
import itertools
import re
import shutil
import textwrap

from tokenizers import Tokenizer

from lib.files import UserError, explained, fetch

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def load_tokenizer(source):
    """The tokenizer.json of a local folder or a Hub repo, as a tokenizers.Tokenizer that keeps
    special-token strings in text as text."""
    path = fetch(source, ["tokenizer.json"]) / "tokenizer.json"
    with explained(path):
        tokenizer = Tokenizer.from_file(str(path))
    if missing := [name for name in CONTROL if tokenizer.token_to_id(name) is None]:
        raise UserError(f"{path}: the token {missing[0]} is missing, which Gemma's chat format needs")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()       # some files were saved with it, and would cut texts without a word
    tokenizer.no_padding()
    return tokenizer


def encode_text(tokenizer, text):
    """Ids of a text as plain text: no BOS, and never the id of a control token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not {tokenizer.token_to_id(name) for name in CONTROL if name != "<unk>"} & set(ids):
        return ids
    # Some tokenizers list their markers as ordinary added tokens, matched all the same: cut them in two.
    between = "|".join(f"(?<=({re.escape(n[0])}))(?={re.escape(n[1:])})" for n in CONTROL)
    pieces = re.sub(between, "\0", text).split("\0")
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]


def turns(messages, what="a prompt"):
    """A conversation that asks for an answer, checked. -> [(speaker, text)], speakers user and model
    messages: a string (one user turn), or a list of {"role", "content"}."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(f"{what} has the roles {roles}; Gemma-2 takes user and assistant in turn, "
                        "user first and last, and no system message")
    names = {"user": "user", "assistant": "model"}
    return [(names[message["role"]], message["content"]) for message in messages]


def decode(tokenizer, ids):
    """Text of an answer's ids, control tokens left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def side_by_side(left, right, *, titles=("base", "steered"), width=None):
    """Two texts as two columns."""
    column = ((width or min(shutil.get_terminal_size((100, 24)).columns, 120)) - 3) // 2

    def fold(title, text):
        lines = [textwrap.wrap(line, column, replace_whitespace=False) for line in text.split("\n")]
        return [title, "-" * column, *(part for parts in lines for part in parts or [""])]
    columns = [fold(title, text or "(nothing)") for title, text in zip(titles, (left, right))]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in rows)


def typed_prompts():
    """What somebody types, until an empty line or the end of input."""
    with contextlib.suppress(EOFError):
        while prompt := input("\nask (empty line: leave) > ").strip():
            yield prompt
