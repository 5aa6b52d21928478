"""Pictures for training, evaluation and inference: with a class each, a class a pixel, or objects.

Needs `visionkernels[pictures]`: timm, torchvision and Pillow.
"""
