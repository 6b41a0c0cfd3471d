"""Train the refusal classifier and measure both refusal scorers on labels of people: ``python benchmarks/refusal_scorers.py``.

Writes ``xmodel_steer/data/refusal_classifier.json``: weights over sentence embeddings, and the accuracy of the
classifier (on answers to requests that the fold was not trained on) and of the phrases, with n and intervals.

In these data an answer to another request counts as a refusal: the same recipe is a 0 below its own request and a 1
below a question about DNA. A text alone cannot show that, and a model that rambles does not refuse; such
answers train nothing, and accuracy is given without and with them.
"""

import csv
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from xmodel_steer.evaluation.judges.refusals import beginning
from xmodel_steer.evaluation.judges.sentences import embed
from xmodel_steer.evaluation.scorers.phrases import RefusalPhrases
from xmodel_steer.files.wheels import packaged_files
from xmodel_steer.maps.statistics import bootstrap_mean

OUT = Path(__file__).parents[1] / "xmodel_steer" / "data" / "refusal_classifier.json"
FOLDS, SEED = 10, 0


def labelled() -> tuple[list[str], list[str], np.ndarray]:
    """Requests, answers, and whether people call the answer a refusal."""
    rows: list[dict[str, str]] = []
    for name in ("refusal.csv", "refusal_extra.csv"):
        with (packaged_files("refusal-labels") / name).open(newline="") as file:
            rows += csv.DictReader(line for line in file if not line.startswith("# "))
    kept = {(row["objective"], row["assistant_response"]): float(row["human_score"]) for row in rows}
    return [r for r, _ in kept], [a for _, a in kept], np.array([label > 0.5 for label in kept.values()])


def pairs() -> tuple[list[str], np.ndarray]:
    """The answers of CAA's refusal pairs, and whether each refuses."""
    texts, refuses = [], []
    for row in json.loads((packaged_files("caa") / "refusal.json").read_text()):
        found = re.search(r"\(A\)(.*?)\n\s*\(B\)(.*?)\n\s*\(([AB])\)\s*$", row["positive"], re.DOTALL)
        if found:
            one, two, right = found.groups()
            texts += [one.strip(), two.strip()]
            refuses += [right == "A", right == "B"]
    return texts, np.array(refuses)


def measured(found: np.ndarray, truth: np.ndarray) -> dict[str, float | int]:
    """Accuracy with its interval, and both kinds of mistake."""
    accuracy = bootstrap_mean((found == truth).astype(float))
    return {
        "accuracy": round(accuracy.value, 3),
        "low": round(accuracy.low, 3),
        "high": round(accuracy.high, 3),
        "n": accuracy.n,
        "false_refusals": round(float(found[~truth].mean()), 3),
        "missed_refusals": round(float((~found)[truth].mean()), 3),
    }


def fitted(x: np.ndarray, y: np.ndarray, more: tuple[np.ndarray, np.ndarray]) -> LogisticRegression:
    """Logistic regression with scikit-learn's penalty for rows of unit length, made ten times weaker."""
    return LogisticRegression(C=10, max_iter=5000).fit(np.r_[x, more[0]], np.r_[y, more[1]])


def misplaced(requests: list[str], answers: list[str], truth: np.ndarray) -> np.ndarray:
    """Which refusals are answers to another request: beginning as one that was called no refusal below its own."""
    own = {answer[:60] for answer, refuses in zip(answers, truth, strict=True) if not refuses}
    return np.array([bool(refuses) and answer[:60] in own for answer, refuses in zip(answers, truth, strict=True)])


def main() -> None:
    """Train, measure, write."""
    requests, answers, truth = labelled()
    x = embed([beginning(answer) for answer in answers]).astype(np.float64)
    texts, refuses = pairs()
    more = (embed([beginning(text) for text in texts]).astype(np.float64), refuses)
    groups = np.array([int(hashlib.sha256(request.encode()).hexdigest()[:12], 16) for request in requests])
    elsewhere = misplaced(requests, answers, truth)
    held_out = np.zeros(len(truth), dtype=bool)
    for train, test in StratifiedGroupKFold(FOLDS, shuffle=True, random_state=SEED).split(x, truth, groups):
        train = train[~elsewhere[train]]
        held_out[test] = fitted(x[train], truth[train], more).predict(x[test])
    phrases = np.array([RefusalPhrases()(answer) for answer in answers]) > 0.5
    accuracy = {}
    for name, rows in (("answers to the request", ~elsewhere), ("all", np.ones_like(truth))):
        accuracy[name] = {
            "classifier": measured(held_out[rows], truth[rows]),
            "phrases": measured(phrases[rows], truth[rows]),
            "majority": round(float(max(truth[rows].mean(), 1 - truth[rows].mean())), 3),
            "agree": round(float((held_out == phrases)[rows].mean()), 3),
        }
    accuracy["labels"] = (
        f"PyRIT 1.1.0, {len(truth)} answers to {len(set(requests))} requests, {elsewhere.sum()} of them answers to another "
        f"request and called refusals; classifier: {FOLDS} folds by request, and {len(texts)} answers of CAA's refusal pairs in every fold"
    )
    final = fitted(x[~elsewhere], truth[~elsewhere], more)
    OUT.write_text(
        json.dumps(
            {
                "encoder": "all-MiniLM-L6-v2, first 20 words",
                "accuracy": accuracy,
                "bias": round(float(final.intercept_[0]), 5),
                "weights": [round(float(w), 5) for w in final.coef_[0]],
            }
        )
        + "\n"
    )
    print(json.dumps(accuracy, indent=1))


if __name__ == "__main__":
    main()
