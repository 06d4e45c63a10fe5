"""Which failures are transient, which are permanent, and how to fix the permanent ones."""

from __future__ import annotations

import errno

from caption_ray.storage.common import DamagedError, HttpStatus, StorageError
from caption_ray.storage.uris import split_bucket

PASSING_CODES = (
    "BadDigest",  # of an upload; the next ones too: what arrived is not what was sent
    "IncompleteBody",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    "NoSuchUpload",  # completed by a request whose answer was lost
    "OperationAborted",
    "RequestTimeout",
)
"""S3 error codes that are transient although their HTTP status says that the client is wrong."""

EXPIRED_CODES = (
    "ExpiredToken",
    "ExpiredTokenException",
    "TokenRefreshRequired",
    "400",  # all of them where a HEAD was asked: its answer has no body to name them in
)
"""S3 error codes after which the credential chain must be asked for new credentials."""

LASTING_ERRORS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "ParamValidationError",
    "NoRegionError",
    "InvalidRegionError",
)
"""boto3's errors of wrong settings, which are permanent; its other errors without an HTTP status
are transient."""

NO_TOKEN = {
    "Could not create a OAuth2 access token": "run `gcloud auth application-default login`, set "
    "GOOGLE_APPLICATION_CREDENTIALS, or write gs://anonymous@bucket/... for a public bucket",
    "Failed to get token from DefaultAzureCredential": "run `az login`, or set AZURE_TENANT_ID, "
    "AZURE_CLIENT_ID and AZURE_CLIENT_SECRET",
}
"""What Google's and Azure's clients say, after their own retries, if they find no credentials; and
the remedy."""

LASTING_NUMBERS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)
"""Error numbers of the operating system for refusals that last until somebody acts."""

_GIVE_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile that there is"
)
_CHECK_KEYS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile"
_ASK = "these credentials may not do this: ask for the permission, or give others"

REMEDIES: dict[str | int, str] = {
    "NoCredentialsError": _GIVE_KEYS,
    "PartialCredentialsError": _GIVE_KEYS,
    "ProfileNotFound": _GIVE_KEYS,
    "NoRegionError": "set AWS_DEFAULT_REGION",
    "InvalidRegionError": "correct AWS_DEFAULT_REGION",
    "InvalidAccessKeyId": _CHECK_KEYS,
    "SignatureDoesNotMatch": _CHECK_KEYS,
    "InvalidToken": "check AWS_SESSION_TOKEN, or the profile",
    "AccessDenied": _ASK,
    "403": _ASK,  # a HEAD's, which cannot name the reason
    **dict.fromkeys(EXPIRED_CODES, "renew the credentials, if they have expired"),
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.ENOTDIR: "a part of this path is a file: choose another place",
    errno.EEXIST: "a part of this path is a file: choose another place",
    errno.EISDIR: "this is a folder: name a file in it",
    errno.ENOENT: "nothing can be created there: choose another place",
}
"""Remedies by S3 error code, boto3 error or the operating system's error number."""


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    answered = http_status(error)
    if answered is not None:
        return answered in (408, 429) or answered >= 500 or error_code(error) in PASSING_CODES
    return type(error).__name__ not in LASTING_ERRORS and _without_token(error) is None


def lasts(error: Exception) -> bool:
    """Whether the error is permanent: a disk that is full or read-only, or missing or insufficient
    credentials."""
    cause = error.__cause__ if isinstance(error, StorageError) else error
    if isinstance(cause, OSError):
        return cause.errno in LASTING_NUMBERS
    if cause is error or not isinstance(cause, Exception):
        return False
    return not is_passing(cause) and error_code(cause) not in EXPIRED_CODES


def _without_token(error: Exception) -> str | None:
    """The remedy, if Google's or Azure's client found no credentials; else None."""
    return next((remedy for said, remedy in NO_TOKEN.items() if said in str(error)), None)


def http_status(error: Exception) -> int | None:
    """The HTTP status of the answer; None if there was no answer."""
    if isinstance(error, HttpStatus):
        return error.status
    response = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
    return None


def error_code(error: Exception) -> str | None:
    """The S3 error code."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def no_bucket(uri: str) -> StorageError:
    """The error message for a resolved S3 URI."""
    bucket, _ = split_bucket(uri)
    return StorageError(f"{uri}: there is no bucket {bucket!r}; create it, or correct its name")


def lasting(uri: str, error: Exception, attempts: int = 1) -> StorageError:
    """One line that says what was requested, why it failed, and the remedy."""
    if isinstance(error, DamagedError):
        return DamagedError(f"{error} (read {attempts} times)")
    if error_code(error) == "NoSuchBucket":
        return no_bucket(uri)
    without_token = _without_token(error)
    if without_token is not None:
        return StorageError(f"{uri}: no credentials were found; {without_token}")
    number = error.errno if isinstance(error, OSError) else None
    remedy = REMEDIES.get(number or error_code(error) or type(error).__name__)
    said = f"{type(error).__name__}: {error}"
    reason = " ".join(((error.strerror if isinstance(error, OSError) else None) or said).split())
    tried = f" (tried {attempts} times)" if attempts > 1 else ""
    return StorageError(f"{uri}: {reason}{tried}" + (f"; {remedy}" if remedy else ""))
