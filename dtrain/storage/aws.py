"""Where an S3 server is, how it is spoken to, and as whom: from a run's options, the environment and the profile."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from dtrain.errors import ConfigError

OPTIONS = ("client", "endpoint_url", "region", "profile", "path_style", "timeout_s")
"""What `storage_options` may hold."""
_MOST_S = 1_000_000_000
"""What clients and clocks can reckon with."""


def split(root: str) -> tuple[str, str]:
    """Bucket and prefix of a URL. :raises ConfigError: there is no bucket in it."""
    parts = urlsplit(root)
    prefix = parts.path.removeprefix("/").rstrip("/")
    wrong = {"", ".", ".."}.intersection(prefix.split("/")) if prefix else ()
    if "@" in parts.netloc:
        raise ConfigError("an s3:// URL must not hold a user's name or password")
    if not parts.netloc or parts.query or parts.fragment or wrong:
        raise ConfigError(f"dir={root!r} must be like s3://bucket/prefix")
    return parts.netloc, prefix


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """:raises ConfigError: an option isn't known, or holds a secret."""
    for name, value in options.items():
        if re.search("key|secret|token|password", name):
            raise ConfigError(
                f"storage_options[{name!r}]: credentials don't belong into a config, which people print and keep; give "
                "them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role"
            )
        if name not in OPTIONS:
            raise ConfigError(f"storage_options[{name!r}] is unknown; there are: {', '.join(OPTIONS)}")
        if name == "endpoint_url":
            addressed({name: value})
        if name == "path_style" and not isinstance(value, bool):
            raise ConfigError(f"storage_options['path_style']={value!r} must be true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "timeout_s" and not (number and 0 < value <= _MOST_S):
            raise ConfigError(
                f"storage_options['timeout_s']={value!r} must be a number of seconds above zero, at most {_MOST_S}"
            )
    return dict(options)


def addressed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Where the server is and how it is spoken to: {endpoint_url, region, path_style}."""
    environment = os.environ.get
    endpoint = (
        options.get("endpoint_url") or environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL") or None
    )
    region = options.get("region") or environment("AWS_REGION") or environment("AWS_DEFAULT_REGION")
    if endpoint and re.match(r"(\w*:?//)?[^/]*@", str(endpoint)):
        raise ConfigError("the endpoint's URL must not hold a user's name or password")
    if endpoint and not _is_address(str(endpoint)):
        raise ConfigError(f"endpoint_url={endpoint!r} must be like https://host or http://host:port")
    if not region and (options.get("profile") or environment("AWS_PROFILE")):
        import boto3
        from botocore.exceptions import BotoCoreError

        try:
            region = boto3.Session(profile_name=options.get("profile")).region_name
        except BotoCoreError as error:
            raise ConfigError(f"no AWS credentials: {error}") from error
    # Servers other than AWS's seldom have a name for each bucket.
    path_style = options.get("path_style", endpoint is not None)
    return {"endpoint_url": endpoint, "region": region or "us-east-1", "path_style": path_style}


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(re.fullmatch(r"https?://[^\s/]+/?\S*", url) and parts.hostname and parts.port != 0)
    except ValueError:  # in its brackets, or its port
        return False


def credentials(options: Mapping[str, Any]) -> dict[str, Any]:
    """From the environment; else by the rest of AWS's chain: profile, web identity, the machine's role.

    :raises ConfigError: there are none.
    """
    environment = os.environ.get
    if not options.get("profile") and environment("AWS_ACCESS_KEY_ID") and environment("AWS_SECRET_ACCESS_KEY"):
        names = {
            "access_key_id": "AWS_ACCESS_KEY_ID",
            "secret_access_key": "AWS_SECRET_ACCESS_KEY",
            "session_token": "AWS_SESSION_TOKEN",
        }
        return {name: value for name, variable in names.items() if (value := environment(variable))}
    import boto3
    from botocore.exceptions import BotoCoreError
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        session = boto3.Session(profile_name=options.get("profile"))
        found = session.get_credentials()
    except BotoCoreError as error:
        raise ConfigError(f"no AWS credentials: {error}") from error
    if found is None:
        raise ConfigError(
            "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, name a profile (AWS_PROFILE, "
            "storage_options={'profile': ...}, --storage-option profile=...), or give the machine a role"
        )
    return {"credential_provider": Boto3CredentialProvider(session)}


@contextlib.contextmanager
def boto_errors(place: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(f"{place}: {error}") from error
