"""Figures of results and ledgers: `accessors` is what users call, the other files draw, one kind of figure each.

Only `accessors` may be imported where matplotlib is not installed. Nothing here uses pyplot, changes rcParams or chooses a
backend: figures belong to whoever has them, and a user's axes are drawn into as they are.

Bars and points are the numbers of the result; whiskers are its 95 % intervals. What is not known is not drawn.
"""
