"""On-device training with filtered gradients (CVPR 2023): `gradfilter.convert(model, last_n=4, radius=4)`."""

from typing import TYPE_CHECKING

from visionkernels.package import is_command

if TYPE_CHECKING or not is_command(__name__):
    from gradfilter.conv import CompactConv2d, FilteredConv2d
    from gradfilter.conversion import ConversionReport, convert, restore
    from gradfilter.delta import apply_delta, trainable_delta
    from gradfilter.diagnosis import diagnose
    from gradfilter.profiles import Plan, Profile, profile
    from visionkernels.ops.filtered_conv import filtered_conv2d, kernel_sum, patch_mean, saved_input

__all__ = [
    "CompactConv2d",
    "ConversionReport",
    "FilteredConv2d",
    "Plan",
    "Profile",
    "apply_delta",
    "convert",
    "diagnose",
    "filtered_conv2d",
    "kernel_sum",
    "patch_mean",
    "profile",
    "restore",
    "saved_input",
    "trainable_delta",
]
