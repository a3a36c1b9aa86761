"""Human study: blind pairs of clips, a page for raters, win, tie and loss with intervals; `python -m eval.human --help`."""
