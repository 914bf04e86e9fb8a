"""Repositories on the Hugging Face Hub: how they are named, fetched and written.

The address is what ``HF_ENDPOINT`` says, the token what ``HF_TOKEN`` says and nothing else does,
``HF_HUB_CACHE`` (or ``HF_HOME``) is where files are kept, and with ``HF_HUB_OFFLINE=1`` nothing
else is asked. Whatever goes wrong is a UserError of one line in which no token stands.
"""

import hashlib
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from tpp.common.errors import Note, UserError, reason_of
from tpp.common.reading import read_json

HUB = "hf-hub:"
# What a repository of ours holds; timm's are called alike.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT_KEY = "format"  # of CONFIG: names the format of WEIGHTS, if that is ours
TOKEN = "HF_TOKEN"
MAIN = "main"
_FORM = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKENS = "https://huggingface.co/settings/tokens"
# Seconds between attempts of what huggingface_hub does not try again itself.
_WAITS = (1.0, 2.0, 4.0)
# Without it huggingface_hub waits for ever for a Hub that says nothing.
_SILENCE_SECONDS = 60.0
# A dry run is not worth so long a wait.
_GLANCE_SECONDS = 5.0
_BUSY = (408, 429, 500, 502, 503, 504)

Done = TypeVar("Done")


class NotAskedError(UserError):
    """The Hub could not be asked: whether it would have refused is not known."""


class Reference(NamedTuple):
    """A repository, at a revision.

    Attributes:
        repository: ``OWNER/NAME``.
        revision: a branch, a tag or a commit; None for the newest.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        at = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.repository}{at}"

    @property
    def is_commit(self) -> bool:
        """Whether it will be the same for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


class Fetched(NamedTuple):
    """What a repository holds.

    Attributes:
        reference: with the commit.
        weights: the file, in the cache.
        config: the file beside it; None where there is none.
    """

    reference: Reference
    weights: Path
    config: Path | None

    @property
    def path(self) -> Path:
        """What to read: the file, or the folder where only its ``config.json`` says the network."""
        if self.config is None:
            return self.weights
        said = read_json(self.config, "the configuration")
        ours = isinstance(said, dict) and FORMAT_KEY in said
        return self.weights if ours else self.weights.parent


class Written(NamedTuple):
    """What an upload came to.

    Attributes:
        reference: with the commit.
        url: of the repository's page; of another branch than main, that one's.
        created: whether there was no such repository before.
        changed: whether there is a new commit; without one all was there already.
    """

    reference: Reference
    url: str
    created: bool
    changed: bool


def is_reference(path: object) -> bool:
    """Whether a path begins as a repository on the Hub."""
    return os.fspath(path).startswith(HUB) if isinstance(path, str | os.PathLike) else False


def reference(text: str | os.PathLike[str]) -> Reference:
    """The repository that ``[hf-hub:]OWNER/NAME[@REVISION]`` names.

    Raises:
        UserError: it is written otherwise.
    """
    plain = os.fspath(text).removeprefix(HUB)
    found = _FORM.fullmatch(plain)
    if found is None or ".." in plain:
        raise UserError(
            f"{text}: expected OWNER/NAME or OWNER/NAME@REVISION, as the Hub's page shows it"
        )
    return Reference(found[1], found[2])


def local(path: str | os.PathLike[str]) -> Path:
    """A path, or what ``hf-hub:OWNER/NAME[@REVISION]`` names, fetched if it is not in the cache.

    Raises:
        UserError: there is no such repository or revision, or it cannot be fetched.
    """
    return fetch(reference(path)).path if is_reference(path) else Path(path)


def pinned(path: Path) -> Path:
    """A path; of a repository with its commit, and fetched. A branch's commit is noted.

    Raises:
        UserError: as :func:`local`.
    """
    if not is_reference(path):
        return path
    return Path(str(fetch(reference(path)).reference))


def fetch(wanted: Reference) -> Fetched:
    """Fetch a repository's weights, and ``config.json`` where it has one, into the cache.

    Where the revision is no commit, a :class:`~tpp.common.errors.Note` says which one it is now.

    Raises:
        UserError: there is no such repository, revision or file, or it cannot be fetched.
    """
    hub = _library()
    with _one_line(wanted, "read"):
        weights = _download(hub, wanted, WEIGHTS)
        # The cache's folder of a commit, and nothing else, says which one it is.
        at = Reference(wanted.repository, weights.parent.name)
        config = _config(hub, at)
    if not wanted.is_commit:
        warnings.warn(Note(f"{wanted}: is commit {at.revision}"), stacklevel=2)
    return Fetched(at, weights, config)


