# SPDX-License-Identifier: Apache-2.0
"""Package map: two source roots, ``kdengine`` here and ``kdengine_kernels`` under ``kernels/``."""

from setuptools import find_namespace_packages, find_packages, setup

# the namespace finder takes folders of data (recipes, model configs) along
setup(
    packages=find_namespace_packages(include=["kdengine", "kdengine.*"]) + find_packages("kernels"),
    package_dir={"kdengine_kernels": "kernels/kdengine_kernels"},
    package_data={"": ["*.toml", "*.json", "*.css", "*.html", "py.typed"]},
)
