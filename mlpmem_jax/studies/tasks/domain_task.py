"""A task of lm-evaluation-harness whose label words are scored after a domain premise too.

Importing this module needs the package lm_eval.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask


class DomainTask(ConfigurableTask):  # type: ignore[misc]
    """Multiple choice, with a second request for each choice: after the doc's field `domain`."""

    def __init__(self, config: dict[str, Any]):
        """Takes a task file, which names this class."""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> list[Any]:
        """Returns requests for the choices after the prompt, then after the domain premise."""
        requests = super().construct_requests(doc, ctx, **dict(kwargs))
        for name in ("apply_chat_template", "chat_template"):
            kwargs.pop(name, None)
        return [
            *requests,
            *(
                Instance(
                    request_type="loglikelihood",
                    doc=doc,
                    arguments=(doc["domain"], request.args[1]),
                    idx=len(requests) + number,
                    **kwargs,
                )
                for number, request in enumerate(requests)
            ),
        ]
