"""Upload of a finished student to the hub, with its model card; a private repository unless asked otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

from limbeck.models.quiet import one_line
from limbeck.models.sources import network_errors
from limbeck.runtime.files import read_json, write_json
from limbeck.runtime.hashing import sha256_of
from limbeck.types import Json, LimbeckError

if TYPE_CHECKING:
    from limbeck.pipeline.context import RunContext


def check_publishing(context: RunContext) -> None:
    """See, before any work, that a student could be uploaded: a name, a token, and the hub not switched off.

    Raises:
        LimbeckError: one of them is missing.
    """
    train = context.recipe.train
    if not train.push_to_hub:
        return
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = train.hub_model_id
    if name is None or name.count("/") != 1:
        raise LimbeckError(
            f"train.hub_model_id is {name!r}; expected owner/name of the repository that train.push_to_hub uploads to"
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise LimbeckError(f"train.hub_model_id is {name!r}: {one_line(error)}; correct it") from None
    if is_offline_mode():
        raise LimbeckError("train.push_to_hub uploads the student, but HF_HUB_OFFLINE is set; unset one of the two")
    if get_token() is None:
        raise LimbeckError(
            "train.push_to_hub needs a token of the hub that may write; log in with `hf auth login`, or set HF_TOKEN"
        )


def publish(context: RunContext) -> None:
    """Upload the student, once for each state of its files; the same command goes on where the network failed.

    Raises:
        LimbeckError: the hub refuses, or cannot be reached; the run itself is whole.
    """
    train, run = context.recipe.train, context.run
    if not train.push_to_hub or train.hub_model_id is None:
        return
    record = run.root / "pushed.json"
    files = {path.name: sha256_of(path) for path in sorted(run.finished_student.iterdir()) if path.is_file()}
    state: Json = {"repository": train.hub_model_id, "files": files}
    if record.exists() and {key: value for key, value in read_json(record).items() if key != "commit"} == state:
        context.console.say(f"hub: {train.hub_model_id} has this student already")
        return
    write_json(record, state | {"commit": _upload(context, train.hub_model_id)})
    context.console.say(f"hub: pushed to {train.hub_model_id}")


def _upload(context: RunContext, repository: str) -> str:
    from huggingface_hub import HfApi, errors

    train, run = context.recipe.train, context.run
    hub = HfApi()
    again = "the run is whole: the same command uploads it again"
    try:
        hub.create_repo(repository, private=train.hub_private_repo, exist_ok=True)
        found = hub.upload_folder(
            repo_id=repository,
            folder_path=run.finished_student,
            commit_message=f"Student of the run {context.recipe.name}",
        )
    except errors.HfHubHTTPError as error:
        raise LimbeckError(f"the hub refuses {repository}: {one_line(error)[:300]}; {again}") from error
    except network_errors() as error:
        raise LimbeckError(f"the hub cannot be reached ({one_line(error)[:300]}); {again}") from error
    return found.oid
