"""What every section of the configuration has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

#: Patterns that text has to match.
NAME, REGISTERED, URI = r"^\w[\w.-]*$", r"^[^/:@]+$", r"^[a-z][a-z0-9+.-]*://.+"
#: What they mean, in words.
IN_WORDS = {
    NAME: "a name of letters, digits, _, . and -, which begins with neither . nor -",
    REGISTERED: "a name without /, : and @",
    URI: "a URI such as s3://bucket/folder (for a local folder set output)",
}


class Section(BaseModel):
    """Settings that cannot be changed, misspelt or converted from another type."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )
