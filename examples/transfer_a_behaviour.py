"""Carry a behaviour between two models in a few lines, and say whether it survived.

Run: python examples/transfer_a_behaviour.py [SOURCE TARGET]
"""

import sys

import xmodel_steer as xs
from xmodel_steer.files.wheels import general_text
from xmodel_steer.studies.concepts import concept


def main(source: str = "packaged:smollm2-135m-instruct", target: str = "packaged:gemma-3-270m") -> None:
    """Find "sentiment" in the source, carry it to the target, and print the verdict."""
    small = xs.load(source, dtype="auto")
    large = xs.load(target, dtype="auto")
    contrast = concept("sentiment").contrast

    # No prompts and no scorer: how much likelier does the target find held-out positive sentences?
    result = xs.transfer(
        small,
        large,
        contrast,
        general_text()[:120],
        label="sentiment",
        source_sites=[xs.Site(round(0.6 * small.cfg.n_layers))],
        target_sites=[xs.Site(round(0.5 * large.cfg.n_layers))],
        strengths=(1.0,),  # as it was found in the source; -1.0 would turn it round
        random_seeds=2,
        side={},  # by default also whether common knowledge stays
        map_tokens=96,
    )
    print(
        result.to_frame()[["arm", "strength", "effect", "low", "high", "n", "kl", "perplexity"]]
        .round(3)
        .to_string(index=False)
    )
    print(result.verdict().text)


if __name__ == "__main__":
    main(*sys.argv[1:3])
