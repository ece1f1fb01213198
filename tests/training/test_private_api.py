import re

import pytest

from nli_sft.training import private_api


def test_the_installed_versions_are_supported():
    assert private_api.missing() == []


@pytest.mark.parametrize(
    ("table", "name", "message"),
    [
        ("OVERRIDDEN", "_gone", r"transformers \S+ no longer calls Trainer\._gone, needed to stop"),
        ("ATTRIBUTES", "_lost", r"trl \S+ no longer has SFTTrainer\._lost, needed to stop"),
    ],
)
def test_missing_names_are_reported(monkeypatch, table, name, message):
    monkeypatch.setitem(getattr(private_api, table), name, "stop")
    (found,) = private_api.missing()
    assert re.fullmatch(message, found)


def test_a_name_inside_a_nested_function_is_found():
    def outer():
        return lambda trainer: trainer._inner

    assert "_inner" in private_api._names(outer)
