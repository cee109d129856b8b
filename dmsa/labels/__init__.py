"""From pixels to the pseudo label: feature bank, clustering, CAM, fusion."""
