"""Raw files from the net: checked, written aside and renamed; archives unpacked without trusting them."""

import gzip
import os
import shutil
import stat
import sys
import time
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gin

TIMEOUT = (10, 60)  # seconds to connect, and between two packets
MAX_EXPANSION = 100  # times the archive's size, or SMALL bytes
SMALL = 1 << 20


@dataclass(frozen=True)
class Remote:
    """A file to download: a zip archive, or a gzip file that is used as it is.

    urls: mirrors, the preferred one first. checksum: "md5:..." where the publisher gives one.
    members: of an archive, file name -> end of its path in the archive.
    """

    name: str
    urls: tuple[str, ...]
    checksum: str | None = None
    members: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.members) or (self.name,)


def obtain(ways: Sequence[Sequence[Remote]], folder: Path, archives: Path) -> tuple[str, ...]:
    """Makes one complete set of raw files lie in `folder` and returns their names.

    ways: alternative sets of remotes, the preferred first. What lies in `folder` is used as it is, and so is an archive
    in `archives`; only what is missing is fetched.

    Raises FileNotFoundError that says what to put where, if no way works; ValueError where an archive is damaged or
    not to be trusted; OSError where the disk is full.
    """
    problems = []
    complete = [way for way in ways if not _missing(way, folder)]
    if complete:
        return _files(complete[0])
    started = sorted(ways, key=lambda way: _missing(way, folder) == _files(way))  # one that is partly there goes first
    for way in started:
        try:
            for remote in way:
                _complete(remote, folder, archives)
            return _files(way)
        except ConnectionError as error:
            problems.append(str(error))
    missing = ", ".join(str(folder / name) for name in _missing(started[0], folder))
    choices = "\nor ".join(_instruction(way, folder, archives) for way in ways)
    reasons = "\n".join(problems)
    raise FileNotFoundError(f"there is no {missing}.\nPut {choices}.\nDownloading failed:\n{reasons}")


def _complete(remote: Remote, folder: Path, archives: Path) -> None:
    """Fetches what is missing of one remote; ConnectionError where what came by download is of no use."""
    missing = _missing((remote,), folder)
    if not missing:
        return
    if not remote.members:
        fetch(remote, folder)
        return
    archive, members = archives / remote.name, {name: remote.members[name] for name in missing}
    if archive.is_file():
        unpack(archive, members, folder)
        return
    fetch(remote, archives)
    try:
        unpack(archive, members, folder)
    except ValueError as error:
        archive.unlink()
        raise ConnectionError(f"  {error}") from error


def _files(way: Sequence[Remote]) -> tuple[str, ...]:
    return tuple(name for remote in way for name in remote.files)


def _missing(way: Sequence[Remote], folder: Path) -> tuple[str, ...]:
    return tuple(name for name in _files(way) if not (folder / name).is_file())


def _instruction(way: Sequence[Remote], folder: Path, archives: Path) -> str:
    zips = "".join(f" (or {remote.name} into {archives})" for remote in way if remote.members)
    return f"{', '.join(_files(way))} into {folder}{zips}"


@gin.configurable
@dataclass(frozen=True)
class Downloads:
    """How files are downloaded.

    mirrors: file name -> URLs to take instead of the published ones. attempts: rounds over all URLs, with 1, 2, 4 ..
    seconds in between; a URL that refuses or serves something else is not asked again.
    """

    mirrors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    attempts: int = 4


def fetch(remote: Remote, folder: Path) -> Path:
    """Downloads one file into `folder` and returns its path.

    Raises ConnectionError with one line for each URL, and OSError where the file can't be written.
    """
    import requests

    settings = Downloads()
    urls = dict.fromkeys(settings.mirrors.get(remote.name, remote.urls))
    problems = {}
    for attempt in range(settings.attempts):
        if attempt and urls:
            time.sleep(2 ** (attempt - 1))
        for url in tuple(urls):
            try:
                return _download(url, remote, folder)
            except (requests.RequestException, ValueError) as error:
                problems[url] = f"  {url}: {_reason(error)}"
                if not _may_pass(error):
                    del urls[url]
                elif attempt + 1 < settings.attempts:
                    print(f"{problems[url].strip()}; trying again", flush=True)
            except OSError as error:
                raise _disk_error(error, remote.name, folder) from error
    raise ConnectionError("\n".join(problems.values()))


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed: not where the server refused, or sent something else than the file."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, ValueError) or "NameResolution" in str(error):
        return False
    return status is None or status >= 500 or status in (408, 429)


