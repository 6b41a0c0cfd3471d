"""Pairing across real tokenizers, trained here: a pair of tokens has read the same text.

What a token has read is told by decoding the tokens up to it, not by the offsets that pairing uses.
"""

import copy
import re
import unicodedata
from itertools import combinations

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from xmodel_steer.core.alignment import align
from xmodel_steer.core.errors import PromptError, PromptWarning
from xmodel_steer.core.prompts import Message, Prompt
from xmodel_steer.models.tokens import tokenise

KINDS = ("byte_level", "metaspace", "byte_fallback", "unigram", "wordpiece")
#: Emoji with joiners and skin tones, combining marks, CJK, right to left, tabs and newlines, spaces of every kind.
PIECES = [
    "The sky",
    " above",
    "the port",
    "été",
    "e\u0301",
    "x\u0301",
    "ﬁ",
    "🙂",
    "👩‍👩‍👧",
    "👍🏽",
    "日本語",
    "東京",
    "한국어",
]
PIECES += [
    "שלום",
    "مرحبا",
    "\t",
    "\n",
    "\r\n",
    " ",
    "  ",
    "\u00a0",
    "\u3000",
    "1234",
    "don't",
    "...",
    "—",
    "Ωμέγα",
    "\u200b",
    "ß",
    "İ",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join), st.text(min_size=1, max_size=30)
)

every_kind = pytest.mark.parametrize("kind", KINDS)
quickly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def prompt(text):
    if not text.strip():
        assume(False)
    try:
        text.encode()
    except UnicodeEncodeError:
        assume(False)  # half of a surrogate pair is no text
    return Prompt(text=text)


def encoded(tokenizer, text):
    if not tokenizer(text)["input_ids"]:
        assume(False)
    (made,) = tokenise(tokenizer, [prompt(text)])
    return made


def letters(text):
    """What no normaliser changes: letters and marks without case, accents, spaces and control characters."""
    whole = unicodedata.normalize("NFKD", text.lower())
    whole = unicodedata.normalize("NFKD", whole.casefold())
    return "".join(c for c in whole if unicodedata.category(c)[0] not in "MZC" and c not in "▁�")


def read_up_to(kind, tokenizer, ids):
    """The text in some tokens, by the tokenizer's own pieces."""
    if kind in ("byte_level", "byte_fallback"):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens([i for i in ids if i not in special])
    return "".join(p.removeprefix("##") for p in pieces)


