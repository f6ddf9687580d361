"""Talking with a person at the terminal: the words of a command line, text that is safe to show; and, for person.py,
the questions and a file from which no answer is lost."""
import itertools
import json
import os
import shutil
import sys
import textwrap
import unicodedata

from common import DISK, UserError

HELP_OF_TWO = """Which response would you rather read after the prompt?
    1 or 2   that one                    =   they are equally good
    1! or 2! that one, but you would accept neither
    s   skip: it is not asked again      u   undo the last answer and give it again
    ?   this help                        q   quit: every answer is on disk already"""
HELP = """Which response would you rather read after the prompt? Type the numbers, best first.
    3142 or 3 1 4 2   3 is best, 2 is worst
    3=1 4 2           3 and 1 are equally good
    1=2=3=4           no difference: kept, but not trained on
    3142!             3 is best, but you would accept none of them
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


def cells(text):
    """How many columns of the terminal a line takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text, width, **indents):
    """Lines of at most this many columns (textwrap counts letters, and some take two columns)."""
    return textwrap.wrap(text, width // 2 if cells(text) > len(text) else width, **indents)


def show(title, prompt, responses):
    """Print one question: the responses side by side if each gets 36 columns, else one below the other."""
    width = max(20, shutil.get_terminal_size().columns - 1)
    column = (width - 3 * (len(responses) - 1)) // len(responses)
    texts = [f"{number}  ...{visible(text)}" for number, text in enumerate(responses, start=1)]
    print(f"\n{'-' * min(100, width)}\n{title}\n\n{textwrap.fill(visible(prompt) + ' ...', min(100, width))}\n")
    if column >= 36:
        column = min(column, 60)
        blocks = [wrap(text, column, subsequent_indent="   ") for text in texts]
        for lines in itertools.zip_longest(*blocks, fillvalue=""):
            print("   ".join(line + " " * (column - cells(line)) for line in lines).rstrip())
    else:
        for text in texts:
            print("\n".join(wrap(text, min(100, width), initial_indent="  ", subsequent_indent=" " * 8)))
    print(f"\n{'best to worst' if len(responses) > 2 else '1 or 2'}, = for a tie; s skip, u undo, q quit, ? help")


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
