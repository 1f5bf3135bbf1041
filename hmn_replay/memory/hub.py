"""Memories on the Hugging Face Hub: a repository of data with the file, a card and pictures."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from hmn_replay.errors import ConfigError
from hmn_replay.extras import import_extra
from hmn_replay.memory.export import contact_sheet_png

if TYPE_CHECKING:
    from hmn_replay.memory.base import Memory

__all__ = ["download", "make_card", "push"]

FILE_NAME, SHEET_NAME = "memory.hmn", "contact_sheet.png"

# A path makes one slash of two.
_ADDRESS = re.compile(
    r"hf:/+(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?"
)
# Settings of a condensation that a card names; the rest is in the report below them.
_NAMED = ("effort", "objective", "network", "seed", "seconds")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


def push(
    memory: Memory,
    repo_id: str,
    *,
    source: str | None = None,
    accuracy: float | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Put a memory on the Hub; see :meth:`hmn_replay.Memory.push_to_hub`."""
    hub = import_extra("huggingface_hub", "hub")
    files = {
        FILE_NAME: memory.checked_bytes(),
        **({} if memory.holds_features else {SHEET_NAME: contact_sheet_png(memory)}),
        "README.md": make_card(
            memory,
            repo_id,
            source=source,
            accuracy=accuracy,
            license=license,
            tags=tags,
            revision=revision,
        ).encode(),
    }
    api = hub.HfApi(token=token, library_name="hmn_replay")
    with _explained(f"cannot put the memory into {repo_id} on the Hub"):
        api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=f"Add a memory of {memory.file_bytes:,} bytes",
            repo_type="dataset",
            revision=revision,
        )
    return str(commit.commit_url)


def download(address: str, *, token: str | None = None) -> Path:
    """Fetch a memory's file from the Hub into the Hub's own cache, and return where it is.

    Args:
        address: ``hf://OWNER/NAME``, which may go on with ``@REVISION``, whose slashes are written
            ``%2F``, and ``/FILE``.
        token: Default: that of ``hf auth login``.

    Raises:
        ConfigError: An address of another form.
        OSError: The repository or the file is not there, or the Hub does not answer.
        MissingExtraError: huggingface_hub is not installed.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(
            f"expected hf://OWNER/NAME, hf://OWNER/NAME@REVISION or hf://OWNER/NAME/FILE; got "
            f"'hf://{address.removeprefix('hf:/').lstrip('/')}'"
        )
    hub = import_extra("huggingface_hub", "hub")
    name = match["file"] or FILE_NAME
    with _explained(f"cannot fetch {name} of {match['repo']} from the Hub"):
        found = hub.hf_hub_download(
            match["repo"],
            name,
            repo_type="dataset",
            revision=match["revision"] and unquote(match["revision"]),
            library_name="hmn_replay",
            token=token,
        )
    return Path(found)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make an OSError of whatever the Hub's library raises: its errors have no base in common."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"{what}: {reason}") from error


def make_card(
    memory: Memory,
    repo_id: str,
    *,
    source: str | None = None,
    accuracy: float | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    revision: str | None = None,
) -> str:
    """Return the card of a memory: a README with metadata that the Hub reads.

    Args:
        memory: A memory of any kind.
        repo_id: ``OWNER/NAME``.
        source: What the images come from, such as ``"CIFAR-10"``.
        accuracy: Test accuracy of a network that was trained on the memory, in [0, 1].
        license: An identifier that the Hub knows, such as ``"mit"``.
        tags: Further tags.
        revision: The branch that it is on. Default: None, the main one.
    """
    address = repo_id + ("" if revision is None else f"@{quote(revision, safe='')}")
    hub = import_extra("huggingface_hub", "hub")
    own = ["hmn_replay", "dataset-distillation", "dataset-condensation", memory.kind]
    data = hub.DatasetCardData(
        pretty_name=repo_id.rpartition("/")[2],
        license=license,
        tags=[*own, *(tag for tag in tags if tag not in own)],
        task_categories=["image-classification"],
        size_categories=next((name for top, name in _SIZES if len(memory) < top), "100K<n<1M"),
    )
    counts, summary = memory.images_per_class, memory.summary()
    names = [memory.class_names.get(label, str(label)) for label in memory.classes.tolist()]
    each = f"{min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
    what = "features" if memory.holds_features else "images"
    facts = {
        "source": source,
        what: f"{memory.num_images:,} of {' x '.join(map(str, memory.image_shape))}",
        "classes": f"{memory.num_classes:,}, {each} images each",
        "file": f"{memory.file_bytes:,} bytes",
        "budget": None if memory.budget_bytes is None else f"{memory.budget_bytes:,} bytes",
        "kind": memory.kind,
        **{
            name.replace("_", " "): summary.get(name)
            for name in ("number_format", "quality", "subsampling")
        },
        **{name: memory.report.get(name) for name in _NAMED},
        "test accuracy": None if accuracy is None else f"{accuracy:.2%}",
    }
    rows = [f"| {name} | {_text(value)} |" for name, value in facts.items() if value is not None]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo_id}",
        f"A memory of hmn_replay: {memory.num_images:,} "
        f"labelled {what} of {memory.num_classes:,} classes in {memory.file_bytes:,} bytes, to "
        "train on in place of a data set, or to replay.",
        "" if memory.holds_features else f"![{SHEET_NAME}]({SHEET_NAME})",
        "\n".join(["| | |", "|---|---|", *rows]),
        "Classes: " + ", ".join(names) + ".",
        f"""```python
import hmn_replay  # pip install 'hmn-replay[hub]'

memory = hmn_replay.load("hf://{address}")
images, labels = memory.decode()
network, accuracy = hmn_replay.evaluate(memory, test_set)
```""",
    ]
    if memory.report:
        report = json.dumps(memory.report, indent=1, default=str)
        parts.append(
            f"<details><summary>How it was made</summary>\n\n```json\n{report}\n```\n\n</details>"
        )
    return "\n\n".join(filter(None, parts)) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
