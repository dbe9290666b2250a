"""What reports and comparisons are written with: figures, JSON, SVG, the page's style."""
