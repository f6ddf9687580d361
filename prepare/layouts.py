"""The layouts that people have, and how a row of each becomes one of ours: for `python data.py own` (own.py).

    {"text"}                                    corpus
    {"prompt", "completion"}                    demonstration; texts, or lists of messages {"role", "content"} as in TRL
    {"messages"}                                demonstration; the last message is the assistant's, the response
    {"instruction", "input", "output"}          demonstration as in Stanford Alpaca; input may be missing or empty
    {"prompt", "chosen", "rejected"}            pair; texts or lists of messages
    {"chosen", "rejected"}                      pair; what both begin with is the prompt: lists of messages, transcripts
                                                as in Anthropic's HH, or texts (cut at a border of words)
    {"prompt", "responses"}                     ranking, best to worst
    {"query", "sample0", "sample1", ..., "best"}  best of several as in lm-human-preferences, texts or ids of GPT-2's
                                                tokens; best is a number, and each other sample gives one pair
    {"prompt"}                                  prompt; text or a list of messages that ends with the user's

Messages become one text as in HH: "\\n\\nHuman: ...", "\\n\\nAssistant: ...", a system message as it is before them;
white space around each is left out. A field with content that a layout does not use is an error, not left out.
Left out on purpose: tools and images in messages, unpaired feedback, trees of messages.
"""
import itertools
from typing import Callable, NamedTuple

from data import REPLY, TURN, check_text, checked
from gpt2 import gpt2_tokenizer
from hh import split_transcript


KINDS = {"corpus": {"text": str}, "demonstrations": {"prompt": str, "completion": str}, "prompts": {"prompt": str},
         "pairs": {"prompt": str, "chosen": str, "rejected": str}, "rankings": {"prompt": str, "responses": list}}


# Every from_... below turns one row into a list of rows of ours; ValueError("field: problem") if it can't.


def dialogue(messages, name):
    """A list of messages {"role", "content"} as one text; ValueError that names the field and the message."""
    if not isinstance(messages, list):
        raise ValueError(f"{name}: expected a list of messages, found {type(messages).__name__}")
    text = ""
    for number, message in enumerate(messages, start=1):
        try:
            if not isinstance(message, dict):
                raise ValueError(f"expected role and content, found {type(message).__name__}")
            role, content = checked(message, {"role": str})["role"], message.get("content")
            if role != "system" or content != "":  # some files begin every dialogue with an empty one
                checked(message, {"content": str})
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"role: {role!r} is not system, user or assistant")
            if role == "system" and number > 1:
                raise ValueError("role: system stands only at the beginning, once")
        except ValueError as error:
            raise ValueError(f"{name}: message {number}: {error}") from None
        text += {"system": "", "user": TURN + " ", "assistant": REPLY + " "}[role] + content.strip()
    return text


def prompt_text(messages, name="prompt"):
    """Messages that end with the user's as a prompt, which ends with REPLY."""
    text = dialogue(messages, name)
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"{name}: {last} before the response (a message of the user has to be there)")
    return text + REPLY


def response_text(messages, name):
    """One message of the assistant as a response, which begins with a space."""
    text = dialogue(messages, name)
    if [message["role"] for message in messages] != ["assistant"]:
        found = ", ".join(message["role"] for message in messages) or "none"
        raise ValueError(f"{name}: expected one message of the assistant, found {found}")
    return text.removeprefix(REPLY)


def from_fields(row, names):
    """[The row as it is, if its fields are texts], or [one with the fields prompt and names made of their messages]."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and TURN in prompt and not prompt.rstrip().endswith(REPLY.strip()):
        raise ValueError("prompt: a dialogue that does not end with Assistant: (the response could not follow)")
    if isinstance(prompt, list) or any(isinstance(row[name], list) for name in names):
        return [{"prompt": prompt_text(row["prompt"]), **{name: response_text(row[name], name) for name in names}}]
    return [row]


def from_demonstration(row):
    """A demonstration with the fields of ours, as texts or as messages."""
    return from_fields(row, ["completion"])


def from_messages(row):
    """A demonstration: the last message is the response, those before it are the prompt."""
    messages = row["messages"]
    dialogue(messages, "messages")
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise ValueError(f"messages: {last} at the end (the last message is the response, the assistant's)")
    return [{"prompt": prompt_text(messages[:-1], "messages"), "completion": response_text(messages[-1:], "messages")}]


def from_alpaca(row):
    """A demonstration: instruction, blank line and input are the user's only message."""
    checked(row, {"instruction": str, "output": str})
    extra = "" if row.get("input") is None else row["input"]
    if not isinstance(extra, str) or extra.strip():
        check_text(extra, "input")
        extra = "\n\n" + extra.strip()
    return [{"prompt": prompt_text([{"role": "user", "content": row["instruction"].strip() + extra}]),
             "completion": " " + row["output"].strip()}]


