"""A person at the terminal: one sample after another, with undo, ties and skips. For label.py rank and for evaluate.py
--ask."""
import time

from answers import check_owner, levels_of, mend, parse_order, read_answers, shown_to, write_answers, write_order
from common import check
from data import write_jsonl
from runs import open_folder
from terminal import HELP, HELP_OF_TWO, append, ask, show

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"  # of a person, as it stands in files and folders


def rank_by_person(samples, labeler, folder):
    """Ask for the order of one sample after another; an answer is on disk before the next question. All answers."""
    check(all(len(row["responses"]) < 10 for row in samples), "a sample has more than nine responses to order")
    open_folder(folder)  # locked: two terminals must not add to one file
    path = folder / "answers.jsonl"
    mend(path)
    check_owner(folder, labeler)
    stored = read_answers(path) if path.exists() else []
    ids, row = {sample["id"] for sample in samples}, None
    if others := sum(answer["id"] not in ids for answer in stored):
        print(f"{folder} also holds answers to other samples ({others}); they stay")
    words = HELP_OF_TWO if all(len(row["responses"]) == 2 for row in samples) else HELP
    print(f"you rank as {labeler}; your answers are in {path}\n\n{words}")
    while True:
        answered = [answer for answer in stored if answer["id"] in ids]
        done = {answer["id"] for answer in answered}
        left = [sample for sample in samples if sample["id"] not in done]
        if left and left[0] is not row:
            row, start = left[0], time.monotonic()
            shown = shown_to(labeler, row)
            show(f"{len(answered) + 1} of {len(samples)}", row["prompt"], shown)
        reply = ask("> " if left else "\nall answered: u undoes the last, Enter ends > ")
        if reply == "u" and answered:
            stored.remove(answered[-1])
            write_jsonl(path, stored)
            row = None  # it is asked again
        elif reply == "q" or not left:
            break
        elif reply in ("u", "?"):
            print(words if reply == "?" else "there is nothing to undo")
        else:
            try:
                order = reply.removesuffix("!").strip()
                if len(shown) == 2:  # one key is enough
                    order = {"1": "1 2", "2": "2 1", "=": "1=2"}.get(order, order)
                levels = parse_order(order, len(shown)) if order != "s" else []
            except ValueError as error:
                print(f"{error}: try again, or ? for help")
                continue
            unacceptable = {"acceptable": False} if levels and reply.endswith("!") else {}
            stored.append({"id": row["id"], "prompt": row["prompt"], "labeler": labeler, "shown": shown,
                           "order": write_order(levels), **unacceptable, "seconds": round(time.monotonic() - start, 1)})
            append(path, stored[-1])
    write_answers(folder, stored)
    preferences = sum(len(levels_of(answer)) > 1 for answer in answered)
    print(f"\n{len(answered)} answered, {preferences} of them with a preference, {len(left)} left; the same command "
          "goes on, or undoes")
    return stored
