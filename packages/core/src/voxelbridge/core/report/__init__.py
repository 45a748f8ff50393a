"""Self-contained HTML pages about runs: frame and style, tables, charts as SVG, loss curves."""
