"""Readers of one format each: from bytes to documents or rows, in bounded memory."""
