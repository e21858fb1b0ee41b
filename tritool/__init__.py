# SPDX-License-Identifier: Apache-2.0
"""Geometry kernels for PyTorch: from several calibrated cameras to 3D joints, with gradients to the pixels."""
