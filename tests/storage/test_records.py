"""Jobs that are killed and go on: nothing twice, nothing missing, nothing half-written."""

import json
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.record_job import RecordJob
from greedy_distill_jax.storage.records import decode_record, encode_record, fingerprint, fingerprint_files
from greedy_distill_jax.storage.sharded import RecordKind, ShardedSource, open_shards, read_dataset


def example(record, info):
    if record["x"].shape != (3,):
        raise ValueError(f"x of shape {record['x'].shape}")
    return record


KIND = RecordKind("numbers", "numbers", ("even", "odd"), example)


def job(folder, items=7, group=2, **plan):
    return RecordJob(folder, KIND.name, {"size": 3, **plan}, items=items, group=group)


def run(job, share=(0, 1), stop_at=None):
    """Item n becomes a record in a split by parity; an exception comes at item `stop_at`."""
    for number in job.pending(share):
        with job.part(number) as part:
            for item in job.items_of(number):
                if item == stop_at:
                    raise KeyboardInterrupt
                part.write("odd" if item % 2 else "even", encode_record({"x": np.full(3, item, np.float32)}, item=item))
                part.notes.append(item)
    return job.finish(items=list)


def stored(folder):
    sources = {split: pickle.loads(pickle.dumps(ShardedSource(folder, KIND, split))) for split in KIND.splits}
    return {split: [source[i]["item"] for i in range(len(source))] for split, source in sources.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_records_hold_what_was_written(dtype):
    x = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    record = encode_record({"x": x, "none": x[:0]}, caption="ein Käse", number=3)
    found = decode_record(record)
    assert (found["caption"], found["number"]) == ("ein Käse", 3) and found["none"].shape == (0, 3)
    assert found["x"].dtype == x.dtype
    np.testing.assert_array_equal(found["x"].astype(np.float32), x.astype(np.float32))
    for damaged in (record[:-1], record + b"x", b"GDJX" + record[4:]):
        with pytest.raises(ValueError):
            decode_record(damaged)


def test_a_job_goes_on_where_it_was_interrupted(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(job(folder), stop_at=5)
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".*")), "a half-written part was left behind"
    with pytest.raises(UserError, match="not finished: run the same command again"):
        read_dataset(folder, KIND)
    (folder / ".even-00002-of-00004.array_record.abcd.partial").write_bytes(b"left by kill -9")
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.array_record")}
    assert job(folder).pending() == [2, 3]
    info = run(job(folder))
    assert info["counts"] == {"even": 4, "odd": 3} and info["items"] == list(range(7))
    assert stored(folder) == {"even": [0, 2, 4, 6], "odd": [1, 3, 5]}
    assert all(p.stat().st_mtime_ns == time for p, time in before.items()), "a finished part was written again"
    assert not list(folder.glob(".*")) and run(job(folder)) == info


def test_a_part_without_its_mark_is_written_again(tmp_path):
    """The kill may fall between the shards of a part and the file that says it is done."""
    run(job(tmp_path / "out"))
    (tmp_path / "out" / "parts" / "00001.json").unlink()
    assert job(tmp_path / "out").pending() == [1]
    run(job(tmp_path / "out"))
    assert stored(tmp_path / "out") == {"even": [0, 2, 4, 6], "odd": [1, 3, 5]}


@pytest.mark.parametrize("count", [2, 3, 6])
def test_processes_share_the_parts(tmp_path, count):
    folder = tmp_path / "out"
    jobs = [job(folder) for _ in range(count)]
    infos = [run(one, (index, count)) for index, one in reversed(list(enumerate(jobs)))]
    assert infos[0] is None and infos[-1]["items"] == list(range(7))
    assert stored(folder) == {"even": [0, 2, 4, 6], "odd": [1, 3, 5]}