def _config(hub: ModuleType, at: Reference) -> Path | None:
    known = hub.try_to_load_from_cache(at.repository, CONFIG, revision=at.revision)
    if known is not None and not isinstance(known, str):  # known not to be there
        return None
    try:
        return _download(hub, at, CONFIG)
    except hub.errors.EntryNotFoundError:  # on the Hub, or in the cache of an offline machine
        return None


def kept(wanted: Reference, name: str) -> Path | None:
    """A repository's file where it is in the cache already; the Hub is not asked."""
    found = _library().try_to_load_from_cache(
        wanted.repository, name, revision=wanted.revision or MAIN
    )
    return Path(found) if isinstance(found, str) else None


def small_file(wanted: Reference, name: str) -> Path | None:
    """A repository's file, fetched if it is not in the cache; None where it has none of that name.

    Raises:
        UserError: there is no such repository or revision, or it cannot be fetched.
    """
    hub = _library()
    with _one_line(wanted, "read"):
        try:
            return _download(hub, wanted, name)
        except hub.errors.RemoteEntryNotFoundError:
            return None


def _download(hub: ModuleType, wanted: Reference, name: str) -> Path:
    blobs = Path(hub.constants.HF_HUB_CACHE, f"models--{wanted.repository}".replace("/", "--"))
    before = {path.name for path in blobs.glob("blobs/*")}
    path = Path(
        hub.hf_hub_download(
            wanted.repository,
            name,
            revision=wanted.revision,
            endpoint=_endpoint(),
            token=_token() or False,
            library_name="tpp",
        )
    )
    if path.resolve().name not in before:
        _check_bytes(path, wanted)
    return path


def _check_bytes(path: Path, wanted: Reference) -> None:
    """Check what was downloaded by its hash, which names it in the cache: only its length was.

    (findings/hf_hub_download_keeps_other_bytes.sh)

    Raises:
        UserError: it is another; it is taken out of the cache, or it would be found there for ever.
    """
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name) is None:  # small files are not named so
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{wanted}: {path.name} was changed on the way: its sha256 is {found[:16]}..., the "
            f"Hub says {blob.name[:16]}...; nothing of it was kept; fetch it again"
        )


def check_may_write(target: Reference) -> None:
    """Check what can be known before the Hub is asked.

    Raises:
        NotAskedError: there is no token, or no network is to be used.
        UserError: the token cannot be one.
    """
    hub = _library()
    if hub.constants.is_offline_mode():
        raise NotAskedError(f"{target}: HF_HUB_OFFLINE is set, and writing asks the Hub; unset it")
    if not _token():
        raise NotAskedError(
            f"{target}: {TOKEN} is not set: export {TOKEN}=... with a token that may write "
            f"({_TOKENS})"
        )


def check_write(
    target: Reference, files: Mapping[str, Path | bytes], *, private: bool, overwrite: bool
) -> None:
    """Check all of :func:`write` that reading tells; nothing is changed.

    Whether the token may write is not among it: the Hub says that to who writes.

    Args:
        target, files, private, overwrite: see :func:`write`.

    Raises:
        NotAskedError: there is no token, no network is to be used, or the Hub does not answer.
        UserError: it would be refused.
    """
    hub = _library()
    check_may_write(target)
    with _one_line(target, "read"), _patient(_GLANCE_SECONDS):
        _look(hub, _api(hub), target, files, private=private, overwrite=overwrite)


