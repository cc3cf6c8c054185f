"""How a run becomes one page: facts from run.json, charts as inline SVG, HTML and text."""
