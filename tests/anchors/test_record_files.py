"""Files of records: what was accepted is on the disk whatever happens, and nobody writes between."""

import copy
import os
import pickle
import stat
import subprocess
import sys
import threading
import warnings
from dataclasses import replace

import pytest
from anchor_records import full_record, line, record, refused
from small_tokenizers import small_tokenizer

from fused_losses.anchors import Anchor, RecordFile, read_records, write_records

# Writers one after the other, each killed at work; every record that was accepted is named on the standard output.
WRITERS = """
import os, signal, sys, time
from fused_losses.anchors import Completion, Record, RecordFile
path, *delays = sys.argv[1:]
for name, delay in zip("abcdefgh", map(float, delays)):
    writer = os.fork()
    if not writer:
        with RecordFile(path) as file:
            for number in range(10**6):
                file.append(Record(f"{name}-{number}", (), 0, (1,), Completion((number,), name * 1_000_000)))
                os.write(1, f"{name}-{number}\\n".encode())
    time.sleep(delay)
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL
"""


def test_no_accepted_record_is_lost_when_writers_are_killed(tmp_path):
    path = tmp_path / "anchors.jsonl"
    delays = [0.3, 0.15, 0.11, 0.13, 0.17, 0.12]
    arguments = [sys.executable, "-W", "ignore", "-c", WRITERS, path, *map(str, delays)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writers:
        accepted = [writers.stdout.readline().strip()]
        assert "another page or process has it open" in refused(RecordFile, path)
        accepted += writers.communicate(timeout=120)[0].split()
    assert writers.returncode == 0 and len({name[0] for name in accepted}) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # whether the last was cut off is chance
        RecordFile(path).close()
    found = read_records(path)
    assert all(one.completion.text == one.id[0] * 1_000_000 for one in found)
    # The last record of a writer may be there without having been reported.
    names = [one.id for one in found]
    assert [name for name in names if name in accepted] == accepted
    for name in set(names) - set(accepted):
        assert f"{name[0]}-{int(name[2:]) + 1}" not in names


def test_a_line_cut_off_is_kept_aside_and_reported(tmp_path):
    path = tmp_path / "anchors.jsonl"
    raw = line()
    second = line(id="b")
    cuts = (1, len(second) // 2, len(second) - 2)
    for cut in cuts:
        path.write_bytes(raw + second[:cut])
        with pytest.warns(
            RuntimeWarning, match=rf"its last line was cut off, {cut} bytes .*kept in .*anchors.jsonl.torn"
        ):
            file = RecordFile(path)
        with file:
            assert [found.id for found in file.records] == [
                full_record().id
            ] and file.torn == tmp_path / "anchors.jsonl.torn"
            file.append(record(3))
        assert path.read_bytes().startswith(raw) and len(read_records(path)) == 2
    kept = (tmp_path / "anchors.jsonl.torn").read_bytes().split(b"\n")
    assert [len(part) for part in kept] == [*cuts, 0]


def test_what_a_crash_of_the_system_left_is_cut_off(tmp_path):
    path = tmp_path / "anchors.jsonl"
    path.write_bytes(line() + b"\0" * 4096)
    with pytest.warns(RuntimeWarning, match="4,096 bytes without an end"), RecordFile(path):
        pass
    assert path.read_bytes() == line()


def test_a_whole_record_without_its_end_gets_it(tmp_path):
    path = tmp_path / "anchors.jsonl"
    path.write_bytes(line()[:-1])
    with RecordFile(path) as file:
        assert len(file.records) == 1 and file.torn is None
    assert path.read_bytes() == line()


@pytest.mark.parametrize(
    "raw", [b"Dear diary", b"# Notes\n\nmore", b"[1]\n", line() + b"Dear diary", line()[:-1] + b"x"]
)
def test_a_file_of_something_else_stays_as_it_is(raw, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(raw)
    number = raw.count(b"Dear") * raw.count(b"\n") + 1
    if raw.startswith(b'{"format"') and number == 1:  # it could be the beginning of a record
        with pytest.warns(RuntimeWarning, match="cut off"), RecordFile(path):
            assert (tmp_path / "notes.txt.torn").read_bytes() == raw + b"\n"
        return
    assert refused(RecordFile, path).startswith(f"{path}:{number}: expected ")
    assert path.read_bytes() == raw and os.listdir(tmp_path) == ["notes.txt"]


def test_records_are_there_when_append_returns(tmp_path):
    path = tmp_path / "anchors.jsonl"
    with RecordFile(path) as file:
        for count in range(1, 4):
            file.append(record(3))
            assert len(read_records(path, small_tokenizer("byte-level"))) == count
        assert read_records(path) == file.records
    with RecordFile(path, small_tokenizer("byte-level")) as file:
        assert len(file.records) == 3


def test_a_second_one_in_the_same_process_is_refused_until_the_first_is_closed(tmp_path):
    path, link = tmp_path / "anchors.jsonl", tmp_path / "link"
    link.symlink_to(path)
    with RecordFile(path):
        assert "another page or process has it open; close that one, or give another path" in refused(RecordFile, path)
        assert "has it open" in refused(RecordFile, link)
        assert "has it open" in refused(write_records, path, [record(3)])
    RecordFile(path).close()
    RecordFile(path)  # nobody holds it: closed when it is collected
    write_records(path, [record(3)])


def test_threads_append_one_after_the_other(tmp_path):
    path = tmp_path / "anchors.jsonl"
    with RecordFile(path) as file:
        records = [replace(full_record(), id=str(number)) for number in range(40)]
        threads = [
            threading.Thread(target=lambda own=records[k::4]: [file.append(one) for one in own]) for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {found.id for found in read_records(path)} == {one.id for one in records}


def test_a_wrong_record_is_not_written(tmp_path):
    path = tmp_path / "anchors.jsonl"
    good = full_record()
    wrong = Anchor(3, (10, 17), good.anchors[0].token_id, " Aurora", confidence=float("nan"))
    with RecordFile(path) as file:
        file.append(good)
        for one, message in [
            (replace(good, id="b", anchors=(wrong,)), "got a value it cannot"),
            (replace(good, id="b", anchors=(replace(wrong, confidence=2.0),)), r"anchors[0].confidence: expected"),
            (replace(good, id="b", messages=({"role": "user", "content": "\ud83d"},)), "half of a surrogate pair"),
            (replace(good, id="b", messages=({"role": "user", "content": "x" * (1 << 24)},)), "at most 16 MiB"),
            (replace(good, id="b", tools=({1},)), "got a value it cannot"),
            (good, "expected each id once in a file"),
        ]:
            with pytest.raises(ValueError) as caught:
                file.append(one)
            assert message in str(caught.value)
        with pytest.raises(TypeError, match="record: expected a Record, got dict; make one with new_record"):
            file.append(good.to_json())
    assert path.read_bytes() == line()


def test_a_full_disk_takes_back_what_was_written(tmp_path, monkeypatch):
    path = tmp_path / "anchors.jsonl"
    write = os.write
    with RecordFile(path) as file:
        file.append(record(3))
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", lambda descriptor, raw: write(descriptor, raw[:100]))
        with pytest.raises(OSError, match=r"the record cannot be written \(only 100 of .* is the disk full"):
            file.append(record(3))
        assert path.read_bytes() == before
        monkeypatch.undo()
        file.append(record(3))
    assert len(read_records(path)) == 2


def test_a_file_that_is_replaced_removed_or_changed_meanwhile(tmp_path):
    path = tmp_path / "anchors.jsonl"
    with RecordFile(path) as file:
        file.append(record(3))
        with open(path, "ab") as other:
            other.write(b"half")
        with pytest.raises(ValueError, match="another program has changed the file"):
            file.append(record(3))
        os.replace(path, tmp_path / "moved")
        with pytest.raises(ValueError, match="the file was removed or replaced since it was opened; open it anew"):
            file.append(record(3))
        path.touch()
        with pytest.raises(ValueError, match="the file was removed or replaced"):
            file.append(record(3))


def test_a_closed_file_and_copies_are_refused(tmp_path):
    file = RecordFile(tmp_path / "anchors.jsonl")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="RecordFile: cannot be copied or sent to another process"):
            copied(file)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="the RecordFile is closed; open it anew"):
        file.append(record(3))
    assert "closed" in repr(file)


def test_a_process_forked_from_it_does_not_keep_the_lock(tmp_path):
    file = RecordFile(tmp_path / "anchors.jsonl")
    inherited = os.dup(file._descriptor)  # as in a fork
    file.close()
    RecordFile(tmp_path / "anchors.jsonl").close()
    os.close(inherited)


def test_another_process_may_not_use_the_file_of_its_parent(tmp_path, monkeypatch):
    with RecordFile(tmp_path / "anchors.jsonl") as file:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(ValueError, match="belongs to process"):
            file.append(record(3))


def test_write_records_replaces_the_file_or_leaves_it(tmp_path):
    path = tmp_path / "anchors.jsonl"
    write_records(path, (record(3) for _ in range(2)))
    os.chmod(path, 0o640)
    before = path.read_bytes()
    for records, message in [
        ([], "records: expected at least one, got none"),
        ([full_record(), full_record()], r"records\[1\]: id: expected each id once"),
        ([full_record(), replace(full_record(), id="/")], r"records\[1\]: id: expected 1 to 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_records(path, records)
    with pytest.raises(TypeError, match=r"records\[1\]: record: expected a Record, got str"):
        write_records(path, [full_record(), "x"])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["anchors.jsonl"]
    write_records(path, [full_record()])
    assert path.read_bytes() == line() and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_records(tmp_path / "link", [full_record()])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == line()


def test_lines_are_lines_for_other_programs_too(tmp_path):
    one = record(messages=[{"role": "user", "content": "a\u2028b\x85c\x0bd\ne\x00f"}])
    write_records(tmp_path / "anchors.jsonl", [one])
    assert len((tmp_path / "anchors.jsonl").read_text("utf-8").splitlines()) == 1
    assert read_records(tmp_path / "anchors.jsonl") == [one]


def test_a_record_takes_the_place_of_the_one_with_its_id(tmp_path):
    path, others = tmp_path / "a.jsonl", [record(3), record()]
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with RecordFile(link) as file:
        for one in others:
            file.append(one)
        os.chmod(path, 0o640)
        changed = replace(record({"position": 3, "confidence": 0.5}), id=others[0].id)
        file.replace(changed)
        assert read_records(path) == file.records == [changed, others[1]]
        with pytest.raises(ValueError, match="another page or process has it open"):
            RecordFile(path)
        last = record(4)
        file.append(last)
        with pytest.raises(ValueError, match="expected that of a record of the file"):
            file.replace(record(3))
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert read_records(path) == [changed, others[1], last] and sorted(tmp_path.iterdir()) == [path, link]


def test_a_record_that_cannot_take_a_place_leaves_the_file(tmp_path, monkeypatch):
    path, first = tmp_path / "a.jsonl", record(3)
    with RecordFile(path) as file:
        file.append(first)

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OSError, match=r"a\.jsonl: cannot be written .No space left on device"):
                file.replace(replace(record(4), id=first.id))
        file.append(record())
        assert len(read_records(path)) == 2 and read_records(path)[0] == first and list(tmp_path.iterdir()) == [path]


def test_a_file_that_got_no_record_is_not_left(tmp_path):
    """One that was there stays, also empty."""
    RecordFile(tmp_path / "new.jsonl").close()
    assert not (tmp_path / "new.jsonl").exists()
    (tmp_path / "old.jsonl").touch()
    RecordFile(tmp_path / "old.jsonl").close()
    assert (tmp_path / "old.jsonl").exists()
    with RecordFile(tmp_path / "new.jsonl") as file:
        file.append(record())
    assert len(read_records(tmp_path / "new.jsonl")) == 1


def test_another_file_of_the_name_is_not_removed(tmp_path):
    file = RecordFile(tmp_path / "new.jsonl")
    (tmp_path / "new.jsonl").unlink()
    (tmp_path / "new.jsonl").touch()
    file.close()
    assert (tmp_path / "new.jsonl").exists()
