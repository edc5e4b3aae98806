"""Services that several modules ask, each started once."""

import pytest

from services import service, write_export


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("served") / "export")


@pytest.fixture(scope="session")
def served(exported):
    limits = ("--max-bytes", 20_000, "--max-images", 5, "--max-pixels", 10_000)
    with service(exported, *limits) as running:
        yield running


@pytest.fixture(scope="session")
def token_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text("s3cret\n")
    return file


@pytest.fixture(scope="session")
def guarded(exported, token_file):
    """A service that takes two requests at once, wants a token, and waits for five seconds."""
    limits = ("--queue", 2, "--seconds", 5)
    with service(exported, *limits, "--token-file", token_file, "--allow-origin", "https://example.org") as running:
        yield running
