"""Write what the pages show of the code: tables of docs/losses.md, the plot of docs/unified-view.md.

    python scripts/make_docs.py            write the pages and the plot
    python scripts/make_docs.py --check    exit with 1 if a page is out of date

This script writes the text between `<!-- generated: NAME -->` and `<!-- end -->`. The rest is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl import PolicyLoss
from fastrl.losses import catalogue
from fastrl.losses.gradient_coefficients import gradient_coefficients
from fastrl.losses.policy.presets import PRESETS, TRAINER_KL, TRAINERS
from fastrl.losses.preference import presets as preference_presets
from fastrl.losses.preset import Fields, Preset, shown

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = (DOCS / "losses.md",)
PLOT = DOCS / "gradient-coefficients.png"

# --- tables -----------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table with the bars inside cells escaped."""
    lines = [header, ["---"] * len(header), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """Return text in code quotes, or nothing for nothing."""
    return f"`{text}`" if text else ""


def presets_of(presets: Mapping[str, Preset], fields_of: Callable[[Fields], str] = shown) -> str:
    """Return name, formula, source and fields of every preset, without the bounds that are None."""
    rows = []
    for name, preset in presets.items():
        fields = {key: value for key, value in preset.fields.items() if value is not None}
        shorthand = "as in the formula" if fields else "the defaults"
        rows.append([code(name), code(preset.formula), preset.paper, code(fields_of(fields)) or shorthand])
    return table(["preset", "loss", "source", "fields"], rows)


def styles_of(presets: Mapping[str, Preset], fields_of: Callable[[Fields], str] = shown) -> str:
    """Return, per preset, the trainers that have it and the differences of each."""
    rows = []
    for name, preset in presets.items():
        same = [style for style, fields in preset.styles.items() if not fields and style not in preset.notes]
        if same:
            rows.append([code(name), ", ".join(same), "the same"])
        for style, fields in preset.styles.items():
            if style not in same:
                said = [part for part in (code(fields_of(fields)) or "the same", preset.notes.get(style)) if part]
                rows.append([code(name), style, "; ".join(said)])
    return table(["preset", "style", "fields that differ"], rows)


def presets_table() -> str:
    """Return the policy presets."""
    return presets_of(PRESETS)


def styles_table() -> str:
    """Return the styles of the policy presets."""
    return styles_of(PRESETS)


def preferences_table() -> str:
    """Return the preference presets."""
    return presets_of(preference_presets.PRESETS, preference_presets.shown_fields)


def preference_styles_table() -> str:
    """Return the styles of the preference presets."""
    return styles_of(preference_presets.PRESETS, preference_presets.shown_fields)


def entries_table(entries: Sequence[catalogue.Entry]) -> str:
    """Return call, formula, source and trainers of functions."""
    rows = [[code(entry.call()), code(entry.formula), entry.source, entry.trainers] for entry in entries]
    return table(["call", "formula", "source", "trainers"], rows)


def trainers_table() -> str:
    """Return the styles, the versions they were read from, and the form of the trainer's KL term."""
    rows = [
        [code(style), version, code(shown(TRAINER_KL[style])) if style in TRAINER_KL else "in the rewards"]
        for style, version in TRAINERS.items()
    ]
    return table(["style", "read from", "`TRAINER_KL`"], rows)


GENERATED: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    "styles": styles_table,
    "trainers": trainers_table,
    "preferences": preferences_table,
    "preference_styles": preference_styles_table,
    "kl": lambda: entries_table(catalogue.KL),
    "advantages": lambda: entries_table(catalogue.ADVANTAGES),
    "others": lambda: entries_table(catalogue.OTHERS),
}


def page(text: str) -> str:
    """Return a page with its generated parts written anew.

    Raises:
        ValueError: an unknown mark, or a missing one.
    """
    marks = re.findall(r"<!-- generated: (\w+) -->", text)
    if sorted(marks) != sorted(GENERATED):
        raise ValueError(f"the page must mark each of {', '.join(GENERATED)} once, got {', '.join(marks) or 'none'}")
    for name, make in GENERATED.items():
        block = f"<!-- generated: {name} -->\n{make()}\n<!-- end -->"
        text = re.sub(rf"<!-- generated: {name} -->\n.*?<!-- end -->", lambda _, new=block: new, text, flags=re.DOTALL)
    return text


# --- plot -------------------------------------------------------------------------------------------------------------

OLD_PROBABILITY = 0.25
CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "reinforce": ("reinforce", {}),
    "clip 0.2 (ppo, grpo)": ("ppo", {}),
    "dual clip 3": ("ppo", {"dual_clip": 3.0}),
    "cispo, weight in [0.8, 1.2]": ("cispo", {"weight_low": 0.8, "weight_high": 1.2}),
    "sapo": ("sapo", {}),
    "topr": ("topr", {}),
    "dppo_tv 0.2, old p = 0.25": ("dppo_tv", {}),
    "opmd, tau = 0.5": ("opmd", {"kl_coef": 0.5}),
}
STYLES = ("-", "-", "--", "-.", "-", ":", "--", "-.")


def curve(preset: str, fields: dict[str, Any], ratios: Tensor, advantage: float) -> Tensor:
    """Return -dL/dlogp at each ratio, every ratio a sequence of one token with weight 1."""
    loss = PolicyLoss.preset(preset, aggregate="token_sum", **fields)
    old = torch.full_like(ratios, OLD_PROBABILITY).log().unsqueeze(1)
    inputs = {"advantages": torch.full_like(ratios, advantage), "mask": torch.ones_like(old, dtype=torch.bool)}
    return -gradient_coefficients(loss, old + ratios.log().unsqueeze(1), old_logprobs=old, **inputs).g.squeeze(1)


def plot(path: Path) -> None:
    """Draw the coefficient against the ratio for A = +1 and A = -1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ratios = torch.linspace(0.02, 3.9, 1553, dtype=torch.float64)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), constrained_layout=True)
    for panel, advantage in zip(panels, (1.0, -1.0), strict=True):
        for (label, (preset, fields)), line in zip(CURVES.items(), STYLES, strict=True):
            width = 2.8 if line == ":" else 1.6
            panel.plot(ratios, curve(preset, fields, ratios, advantage), line, label=label, linewidth=width)
        panel.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
        panel.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        panel.set(xlabel="ratio r = p / p_old", title=f"A = {advantage:+.0f}", xlim=(0.0, 3.9))
        panel.set_ylim(*((-0.2, 2.2) if advantage > 0 else (-4.1, 0.35)))
    panels[0].set_ylabel("weight on dlogp in the ascent direction, -g")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    """Write the pages, or compare them with the code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args().check
    outdated = 0
    for path in PAGES:
        before = path.read_text()
        after = page(before)
        if check and after != before:
            print(f"{path.relative_to(DOCS.parent)} is out of date: run python scripts/make_docs.py", file=sys.stderr)
            outdated = 1
        elif not check:
            path.write_text(after)
    if not check:
        plot(PLOT)
    return outdated


if __name__ == "__main__":
    sys.exit(main())
