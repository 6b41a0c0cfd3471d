"""Tokens of prompts in one model's tokenizer, each with the character that it ends on."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xmodel_steer.core.alignment import TokenEnds
from xmodel_steer.core.errors import PromptError, PromptWarning
from xmodel_steer.core.prompts import Prompt
from xmodel_steer.models.arguments import require_counts, require_side


@dataclass(frozen=True)
class Encoding:
    """A prompt as token ids of one model.

    Args:
        ids: Token ids, special tokens included.
        ends: The end of each token, in characters of the prompt's content; -1 for special and template tokens.
        roles: The role of each token in a chat template: 2i for the last token before the content of message i (or
            before an opened assistant's turn), 2i + 1 for the first one after it; -1 for all other tokens.
        missing: Numbers of the messages that the chat template shortens or rewrites.
    """

    prompt: Prompt
    ids: tuple[int, ...]
    ends: tuple[int, ...]
    roles: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()

    def token_ends(self, *, include_special: bool = False, template: bool = False) -> TokenEnds:
        """Return the ends of the tokens that may be paired.

        Args:
            include_special: Include text position 0, an attention sink.
            template: Include the template's tokens that have a role.
        """
        ends = list(self.ends)
        if template:
            ends = [-2 - role if role >= 0 else end for end, role in zip(ends, self.roles, strict=True)]
        if not include_special:
            ends[0] = -1
        return TokenEnds(tuple(ends))


def tokenise(
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    name: str = "the model",
    limit: int | None = None,
    max_tokens: int | None = None,
    truncation_side: str = "right",
    warn: bool = True,
) -> list[Encoding]:
    """Tokenise prompts, with the character that each token ends on.

    Raw text gets the special tokens that the tokenizer puts before a text (BOS, CLS), unless the text begins with
    them: a chat that was rendered to a string is tokenised like the chat. It gets none of those that the tokenizer
    puts after a text (EOS, SEP): a prompt will be continued, and ``"last"`` means the text's last token. Chats have
    only the special tokens that their template writes.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        prompts: The prompts.
        name: Name of its model, for messages.
        limit: The model's context; a longer prompt is refused.
        max_tokens: Cut longer prompts to this many tokens.
        truncation_side: The side to cut: ``"right"``, the end; ``"left"``, the beginning without its BOS.
        warn: Warn of messages that the chat template shortens or rewrites (`warn_of_missing`).

    Raises:
        PromptError: A prompt is longer than the context, or has no tokens.
    """
    require_side(truncation_side=truncation_side)
    if max_tokens is not None:
        require_counts(max_tokens=max_tokens)
    special = special_ids(tokenizer)
    opening = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    encoded = []
    for prompt in prompts:
        rendered = prompt.render(tokenizer)
        batch = tokenizer(
            rendered.text,
            add_special_tokens=rendered.add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        kept = _prompt_tokens(batch, opening) if batch["input_ids"] else []
        if not kept:
            raise PromptError(f"prompt {prompt.id}: the tokenizer of {name} makes no tokens of {rendered.text[:60]!r}")
        ids, offsets = ([batch[key][i] for i in kept] for key in ("input_ids", "offset_mapping"))
        keep = list(range(len(ids)))
        if max_tokens is not None and len(ids) > max_tokens:
            head = int(truncation_side == "left" and ids[0] in opening and max_tokens > 1)
            start = len(ids) - max_tokens + head if truncation_side == "left" else 0
            keep = [*range(head), *range(start, start + max_tokens - head)]
        if limit is not None and len(keep) > limit:
            raise PromptError(
                f"prompt {prompt.id}: {len(keep)} tokens, but {name} reads at most {limit}; "
                "shorten it or split it (it is not cut silently)"
            )
        ends, span = [], 0
        following = [*offsets[1:], (0, 0)]
        pieces = tokenizer.convert_ids_to_tokens([ids[i] for i in keep])
        for i, piece in zip(keep, pieces, strict=True):
            token, (start, end), (after, beyond) = ids[i], offsets[i], following[i]
            if not piece.strip("▁") and rendered.text[start:end].strip():
                end = start  # SentencePiece's added prefix: its offsets claim a character that it has not read
            if start <= after < end < beyond:
                end = start  # the next token holds the rest of its last character, such as a ligature's second letter
            while span < len(rendered.spans) and end > rendered.spans[span][1]:
                span += 1
            inside = span < len(rendered.spans) and rendered.spans[span][0] < end
            if token in special or end <= start or not inside:
                ends.append(-1)
            else:
                first, _, base = rendered.spans[span]
                ends.append(end - first + base)
        roles = _roles(rendered.marks, offsets, dict(zip(keep, ends, strict=True)))
        encoded.append(Encoding(prompt, tuple(ids[i] for i in keep), tuple(ends), roles, rendered.missing))
    if warn:
        warn_of_missing(encoded, name)
    return encoded


def _prompt_tokens(batch: Any, opening: set[int]) -> list[int]:
    """List places of text tokens, and of opening tokens that it lacks."""
    ids = batch["input_ids"]
    places = [i for i, sequence in enumerate(batch.sequence_ids(0)) if sequence is not None]
    if not places:
        return [i for i, token in enumerate(ids) if token in opening]
    before, first = ids[: places[0]], ids[places[0]]
    return [*range(before.index(first) if first in before else len(before)), *places]


def warn_of_missing(encodings: Sequence[Encoding], name: str) -> None:
    """Warn once of messages that chat templates leave out or rewrite.

    Args:
        encodings: Prompts, tokenised.
        name: Name of the model.
    """
    lacking = [encoding for encoding in encodings if encoding.missing]
    if not lacking:
        return
    prompt, numbers = lacking[0].prompt, lacking[0].missing
    listed = ", ".join(f"{i + 1} ({prompt.messages[i].role})" for i in numbers)
    others = ", and messages of other prompts" if len(lacking) > 1 else ""
    warnings.warn(
        f"prompt {prompt.id} ({prompt.content[:40]!r}): the chat template of {name} leaves out or rewrites all or part of "
        f"message {listed}{others}; the model does not read that part, and the text in its place counts "
        "as the template's: 'mean' and 'all' leave it out, and it pairs with nothing; give messages that the template keeps "
        "(without reasoning, say), or set tokenizer.chat_template",
        PromptWarning,
        stacklevel=3,
    )


def shared_start(sequences: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which all sequences begin."""
    together = zip(*sequences, strict=False)  # up to the end of the shortest
    return next((n for n, tokens in enumerate(together) if len(set(tokens)) > 1), min(map(len, sequences)))


def special_ids(tokenizer: Any) -> set[int]:
    """Collect the tokens that are no text, such as BOS or a turn's opening."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return set(tokenizer.all_special_ids) | added


def _roles(
    marks: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], ends: Mapping[int, int]
) -> tuple[int, ...]:
    """Find the role of each template token, from the borders of template and content.

    The number of a template's tokens does not matter: the last token before a content and the first one after it have
    a role. The whole text decides, so that no kept token takes the role of a token that was cut off.

    Args:
        marks: Places of the borders, and the roles.
        offsets: Character spans of all tokens.
        ends: Ends of the kept tokens, by their places among all.
    """
    roles = dict.fromkeys(ends, -1)
    for place, role in sorted(marks, key=lambda mark: mark[1] % 2, reverse=True):  # beginnings come last, and win
        if role % 2:
            token = next((i for i, (start, end) in enumerate(offsets) if start >= place and end > start), None)
        else:
            token = next((i for i in range(len(offsets) - 1, -1, -1) if 0 < offsets[i][1] <= place), None)
        if token is not None and ends.get(token) == -1:
            roles[token] = role
    return tuple(roles.values())
