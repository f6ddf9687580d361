"""A person ranks at the terminal: one sample after another, with undo, ties and skips.

    python -m labeling.terminal ann                  ranks out/tiny/samples/samples.jsonl into out/tiny/label-ann

The answer is on disk before the next question; the same command resumes, and its undo reaches into earlier sessions.
"""
import re
import shutil
import textwrap
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from common import check, open_folder, run, visible
from data import write_jsonl
from label import shuffled
from labeling.answers import parse_order, read_answers, read_samples, write_answers, write_order

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"  # of a person, as it is written in files and folders
HELP = """Which response would you rather read after the prompt? Type the numbers, best first.
    3142 or 3 1 4 2   3 is best, 2 is worst
    3=1 4 2           3 and 1 are equally good
    1=2=3=4           no difference: stored, but not trained on
    3142!             3 is best, but none of them is acceptable
    1, 2, or =        is enough where there are two responses
    s   skip: it is not asked again      u   undo the last answer and ask again
    ?   this help                        q   quit: every answer is on disk already"""

@dataclass
class Config:
    labeler: str = ""  # your name, the first word of the command line: letters and digits, then also . _ -
    samples: str = "out/tiny/samples/samples.jsonl"  # {"id", "prompt", "responses"}
    limit: int = 0     # only the first so many samples; 0: all
    out: str = ""      # folder for answers.jsonl and rankings.jsonl; empty: out/tiny/label-NAME

def shown_to(labeler, sample):
    """A sample's responses in the order in which a labeler sees them, a different one for each labeler."""
    return shuffled(sample["responses"], zlib.crc32(sample["id"].encode()), zlib.crc32(labeler.encode()))

def show(title, prompt, responses):
    """Print one question, in lines of at most 100 columns."""
    width = min(100, max(20, shutil.get_terminal_size().columns - 1))
    print(f"\n{'-' * width}\n{title}\n\n{textwrap.fill(visible(prompt) + ' ...', width)}\n")
    for number, text in enumerate(responses, start=1):
        print(textwrap.fill(f"  {number}  ...{visible(text)}", width, subsequent_indent=" " * 8))
    print(f"\n{'best to worst' if len(responses) > 2 else '1 or 2'}, = for a tie; s skip, u undo, q quit, ? help")

def ask(question):
    """A line from the keyboard or a pipe; end of input and Ctrl-C mean quit."""
    try:
        return input(question).strip().lower()
    except (EOFError, KeyboardInterrupt):
        print()
        return "q"

def rank(samples, labeler, folder):
    """Ask for the order of one sample after another and store each answer before the next question: all answers."""
    check(re.fullmatch(NAME, labeler), f"your name comes first: letters and digits, then also . _ - ({labeler!r})")
    open_folder(folder)  # locked: two terminals must not write one file
    stored, ids, asked = read_answers(folder, labeler), {sample["id"] for sample in samples}, None
    print(f"you rank as {labeler}; your answers are in {folder / 'answers.jsonl'}\n\n{HELP}")
    while True:
        answered = [answer for answer in stored if answer["id"] in ids]  # those to other samples stay
        done = {answer["id"] for answer in answered}
        left = [sample for sample in samples if sample["id"] not in done]
        if left and left[0] is not asked:
            asked, shown, start = left[0], shown_to(labeler, left[0]), time.monotonic()
            show(f"{len(answered) + 1} of {len(samples)}", asked["prompt"], shown)
        reply = ask("> " if left else "\nall answered: u undoes the last, Enter ends > ")
        if reply == "u" and answered:
            stored.remove(answered[-1])
            asked = None
        elif reply == "q" or not left:
            break
        elif reply in ("u", "?"):
            print(HELP if reply == "?" else "there is nothing to undo")
        else:
            order, acceptable = reply.removesuffix("!").strip(), not reply.endswith("!")
            if len(shown) == 2:  # one key is enough
                order = {"1": "12", "2": "21", "=": "1=2"}.get(order, order)
            try:
                levels = [] if order == "s" else parse_order(order, len(shown))
            except ValueError as error:
                print(f"{error}: try again, or ? for help")
                continue
            stored.append({"id": asked["id"], "prompt": asked["prompt"], "labeler": labeler, "shown": shown,
                           "order": write_order(levels), "seconds": round(time.monotonic() - start, 1),
                           **({} if acceptable or not levels else {"acceptable": False})})
        write_jsonl(folder / "answers.jsonl", stored)
    print(f"\n{len(answered)} answered, {len(left)} left; the same command resumes")
    return stored

def main(cfg):
    folder = Path(cfg.out or f"out/tiny/label-{cfg.labeler}")
    write_answers(folder, rank(read_samples(cfg.samples, cfg.limit), cfg.labeler, folder))

if __name__ == "__main__":
    run(main, Config, words=("labeler",))
