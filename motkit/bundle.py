"""Recipes and merge configs that travel with the package: found by bare name, in a wheel as in a checkout."""

from pathlib import Path


def bundled_folder(kind: str) -> Path:
    """Folder of the bundled files.

    Args:
        kind: ``"recipes"`` or ``"merge_configs"``.

    Returns:
        ``motkit/<kind>`` where the wheel put it, else ``<kind>`` beside the package in a checkout.
    """
    package = Path(__file__).resolve().parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def bundled_files(kind: str) -> dict[str, Path]:
    """Bare name → YAML file: ``name.yaml`` is ``name``, and so is ``name/recipe.yaml``."""
    folder = bundled_folder(kind)
    found = {path.stem: path for path in folder.glob("*.yaml")}
    found.update({path.parent.name: path for path in folder.glob("*/recipe.yaml")})
    return dict(sorted(found.items()))
