"""Prompts, contrast sets and their splits."""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.errors import PromptError
from xmodel_steer.core.inputs import as_prompts
from xmodel_steer.core.prompts import Message, Prompt, Rendered
from xmodel_steer.files.readers import read_contrast, read_prompts

CHAT = [{"role": "user", "content": "HELLO"}]
REPLY = [*CHAT, {"role": "assistant", "content": "HELLO"}]
PAIRS = [("What a joy.", "What a bore."), ("I won.", "I lost.")]
LABELLED = [("What a joy.", 1), ("I won.", "positive"), ("What a bore.", 0), ("I lost.", "No"), ("Rain.", -1)]


@dataclass
class Tokenizer:
    """A chat template like the real ones: it trims, tags each turn, and opens the assistant's."""

    prefix: str = "<bos>"
    user: str = "<|{role}|>\n{content}<|end|>\n"
    name_or_path: str = "fake"
    chat_template: str | None = "given"

    def apply_chat_template(self, turns, *, tokenize, add_generation_prompt, **_):
        assert not tokenize
        said = [self.user.format(role=t["role"], content=t["content"].strip()) for t in turns]
        return self.prefix + "".join(said) + ("<|assistant|>\n" if add_generation_prompt else "")


# --- prompts ---------------------------------------------------------------------------------


def test_the_id_follows_the_content():
    assert Prompt.of("a").id == Prompt.of("a").id != Prompt.of("b").id
    assert Prompt.of(CHAT).id == Prompt.of([Message("user", "HELLO")]).id != Prompt.of("HELLO").id
    assert Prompt.of(CHAT).id != Prompt.of([{"role": "system", "content": "HELLO"}]).id
    assert Prompt("a", id="mine").id == "mine"
    prompt = Prompt.of("a")
    assert Prompt.of(prompt) is prompt


def test_raw_text_is_rendered_as_it_is():
    rendered = Prompt.of(" <s> Hi\n").render(Tokenizer(chat_template=None))
    assert (rendered.text, rendered.spans, rendered.add_special_tokens) == (" <s> Hi\n", ((0, 8, 0),), True)


@pytest.mark.parametrize("chat, opened", [(CHAT, True), (REPLY, False), ([*REPLY, *CHAT], True)])
def test_the_template_opens_the_assistants_turn_unless_it_has_spoken(chat, opened):
    rendered = Prompt.of(chat).render(Tokenizer())
    assert rendered.text.endswith("<|assistant|>\n") == opened
    assert not rendered.add_special_tokens  # the template has written them


