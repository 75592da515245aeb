# SPDX-License-Identifier: Apache-2.0
"""open_clip's class names and prompt templates for ImageNet, as plain strings."""

import open_clip


def imagenet_classnames() -> list[str]:
    """The 1000 class names that OpenAI's zero-shot numbers use, in WordNet-id order."""
    return list(open_clip.IMAGENET_CLASSNAMES)


def imagenet_templates() -> list[str]:
    """The 80 templates of OpenAI's zero-shot numbers, ``{}`` standing for the class name."""
    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
