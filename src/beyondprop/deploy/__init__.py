"""Networks as other tools and chips take them."""

from __future__ import annotations

from beyondprop.deploy.nir import NIRExport, export_nir, load_nir

__all__ = ["NIRExport", "export_nir", "load_nir"]
