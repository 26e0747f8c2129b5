"""Checkpoints of which something is missing, or is not what was written: never mistaken for one."""

from __future__ import annotations

import contextlib
import json
import random
import shutil

import pytest
from ended_probes import CASES, EndedError, probe

from entropy_fast.distributed import Team
from entropy_fast.errors import ResumeError
from entropy_fast.resuming.folder import CheckpointFolder
from entropy_fast.resuming.record import record_from_json, record_to_json

OPTIONS = CASES["units' gradients kept, next step"]
PART = "rank-0-of-1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.raises(EndedError):
        probe(folder, 7, **OPTIONS)
    return folder


@pytest.fixture
def kept(made, tmp_path):
    return shutil.copytree(made, tmp_path / "kept")


def read(folder):
    with CheckpointFolder.held(str(folder), Team.alone()) as held:
        return held.read()


def test_what_is_written_is_read(kept):
    record = read(kept)
    assert [(sweep.position, sweep.finished) for sweep in record.sweeps] == [(4, True), (3, False)]
    assert record_from_json(record_to_json(record), "here") == record
    assert [path.suffix for path in sorted((kept / PART).iterdir())] == [".json", *[".safetensors"] * 5]


@pytest.mark.parametrize("how", ["shorter", "a bit", "missing", "another's"])
def test_a_data_file(kept, how):
    files = sorted((kept / PART).glob("*.safetensors"))
    for number, path in enumerate(files):
        whole = path.read_bytes()
        if how == "shorter":
            path.write_bytes(whole[:-1])
        elif how == "a bit":
            path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
        elif how == "missing":
            path.unlink()
        else:
            path.write_bytes(files[number - 1].read_bytes())
        with pytest.raises(ResumeError, match=f"damaged: {path.name}") as raised:
            read(kept)
        assert "delete its folder" in raised.value.fix
        path.write_bytes(whole)
    assert read(kept) is not None


def test_the_file_that_names_the_others(kept):
    """Any character of it replaced, any number of them cut off."""
    path, generator = kept / PART / "checkpoint.json", random.Random(3)
    whole, expected, refused = path.read_text(), read(kept), 0
    for _ in range(300):
        place = generator.randrange(len(whole))
        changed = whole[:place] + generator.choice('0123456789abcdef{}[],:" \n\x00é') + whole[place + 1 :]
        path.write_text(generator.choice([changed, whole[:place]]))
        with contextlib.suppress(ResumeError):
            assert read(kept) == expected  # a blank for a blank, or the last line break
            continue
        refused += 1
    assert refused > 280


def test_records_that_no_sweep_writes(kept):
    whole = json.loads((kept / PART / "checkpoint.json").read_text())["checkpoint"]
    record = record_from_json(json.dumps(json.loads(record_to_json(read(kept)))), "here")
    assert record.written == whole["written"]
    for change in (
        lambda plain: plain["sweeps"][1]["files"].pop(0),
        lambda plain: plain["sweeps"][0].update(finished=False),
        lambda plain: plain["sweeps"][1].update(position=2),
        lambda plain: plain["sweeps"][1].update(position=True),
        lambda plain: plain["sweeps"][1]["files"][0].update(name="../checkpoint.json"),
        lambda plain: plain["sweeps"][1]["files"][0].update(units=[0, 1, 2]),
        lambda plain: plain.update(identity=[]),
    ):
        plain = json.loads(json.dumps(whole))
        change(plain)
        with pytest.MonkeyPatch.context() as patch:  # as if somebody had written it on purpose, hash and all
            patch.setattr("entropy_fast.resuming.record.dataclasses.asdict", lambda _, plain=plain: plain)
            text = record_to_json(record)
        with pytest.raises(ResumeError, match="damaged"):
            record_from_json(text, "here")
    with pytest.raises(ResumeError, match=r"schema 'entropy_fast\.checkpoint/0'"):
        record_from_json(record_to_json(record).replace("checkpoint/1", "checkpoint/0"), "here")


def test_files_without_the_one_that_names_them_are_none_and_go(kept):
    (kept / PART / "checkpoint.json").unlink()
    assert read(kept) is None
    result, _ = probe(kept, **OPTIONS)
    assert not any("went on" in note for note in result.diagnostics.warnings)
    assert not kept.exists()
