"""MESSAGES.md and the code: the page holds every message that a command can end with, and no other.

run  python tests/messages.py    # after a message has changed: the page again, in place

Each section names its files. A message that the page lacks comes to the end of its section, with
the cause left empty, to be written by hand. A message that the code no longer says goes.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "MESSAGES.md"


def spelled(node):
    """A string of the code, with `...` for what is filled in; "" for anything else."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value if isinstance(part, ast.Constant) else "..." for part in parts]
    if not all(isinstance(text, str) for text in texts):
        return ""
    text = re.sub(r"\.{4,}", "...", "".join(texts)).strip()
    return text if re.search("[a-z]", text) else ""


def messages(path):
    """What a file raises, or gives to a parser's `error`, in the order of its lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if re.fullmatch(r"\w*[eE]rror", name) and spelled(node.args[0]):
                yield spelled(node.args[0])


def strings(path):
    """All of a file's strings: a message may be put together elsewhere than it is raised."""
    return {spelled(node) for node in ast.walk(ast.parse(path.read_text()))}


def page(text):
    """The page again, of its text."""
    told = set(re.findall(r"^\| `(.*?)` \|", text, re.M))
    known = set().union(*map(strings, ROOT.glob("*.py")))
    sections = []
    for section in re.split(r"^(?=## )", text, flags=re.M):
        head, *lines = section.rstrip().split("\n")
        files = [ROOT / name for name in re.findall(r"`(\w+\.py)`", head)]
        kept = []
        for line in lines:
            row = re.match(r"\| `(.*?)` \|", line)
            if not row or row[1] in known:
                kept.append(line)
        for message in dict.fromkeys(message for path in files for message in messages(path)):
            if message not in told:
                kept.append(f"| `{message}` |  |")
        sections.append("\n".join([head, *kept]))
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
