"""Talking with a person at the terminal: the words of a command line, text that is safe to show; and for label.py
questions, answers, and a file that no answer gets lost from."""
import json
import os
import re
import shutil
import sys
import textwrap
import unicodedata

from checkpoint import write_atomic
from common import DISK, UserError
from data import read_jsonl

HELP = """Which response would you rather read after the prompt? Type the numbers, best first.
    3142 or 3 1 4 2   3 is best, 2 is worst
    3=1 4 2           3 and 1 are equally good
    1=2=3=4           no difference: kept, but not trained on
    s   skip: it is not asked again      u   undo the last answer and give it again
    ?   this help                        q   quit: every answer is on disk already"""


def words_for(*flags, several=False):
    """Let the words that a command line begins with stand for these flags, in this order: sample.py FOLDER PROMPT.
    several: any number of words stand for the one flag, with commas between them."""
    words = []
    while sys.argv[1:] and not sys.argv[1].startswith("-") and (several or len(words) < len(flags)):
        words.append(sys.argv.pop(1))
    sys.argv += [f"--{flag}={word}" for flag, word in zip(flags, [",".join(words)] if several and words else words)]


def visible(text):
    """Text that cannot act on the terminal: escape codes, direction marks and the like become \\x1b, \\u202e, ..."""
    text = "".join(c if c in "\n\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
                   else ascii(c)[1:-1] for c in text)  # the two joiners belong to scripts and emoji
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def show(title, prompt, responses):
    """Print one question, wrapped to the width of the terminal."""
    width = max(20, min(100, shutil.get_terminal_size().columns - 1))
    print(f"\n{'-' * width}\n{title}\n\n{textwrap.fill(visible(prompt) + ' ...', width)}\n")
    for number, text in enumerate(responses, start=1):
        print(textwrap.fill(visible(text), width, initial_indent=f"  {number}  ...", subsequent_indent=" " * 8))
    print("\nbest to worst, = for a tie; s skip, u undo, q quit, ? help")


def parse_order(reply, K):
    """Response numbers in levels, best first: "3=1 4 2" is [[3, 1], [4], [2]]. ValueError says what is wrong."""
    reply = re.sub(r"[\s,]", "", reply)
    if not re.fullmatch("[0-9](=?[0-9])*", reply):
        raise ValueError("that is not an order")
    if sorted(reply.replace("=", "")) != [str(number) for number in range(1, K + 1)]:
        raise ValueError(f"each of 1 to {K} has to stand there once")
    return [[int(number) for number in level.split("=")] for level in re.findall("[0-9](?:=[0-9])*", reply)]


def read_answers(path):
    """Rows of a file that answers are appended to. A last line that a crash cut short is dropped, with a notice."""
    content = path.read_bytes() if path.exists() else b""
    whole, _, last = content.rpartition(b"\n")
    if last:
        try:
            json.loads(last)  # if it can be read, only its line end is missing
            whole = content
        except ValueError:
            print(f"{path}: the last line was cut short and is dropped")
        content = whole + b"\n" if whole else b""
        write_atomic(path, lambda temporary: temporary.write_bytes(content))
    return read_jsonl(path, {"id": str}) if content.strip() else []


def append(path, row):
    """Add one line to a JSONL file; when this returns, it is on the disk."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror} (earlier answers are safe)", DISK) from None


def ask(question):
    """A line from the keyboard or a pipe; end of input and Ctrl-C mean quit."""
    try:
        return input(question).strip().lower()
    except UnicodeDecodeError:  # a key that is no UTF-8
        return "no text"
    except (EOFError, KeyboardInterrupt):
        print()
        return "q"
