"""What artifact.json holds, and the check of it: every field, its type, and what belongs together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pydantic

from ..engines.protocol import MODEL_PREFIX
from ..errors import ArtifactError

SCHEMA = 1
"""Version of artifact.json; a newer one is refused."""


class _Entry(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class FieldEntry(_Entry):
    """A field of a signature."""

    name: str
    kind: Literal["input", "output"]
    type: str
    constraints: str | None


class _FieldText(_Entry):
    prefix: str | None
    description: str | None


class _Signature(_Entry):
    instructions: str
    fields: list[_FieldText]


class _PredictState(_Entry):
    signature: _Signature
    demos: list[dict[str, Any]]
    fields: dict[str, dict[str, Any]] = {}
    """DSPy's own criteria of a decision, by output field."""


class PredictorEntry(_Entry):
    """A predictor; or another DSPy parameter, which has only a state."""

    state: dict[str, Any]
    fields: list[FieldEntry] | None = None
    config: dict[str, Any] | None = None
    signature_name: str | None = None
    lm: str | None = None

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> Self:
        missing = [n for n in ("fields", "config", "signature_name") if getattr(self, n) is None]
        if len(missing) == 3 and "signature" not in self.state and self.lm is None:
            return self
        if missing or self.fields is None:
            raise ValueError(f"{', '.join(missing)} missing")
        state = _PredictState.model_validate(self.state)
        if len(state.signature.fields) != len(self.fields):
            raise ValueError(f"{len(self.fields)} fields, but texts for {len(state.signature.fields)}")
        return self


class LocalLMEntry(_Entry):
    """A base model by place and name, and the adapter it answers with."""

    kind: Literal["local"]
    base_name: str
    base_hash: str | None = None
    base: str
    model: str
    options: dict[str, Any]
    engine_options: dict[str, Any]
    adapter: str | None

    @pydantic.model_validator(mode="after")
    def _has_its_adapter(self) -> Self:
        if (self.model == MODEL_PREFIX + self.base_name) != (self.adapter is None):
            raise ValueError(f"model is {self.model!r}, adapter is {self.adapter!r}")
        return self


class DspyLMEntry(_Entry):
    """Any other LM, as DSPy saves it."""

    kind: Literal["dspy"]
    state: dict[str, Any]
    adapter: None = None


class Manifest(_Entry):
    """artifact.json."""

    schema_: int = pydantic.Field(alias="schema", ge=1)
    created: str
    program: str
    adapter: str
    predictors: dict[str, PredictorEntry]
    lms: dict[str, Annotated[LocalLMEntry | DspyLMEntry, pydantic.Field(discriminator="kind")]]
    versions: dict[str, str]
    files: dict[str, str] | None = None
    """Path to SHA-256 (hex) of every other file. None in what was saved before these were recorded."""

    @pydantic.model_validator(mode="after")
    def _has_its_lms(self) -> Self:
        for name, predictor in self.predictors.items():
            if predictor.lm is not None and predictor.lm not in self.lms:
                raise ValueError(f"LM {predictor.lm!r} of {name!r} missing")
        return self


def checked_manifest(data: Any) -> dict[str, Any]:
    """The content of artifact.json, checked. Raises ArtifactError that says which field is wrong."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(
            f"The artifact has schema {schema!r}, this version reads up to {SCHEMA}: pip install -U bettertogether."
        )
    try:
        return Manifest.model_validate(data).model_dump(by_alias=True)
    except pydantic.ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}" for e in error.errors(include_input=False)[:3]
        )
        raise ArtifactError(f"the file is damaged ({wrong:.500}): save the program again.") from error
