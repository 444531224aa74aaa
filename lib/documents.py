"""Plain text, document by document."""
import sys

from lib.files import UserError, json_lines
from lib.pairs import encodable
from lib.text import CONTROL


def read_documents(path):
    """(file and line, text) of each document: a .jsonl holds a "text" in each line, any other file is
    one document a line. Markers of the chat format stay text there; a note on stderr says so once."""
    noted = False
    for where, text in json_texts(path) if path.endswith((".jsonl", ".jsonl.gz")) else lines(path):
        marker = next((name for name in CONTROL if name in text), None)
        if marker and not noted:
            print(f"note: {where} holds {marker}, which is read as plain text, not as a marker; "
                  "conversations go in with --pairs", file=sys.stderr)
            noted = True
        if text.strip():
            yield where, text.strip()


def json_texts(path):
    for where, line in json_lines(path):
        if not isinstance(line, dict) or not isinstance(line.get("text"), str):
            raise UserError(f'{where}: not a JSON object with a "text"')
        encodable(line["text"], where, "text")
        yield where, line["text"]


def lines(path):
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield f"{path}, line {number}", line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
