"""What a request may ask for, and the errors that answer it otherwise."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlpmem_jax.config.serve import ServeConfig
from mlpmem_jax.config.types import AnyText, Seed
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.generation.sampling import Sampling

_MOST_SAMPLES = 128
_MOST_STOPS = 16
# Of the last numbers of OpenAI's protocol: what has no effect may be written, nothing else.
_NO_EFFECT: Any = Field(0.0, ge=0, le=0)
Ids = list[Annotated[int, Field(ge=0)]]
Body = TypeVar("Body", bound=BaseModel)


@dataclasses.dataclass
class RequestError(Exception):
    """Why a request is not answered.

    Attributes:
        status: Of HTTP.
        message: One sentence.
        field: Which of its fields, if it is one.
    """

    status: int
    message: str
    field: str | None = None

    def content(self) -> dict[str, Any]:
        """Returns the body of the answer, in the form of OpenAI's."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        about = {"message": self.message, "type": kind, "param": self.field, "code": self.status}
        return {"error": about}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StreamOptions(_Fields):
    """What a stream holds beside the text."""

    include_usage: bool = False


class CompletionBody(_Fields):
    """The body of `/v1/completions`."""

    prompt: AnyText | list[AnyText] | Ids | list[Ids]
    model: str | None = None
    max_tokens: int = Field(16, ge=0)
    temperature: float = Field(1.0, ge=0, le=1e6)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    interpolation: float | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    n: int = Field(1, ge=1, le=_MOST_SAMPLES)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: AnyText | list[AnyText] | None = None
    stop_token_ids: Ids = Field([], max_length=256)
    ignore_eos: bool = False
    user: str | None = None
    suffix: None = None
    logit_bias: None = None
    best_of: int | None = None
    presence_penalty: float = _NO_EFFECT
    frequency_penalty: float = _NO_EFFECT

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; temperature 0 takes the most probable one."""
        if self.temperature == 0:
            return Sampling("greedy")
        top_k = self.top_k if self.top_k > 0 else None
        return Sampling("random", self.temperature, top_k, self.top_p, self.min_p)

    @property
    def stops(self) -> list[str]:
        """Texts that end a completion."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def seed_or_random(self) -> int:
        """The seed; without one each request has another."""
        return secrets.randbits(32) if self.seed is None else self.seed


class TokenizeBody(_Fields):
    """The body of `/tokenize`. A separator is never added here."""

    prompt: AnyText
    add_special_tokens: bool = False
    model: str | None = None


class DetokenizeBody(_Fields):
    """The body of `/detokenize`."""

    tokens: Ids
    model: str | None = None


class NextBody(_Fields):
    """The body of `/next`."""

    prompt: AnyText | Ids


_PROMPTS = "must be text, a list of texts, a list of token ids, or a list of such lists"
_WORDS = {
    "prompt": _PROMPTS,
    "stop": "must be text or a list of texts",
    "tokens": "must be a list of token ids",
}


def parsed(kind: type[Body], content: Any) -> Body:
    """Reads the body of a request.

    Raises:
        RequestError: Names the first field that is wrong.
    """
    if not isinstance(content, dict):
        raise RequestError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = str(first["loc"][0])[:100]
    if first["type"] == "extra_forbidden":
        raise RequestError(400, f"{field}: unknown field", field)
    if first["type"] == "missing":
        raise RequestError(400, f"{field}: is missing", field)
    raise RequestError(400, f"{field}: {_WORDS.get(field) or _lower(first['msg'])}", field)


def check_completion(body: CompletionBody, config: ServeConfig, with_memory: bool) -> None:
    """Refuses what this server does not allow.

    Raises:
        RequestError: Names the field and the limit.
    """
    limits = {"max_tokens": config.max_tokens, "logprobs": config.max_logprobs}
    for field, limit in limits.items():
        value = getattr(body, field)
        if value is not None and value > limit:
            raise RequestError(400, f"{field}: {value} is more than {limit}", field)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(400, "max_tokens: 0 is allowed only with echo", "max_tokens")
    if body.best_of is not None and body.best_of != body.n:
        raise RequestError(400, "best_of: must equal n, if it is given", "best_of")
    if len(body.stops) > _MOST_STOPS:
        raise RequestError(400, f"stop: at most {_MOST_STOPS} texts", "stop")
    if not all(body.stops):
        raise RequestError(400, "stop: texts must not be empty", "stop")
    if body.interpolation is not None and not with_memory:
        raise RequestError(400, "interpolation: this server has no memory", "interpolation")


class Prompt(NamedTuple):
    """A prompt in tokens.

    Attributes:
        ids: The separator that begins a document, and the prompt.
        added: Whether the separator was added, rather than sent.
    """

    ids: list[int]
    added: bool


def read_prompts(
    prompt: str | Sequence[Any], tokenizer: TextTokenizer, context: int | None
) -> list[Prompt]:
    """Returns the tokens of each prompt.

    Args:
        prompt: As in the body.
        tokenizer: Of the model.
        context: Tokens that the model reads at once; None: prompts may be longer.

    Raises:
        RequestError: There is none, one is too long, or one holds an unknown id.
    """
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not prompt:
        raise RequestError(400, "prompt: is an empty list", "prompt")
    found = []
    for one in prompt:
        ids = tokenizer.encode([one])[0].tolist() if isinstance(one, str) else list(one)
        check_ids(ids, tokenizer, "prompt")
        added = ids[:1] != [tokenizer.separator_id]
        if added:
            ids.insert(0, tokenizer.separator_id)
        if context is not None and len(ids) > context:
            raise RequestError(
                400,
                f"prompt: has {len(ids) - 1} tokens; this model reads at most {context - 1} and "
                "the separator before them",
                "prompt",
            )
        found.append(Prompt(ids, added))
    return found


def check_ids(ids: Sequence[int], tokenizer: TextTokenizer, field: str) -> None:
    """Refuses ids that are not in the vocabulary.

    Raises:
        RequestError: Names the first.
    """
    for token in ids:
        if token >= tokenizer.vocab_size:
            raise RequestError(
                400, f"{field}: token {token} is not below {tokenizer.vocab_size}", field
            )


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
