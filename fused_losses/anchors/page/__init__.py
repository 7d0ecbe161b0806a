"""What `fused-losses annotate` shows: answers to prompts, corrected token by token, in a browser or a terminal.

`tasks` has the prompts, `desk` the one answer that is corrected and what may be done with it, `server` and `static/`
the page over it, `terminal` the same with plain input.
"""
