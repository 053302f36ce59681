"""The picture of a card: R² over L0 of a repository's autoencoders, drawn as in a reproduction's report."""

from collections.abc import Iterable

from shared.saes import ARCHITECTURES
from train.hub.rows import SAERow
from train.reproduce.curves import ArmMeasurement
from train.reproduce.figure import frontier_svg


def frontier_picture(rows: Iterable[SAERow]) -> bytes | None:
    """Returns the SVG, a line per architecture, width and hookpoint; None when nothing was measured."""
    known = [row for row in rows if row.l0 and row.r2 is not None]
    if not known:
        return None
    hooks = {row.hook_name for row in known}
    arms: dict[str, list[ArmMeasurement]] = {}
    for row in known:
        label = ARCHITECTURES[row.arch].label if row.arch in ARCHITECTURES else row.arch
        arm = f"{label} {row.d_sae}" + (f" {row.hook_name}" if len(hooks) > 1 else "")
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
    where = ", ".join(sorted(hook for hook in hooks if hook)) if len(hooks) == 1 else f"{len(hooks)} hookpoints"
    return frontier_svg(f"R² against L0 on held-out tokens, {where}", arms).encode()
