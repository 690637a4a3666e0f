"""The section of the command `serve`."""

import ipaddress
from typing import Annotated

from pydantic import Field

from mlpmem_jax.config.base import Section, runtime
from mlpmem_jax.config.types import WHOLE, Bytes, Count, Name, NonNegativeInt, PositiveInt, Text

Port = Annotated[int, Field(ge=0, le=65535), WHOLE]
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class ServeConfig(Section):
    """The server of `serve`."""

    host: Text = runtime(
        "127.0.0.1", "address to listen on; any but a loopback address requires an API key"
    )
    port: Port = runtime(8000, "TCP port; 0: any free port, which is printed")
    model_name: Name | None = runtime(
        None, "name of the model in requests; not set: the last part of workdir"
    )
    slots: Annotated[int, Field(ge=1, le=4096), WHOLE] = runtime(
        8, "texts that are continued at the same time; each has a row of the cache"
    )
    max_queue: NonNegativeInt = runtime(
        64, "texts that may wait for a slot; more are refused with status 429"
    )
    max_tokens: PositiveInt = runtime(1024, "largest max_tokens of a request")
    max_logprobs: Count = runtime(5, "largest logprobs of a request")
    max_body_bytes: Bytes = runtime(1_000_000, "largest request body; more: status 413")
    request_secs: Seconds = runtime(300.0, "time limit of a request, waiting included; 504 then")
    shutdown_secs: Seconds = runtime(
        30.0, "after SIGTERM: time to finish requests that are being answered"
    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
