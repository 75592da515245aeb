# SPDX-License-Identifier: Apache-2.0
"""Package map: two source roots, ``kdengine`` here and ``kdengine_kernels`` under ``kernels/``."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["kdengine", "kdengine.*"]) + find_packages("kernels"),
    package_dir={"kdengine_kernels": "kernels/kdengine_kernels"},
    package_data={
        "kdengine": ["recipes/*.toml", "models/configs/*.json", "report/*", "py.typed"],
    },
)
