"""`qmedtune items RUN`: one local page to look at what a run's scores are made of, item by item.

It may hold the text of questions, which the report never does. Deliberately absent: scoring, any request to anywhere.
"""
