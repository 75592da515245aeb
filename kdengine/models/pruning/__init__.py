# SPDX-License-Identifier: Apache-2.0
"""Models cut smaller, as TinyCLIP does it.

``axes`` tells what each axis of a tensor counts. By hand, ``inherit`` slices a student out of its
teacher. By masks, ``masks`` learns which units may go, ``ragged`` is the tower that carries their
factors and whose layers may differ, and ``cut`` leaves out what they switch off. ``released`` reads
the published checkpoints.
"""