def write(
    target: Reference,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    private: bool,
    overwrite: bool,
) -> Written:
    """Put files into a repository, as one commit; it and the branch are made if need be.

    Args:
        target: the revision is a branch.
        files: by their names there. All others that it holds stay.
        message: of the commit.
        private: whether a new repository is nobody else's to see.
        overwrite: whether files of these names that are there and different are replaced.

    Raises:
        UserError: it is refused or cannot be reached, there is something else, or an existing
            repository is public and should be private. No file is changed then.
    """
    hub = _library()
    check_may_write(target)
    branch = target.revision or MAIN
    api = _api(hub)
    with _one_line(target, "write"), _patient(_SILENCE_SECONDS):
        known, at = _look(hub, api, target, files, private=private, overwrite=overwrite)
        if not known:
            _tried(
                lambda: api.create_repo(target.repository, private=private or None, exist_ok=True)
            )
            # Somebody else may have made it meanwhile.
            _, at = _look(hub, api, target, files, private=private, overwrite=overwrite)
        if at is None:
            if branch != MAIN:
                _tried(lambda: api.create_branch(target.repository, branch=branch, exist_ok=True))
            at = _tried(lambda: api.model_info(target.repository, revision=branch))
        before = str(at.sha)
        done = _tried(
            lambda: api.create_commit(
                target.repository,
                [
                    hub.CommitOperationAdd(name, str(data) if isinstance(data, Path) else data)
                    for name, data in files.items()
                ],
                commit_message=message,
                revision=branch,
                parent_commit=before,
            )
        )
    commit = str(done.oid)
    tree = "" if branch == MAIN else f"/tree/{quote(branch, safe='')}"
    url = f"{api.endpoint}/{target.repository}{tree}"
    return Written(Reference(target.repository, commit), url, not known, commit != before)


def _api(hub: ModuleType) -> Any:
    return hub.HfApi(endpoint=_endpoint(), token=_token(), library_name="tpp")


def _look(
    hub: ModuleType,
    api: Any,
    target: Reference,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    overwrite: bool,
) -> tuple[bool, Any]:
    """Whether there is the repository, and what the Hub says of the branch; None: there is none.

    All that can be refused before something is made is refused here.
    """
    if CARD in files:
        _check_card(hub, api, target, files[CARD])
    info = _info(hub, api, target.repository)
    if info is None:
        return False, None
    if private and not info.private:
        raise UserError(
            f"{target}: is there and public, which --private does not change: change it in "
            "its settings on the Hub, or name another"
        )
    if (target.revision or MAIN) != MAIN:
        # What a new branch holds of main's is no reason: the branch is this push's own.
        info = _info(hub, api, target.repository, target.revision)
    if info is not None and not overwrite:
        there = {sibling.rfilename for sibling in info.siblings}
        _check_nothing_else(api, target, str(info.sha), files, there)
    return True, info


def _check_card(hub: ModuleType, api: Any, target: Reference, card: Path | bytes) -> None:
    """Ask the Hub of the card's metadata, as ``create_commit`` does when a branch is made already.

    Raises:
        UserError: it does not take them.
    """
    content = card if isinstance(card, bytes) else card.read_bytes()

    def ask() -> Any:
        response = hub.utils.get_session().post(
            f"{api.endpoint}/api/validate-yaml",
            json={"content": content.decode(), "repoType": "model"},
            headers=hub.utils.build_hf_headers(token=_token(), library_name="tpp"),
        )
        if response.status_code != 400:
            hub.utils.hf_raise_for_status(response)
        return response

    response = _tried(ask)
    if response.status_code == 400:
        said = "; ".join(str(error.get("message")) for error in response.json().get("errors", []))
        raise UserError(
            f"{target}: the Hub does not take what the card says: {' '.join(said.split())}; "
            "--license, --dataset and --base-model want the Hub's names"
        )


def _info(hub: ModuleType, api: Any, repository: str, revision: str | None = None) -> Any:
    """What the Hub says of a repository; None where there is none, or no such revision of it."""
    try:
        return _tried(lambda: api.model_info(repository, revision=revision))
    except (hub.errors.GatedRepoError, hub.errors.DisabledRepoError):
        raise
    except hub.errors.HfHubHTTPError as error:
        if error.response.status_code != 404:
            raise
        return None


def _check_nothing_else(
    api: Any,
    target: Reference,
    commit: str,
    files: Mapping[str, Path | bytes],
    there: set[str],
) -> None:
    names = [name for name in files if name in there]
    if not names:
        return
    infos = _tried(lambda: api.get_paths_info(target.repository, names, revision=commit))
    other = [info.path for info in infos if not _is_same(info, files[info.path])]
    if other:
        raise UserError(
            f"{target}: holds {', '.join(sorted(other))} already, and others than these; "
            "--overwrite replaces them, --branch NAME puts these beside them"
        )


def _is_same(info: Any, data: Path | bytes) -> bool:
    """Whether a file on the Hub has these bytes."""
    if isinstance(data, Path) and info.lfs is not None:
        with data.open("rb") as file:
            return bool(hashlib.file_digest(file, "sha256").hexdigest() == info.lfs.sha256)
    content = data if isinstance(data, bytes) else data.read_bytes()
    if info.lfs is not None:
        return bool(hashlib.sha256(content).hexdigest() == info.lfs.sha256)
    # As git names what it keeps.
    said = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return said.hexdigest() == info.blob_id


