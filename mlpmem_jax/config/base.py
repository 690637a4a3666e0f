"""The base class of sections, and the declaration of keys."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

RUNTIME = "runtime"


class Section(BaseModel):
    """A frozen group of keys; unknown keys are errors."""

    # Strict: `"3"` and `true` are not numbers. `types.py` relaxes this for lists and 2e3.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )

    def recipe(self) -> dict[str, Any]:
        """Returns the keys that decide what is computed, as JSON-ready values.

        Keys marked :func:`runtime` (logging intervals, buffer sizes) change how a stage runs
        and have no effect on its result, so they do not enter fingerprints.
        """
        values = self.model_dump(mode="json")
        recipe = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get(RUNTIME):
                continue
            value = getattr(self, name)
            recipe[name] = value.recipe() if isinstance(value, Section) else values[name]
        return recipe


def setting(default: Any, description: str, **constraints: Any) -> Any:
    """Declares a key whose value decides what is computed."""
    return Field(default, description=description, **constraints)


def runtime(default: Any, description: str, hint: str | None = None, **constraints: Any) -> Any:
    """Declares a key that changes how a stage runs, never its result; a hint follows errors."""
    extra: dict[str, Any] = {RUNTIME: True} | ({"hint": hint} if hint else {})
    return Field(default, description=description, json_schema_extra=extra, **constraints)
