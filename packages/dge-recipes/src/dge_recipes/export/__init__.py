"""A model as an artefact that other runtimes run, checked, timed, and with a loader that needs none of this project.

``export`` in ``engine.py`` does it; its command line is ``commands/export.py``. Nothing is imported here, so that
``python -m dge_recipes.export`` hands over before PyTorch is there.
"""