def _reason(error: Exception) -> str:
    """A short one; what requests says goes over several lines."""
    if "NameResolution" in str(error):
        return "the host is not found; is this machine offline?"
    response = getattr(error, "response", None)
    return str(error)[:300] if response is None else f"HTTP {response.status_code} {response.reason}"


def _disk_error(error: OSError, name: str, folder: Path) -> OSError:
    return OSError(error.errno, f"{name} can't be written ({error.strerror}); is the disk full?", str(folder))


def _download(url: str, remote: Remote, folder: Path) -> Path:
    """One attempt. ValueError where what came is not the file that was asked for."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    print(f"Downloading {remote.name} from {url} to {folder}", flush=True)
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=1 << 20,
        timeout=TIMEOUT,
        headers={"Accept-Encoding": "identity", "User-Agent": "generative-retrieval"},
    )
    aside = folder / f".{remote.name}-{uuid.uuid4().hex[:12]}"
    try:
        pooch.retrieve(url, remote.checksum, aside.name, folder, downloader=downloader)
        _check_whole(aside, remote.name)
        aside.chmod(0o666 & ~_umask())  # pooch's temporary files are private
        os.replace(aside, folder / remote.name)
    finally:
        aside.unlink(missing_ok=True)
    return folder / remote.name


def _check_whole(path: Path, name: str) -> None:
    """ValueError unless `path` is a whole zip or gzip file, as `name` says; a web page is neither."""
    with open(path, "rb") as file:
        start = file.read(64)
    problem = f"it is no {'zip' if name.endswith('.zip') else 'gzip'} file but begins with {start[:40]!r}"
    if name.endswith(".zip"):
        if not zipfile.is_zipfile(path):
            raise ValueError(problem)
        return
    try:
        with gzip.open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{problem} ({error})") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def unpack(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Extracts files from a zip archive: all or none of them appear in `folder`.

    members: name in `folder` -> end of the member's path. Nothing else is extracted, and never to another place.

    Raises ValueError that names the archive where it is damaged, lacks a member, names paths outside of itself, has a
    link for a member, or expands more than a hundredfold; OSError where a file can't be written.
    """
    advice = "delete it to download it again, or put the right one in its place"
    aside = folder / f".unpacking-{uuid.uuid4().hex[:12]}"
    try:
        with zipfile.ZipFile(archive) as opened:
            found = {name: _member(opened, end) for name, end in members.items()}
            size = sum(info.file_size for info in found.values())
            if size > max(SMALL, MAX_EXPANSION * archive.stat().st_size):
                raise ValueError(f"it would expand to {size:,} bytes, more than {MAX_EXPANSION} times its size")
            aside.mkdir(parents=True)
            for name, info in found.items():
                with opened.open(info) as source, open(aside / name, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        for name in members:
            os.replace(aside / name, folder / name)
    except OSError as error:
        raise _disk_error(error, f"what {archive.name} holds", folder) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} can't be used ({error}): {advice}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _member(opened: zipfile.ZipFile, end: str) -> zipfile.ZipInfo:
    """The one member whose path ends with `end`; ValueError where the archive is not to be trusted."""
    for info in opened.infolist():
        if info.filename.startswith(("/", "\\")) or ".." in Path(info.filename.replace("\\", "/")).parts:
            raise ValueError(f"it holds {info.filename!r}, a path outside of it")
    found = [info for info in opened.infolist() if f"/{info.filename}".endswith(f"/{end}")]
    if len(found) != 1:
        raise ValueError(f"it holds {len(found)} files {end} where there must be one")
    if stat.S_ISLNK(found[0].external_attr >> 16) or found[0].is_dir():
        raise ValueError(f"{found[0].filename!r} is a link or a folder")
    return found[0]
