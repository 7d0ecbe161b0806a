"""The cache of reference hidden states: bit-exact or absent, never wrong, and never what ends a training run."""

import errno
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import grids
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fused_losses.huggingface.cache import CacheStats, ReferenceCache

ROOT = Path(__file__).parents[2]
DIGEST = "d" * 64
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path / "cache", digest=DIGEST)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def files(cache):
    return sorted(path for path in cache.directory.rglob("*") if path.is_file())


def stored(cache, ids=(1, 2, 3), shape=(3, 5), dtype=torch.bfloat16):
    """(key, hidden, path) of an entry that was put."""
    key, hidden = cache.key(list(ids)), torch.randn(shape).to(dtype)
    cache.put(key, hidden)
    return key, hidden, cache.directory / cache.digest / key[:2] / f"{key}.safetensors"


# ---- entries


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_is_bit_exact(cache, dtype):
    unsigned = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    limits = torch.iinfo(unsigned)
    hidden = torch.randint(limits.min, limits.max, (7, 5), dtype=unsigned).view(
        dtype
    )  # any bits, so NaN with payloads too
    hidden[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype)
    key = cache.key([4, 5])
    assert cache.get(key) is None
    cache.put(key, hidden)
    back = cache.get(key)
    assert back.dtype == dtype and back.shape == hidden.shape and torch.equal(bits(back), bits(hidden))
    size = sum(path.stat().st_size for path in files(cache))
    assert cache.stats == CacheStats(hits=1, misses=1, bytes=size, rebuilt=0)
    back[0, 0] = 1  # the caller's own memory
    assert torch.equal(bits(cache.get(key)), bits(hidden))


def test_views_and_tensors_with_a_gradient_are_stored_by_value(cache):
    whole = torch.randn(6, 8, requires_grad=True)
    for number, part in enumerate((whole[1:4, ::2], whole.t(), whole[None][0])):
        cache.put(cache.key([number]), part)
        assert torch.equal(cache.get(cache.key([number])), part.detach())


def test_files_are_safetensors_with_metadata(cache):
    safetensors = pytest.importorskip("safetensors")
    key, hidden, path = stored(cache)
    assert files(cache) == [path]
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.keys()) == ["hidden"] and torch.equal(file.get_tensor("hidden"), hidden)
        metadata = file.metadata()
    assert metadata["key"] == key and metadata["digest"] == DIGEST
    assert {"format", "package", "checksum"} <= set(metadata)


def test_another_process_finds_what_was_put(cache):
    key, hidden, _ = stored(cache)
    again = ReferenceCache(cache.directory, digest=DIGEST)
    assert torch.equal(again.get(again.key(torch.tensor([1, 2, 3]))), hidden) and again.key([1, 2, 3]) == key
    assert again.stats.bytes == cache.stats.bytes > 0


def test_damage_anywhere_is_noticed(cache):
    """Each byte flipped, and the file cut after each byte: either None or, never, something else."""
    key, hidden, path = stored(cache, shape=(2, 3))
    good = path.read_bytes()
    damaged = [good[:at] for at in range(len(good))]
    damaged += [good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :] for at in range(len(good)) for bit in (1, 128)]
    damaged += [good + b"\0", bytes(len(good)), good[:8] + b"[" * 100_000]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, content in enumerate(damaged, 1):
            path.write_bytes(content)
            assert cache.get(key) is None and not path.exists()
            assert cache.stats.rebuilt == cache.stats.misses == number
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    cache.put(key, hidden)
    assert torch.equal(bits(cache.get(key)), bits(hidden))


def test_a_file_under_another_key_is_not_served(cache):
    _, _, path = stored(cache)
    other = cache.key([7])
    moved = path.parent.parent / other[:2] / f"{other}.safetensors"
    moved.parent.mkdir(exist_ok=True)
    path.rename(moved)
    with pytest.warns(RuntimeWarning, match="written by something else"):
        assert cache.get(other) is None
    assert not moved.exists()


def test_a_file_of_another_digest_is_not_served_even_if_it_is_moved(cache):
    key, _, path = stored(cache)
    other = ReferenceCache(cache.directory, digest="e" * 64)
    assert other.key([1, 2, 3]) != key and other.get(other.key([1, 2, 3])) is None and other.get(key) is None
    moved = other.directory / other.digest / key[:2] / path.name
    moved.parent.mkdir()
    path.rename(moved)
    with pytest.warns(RuntimeWarning, match="something else"):
        assert other.get(key) is None


def test_an_entry_that_cannot_be_read_is_a_miss(cache):
    key = cache.key([1])
    (cache.directory / DIGEST / key[:2] / f"{key}.safetensors").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be read") as caught:
        assert cache.get(key) is None and cache.get(key) is None
    assert len(caught) == 1 and cache.stats.misses == 2


