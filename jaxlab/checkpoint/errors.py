"""The error that checkpoints raise, and what its message needs."""

import errno


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none fits what was asked for."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut after 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:200]}..."


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error, however often it was wrapped."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "RESOURCE_EXHAUSTED" in str(
            error
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
