"""A pretrained vision transformer made cheaper on a folder of pictures: without labels, and mostly without training.

``compress`` in ``engine.py`` does it all; its command line is ``commands/compress.py``. Nothing is imported here, so
that ``python -m dge_recipes.compress`` hands over before PyTorch is there.
"""