# ---- keys


EXTRA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
ROW = st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.lists(EXTRA, max_size=3))


def typed(value):
    """A value that equals another's only where type and value do: True is not 1."""
    return [typed(v) for v in value] if isinstance(value, (list, tuple)) else (type(value).__name__, value)


@settings(deadline=None, max_examples=grids.examples(100, 300))
@given(ROW, ROW)
@example(([1, 2], [(3,)]), ([1], [(2, 3)]))
@example(([1, 2], []), ([1], [2]))
@example(([1], ["a", "b"]), ([1], ["ab"]))
@example(([1], ["asb", "c"]), ([1], ["a", "bsc"]))
@example(([1], [("a",), "b"]), ([1], [("a", "b")]))
@example(([1], ["a"]), ([1], [b"a"]))
@example(([1], [1]), ([1], [True]))
@example(([1], [None]), ([1], []))
def test_keys_are_equal_where_rows_are(shared_cache, a, b):
    assert (shared_cache.key(a[0], *a[1]) == shared_cache.key(b[0], *b[1])) == (typed(a) == typed(b))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return ReferenceCache(tmp_path_factory.mktemp("cache"), digest=DIGEST)


def test_key_of_lists_tensors_and_arrays(cache):
    key = cache.key([1, 2])
    assert cache.key((1, 2)) == cache.key(torch.tensor([1, 2])) == cache.key(torch.tensor([1, 2]).int().numpy()) == key
    base = torch.arange(6)
    keys = [
        cache.key([1, 2], extra)
        for extra in (
            base,
            base.int(),
            base.float(),
            base.reshape(2, 3),
            base.reshape(3, 2),
            base + 1,
            base.tolist(),
            0.5,
        )
    ]
    assert len({key, *keys}) == len(keys) + 1
    assert cache.key([1, 2], base[::2]) == cache.key([1, 2], base[::2].clone()) == cache.key([1, 2], base[::2].numpy())


# ---- several processes, full and unwritable disks


WRITER = """
import sys, torch
from fused_losses.huggingface.cache import ReferenceCache
torch.set_num_threads(1)
cache = ReferenceCache(sys.argv[1], digest=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    for row in range(5):
        key, expected = cache.key([row]), torch.full((64, 96), float(row))
        found = cache.get(key)
        assert found is None or torch.equal(found, expected)
        cache.put(key, expected)
        if turn % 10 == 9 and row == 0 and sys.argv[3] == "0":
            cache.clear()
assert cache._storing and not cache.stats.rebuilt
"""


def test_processes_that_write_the_same_keys(cache):
    """One of them also clears the directory while the other writes into it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-W", "error", "-c", WRITER, str(cache.directory), DIGEST]
    processes = [
        subprocess.Popen([*arguments, str(n)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert all(path.suffix == ".safetensors" for path in files(cache))
    for row in range(5):
        found = cache.get(cache.key([row]))
        assert found is None or torch.equal(found, torch.full((64, 96), float(row)))


def test_a_folder_cleared_between_mkdir_and_open_is_made_again(cache, monkeypatch):
    real, calls = os.replace, []

    def cleared(source, target):
        calls.append(target)
        if len(calls) == 1:
            Path(source).unlink()
            Path(target).parent.rmdir()
        real(source, target)

    monkeypatch.setattr(os, "replace", cleared)
    key, hidden, path = stored(cache)
    assert len(calls) == 2 and torch.equal(cache.get(key), hidden) and files(cache) == [path]


@pytest.fixture
def file_size_limit():
    """A kernel's own error for a write that does not fit, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_directory_that_cannot_be_written_is_an_error_at_once(tmp_path, file_size_limit):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"directory: .*cannot store in .*/file/inner/d+: .*give another") as caught:
        ReferenceCache(blocked / "inner", digest=DIGEST)
    assert caught.value.errno == errno.ENOTDIR
    file_size_limit(1000)
    with pytest.raises(OSError, match="File too large"):
        ReferenceCache(tmp_path / "full", digest=DIGEST)
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="cannot store in"):
        ReferenceCache(tmp_path / "cache", digest=DIGEST)


def test_a_write_that_fails_later_ends_storing_but_not_training(cache, file_size_limit):
    key, hidden, path = stored(cache)
    file_size_limit(2000)
    with pytest.warns(RuntimeWarning, match=r"File too large; nothing more is stored") as caught:
        for row in range(3):
            cache.put(cache.key([row]), torch.randn(100, 10))
    assert len(caught) == 1 and files(cache) == [path]
    cache.put(cache.key([9]), torch.randn(2, 2))  # small enough, but storing is over
    assert files(cache) == [path] and torch.equal(cache.get(key), hidden)


