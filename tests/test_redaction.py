"""Keys and passwords are taken out of texts, and nothing else is."""

from __future__ import annotations

import pytest

from data_io.redaction import (
    is_secret_name,
    require_no_password,
    secret_variable,
    without_secrets,
)

VALUE = "not-a-real-value-0123"


def test_the_value_of_a_secret_variable_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    monkeypatch.setenv("SOME_SETTING", "checkpoints")
    assert without_secrets(f"key {VALUE}, in checkpoints") == "key ***, in checkpoints"
    assert secret_variable(f"x{VALUE}x") == "WANDB_API_KEY"
    assert secret_variable("checkpoints") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("token hf_" + "a" * 34, "token ***"),
        ("ghp_" + "b" * 36, "***"),
        ("AKIA" + "C" * 16, "***"),
        ("-----BEGIN RSA " + "PRIVATE KEY-----\nabc", "***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, told: str) -> None:
    assert without_secrets(text) == told


@pytest.mark.parametrize(
    "text", ["https://host:8080/a@b", "lr=1e-3", "me@host", "a: b@c", "sk-learn", "hf_home"]
)
def test_all_else_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_names_of_secrets() -> None:
    secret = "WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY DB_PASSWORD hydra.job.env_set.API_KEY"
    assert all(map(is_secret_name, secret.split()))
    plain = "val_data.max_new_tokens tokenizer_path shard_tokens PATH LLAMA_TOKENIZER keyboard"
    assert not any(map(is_secret_name, plain.split()))


def test_an_address_with_a_password_is_refused_without_telling_it() -> None:
    require_no_password("https://host/file", "source")
    with pytest.raises(
        ValueError, match="source=https://\\*\\*\\*@host/ holds a password"
    ) as caught:
        require_no_password("https://me:hidden@host/", "source")
    assert "hidden" not in str(caught.value)
