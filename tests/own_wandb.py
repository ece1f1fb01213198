"""A fixture for tests that run W&B in their process."""

from contextlib import suppress

import pytest
import wandb


@pytest.fixture
def own_wandb(tmp_path, monkeypatch):
    """A wandb without the user's settings and login, offline unless a test changes that."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    with suppress(ConnectionResetError):  # if a test has killed the service
        wandb.teardown()
