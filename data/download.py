"""Raw files from the net: checked, written aside and renamed; archives unpacked without trusting them."""

import gzip
import logging
import os
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from common.files import aside
from common.parameters import Name, PositiveInt, configurable

HEADERS = {"Accept-Encoding": "identity", "User-Agent": "generative-retrieval"}
TIMEOUT = (10, 60)  # seconds to connect, and between two packets
MAX_EXPANSION = 100  # times the archive's size, or SMALL bytes
SMALL = 1 << 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
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


def ensure_raw_files(sources: Sequence[Sequence[RemoteFile]], folder: Path, archives: Path) -> tuple[str, ...]:
    """Makes one complete set of raw files lie in `folder` and returns their names.

    sources: alternative sets of remotes, the preferred first. What lies in `folder` is used as it is, and so is an
    archive in `archives`; only what is missing is fetched.

    Raises FileNotFoundError that says what to put where, if no source works; ValueError where an archive is damaged or
    not to be trusted; OSError where the disk is full.
    """
    problems = []
    started = sorted(sources, key=lambda source: len(_missing(source, folder)) / len(_files(source)))  # whole: first
    for source in started:
        try:
            for remote in source:
                if missing := _missing((remote,), folder):
                    _complete(remote, missing, folder, archives)
            return _files(source)
        except ConnectionError as error:
            problems.append(str(error))
    absent = ", ".join(str(folder / name) for name in _missing(started[0], folder))
    choices = "\nor ".join(_instruction(source, folder, archives) for source in sources)
    reasons = "\n".join(problems)
    raise FileNotFoundError(f"there is no {absent}.\nPut {choices}.\nDownloading failed:\n{reasons}")


def _complete(remote: RemoteFile, missing: Sequence[str], folder: Path, archives: Path) -> None:
    """Fetches what is missing of one remote; ConnectionError where what came by download is of no use."""
    if not remote.members:
        fetch(remote, folder)
        return
    archive = archives / remote.name
    if fetched := not archive.is_file():
        fetch(remote, archives)
    try:
        unpack(archive, {name: remote.members[name] for name in missing}, folder)
    except ValueError as error:
        if not fetched:
            raise
        archive.unlink()
        raise ConnectionError(f"  {error}") from error


def _files(source: Sequence[RemoteFile]) -> tuple[str, ...]:
    return tuple(name for remote in source for name in remote.files)


def _missing(source: Sequence[RemoteFile], folder: Path) -> tuple[str, ...]:
    return tuple(name for name in _files(source) if not (folder / name).is_file())


def _instruction(source: Sequence[RemoteFile], folder: Path, archives: Path) -> str:
    zips = "".join(f" (or {remote.name} into {archives})" for remote in source if remote.members)
    return f"{', '.join(_files(source))} into {folder}{zips}"


@configurable
@dataclass(frozen=True)
class Downloads:
    """How files are downloaded.

    mirrors: file name -> URLs to take instead of the published ones. attempts: at each URL, with 1, 2, 3 .. seconds in
    between; one that refuses or serves something else is not asked again.
    """

    mirrors: Mapping[str, Sequence[Name]] = field(default_factory=dict)
    attempts: PositiveInt = 4


class Refused(Exception):
    """Why a URL is not asked again."""


def fetch(remote: RemoteFile, folder: Path) -> Path:
    """Downloads one file into `folder` and returns its path. Raises ConnectionError with one line for each URL, and
    OSError where the file can't be written."""
    import pooch
    from pooch.hashes import hash_matches
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")
    bar = {"progressbar": sys.stderr.isatty(), "chunk_size": 1 << 20}
    http = pooch.HTTPDownloader(**bar, timeout=TIMEOUT, headers=HEADERS)
    settings, problems = Downloads(), []

    def attempt(url: str, output: str, store: pooch.Pooch) -> None:
        try:
            http(url, output, store)
            hash_matches(output, remote.checksum, strict=True, source=remote.name)
            _check_whole(Path(output), remote.name)
        except (RequestException, ValueError) as error:
            if not _may_pass(error):
                raise Refused(_reason(error)) from error
            logger.info(f"{url}: {_reason(error)}")
            raise

    for url in settings.mirrors.get(remote.name, remote.urls):
        logger.info(f"Downloading {remote.name} from {url} to {folder}")
        file, attempts = {remote.name: url}, settings.attempts
        store = pooch.create(folder, "", registry={remote.name: None}, urls=file, retry_if_failed=attempts - 1)
        try:
            path = Path(store.fetch(remote.name, downloader=attempt))
            os.umask(mask := os.umask(0))
            path.chmod(0o666 & ~mask)  # pooch's temporary files are private
            return path
        except (RequestException, Refused) as error:
            problems.append(f"  {url}: {_reason(error)}")
        except OSError as error:
            raise _disk_error(error, remote.name, folder) from error
    raise ConnectionError("\n".join(problems))


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


def unpack(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Extracts files from a zip archive: all or none of them appear in `folder`.

    members: name in `folder` -> end of the member's path. Nothing else is extracted, and never to another place.

    Raises ValueError that names the archive where it is damaged, lacks a member, names paths outside of itself, has a
    link for a member, or expands more than a hundredfold; OSError where a file can't be written.
    """
    advice = "delete it to download it again, or put the right one in its place"
    try:
        with zipfile.ZipFile(archive) as opened, ExitStack() as stack:
            found = {name: _member(opened, end) for name, end in members.items()}
            size = sum(info.file_size for info in found.values())
            if size > max(SMALL, MAX_EXPANSION * archive.stat().st_size):
                raise ValueError(f"it would expand to {size:,} bytes, more than {MAX_EXPANSION} times its size")
            for name, info in found.items():
                part = stack.enter_context(aside(folder / name))
                with opened.open(info) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise _disk_error(error, f"what {archive.name} holds", folder) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{archive} can't be used ({error}): {advice}") from error


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
