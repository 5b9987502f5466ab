"""The report room: turns a run folder into one self-contained HTML page.

It imports neither torch nor the rooms that train, so that a report can be written anywhere, also of a run that is
still going, was killed, or came from another machine. What is missing or damaged is said on the page, not raised.
"""
