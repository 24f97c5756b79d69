"""An S3 API server for tests: moto's, in a process of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

import pytest

from tests.warehouse import wait_until


class S3:
    """moto's S3 API server as a process of its own, with one bucket; what it holds ends with it.

    :param checked_after: requests that need no valid credentials; all, if it is None.
    :param host: the address that it listens on.
    """

    bucket = "warehouse"

    def __init__(self, checked_after: int | None = None, host: str = "127.0.0.1") -> None:
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.host, self.port = probe.getsockname()
        self.endpoint = f"http://{self.host}:{self.port}"
        self.more = {} if checked_after is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(checked_after)}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", self.host, "-p", str(self.port)],
            env=os.environ | {"PYTHONWARNINGS": "ignore"} | self.more,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._listens)
        self.client().create_bucket(Bucket=self.bucket)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
            return True
        assert self.process.poll() is None, "moto's server ended by itself"
        return False

    @property
    def environment(self) -> dict[str, str]:
        """For boto, s3fs, and by the connection aws_default for Airflow."""
        extra = {"endpoint_url": self.endpoint, "region_name": "us-east-1"}
        connection = {"conn_type": "aws", "login": "testing", "password": "not-a-secret", "extra": extra}
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_MAX_ATTEMPTS": "1",
            "AIRFLOW_CONN_AWS_DEFAULT": json.dumps(connection),
        }

    @cached_property
    def _client(self) -> Any:
        from botocore.session import Session

        return Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="not-a-secret",  # noqa: S106
        )

    def client(self) -> Any:
        """boto's client: another program than the one under test, with no cache in common."""
        return self._client

    def path(self, key: str, bucket: str = bucket) -> Any:
        """For loader and generator, with the credentials of the environment."""
        from upath import UPath

        return UPath(f"s3://{bucket}/{key}", endpoint_url=self.endpoint)

    def put(self, key: str, content: bytes) -> Any:
        self.client().put_object(Bucket=self.bucket, Key=key, Body=content)
        return self.path(key)

    def get(self, key: str) -> bytes:
        content: bytes = self.client().get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content

    def keys(self, prefix: str) -> list[str]:
        listed = self.client().list_objects_v2(Bucket=self.bucket, Prefix=prefix)
        return [found["Key"] for found in listed.get("Contents", [])]

    def uploads(self, prefix: str) -> list[dict[str, Any]]:
        """Those that are not finished."""
        listed = self.client().list_multipart_uploads(Bucket=self.bucket, Prefix=prefix)
        return [upload for upload in listed.get("Uploads", []) if upload["Key"].startswith(prefix)]


def s3_server(**options: Any) -> Iterator[S3]:
    with pytest.MonkeyPatch.context() as patch:
        server = S3(**options)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    yield from s3_server()


@pytest.fixture
def own_s3(request: pytest.FixtureRequest) -> Iterator[S3]:
    """One to stop and start, for the test alone."""
    yield from s3_server(**getattr(request, "param", {}))