def test_max_bytes(tmp_path):
    size = 400 * 4 + 600  # with room for the header
    cache = ReferenceCache(tmp_path, digest=DIGEST, max_bytes=10 * size)
    with pytest.warns(RuntimeWarning, match="max_bytes is.*nothing more is stored.*prune") as caught:
        for row in range(30):
            cache.put(cache.key([row]), torch.randn(20, 20))
    assert len(caught) == 1
    held = sum(path.stat().st_size for path in files(cache))
    assert 9 * size < held <= 10 * size and held == cache.stats.bytes
    assert cache.get(cache.key([0])) is not None and cache.get(cache.key([29])) is None
    cache.clear()
    cache.put(cache.key([29]), torch.randn(20, 20))
    assert cache.get(cache.key([29])) is not None


def test_max_bytes_counts_what_others_write_and_not_what_is_replaced(tmp_path):
    a, b = (ReferenceCache(tmp_path, digest=digest * 64, max_bytes=40_000) for digest in "ab")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(60):
            a.put(a.key([0]), torch.randn(10, 10))  # again and again the same
        assert not caught and a.stats.bytes == files(a)[0].stat().st_size
        for row in range(100):
            a.put(a.key([row]), torch.randn(10, 10))
            b.put(b.key([row]), torch.randn(10, 10))
    held = sum(path.stat().st_size for path in files(a))
    assert 35_000 < held <= 40_000 * (1 + 1 / 16) and len(caught) == 2


def test_prune_removes_other_digests_and_nothing_else(cache):
    key, hidden, path = stored(cache)
    other = ReferenceCache(cache.directory, digest="other")
    _, _, foreign_entry = stored(other)
    own = [
        cache.directory / "notes.txt",
        cache.directory / "other" / "notes.txt",
        cache.directory / "data" / "ab" / "x",
    ]
    for note in own:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("mine")
    (cache.directory / "empty").mkdir()
    fresh, abandoned = (path.parent / name for name in (".a.1.00.tmp", ".b.1.00.tmp"))
    for temporary in (fresh, abandoned):
        temporary.write_text("part")
    os.utime(abandoned, (0, 0))
    size = foreign_entry.stat().st_size
    assert cache.prune() == size + 4
    assert files(cache) == sorted([path, fresh, *own]) and (cache.directory / "empty").is_dir()
    assert torch.equal(cache.get(key), hidden)
    left = path.stat().st_size + fresh.stat().st_size
    assert cache.clear() == left
    assert files(cache) == sorted(own) and cache.stats.bytes == 0 and cache.get(key) is None


@pytest.mark.parametrize(
    "attempt, kind, message",
    [
        (lambda path: ReferenceCache(path, digest="../up"), ValueError, r"digest.*folder.*'\.\./up'.*model_digest"),
        (lambda path: ReferenceCache(path, digest=3), TypeError, "digest.*string.*int"),
        (lambda path: ReferenceCache(None, digest=DIGEST), TypeError, "directory.*path.*NoneType"),
        (lambda path: ReferenceCache(path, digest=DIGEST, max_bytes=0), ValueError, "max_bytes.*> 0.*got 0"),
        (
            lambda path: ReferenceCache(path, digest=DIGEST, max_bytes=1e9),
            TypeError,
            "max_bytes.*integer.*1000000000.0",
        ),
        (lambda path: ReferenceCache(path, digest=DIGEST).get("../../x"), ValueError, r"key.*\.\./x"),
        (lambda path: put(path, torch.zeros(2, 3, 4)), ValueError, r"hidden.*\[T, D\].*\[2, 3, 4\].*one by one"),
        (lambda path: put(path, torch.zeros(0, 4)), ValueError, r"hidden.*\[0, 4\]"),
        (lambda path: put(path, torch.zeros(2, 3).long()), TypeError, "hidden.*bfloat16.*int64"),
        (lambda path: put(path, [[1.0]]), TypeError, "hidden.*tensor.*list"),
        (lambda path: ReferenceCache(path, digest=DIGEST).key([]), ValueError, "ids.*non-empty"),
        (lambda path: ReferenceCache(path, digest=DIGEST).key([[1, 2]]), ValueError, r"ids.*one row.*\[1, 2\]"),
        (lambda path: ReferenceCache(path, digest=DIGEST).key([0.5]), ValueError, "ids.*integers.*float32"),
        (lambda path: ReferenceCache(path, digest=DIGEST).key("text"), TypeError, "ids.*str"),
        (lambda path: ReferenceCache(path, digest=DIGEST).key([1], {}), TypeError, "extra.*dict"),
    ],
)
def test_errors_of_the_cache(tmp_path, attempt, kind, message):
    with pytest.raises(kind, match=message):
        attempt(tmp_path)


def put(path, hidden):
    cache = ReferenceCache(path, digest=DIGEST)
    cache.put(cache.key([1]), hidden)
