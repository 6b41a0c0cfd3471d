"""Put finished studies among the records that the documentation cites: ``python docs/record.py FOLDER ...``.

A record is small: it has every number and the texts that the report shows, and neither vectors, maps nor single scores.
"""

import sys
from dataclasses import replace
from pathlib import Path

import xmodel_steer as xs
from xmodel_steer.figures.report import write_report
from xmodel_steer.recipe.results import Result

SHOWN = 16
STUDIES = Path(__file__).parents[1] / "studies"


def slim(result: Result) -> Result:
    """Leave out what only a rerun or another analysis needs."""
    arms = tuple(
        replace(
            arm,
            scores=(),
            table=(),
            ids=(),
            groups=(),
            texts=arm.texts[:SHOWN],
            more_texts=(),
            raw=(),
        )
        for arm in result.arms
    )
    # What was concluded from the scores cannot be concluded again.
    return replace(result, arms=arms, vectors={}, maps={}, stored=result.conclusions)


def main() -> None:
    """Write a record for each folder, under the folder's name."""
    for name in sys.argv[1:]:
        folder = STUDIES / Path(name).name
        xs.save(slim(xs.read(name)), folder)
        write_report(xs.read(folder), folder / "report.html")


if __name__ == "__main__":
    main()