@given(st.lists(st.text("ABC 12", min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_spans_lead_to_the_same_content_under_every_template(contents):
    prompt = Prompt.of([{"role": "user", "content": c} for c in contents])
    trimmed = [c.strip() for c in contents]
    for tokenizer in (Tokenizer(), Tokenizer(prefix="", user="[inst] {content} [/inst]")):
        rendered = prompt.render(tokenizer)
        assert [rendered.text[a:b] for a, b, _ in rendered.spans] == trimmed
        assert ["".join(trimmed)[base : base + b - a] for a, b, base in rendered.spans] == trimmed
        assert list(rendered.spans) == sorted(rendered.spans)
        assert all(b <= a for (_, b, _), (a, _, _) in pairwise(rendered.spans))


def test_content_that_a_template_drops_has_no_span_and_moves_no_other():
    @dataclass
    class NoSystem(Tokenizer):
        def apply_chat_template(self, turns, **options):
            return super().apply_chat_template([t for t in turns if t["role"] != "system"], **options)

    prompt = Prompt.of([{"role": "system", "content": "BRIEF"}, *CHAT])
    (span,) = prompt.render(NoSystem()).spans
    assert span == (len("<bos><|user|>\n"), len("<bos><|user|>\nHELLO"), len("BRIEF"))


@pytest.mark.parametrize("tokenizer", [Tokenizer(chat_template=None), object()])
def test_chat_without_a_template_is_refused(tokenizer):
    name = getattr(tokenizer, "name_or_path", "this model")
    with pytest.raises(PromptError, match=f"need a chat template, .*'{name}' has none.*give raw text instead"):
        Prompt.of(CHAT).render(tokenizer)


# --- contrast sets ---------------------------------------------------------------------------


def paired_set(pairs):
    return ContrastSet.from_prompts(*zip(*pairs, strict=True), paired=True)


PAIR_ROWS = [{"positive": p, "negative": n} for p, n in PAIRS]
LABEL_ROWS = [{"text": text, "label": label} for text, label in LABELLED]
FORMS = {"records": list, "frame": pd.DataFrame, "dataset": datasets.Dataset.from_list}


@pytest.mark.parametrize("form", FORMS)
def test_paired_rows_of_every_form_give_the_same_set(form):
    assert ContrastSet.from_records(FORMS[form](PAIR_ROWS)) == paired_set(PAIRS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("column", ["text", "prompt"])
@pytest.mark.parametrize("on, off", [(1, 0), (True, False), ("positive", "negative"), (1.0, -1.0), (" Yes", "NO ")])
def test_labelled_rows_of_every_form_give_the_same_set(form, column, on, off):
    rows = [{column: text, "label": label} for text, label in (("a", on), ("b", off), ("c", off))]
    assert ContrastSet.from_records(FORMS[form](rows)) == ContrastSet.from_prompts(["a"], ["b", "c"])


def test_labels_of_mixed_spelling():
    made = ContrastSet.from_records(LABEL_ROWS)
    assert made == ContrastSet.from_prompts([t for t, _ in LABELLED[:2]], [t for t, _ in LABELLED[2:]])
    assert not made.paired


@pytest.mark.parametrize("write", [lambda m: m, json.dumps, np.array], ids=["list", "json", "array"])
def test_chat_messages_come_as_lists_or_json_or_arrays(write):
    made = ContrastSet.from_records([{"positive": write(REPLY), "negative": write(CHAT)}])
    assert made == ContrastSet.from_prompts([REPLY], [CHAT], paired=True)
    labelled = [{"messages": write(REPLY), "label": 1}, {"messages": write(CHAT), "label": 0}]
    assert ContrastSet.from_records(labelled) == ContrastSet.from_prompts([REPLY], [CHAT])


def test_text_that_only_looks_like_json_stays_text():
    text = '[{"an unfinished thought'
    assert ContrastSet.from_records([{"positive": text, "negative": "b"}]).positive[0].text == text


REFUSED = {
    "a blank text": (lambda: Prompt.of("  \n"), "the text is empty; drop the row or fill it in"),
    "blank messages": (lambda: Prompt.of([{"role": "user", "content": " "}]), "every message is empty"),
    "nothing": (Prompt, "either text or messages, not both and not neither"),
    "both": (lambda: Prompt("a", (Message("user", "b"),)), "either text or messages, not both and not neither"),
    "a number": (lambda: Prompt.of(3), "needs a string or a list of .* got int '3'"),
    "an empty list": (lambda: Prompt.of([]), "needs a string or a list of .* got list"),
    "no role": (lambda: Prompt.of([{"content": "a"}]), "needs role and content, 'role' is missing"),
    "a lone string": (lambda: as_prompts("ab"), r"give a list of prompts; for a single one, \[prompt\]"),
    "empty set": (lambda: ContrastSet.from_records([]), "no rows; each needs positive and negative"),
    "one-sided": (lambda: ContrastSet.from_prompts(["a"], []), "on both sides, got 1 positive and 0 negative"),
    "one label": (lambda: ContrastSet.from_records(LABEL_ROWS[2:]), "got 0 positive and 3 negative"),
    "on both sides": (
        lambda: ContrastSet.from_prompts(["a", "b"], ["c", "b", "a"]),
        r"2 prompt\(s\) are on both sides, for example 'a'; .* remove them",
    ),
    "chat on both sides": (lambda: ContrastSet.from_prompts([CHAT], ["a", CHAT]), r"1 prompt\(s\) are on both"),
    "unpaired length": (
        lambda: ContrastSet.from_prompts(["a", "b"], ["c"], paired=True),
        "paired, but 2 positive and 1 negative prompts; pass paired=False or complete the pairs",
    ),
    "no prompt column": (
        lambda: ContrastSet.from_records([{"sentence": "a", "label": 1}]),
        r"row 1: no text, prompt or messages among the columns \['label', 'sentence'\]",
    ),
    "no label column": (
        lambda: ContrastSet.from_records([LABEL_ROWS[0], {"text": "a"}]),
        r"row 2: label None is not 1/0, .* \(columns: \['text'\]",
    ),
    "half a pair": (lambda: ContrastSet.from_records([{"positive": "a"}]), "row 1: label None is not"),
    "bad label": (lambda: ContrastSet.from_records([{"text": "a", "label": 7}]), "row 1: label 7 is not 1/0"),
    "an empty cell": (
        lambda: ContrastSet.from_records(pd.DataFrame({"positive": ["a", np.nan], "negative": ["b", "c"]})),
        "row 2: an empty cell; drop the row",
    ),
    "rows of strings": (lambda: ContrastSet.from_records(["a"]), "row 1 is str, not a dictionary of columns"),
    "a file name": (lambda: ContrastSet.from_records("set.csv"), "got one string; .*read a file"),
    "too few to split": (
        lambda: paired_set(PAIRS).split((0.3, 0.3, 0.3)),
        "2 positive and 2 negative .* too few for 3",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_told_why(case):
    make, message = REFUSED[case]
    with pytest.raises(PromptError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError)


# --- splits ----------------------------------------------------------------------------------

FRACTIONS = st.sampled_from([(0.5, 0.5), (0.25, 0.25, 0.5), (0.6, 0.2), (1.0,), (1 / 3, 1 / 3, 1 / 3)])
NAMES = st.integers(0, 9)


def keys(part):
    return {p.content_key() for p in part.positive + part.negative}


def members(part):
    """Pairs of a paired set, or the prompts of an unpaired one, with their multiplicities."""
    if part.paired:
        return Counter(zip(part.positive, part.negative, strict=True))
    return Counter([(p, None) for p in part.positive] + [(None, n) for n in part.negative])


@settings(deadline=None)
@given(st.lists(st.tuples(NAMES, NAMES), min_size=1, max_size=30), st.booleans(), FRACTIONS, st.integers(0, 99))
def test_no_split_puts_a_prompt_into_two_parts_or_tears_a_pair(names, paired, fractions, seed):
    whole = ContrastSet.from_prompts([f"p{p}" for p, _ in names], [f"n{n}" for _, n in names], paired=paired)
    try:
        parts = whole.split(fractions, seed=seed)
    except PromptError as error:
        if "too few" not in str(error):
            raise
        return
    assert parts == whole.split(fractions, seed=seed)
    assert len(parts) == len(fractions)
    assert sum(len(keys(part)) for part in parts) == len(set().union(*map(keys, parts)))
    together = sum(map(members, parts), Counter())
    assert together <= members(whole)
    if sum(fractions) == 1:
        assert together == members(whole)


@pytest.mark.parametrize("paired", [True, False])
def test_a_split_keeps_to_its_shares_and_follows_its_seed(paired):
    whole = ContrastSet.from_prompts([f"p{i}" for i in range(40)], [f"n{i}" for i in range(40)], paired=paired)
    parts = whole.split((0.5, 0.25, 0.1), seed=1)
    assert [(len(p.positive), len(p.negative)) for p in parts] == [(20, 20), (10, 10), (4, 4)]
    assert all(part.paired == paired for part in parts)
    assert parts[0].positive != whole.positive[:20]  # shuffled
    assert keys(whole.split(seed=0)[0]) != keys(whole.split(seed=1)[0])


@pytest.mark.parametrize("fractions", [(0.7, 0.4), (0.5, 0.0), (1.2, -0.2)])
def test_impossible_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions must be positive and sum to at most 1, got"):
        paired_set(PAIRS).split(fractions)


class Roles:
    """A tokenizer whose template has words that a message may have too."""

    chat_template = "yes"
    name_or_path = "roles"

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep

    def apply_chat_template(
        self, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **_: object
    ) -> str:
        body = "".join(
            f"<|im_start|>{t['role']}\n{t['content'] if self.keep else t['content'].strip()}<|im_end|>\n" for t in turns
        )
        return (
            "<|im_start|>system\nYou are an art critic.<|im_end|>\n"
            + body
            + "<|im_start|>assistant\n" * add_generation_prompt
        )


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("content", ["user", "art", "You are an art critic.", " assistant ", "im_start", "a"])
def test_content_is_not_mistaken_for_the_templates_own_words(content: str, keep: bool) -> None:
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "art"},
        {"role": "user", "content": "user"},
    ]
    rendered = Prompt.of(messages).render(Roles(keep))
    own = [content.strip(), "art", "user"]
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == own
    assert [base for _, _, base in rendered.spans] == [0, len(own[0]), len(own[0]) + 3]
    # Each follows its own role tag.
    for (start, _, _), role in zip(rendered.spans, ("user", "assistant", "user"), strict=True):
        assert rendered.text[:start].rstrip().endswith(f"<|im_start|>{role}")


def test_text_that_spells_out_messages_is_another_prompt() -> None:
    chat = Prompt.of([{"role": "user", "content": "Hello"}])
    text = Prompt.of('[["user", "Hello"]]')
    assert chat.content_key() != text.content_key()
    assert chat.id != text.id


def test_message_content_must_be_text() -> None:
    with pytest.raises(PromptError, match="must be strings"):
        Prompt.of([{"role": "user", "content": None}])  # type: ignore[dict-item]


# --- templates that rewrite ------------------------------------------------------------------


def with_template(template: Any) -> Any:
    """A Hugging Face tokenizer with a chat template."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, name_or_path="mine")


LAST, CLEANED = "('<no think>' ~ m.content.split('</think>')[-1])", "m.content | replace('art', '')"
#: What a template writes of a message, and what of the content that is; None where it has other letters.
WRITES = {
    "m.content": lambda c: c,
    "m.content | trim": str.strip,
    "m.content.split('</think>')[-1] | trim": lambda c: c.split("</think>")[-1].strip(),
    "(m.content.split('</think>')[-1] if '</think>' in m.content else '<no think>' ~ m.content)": (
        lambda c: c.split("</think>")[-1]
    ),
    LAST: lambda c: c.split("</think>")[-1],
    "m.content | upper": lambda c: c if c.upper() == c else None,
    "m.content[:7]": lambda c: c[:7],
    "m.content.split() | join(' ')": str.strip,
    CLEANED: lambda c: c.replace("art", ""),
    "(m.content | reverse if m.content == 'art' else m.content)": lambda c: None if c == "art" else c,
    "''": lambda c: "",
}
FRAMES = [("<|", "|>\n", "<|end|>\n"), ("[", "] ", "[/]"), ("", "", "%\n"), ("", "", "")]
TURNS = {"messages": slice(None), "messages[1:]": slice(1, None), "messages[-2:]": slice(-2, None)}
WORDS = [
    "user",
    "art",
    "assistant",
    "You are an art critic.",
    "critic",
    "system",
    "A",
    "b",
    "?",
    "é🙂",
    "ß",
    "\U000f0001",
]
WORDS += [" ", "\n", "  ", "<think>", "</think>", "[/]", "<|end|>", "</think>\n\n", "'", '"', "\\"]
CONTENTS = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
CHATS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENTS), min_size=1, max_size=5)


def written(template: Any, chat: list[tuple[str, str]]) -> tuple[Prompt, Rendered, list[str]]:
    """The prompt, rendered, and what of each message has a span, without white space."""
    prompt = Prompt(messages=tuple(Message(role, content) for role, content in chat))
    rendered = prompt.render(with_template(template))
    trimmed = [content.strip() for _, content in chat]
    bases = list(accumulate(map(len, trimmed), initial=0))
    located = [""] * len(chat)
    assert all(b <= c for (_, b, _), (c, _, _) in pairwise(rendered.spans))
    for start, end, base in rendered.spans:
        number = next(i for i, content in enumerate(trimmed) if bases[i] <= base < bases[i] + len(content))
        part = rendered.text[start:end]
        assert part == trimmed[number][base - bases[number] : base - bases[number] + end - start]
        located[number] += "".join(part.split())
    return prompt, rendered, located


@settings(max_examples=400, deadline=None)
@given(
    chat=CHATS.filter(lambda chat: any(content.strip() for _, content in chat)),
    writes=st.tuples(*[st.sampled_from(sorted(WRITES))] * 3),
    frame=st.sampled_from(FRAMES),
    turns=st.sampled_from(sorted(TURNS)),
    default=st.sampled_from(["", "You are an art critic. user A "]),
)
# The end of the text is what the template cut off; what it looks for in another message; nothing between two.
@example([("system", "userAé🙂[/]")], ("m.content[:7]", "''", "''"), ("[", "] ", "[/]"), "messages", "")
@example(
    [("user", "</think>"), ("assistant", "</think>\n\nuser")], ("''", LAST, "m.content[:7]"), FRAMES[0], "messages", ""
)
@example([("user", "art"), ("system", "artuser")], (CLEANED, "m.content", "''"), ("", "", ""), "messages", "")
@example([("user", "userartYou are A.")], ("''", CLEANED, "''"), FRAMES[0], "messages", "")
def test_what_a_template_keeps_is_found_whatever_it_does_to_the_rest(chat, writes, frame, turns, default):
    roles = dict(zip(("system", "user", "assistant"), writes, strict=True))
    opening, closing, end = frame
    template = default + "{% for m in " + turns + " %}"
    for role, write in roles.items():
        tag = opening and f"{opening}{role}{closing}"
        template += (
            "{% if m.role == '" + role + "' %}{{ '" + tag.replace("\n", "\\n") + "' ~ " + write + " }}{% endif %}"
        )
    template += end + "{% endfor %}"
    _, rendered, located = written(template, chat)
    if not end:
        return  # with nothing between them, the end of one content may be the beginning of the next
    there = range(len(chat))[TURNS[turns]]
    kept = [WRITES[roles[role]](content) if i in there else "" for i, (role, content) in enumerate(chat)]
    for part, own in zip(kept, located, strict=True):
        assert part is None or own == "".join(part.split())
    lacking = tuple(i for i, (_, c) in enumerate(chat) if "".join((kept[i] or "").split()) != "".join(c.split()))
    assert rendered.missing == lacking
    # Written as the template keeps it, the same text has the same content.
    if any((part or "").strip() for part in kept) and None not in kept:
        _, again, found = written(template, [(role, part) for (role, _), part in zip(chat, kept, strict=True)])
        if again.text == rendered.text:
            assert covered(again) == covered(rendered) and found == located


def covered(rendered: Rendered) -> set[int]:
    places = {at for start, end, _ in rendered.spans for at in range(start, end)}
    return {at for at in places if not rendered.text[at].isspace()}


def chat_of(*contents: str, first: str = "user") -> Prompt:
    order = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    return Prompt.of([{"role": order[i % len(order)], "content": c} for i, c in enumerate(contents)])


TAGGED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
MERGED = (
    "{% set brief = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]"
    "{% if brief and loop.first %}<<{{ brief }}>> {% endif %}{{ m.content }}[/]{% endfor %}"
)


def test_a_system_message_in_the_first_users_turn_is_found_and_not_missing() -> None:
    rendered = chat_of("Be brief.", "Hi", "Yes.", first="system").render(with_template(MERGED))
    assert rendered.text == "[user]<<Be brief.>> Hi[/][assistant]Yes.[/]"
    assert [rendered.text[a:b] for a, b, _ in rendered.spans] == ["Be brief.", "Hi", "Yes."]
    assert [base for *_, base in rendered.spans] == [0, 9, 11] and rendered.missing == ()


class Stripping:
    """Python, of which no source is known."""

    chat_template, name_or_path = "yes", "stripping"

    def apply_chat_template(self, turns: list[dict[str, str]], **_: object) -> str:
        return "".join(f"[{t['role']}]{t['content'].split('</think>')[-1].strip()}[/]" for t in turns)


def test_reasoning_is_missing_and_what_follows_is_not() -> None:
    thought = chat_of("Hi", "<think>\nHm.\n</think>\n\n<b>Yes</b>.", "the cat")
    plain = chat_of("Hi", "<b>Yes</b>.", "the cat")
    one, two = (prompt.render(Stripping()) for prompt in (thought, plain))
    assert one.text == two.text and (one.missing, two.missing) == ((1,), ())
    assert [span[:2] for span in one.spans] == [span[:2] for span in two.spans]
    assert [one.text[a:b] for a, b, _ in one.spans] == ["Hi", "<b>Yes</b>.", "the cat"]


def test_content_that_is_written_twice_is_where_it_was_written_last() -> None:
    rendered = chat_of("Hi there").render(with_template("{{ messages[-1].content }}|" + TAGGED))
    assert [rendered.text[a:b] for a, b, _ in rendered.spans] == ["Hi there"] and rendered.spans[0][0] == 15


def test_very_long_contents_are_followed_round_the_private_use_characters() -> None:
    long = "0123456789" * 14000
    rendered = chat_of(long, "Yes. \U000f0001", long).render(with_template(TAGGED))
    assert [rendered.text[a:b] for a, b, _ in rendered.spans] == [long, "Yes. \U000f0001", long]


def test_a_template_that_takes_only_certain_words_can_be_used() -> None:
    only = "{% for m in messages %}{% if m.content not in ('yes', 'no') %}{{ raise_exception('yes or no') }}{% endif %}[{{ m.content }}]{% endfor %}"
    rendered = chat_of("yes", "no").render(with_template(only))
    assert rendered.text == "[yes][no]" and [rendered.text[a:b] for a, b, _ in rendered.spans] == ["yes", "no"]


FAILING = {
    "{{ raise_exception('System role not supported') }}": r"TemplateError: System role not supported\); change the messages",
    "{% for m in messages %}": "TemplateSyntaxError: ",
    "{{ nothing.at.all }}": "UndefinedError: 'nothing' is undefined",
    "{{ messages + 1 }}": "TypeError: ",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_an_error_of_the_prompt(template: str) -> None:
    prompt = chat_of("Be brief.", "Hi", first="system")
    says = f"{prompt.id} \\('system: Be brief.*the chat template of 'mine' fails on it \\({FAILING[template]}"
    with pytest.raises(PromptError, match=says):
        prompt.render(with_template(template))


def test_named_templates_need_a_default() -> None:
    assert chat_of("Hi").render(with_template({"default": TAGGED, "rag": "x"})).text == "[user]Hi[/]"
    with pytest.raises(PromptError, match=r"has the chat templates rag, tool and no default; .*chat_template\['rag'\]"):
        chat_of("Hi").render(with_template({"tool": "x", "rag": TAGGED}))


@pytest.mark.parametrize("code", ["%d %B %Y", "%Y-%m-%d", "%-d/%-m/%y %H:%M %A %j", "%D %T 100%%"])
@pytest.mark.parametrize("before", ["", "\n", "  ", "  {% if true %}\n x{% endif %}"])
def test_a_template_sees_the_same_day_on_every_day(code: str, before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = before + "{% set day = strftime_now is defined %}{{ day }}Today: {{ strftime_now(code) }}."
    tokenizer = with_template(template.replace("code", repr(code)) + TAGGED)
    now = chat_of("Hi").render(tokenizer).text
    clock = SimpleNamespace(now=lambda: datetime(2031, 1, 2, 3, 4))
    monkeypatch.setattr(chat_template_utils, "datetime", clock)
    assert chat_of("Hi").render(tokenizer).text == now
    # But for the day it is what transformers writes, white space at the beginning included.
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2024, 7, 26)))
    turns = [{"role": "user", "content": "Hi"}]
    assert now == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


# --- inputs of every kind --------------------------------------------------------------------

TEXTS = ["the cat", "the mat"]
ROWS = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
TAKEN = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "dictionary values": lambda: dict(enumerate(TEXTS)).values(),
    "array": lambda: np.array(TEXTS),
    "array of objects": lambda: np.array(TEXTS, dtype=object),
    "series": lambda: pd.Series(TEXTS, index=[5, 3]),
    "column": lambda: datasets.Dataset.from_list(ROWS)["text"],
    "prompts": lambda: [Prompt(text=text) for text in TEXTS],
    "rows": lambda: ROWS,
    "frame": lambda: pd.DataFrame(ROWS, index=[5, 3]),
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "stream": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "prompt column": lambda: [{"prompt": text, "text": None} for text in TEXTS],
    "frame with gaps": lambda: pd.DataFrame([{"text": TEXTS[0]}, {"prompt": TEXTS[1]}]),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_every_form_of_the_same_prompts_is_the_same(kind: str) -> None:
    expected = tuple(Prompt(text=text) for text in TEXTS)
    assert as_prompts(TAKEN[kind]()) == read_prompts(TAKEN[kind]()) == expected
    contrast = ContrastSet.from_prompts(TAKEN[kind](), ["no"])
    assert contrast.positive == expected


DATASETS = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
FOREIGN = {
    "splits": (
        lambda: datasets.DatasetDict(DATASETS),
        r"DatasetDict with splits train, test; give one of them, data\['train'\]",
    ),
    "streamed splits": (
        lambda: datasets.IterableDatasetDict({k: d.to_iterable_dataset() for k, d in DATASETS.items()}),
        r"IterableDatasetDict with splits train, test; .*data\['train'\]",
    ),
    "mapping of sets": (
        lambda: {"a": TEXTS, "b": DATASETS["test"]},
        r"dict with keys a, b; give one of them, data\['a'\]",
    ),
    "columns": (lambda: {"text": TEXTS}, r"dict with keys text; for rows of these columns, pandas.DataFrame\(data\)"),
    "a row": (lambda: ROWS[0], r"dict with keys text, n; for a single row, \[row\]"),
    "a message": (lambda: CHAT[0], r"dict with keys role, content; .*\[\[message\]\]"),
    "a set": (lambda: set(TEXTS), "a set has no order"),
    "bytes": (lambda: b"the cat", r"for a single one, \[prompt\]; got bytes"),
    "nothing": (lambda: None, "needs a list of prompts or rows, got NoneType 'None'"),
    "a number": (lambda: 3, "needs a list of prompts or rows, got int '3'"),
    "not a number": (lambda: float("nan"), "got float 'nan'"),
    "an array of no dimension": (lambda: np.array("the cat"), "needs a list of prompts or rows"),
    "token ids": (lambda: [[1, 2], [3]], r"number 1: Prompt: needs a string or a list .* got list '\[1, 2\]'"),
    "ids": (lambda: np.array([1, 2]), "number 1: Prompt: needs a string .* got int '1'"),
    "nested": (lambda: ["ab", ["cd", "ef"]], "number 2: Prompt: needs a string .* got list"),
    "a table of strings": (lambda: np.array([TEXTS, TEXTS]), "number 1: Prompt: needs a string .* got list"),
    "a conversation": (
        lambda: CHAT,
        r"number 1: no text, .* one chat message: a prompt is a list of messages, \[message\]",
    ),
    "an empty cell": (lambda: pd.Series(["a", None]), "number 2: an empty cell; drop the row or fill it in"),
    "other columns": (
        lambda: datasets.Dataset.from_dict({"sentence": TEXTS, "n": [1, 2]}),
        r"number 1: no text, prompt or messages among the columns \['n', 'sentence'\]; rename one",
    ),
    "a frame of other columns": (lambda: pd.DataFrame({"a": TEXTS}), r"columns \['a'\]; rename one"),
    "data sets in a list": (lambda: [DATASETS["train"]], "number 1: Prompt: .* got Dataset with columns text, n"),
    "bytes in a list": (lambda: [b"the cat"], "number 1: Prompt: needs a string .* got bytes"),
    "a path in a list": (lambda: [Path("a.txt")], "number 1: Prompt: needs a string .* got PosixPath 'a.txt'"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_list_of_prompts_is_refused_and_named(kind: str) -> None:
    made, says = FOREIGN[kind]
    for take in (as_prompts, read_prompts, lambda values: ContrastSet.from_prompts(values, ["no"])):
        with pytest.raises(PromptError, match=says):
            take(made())
    if "number" not in says and "columns" not in says:
        for take in (ContrastSet.from_records, read_contrast):
            with pytest.raises(PromptError):
                take(made())


def test_files_and_paths_are_read_by_the_readers_only(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the cat")
    with file.open() as opened:
        for made in (file, opened):
            with pytest.raises(PromptError, match="read it with xs.read_prompts"):
                as_prompts(made)
    for text, says in (("the cat " * 200, "needs a .jsonl or .csv file"), ("the cat " * 200 + ".txt", "no such file")):
        with pytest.raises(PromptError, match=says + r"; for a text instead of a file, \[text\]"):
            read_prompts(text)
    with pytest.raises(PromptError, match="there are none"):
        read_prompts([])