def shared(a, b):
    """How many items (letters of a text, messages of a list) two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def from_transcript(text, name):
    """(prompt, response) of a dialogue as one text; ValueError that names the field."""
    try:
        return split_transcript(text)
    except ValueError as error:
        raise ValueError(f"{name}: a transcript where the Assistant's turn is not the last ({error})") from None


def without_prompt(chosen, rejected):
    """{"prompt", "chosen", "rejected"} of two lists of messages or two texts: what both begin with is the prompt."""
    if isinstance(chosen, list) or isinstance(rejected, list):
        dialogue(chosen, "chosen")
        dialogue(rejected, "rejected")
        cut = shared(*([(m["role"], m["content"].strip()) for m in messages] for messages in (chosen, rejected)))
        return from_fields({"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]},
                           ["chosen", "rejected"])[0]
    checked({"chosen": chosen, "rejected": rejected}, {"chosen": str, "rejected": str})
    if any(mark in text for mark in (TURN, REPLY) for text in (chosen, rejected)):
        (prompt, chosen), (other, rejected) = from_transcript(chosen, "chosen"), from_transcript(rejected, "rejected")
        if prompt != other:
            raise ValueError("rejected: another prompt than chosen has (they differ before the last response)")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    cut = shared(chosen, rejected)  # back to white space before a word of each
    while cut and not all(text[cut:cut + 1].isspace() and text[cut:].strip() for text in (chosen, rejected)):
        cut -= 1
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def from_pair(row):
    """A pair; a prompt as text beside lists of messages is in these lists once more, as in UltraFeedback."""
    if "prompt" in row and not (isinstance(row["prompt"], str) and isinstance(row["chosen"], list)):
        return from_fields(row, ["chosen", "rejected"])
    made = without_prompt(row["chosen"], row["rejected"])
    if row.get("prompt", "").strip() not in made["prompt"]:
        raise ValueError("prompt: it is not in the messages that chosen and rejected begin with")
    return [made]


def sample_text(value, name):
    """A text as it is, or a list of GPT-2's token ids as text; ids above its end of text are padding."""
    if not isinstance(value, list):
        if value != "" or name != "query":  # only a prompt may be empty
            check_text(value, name)
        return value
    if any(type(i) is not int or i < 0 for i in value):
        raise ValueError(f"{name}: expected a text or the ids of GPT-2's tokens")
    enc = gpt2_tokenizer()
    return enc.decode([i for i in value if i <= enc.eot_token])


def sample_names(row):
    """sample0, sample1, ... as far as the row has them."""
    return list(itertools.takewhile(row.__contains__, map("sample{}".format, itertools.count())))


def from_best(row):
    """Pairs with the best sample as chosen, one for each different other sample; nothing ranks the others."""
    prompt, *texts = [sample_text(row[name], name) for name in ["query"] + sample_names(row)]
    best = row["best"]
    if type(best) is not int or not 0 <= best < len(texts):
        raise ValueError(f"best: expected a whole number from 0 to {len(texts) - 1}")
    others = [text for text in dict.fromkeys(texts) if text != texts[best]]
    if not others:
        raise ValueError("best: all samples are the same")
    return [{"prompt": prompt, "chosen": texts[best], "rejected": text} for text in others]


class Layout(NamedTuple):
    """Fields of a row that tell this layout, fields that it needs, fields that it may have, and what becomes of it."""
    telling: tuple
    needed: tuple
    optional: tuple
    kind: str
    convert: Callable

    def used(self, row):
        """The names of the fields whose content is in the converted rows."""
        samples = sample_names(row) if self.convert is from_best else []
        return {*self.needed, *self.optional, *samples}


LAYOUTS = [  # the first of which a row has a telling field
    Layout(("sample0", "sample1"), ("query", "best", "sample0", "sample1"), (), "pairs", from_best),
    Layout(("chosen", "rejected"), ("chosen", "rejected"), ("prompt",), "pairs", from_pair),
    Layout(("responses",), ("prompt", "responses"), (), "rankings", lambda row: [row]),
    Layout(("completion",), ("prompt", "completion"), (), "demonstrations", from_demonstration),
    Layout(("instruction",), ("instruction", "output"), ("input",), "demonstrations", from_alpaca),
    Layout(("messages",), ("messages",), (), "demonstrations", from_messages),
    Layout(("text",), ("text",), (), "corpus", lambda row: [row]),
    Layout(("prompt",), ("prompt",), (), "prompts", lambda row: from_fields(row, []))]
# Fields that hold content. Beside a layout that does not use them they would be lost, and the rest would mislead.
CONTENT = {"question", "instruction", "query", "input", "output", "response", "answer", "answers", "completion",
           "completions", "system", "history", "context", "conversations", "messages", "parent_id", "label", "labels",
           "rank", "ranks", "scores"}


def recognise(row):
    """The Layout of a row; ValueError if there is none, or a field is missing, or one with content would be lost."""
    layout = next((layout for layout in LAYOUTS if any(name in row for name in layout.telling)), None)
    if layout is None:
        found = ", ".join(row)[:200] or "nothing"
        raise ValueError(f"no known layout (found: {found}; layouts.py lists those that are)")
    checked(row, dict.fromkeys(layout.needed, object))  # that they are there; convert looks at what they hold
    for name in row:
        if name in CONTENT - layout.used(row):
            raise ValueError(f"{name}: not used by the layout {', '.join(layout.needed)} (rename it, or remove it)")
    return layout
