"""Deterministic synthetic data in the shapes of the real sets, with something in it that a tiny model can learn.

Instructions come from a few task families over a closed vocabulary, and the answer is a function of the instruction. In
a preference pair the chosen answer is kinder than the rejected one (kind against plain, kind against rude, plain
against rude), so a reward model can tell them by their words, and a policy raises its reward by preferring kind words.
Nothing here reads a clock, a random state or the network: the bytes are pinned in `sources.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from bench.data.draws import Draws
from bench.errors import DataError

Row = dict[str, Any]
Task = tuple[str, str]
"""Instruction and its answer."""

KINDS_OF_THING = {
    "animal": ("dog", "cat", "cow", "horse", "goat", "duck", "fox", "bear"),
    "fruit": ("apple", "pear", "plum", "grape", "lemon", "melon", "peach", "fig"),
    "tool": ("hammer", "saw", "drill", "file", "wrench", "spade", "axe", "rake"),
    "colour": ("red", "blue", "green", "pink", "grey", "brown", "white", "black"),
    "metal": ("iron", "gold", "silver", "tin", "lead", "zinc", "steel", "copper"),
}
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("long", "short"), ("high", "low"),
    ("wet", "dry"), ("full", "empty"), ("early", "late"), ("soft", "hard"), ("rich", "poor"), ("light", "dark"),
)  # fmt: skip
NAMES = ("Ann", "Bob", "Carl", "Dora", "Emma", "Fred", "Gina", "Hugo", "Ida", "Jack", "Kate", "Leo")
NUMBERS = tuple(range(13))

KIND = ("Gladly!", "With pleasure!", "Of course!", "Happy to help!", "What a good question!")
KIND_ENDS = ("You are welcome.", "Have a nice day.", "I am glad to help.", "Thank you for asking.")
RUDE = ("Go away!", "What a silly question!", "Leave me alone!", "How boring!", "Not again!")
RUDE_ENDS = ("Ask somebody else.", "I do not care.", "Stop wasting my time.", "Do it yourself.")

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


def instruct_rows(count: int = 2000) -> list[Row]:
    """Rows `{instruction, input, output, id}` as InstructWild has them; every instruction stands once."""
    return [
        {"instruction": instruction, "input": "", "output": _spoken(instruction, answer), "id": number}
        for number, (instruction, answer) in enumerate(_tasks("instruct", count), 1)
    ]


def pair_rows(count: int = 1000) -> list[Row]:
    """Rows `{prompt, response, chosen, rejected}` as rm-static has them; `response` is the answer without manners."""
    return [_pair(instruction, answer, number) for number, (instruction, answer) in enumerate(_tasks("pairs", count))]


def prompt_rows(count: int = 500) -> list[Row]:
    """Rows `{instruction, id}`: what a policy answers in PPO, drawn from the same families."""
    return [{"instruction": instruction, "id": number} for number, (instruction, _) in enumerate(_tasks("prompts", count), 1)]


def answered(prompts: Iterable[Row]) -> list[Row]:
    """Instruct rows for real prompts: each gets a generated answer that depends on its text only.

    The answer speaks about the prompt's first words in sentences of a closed vocabulary; its length varies as those of
    real answers do (about 10 to 120 words).
    """
    return [
        {"instruction": row["instruction"], "input": "", "output": _long_answer(row["instruction"]), "id": row.get("id", number)}
        for number, row in enumerate(prompts, 1)
    ]


def paired(prompts: Iterable[Row]) -> list[Row]:
    """Pair rows for real prompts: chosen and rejected are generated and differ in manners as those of `pair_rows` do."""
    return [_pair(row["instruction"], _long_answer(row["instruction"]), number) for number, row in enumerate(prompts)]


def file_content(name: str) -> bytes:
    """The bytes of a synthetic set's file; `name` is that of the source table. Raises DataError for another name."""
    makers: dict[str, Callable[[], bytes]] = {
        "synthetic-instruct": lambda: json_array(instruct_rows()),
        "synthetic-pairs": lambda: json_lines(pair_rows()),
        "synthetic-prompts": lambda: json_array(prompt_rows()),
    }
    if name not in makers:
        raise DataError(f"no synthetic data {name!r}; there are {', '.join(makers)}")
    return makers[name]()


def derived_content(suffix: str, prompts: Iterable[Row]) -> bytes:
    """The bytes of a file made from real prompts; `suffix` is `synthetic-instruct` or `synthetic-pairs`."""
    return json_lines(paired(prompts)) if suffix == "synthetic-pairs" else json_array(answered(prompts))


def json_array(rows: Iterable[Row]) -> bytes:
    """One JSON array, a row a line."""
    return ("[\n" + ",\n".join(map(_json, rows)) + "\n]\n").encode()


def json_lines(rows: Iterable[Row]) -> bytes:
    """A JSON object a line."""
    return "".join(_json(row) + "\n" for row in rows).encode()


def _json(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False)


# -- task families -------------------------------------------------------------------------------------------------


def _things() -> list[Task]:
    forms = ("What kind of thing is {}?", "Name the kind of {}.", "Tell me what kind {} is.")
    return [
        (form.format(thing), f"It is a kind of {kind}.") for form in forms for kind, things in KINDS_OF_THING.items() for thing in things
    ]