@every_kind
@quickly
@given(text=TEXTS)
@example(text="The café 🙂 above\tété  日本 x\u0301y\nport ﬁ עברית clocks")
@example(text="ﬁthe port")  # a ligature, whose second letter stands in the next token
def test_a_token_ends_where_what_was_read_ends(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    made = encoded(tokenizer, text)
    last = {end: i for i, end in enumerate(made.ends) if end >= 0}  # of the bytes of one character, the last
    unknown = [i for i, token in enumerate(made.ids) if token == tokenizer.unk_token_id]
    for end, i in last.items():
        assert 0 < end <= len(text)
        if any(j < i for j in unknown):
            continue  # what an unknown token stood for cannot be told
        got = read_up_to(kind, tokenizer, made.ids[: i + 1])
        if kind == "byte_level":
            assert got == text[:end]
        else:
            assert letters(got) == letters(text[:end])


@pytest.mark.parametrize("kinds", list(combinations(KINDS, 2)), ids="-".join)
@quickly
@given(text=TEXTS)
def test_paired_tokens_have_read_the_same_text_and_no_text_goes_unpaired_that_both_end_on(tokenizers, kinds, text):
    one, two = (encoded(tokenizers[kind], text) for kind in kinds)
    pairs = align(one.token_ends(), two.token_ends())
    ends = [(one.ends[i], two.ends[j]) for i, j in zip(pairs.source, pairs.target, strict=True)]
    assert all(a == b > 0 for a, b in ends)
    assert list(pairs.source) == sorted(set(pairs.source)) and list(pairs.target) == sorted(set(pairs.target))
    shared = {e for e in one.ends[1:] if e >= 0} & {e for e in two.ends[1:] if e >= 0}
    assert len(pairs) == len(shared) <= pairs.eligible <= min(len(one.ids), len(two.ids))
    assert 0 not in pairs.source and 0 not in pairs.target  # text position 0


@every_kind
@quickly
@given(text=st.text(alphabet="The skyabovport 日🙂\n", min_size=20, max_size=60), room=st.integers(4, 12))
@pytest.mark.parametrize("side", ["left", "right"])
def test_cut_tokens_keep_their_ends(tokenizers, kind, side, text, room):
    tokenizer = tokenizers[kind]
    whole = encoded(tokenizer, text)
    assume(len(whole.ids) > room)
    (cut,) = tokenise(tokenizer, [prompt(text)], max_tokens=room, truncation_side=side)
    assert len(cut.ids) == room
    head = int(kind in ("wordpiece", "metaspace"))  # [CLS] and BOS; the others add nothing
    if side == "right":
        expected = list(zip(whole.ids, whole.ends, strict=True))[:room]
    else:
        rows = list(zip(whole.ids, whole.ends, strict=True))
        expected = rows[:head] + rows[len(rows) - room + head :]
    assert list(zip(cut.ids, cut.ends, strict=True)) == expected


def test_leading_spaces_belong_to_the_word_that_they_lead(tokenizers):
    # " above" is one token here and " " + "above" there: both ways the word's end is the word's end.
    for kind in KINDS:
        made = encoded(tokenizers[kind], "The sky above")
        assert made.ends[-1] == len("The sky above")
        assert len("The sky") in made.ends


def test_an_unknown_token_pairs_with_nothing(tokenizers):
    made = encoded(tokenizers["wordpiece"], "The 日本 port")
    assert [e for e in made.ends if e >= 0][-1] == len("The 日本 port")
    assert len("The 日本") not in made.ends


# --- chat templates --------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GEMMA = "{{ '<bos>' }}{% for m in messages %}{{ '<s>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<e>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>model\n' }}{% endif %}"
LLAMA2 = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
CHAT = [Message("user", "Call me Ishmael."), Message("assistant", "the clocks 🙂"), Message("user", "Some years ago")]


def with_template(tokenizer, template):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


@pytest.mark.parametrize("messages", [CHAT, CHAT[:2], CHAT[:1]], ids=len)
@pytest.mark.parametrize(
    "templates", [(CHATML, GEMMA), (GEMMA, LLAMA2), (CHATML, CHATML)], ids=["ml-gemma", "gemma-llama2", "ml-ml"]
)
def test_chats_pair_by_message_and_by_role(tokenizers, templates, messages):
    chat = Prompt(messages=tuple(messages))
    kinds = ("byte_level", "byte_fallback")
    made = []
    for kind, template in zip(kinds, templates, strict=True):
        tokenizer = with_template(tokenizers[kind], template)
        (encoding,) = tokenise(tokenizer, [chat])
        text = chat.render(tokenizer).text
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        made.append((encoding, text, offsets))
    roles = []
    for encoding, text, offsets in made:
        starts = [text.index(m.content) for m in messages]
        for end, (_, stop) in zip(encoding.ends, offsets, strict=True):
            read = [min(max(stop - start, 0), len(m.content)) for start, m in zip(starts, messages, strict=True)]
            assert end in (-1, sum(read))  # counted over the contents of all messages
        found = {}
        for i, role in enumerate(encoding.roles):
            if role < 0:
                continue
            found[role] = i
            assert encoding.ends[i] == -1  # the template's own
            number, closing = divmod(role, 2)
            if closing:  # nothing but the template since the message ended
                assert text[: offsets[i][0]].rstrip().endswith(messages[number].content)
            elif number < len(messages):  # the next token is the message's first
                assert text[offsets[i][1] :].lstrip().startswith(messages[number].content)
                assert encoding.ends[i + 1] > 0
            else:
                assert i == len(encoding.ids) - 1  # the assistant's first position
        # Every message begins and ends, and the assistant's turn begins.
        assert found.keys() >= set(range(1, 2 * len(messages) + (messages[-1].role == "user")))
        roles.append(found)
    one, two = (encoding for encoding, _, _ in made)
    pairs = align(one.token_ends(template=True), two.token_ends(template=True))
    paired = dict(zip(pairs.source, pairs.target, strict=True))
    for role in roles[0].keys() & roles[1].keys():
        if roles[0][role] > 0 < roles[1][role]:
            assert paired[roles[0][role]] == roles[1][role]
    opened = 2 * len(messages)
    assert (opened in roles[0] and opened in roles[1]) == (messages[-1].role == "user")
    assert len(pairs) > len(align(one.token_ends(), two.token_ends()))
    assert align(one.token_ends(), one.token_ends()).source == tuple(
        sorted({e: i for i, e in enumerate(one.ends) if e >= 0 and i}.values())
    )


def roles_of(tokenizer, template, messages):
    """The roles of a chat's tokens, and the text of each token."""
    tokenizer = with_template(tokenizer, template)
    (made,) = tokenise(tokenizer, [Prompt(messages=tuple(messages))])
    return made, dict(zip(made.roles, (tokenizer.decode([i]) for i in made.ids), strict=True))


def test_one_token_between_two_messages_begins_the_second(tokenizers):
    lines = "{% for m in messages %}{{ m.content | trim }}\n{% endfor %}"
    made, tokens = roles_of(tokenizers["byte_level"], lines, CHAT)
    assert {role: tokens[role] for role in tokens if role >= 0} == {2: "\n", 4: "\n", 6: "\n"}
    assert [r for r in made.roles if r >= 0] == [2, 4, 6]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_token_where_a_chat_is_cut_keeps_its_role(tokenizers, side):
    tokenizer = with_template(tokenizers["byte_level"], CHATML)
    prompt = Prompt(messages=tuple(CHAT))
    (whole,) = tokenise(tokenizer, [prompt])
    assert {-1, 0, 1} < set(whole.roles)
    for n in range(1, len(whole.ids) + 1):
        (cut,) = tokenise(tokenizer, [prompt], max_tokens=n, truncation_side=side)
        kept = slice(None, n) if side == "right" else slice(len(whole.ids) - n, None)
        assert (cut.ids, cut.ends, cut.roles) == (whole.ids[kept], whole.ends[kept], whole.roles[kept])


def test_a_token_of_content_never_has_a_role(tokenizers):
    bare = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    made, _ = roles_of(tokenizers["byte_level"], bare, CHAT)
    assert set(made.roles) == {-1} and made.token_ends(template=True) == made.token_ends()


def test_a_single_token_of_the_end_is_the_last_and_not_a_bos(tokenizers):
    for kind in ("metaspace", "wordpiece", "byte_level"):
        whole = encoded(tokenizers[kind], "The sky above")
        (cut,) = tokenise(tokenizers[kind], [prompt("The sky above")], max_tokens=1, truncation_side="left")
        assert (cut.ids, cut.ends) == (whole.ids[-1:], whole.ends[-1:])


# --- special tokens at either end -------------------------------------------------------------

ADDED = [("<s> $A", 1, 0), ("$A </s>", 0, 1), ("<s> $A </s>", 1, 1), ("<s> [a] $A </s> [b]", 2, 2), ("$A", 0, 0)]


def adding(tokenizer, post):
    """A copy whose post-processor puts tokens around a text."""
    made = copy.deepcopy(tokenizer)
    names = ["<s>", "</s>", "[a]", "[b]"]
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": names[2:]})
    ids = [(name, made.convert_tokens_to_ids(name)) for name in names]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(post, special_tokens=ids)
    return made


@pytest.mark.parametrize("post, before, after", ADDED)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "byte_fallback"])
def test_special_tokens_come_once_and_none_after_the_text(tokenizers, kind, post, before, after):
    tokenizer = adding(tokenizers[kind], post)
    ids = tokenizer("the cat")["input_ids"]
    assert len(ids) > before + after
    (plain,) = tokenise(tokenizer, [prompt("the cat")])
    assert plain.ids == tuple(ids[: len(ids) - after])
    assert plain.ends[-1] == len("the cat")  # "last" is the text's own last token
    for start in range(before + 1):  # the text writes all of them itself, the last ones, or none
        written = "".join(post.split()[start:before])
        (own,) = tokenise(tokenizer, [prompt(written + "the cat")])
        apart = tokenizer(written + "the cat", add_special_tokens=False)["input_ids"]
        assert own.ids == (*ids[:start], *apart)
        assert all(own.ids.count(token) == 1 for token in ids[:before])
    (closed,) = tokenise(tokenizer, [prompt("the cat</s>")])
    assert closed.ids[-1] == tokenizer.eos_token_id and closed.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("post", [post for post, *_ in ADDED])
