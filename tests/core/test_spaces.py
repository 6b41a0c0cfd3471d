"""Sites and spaces: what makes two vector spaces the same."""

import json
import re
from dataclasses import replace

import pytest

from xmodel_steer.core.errors import SpaceMismatchError
from xmodel_steer.core.spaces import STREAMS, Site, Space, require_same_space

SPACE = Space("small", Site(3), 8, "abc123", "fold_ln")
CHANGES = {"site": Site(3, "resid_pre"), "width": 9, "fingerprint": "abc124", "processing": "none"}


def test_the_name_takes_no_part_in_equality_or_hash():
    renamed = replace(SPACE, model="another name")
    assert renamed == SPACE
    assert {SPACE: "found"}[renamed] == "found"


@pytest.mark.parametrize("field", CHANGES)
def test_every_other_field_does(field):
    assert replace(SPACE, **{field: CHANGES[field]}) != SPACE


@pytest.mark.parametrize("stream", STREAMS)
def test_a_space_survives_json(stream):
    space = replace(SPACE, site=Site(11, stream))
    read = Space.from_dict(json.loads(json.dumps(space.to_dict())))
    assert read == space
    assert read.model == space.model  # which equality does not see


def test_sites_are_ordered_by_depth():
    assert sorted([Site(10), Site(2), Site(9)]) == [Site(2), Site(9), Site(10)]


def test_hook_names_are_those_of_transformer_lens():
    assert Site(4).hook_name == "blocks.4.hook_resid_post"
    assert Site(0, "mlp_out").hook_name == "blocks.0.hook_mlp_out"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1,), "counts blocks from 0, got -1; name the last block by its own index"),
        ((0, "resid"), "stream must be one of resid_pre, .*, z; got 'resid'"),
    ],
)
def test_a_bad_site_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Site(*arguments)


def test_a_mismatch_names_both_spaces_and_the_way_out():
    require_same_space(SPACE, replace(SPACE, model="renamed"), "adding")
    other = Space("large", Site(5), 8, "ffff00")
    with pytest.raises(SpaceMismatchError, match=re.escape(f"adding: needs {SPACE}, got {other}. ")) as caught:
        require_same_space(SPACE, other, "adding")
    assert "mapping.transport(vector)" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert str(SPACE) == "small resid_post[3] (width 8, fold_ln, weights abc123)"
    assert str(other) == "large resid_post[5] (width 8, weights ffff00)"
