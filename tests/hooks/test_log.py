"""The log says once per module and reason why a module runs its own code, and nothing where it is patched."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_rope
from zoo import named

LOGGER = "dit_rope.hooks"


class OtherProcessor(WanAttnProcessor):
    """Code that no adapter knows."""

    def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
        """As the known code."""
        return super().__call__(*args, **kwargs)


def forward(model: torch.nn.Module, times: int = 2) -> None:
    for _ in range(times):
        named("wan").forward(model)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


@pytest.mark.parametrize("when", ["before", "after"])
def test_unknown_processor_is_logged_once(when: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = named("wan").build()
    attention = model.blocks[1].attn1
    if when == "before":
        attention.set_processor(OtherProcessor())
    with torch.no_grad(), dit_rope.patch(model):
        if when == "after":
            assert messages(caplog) == []
            attention.set_processor(OtherProcessor())
        forward(model)
    (message,) = messages(caplog)
    assert message.startswith("model.blocks.1.attn1 is not patched: ")
    assert "OtherProcessor" in message


def test_tables_of_unknown_code_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = named("wan").build()
    with torch.no_grad(), dit_rope.patch(model):
        forward(model)
        assert messages(caplog) == []
        vars(model.rope)["_hidden"] = object()  # its attributes are part of the key, and this one cannot be
        forward(model)
    assert messages(caplog) == ["model.rope is not patched: its tables depend on values that cannot be a cache key"]


def test_calls_that_the_patch_cannot_rotate_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    model = named("wan").build()
    with dit_rope.patch(model, exact=True):
        forward(model)
    reason = "its tables, dtypes or gradients do not allow it in this call"
    assert messages(caplog) == [f"model.blocks.{number}.attn1 is not patched: {reason}" for number in range(2)]


def test_nothing_is_logged_above_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    model = named("wan").build()
    model.blocks[1].attn1.set_processor(OtherProcessor())
    with dit_rope.patch(model, exact=True):
        forward(model)
    assert messages(caplog) == []
