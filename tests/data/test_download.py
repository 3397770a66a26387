import gzip
import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gin
import pytest

from data import ml1m
from data.download import RemoteFile, ensure_raw_files, fetch, unpack
from data.processed import RecDataset, load_corpus

REPOSITORY = Path(__file__).parents[2]
MOVIES = "1::Heat (1995)::Action|Crime\n2::Amélie (2001)::Comedy\n".encode("latin-1")
RATINGS = b"1::2::5::20\n1::1::4::10\n2::1::3::5\n"


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = zipped(**{"ml-1m/movies.dat": MOVIES, "ml-1m/ratings.dat": RATINGS, "ml-1m/README": b"Terms."})
HTML = b"<!DOCTYPE html><html>Google Drive can't scan this file for viruses.</html>"


class Server(ThreadingHTTPServer):
    """Serves, for each path, one answer after the other and the last one ever after.

    An answer is a status, or a body; with CUT before it, the body breaks off halfway.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = {}, []

    def url(self, path: str, *answers) -> str:
        self.answers[path] = list(answers)
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers = self.server.answers[self.path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.server.asked.append(self.path)
        if isinstance(answer, int):
            self.send_error(answer)
            return
        body, cut = (answer[1], True) if isinstance(answer, tuple) else (answer, False)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, *_) -> None:
        pass


CUT = "cut"


@pytest.fixture
def server():
    served = Server()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The seconds that would have been waited."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def archive(*urls: str, content: bytes | None = GOOD) -> RemoteFile:
    checksum = f"md5:{hashlib.md5(content).hexdigest()}" if content else None
    return RemoteFile("ml-1m.zip", urls, checksum, {name: f"ml-1m/{name}" for name in ml1m.FILES})


def link(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc/passwd")
        opened.writestr("ml-1m/ratings.dat", RATINGS)
    return buffer.getvalue()


HOSTILE = {
    "a path upwards": (zipped(**{"../movies.dat": b"x", "ml-1m/movies.dat": MOVIES}), "a path outside"),
    "an absolute path": (zipped(**{"/etc/ml-1m/movies.dat": b"x"}), "a path outside"),
    "a Windows path upwards": (zipped(**{"ml-1m\\..\\..\\x": b"x", "ml-1m/movies.dat": MOVIES}), "a path outside"),
    "a link": (link("ml-1m/movies.dat"), "is a link or a folder"),
    "absurd expansion": (
        zipped(**{"ml-1m/movies.dat": bytes(9_000_000), "ml-1m/ratings.dat": RATINGS}),
        "would expand to 9,000,035 bytes, more than 100 times",
    ),
    "a missing member": (zipped(**{"ml-1m/movies.dat": MOVIES}), "0 files ml-1m/ratings.dat"),
    "a member twice": (
        zipped(**{"ml-1m/movies.dat": MOVIES, "a/ml-1m/movies.dat": MOVIES}),
        "2 files ml-1m/movies.dat",
    ),
    "no archive": (HTML, "not a zip file"),
    "flipped bits": (GOOD.replace(zipped(x=RATINGS)[31:50], bytes(19), 1), ""),
}


def test_an_error_then_a_truncated_body_then_the_right_one(tmp_path, server, waits, capsys):
    remote = archive(server.url("/ml-1m.zip", 500, (CUT, GOOD), GOOD))
    assert ensure_raw_files(((remote,),), tmp_path / "raw", tmp_path / "raw") == ml1m.FILES
    assert (tmp_path / "raw/movies.dat").read_bytes() == MOVIES
    assert (tmp_path / "raw/ratings.dat").read_bytes() == RATINGS
    assert sorted(os.listdir(tmp_path / "raw")) == ["ml-1m.zip", "movies.dat", "ratings.dat"]
    assert waits == [1, 2] and len(server.asked) == 3
    assert "HTTP 500" in capsys.readouterr().out


def test_mirrors_are_asked_in_turn_and_those_that_refuse_only_once(tmp_path, server, waits):
    urls = [
        server.url("/gone", 404),
        server.url("/page", HTML),
        server.url("/other", zipped(other=b"1")),
        server.url("/busy", 503, 429, GOOD),
    ]
    assert fetch(archive(*urls), tmp_path).read_bytes() == GOOD
    assert server.asked == ["/gone", "/page", "/other", "/busy", "/busy", "/busy"] and waits == [1, 2]


def test_a_web_page_is_not_taken_for_an_archive_without_a_checksum(tmp_path, server, waits):
    for name in ("a.zip", "a.json.gz"):
        remote = RemoteFile(name, (server.url("/drive", HTML),))
        with pytest.raises(ConnectionError, match="begins with b.<!DOCTYPE html>"):
            fetch(remote, tmp_path)
    for whole in (GOOD, gzip.compress(b"x" * 9999)):
        remote = RemoteFile("a.zip" if whole is GOOD else "a.json.gz", (server.url("/half", whole[:-20]),))
        with pytest.raises(ConnectionError, match="it is no (zip|gzip) file"):
            fetch(remote, tmp_path)
    assert waits == [] and not os.listdir(tmp_path)


def test_a_wrong_checksum_is_one_clear_error(tmp_path, server, waits):
    remote = archive(server.url("/ml-1m.zip", zipped(**{"ml-1m/movies.dat": b"other"})))
    with pytest.raises(FileNotFoundError) as raised:
        ensure_raw_files(((remote,),), tmp_path / "raw", tmp_path / "raw")
    assert "does not match the known hash" in str(raised.value) and len(server.asked) == 1
    assert f"Put movies.dat, ratings.dat into {tmp_path / 'raw'} (or ml-1m.zip into {tmp_path / 'raw'})" in str(
        raised.value
    )
    assert not os.listdir(tmp_path / "raw")


def test_offline_the_error_says_which_files_to_put_where_and_does_not_wait(tmp_path, waits):
    names = ["reviews_Toys_and_Games_5.json.gz", "meta_Toys_and_Games.json.gz"]
    gin.parse_config(f"Downloads.mirrors = { {name: ['http://no.invalid/'] for name in ('P5_data.zip', *names)} }")
    try:
        with pytest.raises(FileNotFoundError) as raised:
            load_corpus(RecDataset.AMAZON, str(tmp_path), "toys")
    finally:
        gin.clear_config()
    raw = tmp_path / "raw"
    assert (
        f"Put sequential_data.txt, datamaps.json, meta.json.gz into {raw / 'toys'} (or P5_data.zip into {raw})"
        in str(raised.value)
    )
    assert f"or {names[0]}, {names[1]} into {raw / 'toys'}." in str(raised.value)
    assert str(raised.value).count("offline?") == 2 and "In call to" not in str(raised.value)
    assert waits == []


def test_the_second_source_serves_when_the_first_fails(tmp_path, server, waits):
    first = archive(server.url("/ml-1m.zip", 404))
    second = RemoteFile("reviews.json.gz", (server.url("/reviews", gzip.compress(b"{}")),))
    assert ensure_raw_files(((first,), (second,)), tmp_path / "raw", tmp_path) == ("reviews.json.gz",)
    server.asked.clear()
    assert ensure_raw_files(((first,), (second,)), tmp_path / "raw", tmp_path) == ("reviews.json.gz",)
    assert server.asked == []


def test_an_archive_of_other_contents_is_not_kept_and_the_second_source_serves(tmp_path, server, waits):
    for content in (HOSTILE["a path upwards"][0], HOSTILE["a missing member"][0]):
        first = archive(server.url("/ml-1m.zip", content), content=None)
        with pytest.raises(FileNotFoundError, match=r"(?s)ml-1m.zip can't be used \(it holds"):
            ensure_raw_files(((first,),), tmp_path / "raw", tmp_path)
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
    second = RemoteFile("reviews.json.gz", (server.url("/reviews", gzip.compress(b"{}")),))
    assert ensure_raw_files(((first,), (second,)), tmp_path / "raw", tmp_path) == ("reviews.json.gz",)


def test_files_placed_by_hand_are_used_as_they_are(tmp_path, server, waits):
    remote = archive(server.url("/ml-1m.zip", 404))
    (tmp_path / "ml-1m.zip").write_bytes(GOOD[:-1] + b"\0")  # other bytes than the checksum's, still a zip file
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/movies.dat").write_bytes(b"mine")
    ensure_raw_files(((remote,),), tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw/movies.dat").read_bytes() == b"mine"
    assert (tmp_path / "raw/ratings.dat").read_bytes() == RATINGS and server.asked == []
    assert sorted(os.listdir(tmp_path / "raw")) == ["movies.dat", "ratings.dat"]


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_an_archive_that_is_not_to_be_trusted_leaves_nothing(tmp_path, content, message):
    assert content != GOOD
    inner = tmp_path / "a/b/raw"
    inner.mkdir(parents=True)
    (inner / "ml-1m.zip").write_bytes(content)
    with pytest.raises(ValueError, match="delete it to download it again") as raised:
        unpack(inner / "ml-1m.zip", archive().members, inner)
    assert message in str(raised.value) and str(inner / "ml-1m.zip") in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inner / "ml-1m.zip"]
    assert os.listdir(inner) == ["ml-1m.zip"]


LOAD = """
import gin, resource, sys
from data import ml1m, processed
from data.processed import RecDataset, load_corpus
ml1m.ARCHIVE = ml1m.ARCHIVE.__class__(ml1m.ARCHIVE.name, (sys.argv[1],), None, ml1m.ARCHIVE.members)
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    print(load_corpus(RecDataset.ML_1M, sys.argv[2]).hash)
except OSError as error:
    sys.exit(f"error: {error}")
