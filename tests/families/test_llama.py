"""Llama: what its config.json says, and what is refused."""

import pytest

from gaze_jax.errors import UserError
from tests.helpers.model_configs import QWEN, read, written_and_read

LLAMA = QWEN | {"model_type": "llama"}


def test_it_has_neither_norms_nor_biases():
    found = read(LLAMA)
    assert not found.qk_norm and not found.qkv_bias and found.head_dim == 16


@pytest.mark.parametrize("name", ["mlp_bias", "attention_bias"])
def test_what_would_compute_something_else_is_refused(name):
    with pytest.raises(UserError, match=f"{name}=True"):
        read(LLAMA | {name: True})


def test_a_config_that_is_written_is_read_as_it_was():
    config, found = written_and_read("llama")
    assert found == config
