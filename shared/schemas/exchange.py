"""The frozen configurations of the commands that carry autoencoders to other tools and back."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shared.config import Folder, Location
from shared.schema import Frozen, Shown

Tool = Literal["saelens", "dictionary-learning", "sparsify", "gemma-scope"]
FormName = Literal["auto", "gated", "standard", "jumprelu", "batch-topk", "topk", "abstopk", "bijumprelu"]


class ExportConfig(Frozen):
    """One export of trained autoencoders to the files of another tool."""

    groups: ClassVar[Mapping[str, str]] = {
        "Export": "source to out overwrite",
        "Form": "form fold_b_dec approximate_topk force",
    }

    source: Annotated[Folder, Shown(option="RUN")]
    """A training run, RUN/NAME of one autoencoder, or an autoencoder's folder."""
    to: Tool
    """The tool that shall read the files.

    gemma-scope writes params.npz as Gemma Scope's repositories hold it."""
    out: Folder
    """The folder to write. Several autoencoders of a run get OUT/HOOKPOINT/NAME each."""
    overwrite: bool = False
    """Replace files of an earlier export. Other files are never replaced."""
    form: FormName = "auto"
    """The architecture to write the autoencoder as. Default: the nearest one of the tool.

    Which ones there are depends on the tool and the autoencoder. All of them compute the same function. saelens:
    gated for sa-gsae and gated, standard for relu, topk or abstopk for those that choose per token, jumprelu for all
    others and for all that have thresholds; bijumprelu keeps signed latents, and needs the file
    sagsae_bijumprelu.py, which is written beside it."""
    fold_b_dec: bool = False
    """Fold b_dec into the encoder's biases, for a reader that does not subtract it from the input. SAELens only."""
    approximate_topk: Annotated[int, Field(ge=1)] | None = None
    """Latents per token, where sparsify's TopK has to stand for thresholds. Default: refuse.

    sparsify has no thresholds: only relu and topk autoencoders are exact there. The R² that is lost is measured."""
    force: bool = False
    """Write a hookpoint that the tool's files cannot name, under a name that is not its own."""

    @model_validator(mode="after")
    def check(self) -> "ExportConfig":
        if self.fold_b_dec and self.to != "saelens":
            raise ValueError(f"fold_b_dec: is for --to saelens; {self.to} says by itself what is folded")
        if self.approximate_topk is not None and self.to != "sparsify":
            raise ValueError(f"approximate_topk: is for --to sparsify; {self.to} has thresholds")
        return self


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
    """The tool that wrote it. auto: by the files that are there."""
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


class PushConfig(Frozen):
    """One push of autoencoders, or of a store, to the Hugging Face hub."""

    groups: ClassVar[Mapping[str, str]] = {
        "Repository": "source repo private license yes",
        "Form": "to form fold_b_dec approximate_topk force",
    }

    source: Annotated[Location, Shown(option="SOURCE")]
    """A training run, one autoencoder of it (RUN/SAE), an autoencoder's folder, or a finished store."""
    repo: Annotated[str, Shown("OWNER/NAME")]
    """The repository, which is made where there is none: a model for autoencoders, a dataset for a store."""
    private: bool = False
    """Make the repository private. A public one stays public, and is refused."""
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")] | None = None
    """The license that the card names, such as mit or cc-by-4.0. Default: the card names none.

    Once a card is there, change it on the hub."""
    yes: bool = False
    """Do not ask before something becomes public."""
    to: Tool = "saelens"
    """The tool whose files are pushed beside sagsae's own."""
    form: FormName = "auto"
    """The architecture to write autoencoders as. Default: the nearest one of the tool."""
    fold_b_dec: bool = False
    """Fold b_dec into the encoder's biases, for a reader that does not subtract it from the input. SAELens only."""
    approximate_topk: Annotated[int, Field(ge=1)] | None = None
    """Latents per token, where sparsify's TopK has to stand for thresholds. Default: refuse."""
    force: bool = False
    """Write a hookpoint that the tool's files cannot name, under a name that is not its own."""


class PullConfig(Frozen):
    """One download of autoencoders from the Hugging Face hub."""

    groups: ClassVar[Mapping[str, str]] = {"Repository": "source revision out"}

    source: Annotated[str, Shown(option="OWNER/NAME[/SAE]")]
    """The repository, or one autoencoder in it. Default: all that sagsae has pushed there."""
    revision: str | None = None
    """A branch, a tag or a commit. Default: the newest state of main."""
    out: Folder
    """The folder to write: one autoencoder, or a folder for each of several."""