def _opposites() -> list[Task]:
    both = [*OPPOSITES, *((right, left) for left, right in OPPOSITES)]
    forms = ("What is the opposite of {}?", "Give the opposite of {}.", "Which word is not {}?")
    return [(form.format(word), f"The opposite is {other}.") for form in forms for word, other in both]


def _sums() -> list[Task]:
    forms = ("Add {} and {}.", "What is {} plus {}?")
    return [(form.format(left, right), f"The sum is {left + right}.") for form in forms for left in NUMBERS for right in NUMBERS]


def _orders() -> list[Task]:
    triples = [(a, b, c) for a in NUMBERS for b in NUMBERS for c in NUMBERS if len({a, b, c}) == 3]
    return [(f"Sort {a}, {b}, {c}.", "In order: {}, {}, {}.".format(*sorted((a, b, c)))) for a, b, c in triples]


def _echoes() -> list[Task]:
    words = [thing for things in KINDS_OF_THING.values() for thing in things]
    return [(f"Say {word} for {name}.", f"{name}, {word}.") for word in words for name in NAMES]


def _greetings() -> list[Task]:
    forms = (("Greet {} in the {}.", "Good {time}, {name}."), ("Wish {} a good {}.", "Have a good {time}, {name}."))
    times = ("morning", "evening", "night", "day")
    return [(ask.format(name, time), reply.format(name=name, time=time)) for ask, reply in forms for name in NAMES for time in times]


FAMILIES: tuple[Callable[[], list[Task]], ...] = (_things, _opposites, _sums, _orders, _echoes, _greetings)


def _tasks(purpose: str, count: int) -> list[Task]:
    """`count` tasks, each once; the families in turn as long as they last, then shuffled together."""
    draws = Draws(f"synthetic:{purpose}")
    families = [draws.sample(tasks, len(tasks)) for tasks in (family() for family in FAMILIES)]
    available = sum(map(len, families))
    if count > available:
        raise DataError(f"{count} synthetic rows asked for; the task families have {available}")
    chosen: list[Task] = []
    turn = 0
    while len(chosen) < count:
        family = families[turn % len(families)]
        turn += 1
        if family:
            chosen.append(family.pop())
    return draws.sample(chosen, count)


# -- wording -------------------------------------------------------------------------------------------------------


def _spoken(instruction: str, answer: str) -> str:
    """The answer, with kind words before or after it in every second row, so that a policy knows them."""
    draws = Draws(f"spoken:{instruction}")
    form = draws.below(4)
    if form == 0:
        return f"{draws.choice(KIND)} {answer}"
    if form == 1:
        return f"{answer} {draws.choice(KIND_ENDS)}"
    return answer


def _pair(instruction: str, answer: str, number: int) -> Row:
    """Of four pairs two are kind against rude, one kind against plain, one plain against rude."""
    draws = Draws(f"pair:{instruction}")
    kind = _with_manners(answer, KIND, KIND_ENDS, draws)
    rude = _with_manners(answer, RUDE, RUDE_ENDS, draws)
    plain = f" {answer}"
    chosen, rejected = ((kind, rude), (kind, plain), (kind, rude), (plain, rude))[number % 4]
    return {"prompt": f"{HUMAN}{instruction}{ASSISTANT}", "response": plain, "chosen": chosen, "rejected": rejected}


def _with_manners(answer: str, starts: tuple[str, ...], ends: tuple[str, ...], draws: Draws) -> str:
    """The answer with one phrase before or after it."""
    return f" {draws.choice(starts)} {answer}" if draws.below(2) else f" {answer} {draws.choice(ends)}"


_SENTENCES = (
    "First look at what is given and what is asked.",
    "Then take one small step after the other.",
    "A short example makes it clear.",
    "Keep the parts that matter and leave out the rest.",
    "It helps to write the answer down in plain words.",
    "There is more than one good way to do it.",
    "Check the result against the question at the end.",
    "If something is missing, ask for it.",
    "The most common case comes first.",
    "In short, begin simply and add detail later.",
)
_CHINESE_SENTENCES = (
    "首先看清题目给出了什么，要求什么。",
    "然后一步一步地完成。",
    "举一个简单的例子会更清楚。",
    "保留重要的部分，去掉其余的部分。",
    "用简单的话写出答案很有帮助。",
    "好的方法不止一种。",
    "最后根据问题检查结果。",
    "如果缺少什么，就提出来。",
    "最常见的情况放在前面。",
    "总之，先简单开始，再补充细节。",
)


def _long_answer(instruction: str) -> str:
    draws = Draws(f"answer:{instruction}")
    chinese = any("\u4e00" <= letter <= "\u9fff" for letter in instruction)
    sentences = draws.sample(_CHINESE_SENTENCES if chinese else _SENTENCES, 1 + draws.below(10))
    if chinese:
        return f"关于“{instruction.strip()[:12]}”：{''.join(sentences)}"
    return f'About "{" ".join(instruction.split()[:6])}": {" ".join(sentences)}'
