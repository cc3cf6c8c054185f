"""Parts of `qmedtune ablate`: the arms, their uncertainty, the table, the figure and the page."""
