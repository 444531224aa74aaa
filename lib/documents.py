"""Plain text, document by document."""
import sys

from lib.files import UserError, json_lines, text_lines
from lib.text import CONTROL


def read_documents(path):
    """(file and line, text) of each document: a .jsonl holds a "text" in each line, any other file is
    one document a line. Markers of the chat format stay text there; a note on stderr says so once."""
    objects, noted = path.endswith((".jsonl", ".jsonl.gz")), False
    for where, line in json_lines(path) if objects else text_lines(path):
        if objects and not (isinstance(line, dict) and isinstance(line.get("text"), str)):
            raise UserError(f'{where}: not a JSON object with a "text"')
        text = (line["text"] if objects else line).strip()
        marker = next((name for name in CONTROL if name in text), None)
        if marker and not noted:
            print(f"note: {where} holds {marker}, which is read as plain text, not as a marker; "
                  "conversations go in with --pairs", file=sys.stderr)
            noted = True
        if text:
            yield where, text
