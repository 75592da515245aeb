# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of kdengine; imports torch and triton only, never kdengine."""
