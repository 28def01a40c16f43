"""Measuring what came out: Dice and distances, harmonization quality, site report, audits of privacy, pages to watch a run."""