def test_a_chat_that_was_rendered_to_a_string_has_the_ids_of_the_chat(tokenizers, post):
    tokenizer = with_template(adding(tokenizers["byte_level"], post), "<s>" + CHATML)
    chat = Prompt(messages=tuple(CHAT))
    text, encoding = Prompt(text=chat.render(tokenizer).text), tokenise(tokenizer, [chat])[0]
    assert tokenise(tokenizer, [text])[0].ids == encoding.ids
    assert encoding.ids.count(tokenizer.bos_token_id) == 1


def test_what_is_only_special_tokens_is_no_text(tokenizers):
    with pytest.raises(PromptError, match="the tokenizer of the model makes no tokens of"):
        tokenise(adding(tokenizers["wordpiece"], "$A </s>"), [Prompt(text="\u200b")])


# --- messages that a template does not show whole ------------------------------------------------

STRIPS = CHATML.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")


def chat(answer):
    return Prompt(messages=(Message("user", "Hi"), Message("assistant", answer), Message("user", " the cat sat ")))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_the_same_text_has_the_same_content_tokens_however_its_messages_were_written(tokenizers, kind):
    tokenizer = with_template(tokenizers[kind], STRIPS)
    plain, thought = chat("Yes. It is."), chat("<think>\nHm.\n</think>\n\nYes. It is.")
    (one,) = tokenise(tokenizer, [plain])
    with pytest.warns(PromptWarning) as caught:
        (two,) = tokenise(tokenizer, [thought], name="llama")
    assert one.ids == two.ids and one.roles == two.roles and (one.missing, two.missing) == ((), (1,))
    stripped = len("<think>\nHm.\n</think>\n\n")
    assert two.ends == tuple(end + stripped if end > len("Hi") else end for end in one.ends)
    (warning,) = caught
    assert re.match(
        rf"prompt {thought.id} \('user: Hi.*the chat template of llama leaves out or rewrites all or part of message 2 "
        r"\(assistant\); .*give messages that the template keeps",
        str(warning.message),
    )
    # With a template that keeps the reasoning, what both keep pairs.
    (whole,) = tokenise(with_template(tokenizers[kind], CHATML), [thought])
    shared = {end for end in two.ends if end >= 0}
    assert shared <= set(whole.ends) and whole.missing == ()
    assert len(align(whole.token_ends(), two.token_ends())) == len(shared)


def test_one_warning_a_call_and_none_of_white_space(tokenizers):
    tokenizer = with_template(tokenizers["byte_level"], STRIPS)
    with pytest.warns(PromptWarning, match=r"message 2 \(assistant\), and messages of other prompts;") as caught:
        tokenise(tokenizer, [chat(" a"), chat("<think>b</think>c"), chat("<think>b</think>d")])
    assert len(caught) == 1
    tokenise(tokenizer, [chat("<think>b</think>c")], warn=False)
    tokenise(tokenizer, [chat(" a\n\n")])
    collapsing = CHATML.replace("m.content | trim", "m.content.split() | join(' ')")
    (made,) = tokenise(with_template(tokenizers["byte_level"], collapsing), [chat("It  was\n\ta   bright")])
    assert made.missing == ()
    read = "Hi" + "It  was\n\ta   bright" + "the cat sat"
    assert {read.index(word) + len(word) for word in ("Hi", "It", "was", "bright", "sat")} <= set(made.ends)