def _library() -> ModuleType:
    try:
        hub = importlib.import_module("huggingface_hub")
        for part in ("constants", "errors", "utils"):
            importlib.import_module(f"huggingface_hub.{part}")
    except ImportError:
        raise UserError(
            f"{HUB}: needs huggingface_hub: pip install 'huggingface_hub>=2.4.0'"
        ) from None
    return hub


def _token() -> str | None:
    """The user's token. One that ``hf auth login`` has written to a file is not looked for.

    Raises:
        UserError: it is none. What sends it would quote it in what it says about that.
    """
    token = os.environ.get(TOKEN, "").strip()
    if re.fullmatch(r"[!-~]*", token) is None:
        raise UserError(f"{TOKEN}: holds a blank, a line break or other letters, as no token does")
    return token or None


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


@contextmanager
def _patient(seconds: float) -> Iterator[None]:
    """Within it a Hub that accepts a request and says nothing for so long is given up."""
    session = _library().utils.get_session()
    before = session.timeout
    session.timeout = seconds
    try:
        yield
    finally:
        session.timeout = before


def _tried(call: Callable[[], Done]) -> Done:
    """The result of a call that may be made twice, after a few attempts if need be."""
    for wait in _WAITS:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(wait)
    return call()


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may be answered a little later."""
    status = _status(error)
    return status in _BUSY if status is not None else _is_of_network(error)


def _is_of_network(error: BaseException) -> bool:
    if isinstance(error, _library().errors.OfflineModeIsEnabled):
        return False
    # httpx, httpx2 or requests, by the version of huggingface_hub.
    return isinstance(error, ConnectionError | TimeoutError) or any(
        kind.__name__ in ("TransportError", "ConnectionError") for kind in type(error).__mro__
    )


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    return code if isinstance(code, int) else None


@contextmanager
def _one_line(target: Reference, doing: str) -> Iterator[None]:
    """Within it what goes wrong on the way to the Hub is a UserError, and the library is quiet."""
    hub = _library()
    logging, level = hub.utils.logging, hub.utils.logging.get_verbosity()
    bars = not hub.utils.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    if bars and not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of huggingface_hub, or of whatever carries its requests
        kind = NotAskedError if any(map(_may_pass, _chain(error))) else UserError
        raise kind(f"{target}: {_reason(hub, error, target, doing)}") from None
    finally:
        logging.set_verbosity(level)
        if bars and not sys.stderr.isatty():
            hub.utils.enable_progress_bars()


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def _reason(hub: ModuleType, error: BaseException, target: Reference, doing: str) -> str:
    """What went wrong, and what to do."""
    errors, token = hub.errors, _token()
    place = _endpoint() or hub.constants.ENDPOINT
    offline = hub.constants.is_offline_mode()
    if offline and isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"is not in the cache ({hub.constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; fetch "
            f"it where there is a network: tpp pull {str(target).removeprefix(HUB)} --output FILE"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {target.revision}"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"the repository holds no {WEIGHTS}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner has to let you in: ask on {place}/{target.repository}, and set {TOKEN}"
    chain = list(_chain(error))
    status = next((code for code in map(_status, chain) if code is not None), None)
    if status == 401 and token:
        return f"the Hub does not take the token in {TOKEN}; make another: {_TOKENS}"
    if status == 403:
        return f"the token in {TOKEN} may not {doing} it; make one that may: {_TOKENS}"
    if status in (401, 404):
        hidden = "or the token may not see it" if token else f"or it is private, and {TOKEN} unset"
        return f"there is no such repository, {hidden}"
    if status in (409, 412):
        return "was changed by somebody else meanwhile; nothing was written; try again"
    if status == 429:
        return "the Hub takes no more requests from here for now (429); try again later"
    if status is not None and status >= 500:
        return f"the Hub fails ({place}: {status}), also when asked again; try again later"
    # The one that the others came from says most.
    said = reason_of(chain[-1] if any(map(_is_of_network, chain)) else error)
    if token:
        said = said.replace(token, "...")
    if any(map(_is_of_network, chain)):
        return f"{place} cannot be reached ({said})"
    return said
