"""Damage is refused and never read as data: bits, foreign parts, forged numbers, names that lead out of a folder."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_results import mapping, moments, result, same, vector

from xmodel_steer.core.errors import ArtifactError, UncheckedWarning
from xmodel_steer.files.records import KEY, read_record, read_tensors, write_record, write_tensors
from xmodel_steer.files.resume import once, resumable
from xmodel_steer.recipe.saving import read, save


@pytest.mark.parametrize("make", [vector, mapping, moments])
def test_no_flipped_bit_of_an_artefact_is_read(make, tmp_path):
    file = save(make(), tmp_path / "a.safetensors")
    whole = file.read_bytes()
    rng = random.Random(0)
    places = range(len(whole)) if len(whole) < 1500 else rng.sample(range(len(whole)), 1500)
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))
        with pytest.raises(ArtifactError, match=r"a\.safetensors"):
            read(file)


def test_no_flipped_bit_of_a_run_is_read(tmp_path):
    run = save(result(), tmp_path / "run")
    rng = random.Random(0)
    for file in sorted(f for f in run.rglob("*") if f.is_file()):
        whole = file.read_bytes()
        for place in rng.sample(range(len(whole)), 60):
            data = bytearray(whole)
            data[place] ^= 1 << rng.randrange(8)
            file.write_bytes(bytes(data))
            with pytest.raises(ArtifactError, match="run"):
                read(run)
        file.write_bytes(whole)
    assert same(read(run), result())


def test_a_file_from_before_checksums_is_read_with_a_warning(tmp_path):
    file = save(vector(), tmp_path / "v.safetensors")
    header, tensors = read_tensors(file)
    old = json.dumps(header | {"schema": 1})
    save_file(load_file(file), file, metadata={KEY: old})
    with pytest.warns(UncheckedWarning, match=r"v.safetensors: was written before files carried checksums"):
        assert same(read(file), vector())
    # It does not become one by losing its checksum.
    save_file(tensors, file, metadata={KEY: json.dumps(header)})
    with pytest.raises(ArtifactError, match="does not match its checksum"):
        read(file)


def other_run(tmp_path: Path) -> Path:
    return save(replace(result(), vectors={n: v * 2.0 for n, v in result().vectors.items()}), tmp_path / "other")


def reordered(run: Path) -> None:
    lines = (run / "generations.jsonl").read_text().split("\n")[:-1]
    (run / "generations.jsonl").write_text("\n".join(reversed(lines)) + "\n")


@pytest.mark.parametrize("place", ["vectors/native.safetensors", "maps/joy.safetensors", "generations.jsonl"])
def test_a_part_of_another_run_is_refused(place, tmp_path):
    run, other = save(result(), tmp_path / "run"), other_run(tmp_path)
    if place == "generations.jsonl":
        reordered(run)
    elif place.startswith("maps"):
        save(replace(mapping(), bias=mapping().bias + 1), run / place)
    else:
        shutil.copy(other / place, run / place)
    with pytest.raises(ArtifactError, match=f"{place}: is not the file that this run wrote"):
        read(run)


@pytest.mark.parametrize("field", ["effect", "change"])
def test_an_effect_is_that_of_its_scores(field, tmp_path):
    run = save(result(), tmp_path / "run")
    record = read_record(run / "result.json")
    record["arms"][1][field] += 0.5
    write_record(run / "result.json", record)
    with pytest.raises(ArtifactError, match=f"states the {field} .*, and its scores give"):
        read(run)


@pytest.mark.parametrize(
    "name", ["../../planted.safetensors", "/etc/passwd", "..", "vectors/../../x", "a/b", "", "maps"]
)
@pytest.mark.parametrize("kind", ["vectors", "maps"])
def test_no_name_leads_out_of_the_folder(kind, name, tmp_path):
    run = save(result(), tmp_path / "deep" / "run")
    save(vector(), tmp_path / "planted.safetensors")
    record = read_record(run / "result.json")
    record[kind] = {"native": name}
    write_record(run / "result.json", record)
    with pytest.raises(
        ArtifactError, match="is no name of a file|binds other files|is damaged or foreign|no such file"
    ):
        read(run)


def test_names_of_vectors_are_no_paths(tmp_path):
    odd = "../../planted"
    run = save(replace(result(), vectors={odd: vector()}, maps={}), tmp_path / "deep" / "run")
    assert set(read(run).vectors) == {odd}
    save(read(run), tmp_path / "deep" / "copy")
    assert sorted(p.name for p in tmp_path.rglob("*planted*")) == ["planted.safetensors"] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (vector, "label", 3),
        (vector, "counts", [1, -1]),
        (vector, "counts", "ab"),
        (vector, "space", {"model": "x"}),
        (mapping, "info", []),
        (mapping, "score", {"cosine": "x", "norm_ratio": 1, "count": 1, "documents": 1}),
        (moments, "paired", "many"),
        (moments, "counts", {}),
        (moments, "settings", None),
    ],
)
def test_every_field_has_its_type(make, field, value, tmp_path):
    file = save(make(), tmp_path / "a.safetensors")
    header, tensors = read_tensors(file)
    kind = header.pop("kind")
    write_tensors(file, kind, tensors, header | {field: value})
    with pytest.raises(ArtifactError, match=r"a\.safetensors"):
        read(file)


@pytest.mark.parametrize(
    ("make", "name", "change"),
    [
        (vector, "scale", lambda t: -t),
        (vector, "direction", lambda t: t[:2]),
        (mapping, "weight", lambda t: t.T.contiguous()),
        (mapping, "source_scale", lambda t: -t - 1),
        (mapping, "bias", lambda t: t[:1]),
        (moments, "train/source_scatters/1.resid_post", lambda t: -t),
        (moments, "train/cross/1.resid_post/2.resid_mid", lambda t: t[:1]),
        (moments, "test/target_means/2.resid_mid", lambda t: t.long()),
    ],
)
def test_every_tensor_has_its_shape_and_range(make, name, change, tmp_path):
    file = save(make(), tmp_path / "a.safetensors")
    header, tensors = read_tensors(file)
    kind = header.pop("kind")
    write_tensors(file, kind, tensors | {name: change(tensors[name])}, header)
    with pytest.raises(ArtifactError, match=r"a\.safetensors"):
        read(file)


def test_what_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(ArtifactError, match="not written, since it could not be read again: scale has numbers under 0"):
        save(replace(vector(), scale=-torch.ones(4)), tmp_path / "v.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    ['{"schema": 2, "a": NaN}', '{"schema": 2, "schema": 2}', "[" * 100_000, '{"schema": true}', '{"schema": ' + "9" * 5000 + "}", "\ud800", '"x"', "null"],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ArtifactError, match="a.json"):
        read_record(tmp_path / "a.json")


def test_a_damaged_kept_result_is_made_anew(tmp_path):
    def run(answer):
        return once(lambda: "key", lambda: answer)

    def cut_off(answer):
        with resumable(tmp_path / "kept"):
            made = run(answer)
            raise KeyboardInterrupt(made)

    with pytest.raises(KeyboardInterrupt):
        cut_off([0.5, 0.25])
    (file,) = (tmp_path / "kept").iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 4
        file.write_bytes(bytes(data))
        with pytest.raises(KeyboardInterrupt) as raised:
            cut_off([0.5, 0.25])
        assert raised.value.args[0] == [0.5, 0.25], place