"""


def load(url: str, folder: Path, limit: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", LOAD, url, str(folder), str(limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "*"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_that_ask_at_once_download_once_and_agree(tmp_path, server):
    url = server.url("/ml-1m.zip", GOOD)
    both = [load(url, tmp_path) for _ in range(2)]
    output = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    assert server.asked == ["/ml-1m.zip"]
    assert output[0][0].split()[-1] == output[1][0].split()[-1]
    assert os.listdir(tmp_path / "processed") == ["ml1m"]


@pytest.mark.parametrize("limit", [len(GOOD) - 100, len(GOOD) + 100])
def test_a_full_disk_is_one_clear_error_and_leaves_no_half_file(tmp_path, server, limit):
    """The first limit breaks the download, the second one the unpacking of a file that is larger than the archive."""
    numbers = hashlib.sha256(b"").hexdigest() * 40
    movies = MOVIES + "".join(f"{n}::{numbers}::Drama\n" for n in range(3, 6)).encode()
    body = zipped(**{"ml-1m/movies.dat": movies, "ml-1m/ratings.dat": RATINGS})
    limit += len(body) - len(GOOD)
    url = server.url("/ml-1m.zip", body)
    process = load(url, tmp_path, limit)
    _, error = process.communicate()
    assert process.returncode == 1 and re.fullmatch(r"error: .*is the disk full\?.*\n", error), error
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert left == (["ml-1m.zip"] if limit > len(body) else [])
    again = load(url, tmp_path)
    assert again.communicate()[0] and again.returncode == 0
