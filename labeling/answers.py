"""What labelers said, in one format, whether they are people at the terminal, people at the page, or machines.

An answer, a line of answers.jsonl: {"id", "prompt", "labeler", "shown", "order"}. shown holds the sample's responses as
the labeler saw them; order has their numbers, best first: "3=1 4 2" says that 3 and 1 are equally good, "" that the
sample was skipped. People's have "seconds", too, and "acceptable": false if they would accept none of the responses;
machines' have "preferences": [[i, j, p], ...], shown response i is better than j with probability p.

A ranking, a line of rankings.jsonl, is what reward.py and dpo.py train on: {"id", "prompt", "responses", "ties",
"labeler"}. Tied responses must not become pairs to train on: "responses" has one of each tie, the first shown (in a
random order), and "ties" each tie in full, that one first. An answer that compares nothing makes no ranking.
"""
import re
import shlex

from common import check
from data import check_text, read_jsonl, read_rows, write_jsonl

def parse_order(text, K):
    """Response numbers in levels, best first: "3=1 4 2" is [[3, 1], [4], [2]]. ValueError says what is wrong."""
    text = re.sub(r"[\s,]", "", text)
    if not re.fullmatch("[0-9](=?[0-9])*", text):
        raise ValueError(f"{text!r} is not an order")
    if sorted(text.replace("=", "")) != [str(number) for number in range(1, K + 1)]:
        raise ValueError(f"an order has each of 1 to {K} once")
    return [[int(number) for number in level.split("=")] for level in re.findall("[0-9](?:=[0-9])*", text)]

def write_order(levels):
    """The reverse of parse_order; the numbers of a tie in ascending order."""
    return " ".join("=".join(map(str, sorted(level))) for level in levels)

def levels_of(answer):
    """The responses (texts) of an answer, or of a ranking, in levels, best first; [] if it was skipped."""
    if "shown" in answer:
        levels = parse_order(answer["order"], len(answer["shown"])) if answer["order"].strip() else []
        return [[answer["shown"][number - 1] for number in sorted(level)] for level in levels]
    ties = {tie[0]: tie for tie in answer.get("ties", [])}
    return [ties.get(text, [text]) for text in answer["responses"]]

def same_order(one, two):
    """Whether two answers to one sample order its responses alike, however these were shown."""
    return list(map(sorted, levels_of(one))) == list(map(sorted, levels_of(two)))

def ranking_of(answer):
    """The ranking that an answer makes; None if it compares nothing."""
    levels = levels_of(answer)
    if len(levels) < 2:
        return None
    return {"id": answer["id"], "prompt": answer["prompt"], "responses": [level[0] for level in levels],
            "ties": [level for level in levels if len(level) > 1], "labeler": answer["labeler"]}

def check_answer(row):
    """The row, if it is an answer or a ranking; else ValueError."""
    texts = row.get("shown" if "order" in row else "responses")
    if not isinstance(texts, list):
        raise ValueError("expected an object with id, prompt, labeler, and shown and order, or responses")
    for name, kind, default in (("order", str, ""), ("ties", list, []), ("seconds", (int, float), 0)):
        if not isinstance(row.get(name, default), kind) or name == "ties" and not all(
                isinstance(tie, list) and tie for tie in row.get(name, [])):
            raise ValueError(f"{name}: {row[name]!r} has another type")
    check_text(row.get("prompt"), "prompt")
    for text in (row.get("id"), row.get("labeler"), *texts):
        check_text(text, "id, labeler, responses")
    levels_of(row)
    return row

def read_answers(folder, labeler=None):
    """The answers in a folder; UserError if they are another labeler's (None: anybody's will do), or a model's."""
    path = folder / "answers.jsonl"
    answers = read_rows(path, check_answer) if path.exists() and path.stat().st_size else []
    others = [answer for answer in answers if labeler not in (None, answer["labeler"])]
    by_model = (folder / "rankings.jsonl").exists() and not path.exists()  # a reward model writes no answers
    check(not others and not by_model, f"{folder} holds another labeler's work: change --out")
    return answers

def write_answers(folder, answers):
    """Write answers.jsonl and rankings.jsonl, print how to train on the rankings, and return how many there are."""
    rankings = list(filter(None, map(ranking_of, answers)))
    write_jsonl(folder / "answers.jsonl", answers)
    write_jsonl(folder / "rankings.jsonl", rankings)
    print(f"{folder}: {len(answers)} answers, {len(rankings)} rankings")
    if rankings:
        epochs = max(2, 80 * 16 // len(rankings))  # 80 steps: best on held-out rankings, with 42 and with 167 of them
        reward = folder.with_name("reward-" + folder.name.removeprefix("label-"))
        print("to train: ", shlex.join(["python", "reward.py", "--train", f"{folder}/rankings.jsonl",
                                        "--epochs", str(epochs), "--out", str(reward)]))
    return len(rankings)

def read_samples(path, count=0):
    """The first so many (0: all) samples {"id", "prompt", "responses"} of a file that label.py sample wrote."""
    samples = read_jsonl(path, {"id": str, "prompt": str, "responses": list})
    check(len({row["id"] for row in samples}) == len(samples), f"{path}: id: a duplicate")
    check(all(len(row["responses"]) < 10 for row in samples), f"{path}: more than nine responses to order")
    return samples[:count or len(samples)]
