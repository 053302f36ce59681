"""The pictures of a card: R² over L0 of a repository's autoencoders, drawn as in a reproduction's report."""

from collections.abc import Iterable, Sequence

from shared.saes import ARCHITECTURES
from train.hub.rows import SAERow
from train.reproduce.curves import ArmMeasurement
from train.reproduce.figure import frontier_svg


def frontier_pictures(rows: Iterable[SAERow]) -> dict[str, bytes]:
    """Returns one SVG for each hookpoint with a measured autoencoder, by its path in the repository."""
    hooks: dict[str, list[SAERow]] = {}
    for row in rows:
        if row.l0 and row.r2 is not None:
            hooks.setdefault(row.own.rpartition("/")[0], []).append(row)
    return {f"{folder}/frontier.svg": picture(some) for folder, some in hooks.items()}


def picture(rows: Sequence[SAERow]) -> bytes:
    """Returns the SVG, a line per architecture and width."""
    arms: dict[str, list[ArmMeasurement]] = {}
    for row in rows:
        label = ARCHITECTURES[row.arch].label if row.arch in ARCHITECTURES else row.arch
        arm = f"{label} {row.d_sae}"
        point = ArmMeasurement(
            arm=arm,
            seed=0,
            name=row.name,
            d_sae=row.d_sae,
            setting=row.setting or 0.0,
            l0=row.l0,
            r2=row.r2,
            dead=row.dead,
        )
        arms.setdefault(arm, []).append(point)
    where = rows[0].hook_name or "a hookpoint that is not known"
    return frontier_svg(f"R² against L0 on held-out tokens, {where}", arms).encode()
