"""transformers is told that parameters are born in pieces, so that its from_pretrained fills pieces instead of whole tensors.

    with strategy.init_context():                         deepspeed.zero.Init, and the word to transformers
        model = AutoModel.from_pretrained(folder)         each tensor is read whole by rank 0 alone, and given out
transformers keeps one configuration for the whole process, by a weak reference; here it holds for as long as the context does.
Source: transformers.integrations.deepspeed.HfDeepSpeedConfig, of which this is the part that is asked (without its need for
Accelerate).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ConfigError

__all__ = ["told"]


class _Configuration:
    """What transformers asks: the JSON, and whether it is stage 3."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def is_zero3(self) -> bool:
        return True

    def is_zero2(self) -> bool:
        return False


@contextlib.contextmanager
def told(config: Mapping[str, Any]) -> Iterator[None]:
    """Tell transformers, where it was imported.

    Raises:
        ConfigError: it was first imported inside, and so did not know.
    """
    if "transformers" not in sys.modules:
        yield
        if "transformers.modeling_utils" in sys.modules:
            raise ConfigError(
                "transformers was first imported while a model was built in pieces (configure_model, or init_context), and was "
                "not told that its parameters are: from_pretrained leaves them unfilled. Import it at the top of the file."
            )
        return
    from transformers.integrations import deepspeed as theirs

    ours: Any = _Configuration(config)
    before = theirs._hf_deepspeed_config_weak_ref
    theirs.set_hf_deepspeed_config(ours)
    try:
        yield
    finally:
        theirs._hf_deepspeed_config_weak_ref = before