def test_another_job_is_refused(tmp_path):
    folder = tmp_path / "out"
    run(job(folder))
    with pytest.raises(UserError, match=r"begun with size = 3, not 4; go on with the same input") as refused:
        job(folder, size=4)
    with pytest.raises(UserError, match=r"begun with kind = 'numbers', not 'other'; .* choose another folder$"):
        RecordJob(folder, "other", {"size": 3}, items=7, group=2, overwrite=True)
    again = RecordJob(folder, KIND.name, {"size": 4}, items=3, group=2, overwrite=True)
    assert again.pending() == [0, 1] and not list(folder.glob("*.array_record"))
    assert refused.traceback, "the refused job, which its error keeps alive, may be overwritten"
    for name in ("me.jpg", "film.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        with pytest.raises(UserError, match="other files: not touched"):
            RecordJob(tmp_path / name, KIND.name, {}, items=1, group=1, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        job(tmp_path / "file")
    with pytest.raises(UserError, match="process 2 of 2 processes: use 0 to 1") as error:
        again.pending((2, 2))
    assert error.value.field == "share"
    with pytest.raises(UserError, match="0 items"):
        job(tmp_path / "x", items=0)


def test_damage_names_the_file(tmp_path):
    folder = tmp_path / "out"
    info = run(job(folder))
    shard = folder / info["shards"]["odd"][1]["file"]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(UserError, match=rf"{shard.name}.*; make it with .*prepare numbers"):
        ShardedSource(folder, KIND, "odd")
    source = ShardedSource(folder, KIND, "even")
    assert repr(source) == f"ShardedSource('{folder}', 'numbers', 'even')" and len(source) == 4
    assert source.levels is None and source.captions == set()
    for index in (-1, 4):
        with pytest.raises(IndexError):
            source[index]
    assert len(open_shards(folder, info, KIND, "none")) == 0
    with pytest.raises(UserError, match="numbers: split='all' is unknown; use one of even, odd"):
        ShardedSource(folder, KIND, "all")
    (folder / "dataset.json").write_text(json.dumps({**info, "format": 9}))
    with pytest.raises(UserError, match="format 9"):
        read_dataset(folder, KIND)
    with pytest.raises(UserError, match="holds no numbers: make it with"):
        read_dataset(tmp_path / "nowhere", KIND)


def test_a_record_that_does_not_fit_is_named(tmp_path):
    one = RecordJob(tmp_path, KIND.name, {}, items=1, group=1)
    with one.part(0) as part:
        part.write("even", encode_record({"x": np.zeros(3, np.float32)}))
        part.write("even", encode_record({"x": np.zeros(4, np.float32)}))
    one.finish()
    source = ShardedSource(tmp_path, KIND, "even")
    assert source[0]["x"].shape == (3,)
    with pytest.raises(UserError, match=r"record 1 of .*even-00000-of-00001.* \(index 1 of even\) is damaged: x"):
        source[1]


def test_what_belongs_to_a_folder_is_there_before_it_is_finished(tmp_path):
    def refuse(info):
        assert info["counts"] == {"even": 1} and not (tmp_path / "dataset.json").exists()
        raise UserError("too few")

    one = RecordJob(tmp_path, KIND.name, {}, items=1, group=1)
    with one.part(0) as part:
        part.write("even", encode_record({"x": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="too few"):
        one.finish(refuse)
    with pytest.raises(UserError, match="not finished"):
        read_dataset(tmp_path, KIND)
    one.finish(lambda info: (tmp_path / "more.txt").write_text(str(info["size"])), size=3)
    assert (tmp_path / "more.txt").read_text() == "3" and len(ShardedSource(tmp_path, KIND, "even")) == 1


def test_two_processes_finish_a_job_without_records(tmp_path):
    one = RecordJob(tmp_path / "out", KIND.name, {}, items=1, group=1)
    with one.part(0):
        pass

    def refuse(_):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)  # as the other process does
        raise UserError("no record")

    with pytest.raises(UserError, match="^no record$"):
        one.finish(refuse)


def test_fingerprints_of_files_tell_contents_apart(tmp_path):
    found = set()
    for place in (None, 0, 2**15, 2**17, 2**18 - 1):  # nothing, the head, the end of the head, further on, the end
        folder = tmp_path / str(place) / "transformer"
        folder.mkdir(parents=True)
        data = bytearray(2**18)
        if place is not None:
            data[place] = 1
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_text("{}")
        found.add(fingerprint_files(sorted(folder.iterdir())))
    assert len(found) == 5
    shutil.copytree(tmp_path / "0", tmp_path / "moved")
    assert fingerprint_files(sorted((tmp_path / "moved" / "transformer").iterdir())) in found


def test_fingerprints_tell_lists_apart():
    assert len({fingerprint(x) for x in (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""], [])}) == 5
