"""The measured swap: record what a model asks for, race the backends on it, remember the answers.

Imported by ``dlkern.dispatch`` for ``answers`` alone; the rest loads when something is measured.
"""
