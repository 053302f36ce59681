"""The settings of the commands that exchange autoencoders with other tools, as shared/config.py has those of the
stages."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shared.config import Folder
from shared.schema import Frozen, Shown


class ImportConfig(Frozen):
    """One autoencoder of another tool, brought into a folder that this program reads."""

    groups: ClassVar[Mapping[str, str]] = {
        "Autoencoder": "source format norm_factor",
        "Folder": "out model hook overwrite",
    }

    source: Annotated[Folder, Shown(option="SOURCE")]
    """The folder or file of the other tool's autoencoder."""
    out: Folder
    """The folder to write."""
    format: Literal["auto", "saelens", "sparsify", "dictionary-learning", "llamascopium", "gemma-scope", "openai"] = (
        "auto"
    )
    """The tool that wrote it. auto: told by the files."""
    norm_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """SAELens' norm_scaling_factor, which its folder does not say. Default: none is needed.

    Only for a SAELens autoencoder with normalize_activations = expected_average_only_in: its weights are for
    activations times this number. SAELens' list of releases has it."""
    model: str | None = None
    """The language model that the activations are of. Default: what the source says."""
    hook: str | None = None
    """The hookpoint, such as blocks.8.hook_resid_post. Default: what the source says."""
    overwrite: bool = False
    """Replace an imported autoencoder in the folder."""
